"Workers share out the GPUs of a machine. The GPUs are simulated; what is computed is computed on a CPU."

import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest

from dsbs.records import find_folders, usable_cpus
from dsbs.runs import experiments
from dsbs.runs.specs import RunSpec, make_spec, run_key

TINY = RunSpec(
    student='scratch-32x1', dropout=0.0, n_train=16, max_steps=2, eval_every=2, batch_size=8, learning_rate=1e-3
)
EIGHT = [replace(TINY, seed=seed, subset_seed=seed) for seed in range(8)]


@pytest.fixture
def driver(tmp_path, monkeypatch):
    "Puts an nvidia-smi on the path that lists so many GPUs."

    def put(n):
        program = tmp_path / 'bin' / 'nvidia-smi'
        program.parent.mkdir(exist_ok=True)
        program.write_text('#!/bin/sh\n' + 'echo 81559\n' * n + f'exit {0 if n else 6}\n')
        program.chmod(0o755)
        monkeypatch.setenv('PATH', f'{program.parent}:{os.environ["PATH"]}')

    monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
    return put


def seen(records):  # visible GPUs -> runs
    return Counter(r['provenance']['visible_gpus'] for r in records)


def test_eight_runs_on_four_gpus(driver, tmp_path):
    "A worker for each GPU, which sees no other; all runs are made."
    driver(4)
    assert experiments.default_workers() == 4
    records = experiments.run_all(EIGHT, find_folders(runs=tmp_path / 'runs'))
    assert [r['spec']['seed'] for r in records] == list(range(8)) and all(r['metrics'] for r in records)
    assert seen(records) == {'0': 2, '1': 2, '2': 2, '3': 2}


def test_the_gpus_that_are_named_are_shared_out_by_the_command(driver, tmp_path, monkeypatch, dsbs):
    driver(4)
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '2,3')
    status, _, err = dsbs('reproduce', 'fig6', '--preset', 'smoke', '--reports', tmp_path / 'reports')
    assert status == 0, err
    from dsbs.evidence.plan import records_here

    found = seen(records_here(tmp_path / 'runs').values())
    assert set(found) == {'2', '3'} and min(found.values()) > 0


UNLIKE = {str(i): replace(TINY, max_steps=2 + i) for i in range(max(16, usable_cpus()))}  # key -> spec


class Started:
    "A worker that was started, and does nothing."

    def __init__(self, folders, card, threads):
        self.card, self.threads, self.bundle = card, threads, {}

    def give(self, bundle):
        self.bundle = bundle


@pytest.mark.parametrize(
    'given, workers, cards',
    [
        ('', None, [None] * usable_cpus()),  # no GPU: as on a machine without
        (None, 2, ['0', '1']),
        (None, 8, ['0', '1', '2', '3'] * 2),
        ('2,3', None, ['2', '3']),
        ('2,3', 3, ['2', '3', '2']),
        ('GPU-8f6a,GPU-11c2', None, ['GPU-8f6a', 'GPU-11c2']),
        ('MIG-77ab', None, ['MIG-77ab']),
    ],
)
def test_which_worker_sees_which_gpu(driver, tmp_path, monkeypatch, given, workers, cards):
    driver(4)
    if given is not None:
        monkeypatch.setenv('CUDA_VISIBLE_DEVICES', given)
    monkeypatch.setattr(experiments, '_Worker', Started)
    size = workers or experiments.default_workers()
    team = experiments._Team(experiments._Runs(UNLIKE, find_folders(runs=tmp_path)), size)
    team.hand_out()
    assert [w.card for w in team.workers] == cards and all(len(w.bundle) == 1 for w in team.workers)
    assert {w.threads for w in team.workers} == {max(1, usable_cpus() // size)}


def test_without_a_driver_there_is_a_worker_for_each_cpu(driver, monkeypatch):
    driver(0)
    assert experiments.visible_cards() == [] and experiments.default_workers() == usable_cpus()


def test_the_server_that_forks_workers_wakes_no_gpu():
    "A driver that is awake before a fork is of no use behind it, and has read CUDA_VISIBLE_DEVICES already."
    watched = """
import torch
def awake(*_): raise SystemExit('CUDA was asked for')
torch.cuda.init = torch.cuda._lazy_init = torch.cuda.is_available = torch.cuda.device_count = awake
import dsbs.runs.run
assert not torch.cuda._initialized
"""
    subprocess.run([sys.executable, '-c', watched], check=True, timeout=600)


def test_bfloat16_on_a_gpu_without_it_is_one_line(monkeypatch, main):
    "A T4 imitates it."
    import torch

    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda: 'Tesla T4')
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda including_emulation=True: including_emulation)
    status, out, err = main('run', 'dtype=bfloat16', 'student=scratch-32x1', 'n_train=8')
    assert (status, out) == (2, '') and err.count('\n') == 1
    assert 'dtype=bfloat16: Tesla T4 only imitates it: use dtype=float32' in err


