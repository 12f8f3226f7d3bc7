"One training by several processes: it is that of one process."

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

ROOT, BIN = Path(__file__).resolve().parents[2], Path(sys.executable).parent
TINY = (
    'task=same_kind student=scratch-32x2 n_train=64 batch_size=16 accumulation=2 '
    'max_steps=12 eval_every=6 learning_rate=3e-3 dropout=0'
).split()


def start(tmp_path, way, *settings, runs='runs', first=''):
    launch = (
        [
            str(BIN / 'accelerate'),
            'launch',
            '--config_file',
            str(ROOT / 'configs' / f'{way}.yaml'),
            '--num_processes',
            '2',
            '--main_process_port',
            '0',
        ]
        if way != 'one'
        else [sys.executable]
    )
    changed = {t.split('=')[0] for t in settings}
    env = dict(
        os.environ, DSBS_RUNS=str(tmp_path / runs), ACCELERATE_USE_CPU='true', OMP_NUM_THREADS='1', PYTHONPATH=str(ROOT)
    )
    program = tmp_path / 'dsbs_command.py'
    program.write_text(f'import sys\n{first}\nfrom dsbs.tools.cli import main\nsys.exit(main())\n')
    return subprocess.Popen(
        [*launch, str(program), 'run', *(t for t in TINY if t.split('=')[0] not in changed), *settings, '--json'],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
        cwd=tmp_path,
    )


def record(process):
    out, err = process.communicate(timeout=1800)
    assert process.returncode == 0, err
    return json.loads(out), err


def same_training(one, two):
    for a, b in zip(one['history'], two['history'], strict=True):
        assert a.keys() == b.keys() and all(abs(a[name] - b[name]) <= 2e-5 * abs(a[name]) for name in a), (a, b)
    assert two['metrics'] == one['metrics'] and two['key'] == one['key'] and two['answers'] == one['answers']


@pytest.mark.slow
@pytest.mark.parametrize(
    'way, settings',
    [('ddp', []), ('fsdp2', []), ('ddp', ['method=standard']), ('fsdp2', ['task_prefix=decoder', 'schedule=constant'])],
    ids=lambda v: ' '.join(v) if isinstance(v, list) else v,
)
def test_two_processes_train_as_one(tmp_path, way, settings):
    "Of one engine: the stack, which one process would choose, has other last digits."
    settings = [*settings, 'engine=plain']
    one, _ = record(start(tmp_path, 'one', *settings, '--save', str(tmp_path / 'one'), runs='a'))
    two, said = record(start(tmp_path, way, *settings, '--save', str(tmp_path / 'two'), runs='b'))
    same_training(one, two)
    assert (one['provenance']['processes'], two['provenance']['processes']) == (1, 2)
    assert said.count('step 12 of 12 (100%)') == 1
    a, b = (load_file(tmp_path / name / 'model.safetensors') for name in ('one', 'two'))
    assert a.keys() == b.keys() and max((a[name] - b[name]).abs().max().item() for name in a) < 1e-4


@pytest.mark.slow
def test_two_processes_that_compute_blocks_twice_train_as_without(tmp_path):
    "To the bit, with the dropout that each process draws for itself."
    made = {
        on: record(
            start(
                tmp_path,
                'fsdp2',
                'dropout=.1',
                'dtype=bfloat16',
                'task_prefix=decoder',
                f'gradient_checkpointing={on}',
                '--save',
                str(tmp_path / on),
            )
        )[0]
        for on in ('false', 'true')
    }
    assert (
        made['false']['history'] == made['true']['history']
        and made['false']['metrics'] == made['true']['metrics']
        and made['false']['provenance']['processes'] == 2
    )
    a, b = (load_file(tmp_path / on / 'model.safetensors') for on in made)
    assert a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


@pytest.mark.slow
@pytest.mark.parametrize('way', ['ddp', 'fsdp2'])
def test_two_processes_sum_a_loss_in_pieces(tmp_path, way):
    few = 'from dsbs.method import multitask; multitask.LOGITS = 2000'  # some twenty positions of this vocabulary
    one, two = (record(start(tmp_path, which, runs=which, first=few))[0] for which in ('one', way))
    same_training(one, two)


@pytest.mark.slow
@pytest.mark.parametrize('way', ['ddp', 'fsdp2'])
def test_two_processes_are_stopped_and_go_on(tmp_path, way):
    longer = ['max_steps=240', 'accumulation=1', 'schedule=constant', 'learning_rate=1e-3']
    process = start(tmp_path, way, *longer)
    while 'step 12' not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(1800) != 0
    assert list(tmp_path.glob('runs/*/checkpoints/*/manifest.json')) and not list(tmp_path.glob('runs/*/record.json'))
    two, said = record(start(tmp_path, way, *longer))
    (resumed,) = two['provenance']['resumed']
    assert (
        12 <= resumed['step'] < 240
        and not resumed['exact']
        and 'several processes' in resumed['why']
        and 'with other last digits' in said
    )
    assert [h['step'] for h in two['history']] == list(range(1, 241)) and not list(tmp_path.glob('runs/*/checkpoints'))
    one, _ = record(start(tmp_path, 'one', *longer, runs='alone'))
    for a, b in zip(one['history'][:60], two['history'][:60], strict=True):
        assert abs(a['loss'] - b['loss']) <= 1e-3 * a['loss']  # small differences grow in time


def test_what_several_processes_cannot_do(tmp_path, monkeypatch):
    from dsbs.records import UsageError, find_folders
    from dsbs.runs.experiments import run_all

    monkeypatch.setenv('WORLD_SIZE', '2')
    with pytest.raises(UsageError, match='one run, not a grid'):
        run_all([], find_folders(runs=tmp_path))
    monkeypatch.delenv('WORLD_SIZE')
    process = start(tmp_path, 'ddp', 'accumulation=16')
    assert (
        process.communicate(timeout=1800)[1].count(
            '16 examples cannot be shared by 2 processes in 16 equal micro-batches'
        )
        and process.returncode != 0
    )


def test_the_processes_share_the_questions(monkeypatch):
    "Known before anything is distributed, and each question is one process's."
    from dsbs.runs.run import Run
    from dsbs.runs.specs import make_spec, prepare

    monkeypatch.setenv('WORLD_SIZE', '2')
    asked = []
    for rank in '01':
        monkeypatch.setenv('RANK', rank)
        asked.append(Run(prepare(make_spec(dict(t.split('=') for t in TINY)))).asked)
    for split, n in dict(validation=200, test=500).items():
        assert [sum(len(b.places) for b in one[split]) for one in asked] == [n / 2, n / 2]
