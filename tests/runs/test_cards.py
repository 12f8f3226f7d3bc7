"Workers share out the GPUs of a machine. The GPUs are simulated; what is computed is computed on a CPU."

import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest

from dsbs.records import find_folders, usable_cpus
from dsbs.runs import experiments
from dsbs.runs.specs import RunSpec

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