def test_a_record_says_whether_float32_was_whole():
    from making import record_of

    assert record_of(TINY)['provenance']['tf32'] is False


# ---- students that one GPU does not hold

XXL = replace(TINY, student='t5-v1_1-xxl', dtype='bfloat16')


@pytest.fixture
def accelerate(tmp_path, monkeypatch):
    "Puts an accelerate on the path that writes its arguments, and then does something."

    def put(then='exit 3'):
        program = tmp_path / 'bin' / 'accelerate'
        program.parent.mkdir(exist_ok=True)
        program.write_text(f'#!/bin/sh\nfor word in "$@"; do echo "$word" >> {tmp_path}/said; done\n{then}\n')
        program.chmod(0o755)
        monkeypatch.setenv('PATH', f'{program.parent}:{os.environ["PATH"]}')
        return tmp_path / 'said'

    return put


def test_a_student_that_eight_gpus_hold_is_started_there(driver, fetched, accelerate, tmp_path, capfd):
    "After the others, which are made; what comes of it counts."
    driver(8)
    said, folders = accelerate(), find_folders(runs=tmp_path / 'runs')
    with pytest.raises(RuntimeError, match='1 of 2 runs failed.*accelerate launch ended with 3 and left no record'):
        experiments.run_all([XXL, TINY], folders, workers=1)
    words = said.read_text().splitlines()
    assert words[:2] == ['launch', '--config_file'] and words[2].endswith('configs/fsdp2.yaml')
    assert words[3:7] == ['--main_process_port', '0', '--num_processes', '8']
    assert words[7].endswith('dsbs') and words[8] == 'run' and words[-2:] == ['--data-dir', str(folders.data)]
    assert make_spec(dict(word.split('=', 1) for word in words[9:-2])) == XXL
    assert experiments.find_record(run_key(TINY, folders), folders)


def test_a_record_that_it_leaves_is_the_runs(driver, fetched, accelerate, tmp_path):
    driver(8)
    folders = find_folders(runs=tmp_path / 'runs')
    place = folders.runs / run_key(XXL, folders)
    said = accelerate(
        f"""mkdir -p {place} && echo '{{"key": "made by eight"}}' > "$DSBS_RUNS/{place.name}/record.json" """
    )
    assert experiments.run_all([XXL], folders) == [dict(key='made by eight')] and said.exists()


@pytest.mark.parametrize('n, words', [(1, '8 GPUs, and 1 can be seen'), (0, '8 GPUs, and 0 can be seen')])
def test_where_there_are_too_few_the_command_is_printed(driver, fetched, accelerate, tmp_path, capfd, n, words):
    driver(n)
    said, folders = accelerate(), find_folders(runs=tmp_path / 'runs')
    with pytest.raises(RuntimeError, match=f'1 of 2 runs failed; the others are kept.*{words}'):
        experiments.run_all([XXL, TINY], folders, workers=1)
    assert not said.exists() and experiments.find_record(run_key(TINY, folders), folders)
    (line,) = [line for line in capfd.readouterr().err.splitlines() if 'launch --config_file' in line]
    assert (
        line.startswith(f'DSBS_RUNS={folders.runs} ') and '--num_processes 8' in line and 'student=t5-v1_1-xxl' in line
    )


def test_gpus_that_are_too_small_in_any_number_are_not_tried(driver, fetched, accelerate, tmp_path, capfd):
    "Each process gathers the weights: 44 GB."
    driver(8)
    program = tmp_path / 'bin' / 'nvidia-smi'
    program.write_text(program.read_text().replace('81559', '24576'))
    said = accelerate()
    with pytest.raises(RuntimeError, match='needs 8 GPUs of 80 GB, and 8 can be seen here'):
        experiments.run_all([XXL], find_folders(runs=tmp_path / 'runs'))
    assert not said.exists() and '--num_processes 8' in capfd.readouterr().err


@pytest.mark.slow
def test_two_real_processes_make_a_run_of_a_grid(driver, tmp_path, monkeypatch):
    driver(2)
    monkeypatch.setattr(experiments, 'gpus_of', lambda student, gpu_gb: 2)
    monkeypatch.setenv('ACCELERATE_USE_CPU', 'true')
    (record,) = experiments.run_all([replace(TINY, engine='plain')], find_folders(runs=tmp_path / 'runs'))
    assert record['provenance']['processes'] == 2 and record['metrics']['steps'] == 2
