"Checkpoints: what kills, damages, fills or interrupts changes no weight of a student, and is said."

import errno
import itertools
import json
import os
import random
import shutil
import signal
from dataclasses import dataclass, replace
from multiprocessing import get_context

import pytest
import torch
from making import record_of
from nearly import nearly_the_same
from transformers import T5ForConditionalGeneration

from dsbs.method import training
from dsbs.method.multitask import Tokenised
from dsbs.method.settings import TrainingConfig
from dsbs.method.stack import StackedEngine
from dsbs.method.student import scratch_config
from dsbs.method.training import Interrupted, Trainee, TrainingResult, fit
from dsbs.records import DRIFT, find_folders, is_near
from dsbs.runs import checkpoints
from dsbs.runs import run as runs
from dsbs.runs.checkpoints import CheckpointError, DiskKeeper, load_checkpoint, save_checkpoint
from dsbs.runs.run import train_runs
from dsbs.runs.specs import RunSpec, prepare, run_key
from dsbs.runs.verifying import same_numbers

pytestmark = pytest.mark.numeric

CONFIG = TrainingConfig(max_steps=30, eval_every=10, batch_size=8, learning_rate=3e-3)
SHORT = replace(CONFIG, max_steps=8, eval_every=3)


@dataclass
class Trained:
    best: torch.Tensor  # Weights
    last: torch.Tensor
    result: TrainingResult

    def __eq__(self, other):
        said = [
            {name: value for name, value in vars(t.result).items() if name not in ('seconds', 'resumed')}
            for t in (self, other)
        ]
        return torch.equal(self.best, other.best) and torch.equal(self.last, other.last) and said[0] == said[1]

    def is_near(self, other):
        losses = [[h['loss'] for h in t.result.history] for t in (self, other)]
        return (
            all(is_near(a, b, DRIFT) for a, b in zip(*losses, strict=True))
            and self.result.stopped == other.result.stopped
        )


def flat(t5):
    return torch.cat([p.detach().flatten() for p in t5.parameters()])


def rows(n=40, even=False, decoder=False, why=True):
    "Examples of words that mean nothing, some without a rationale."
    rng = random.Random(0)

    def words(low, high):
        return [rng.randrange(3, 64) for _ in range(high if even else rng.randint(low, high))] + [1]

    asked = [words(3, 9) for _ in range(n)]
    return [
        Tokenised(x, words(1, 3), x if decoder else words(3, 9), words(4, 9))
        if why and (even or i % 5)
        else Tokenised(x, words(1, 3), [], [])
        for i, x in enumerate(asked)
    ]


def train(
    folder=None,
    config=CONFIG,
    stop_at=0,
    save_every=0.0,
    seeds=(0,),
    dropout=0.1,
    examples=None,
    weight=1.0,
    accuracy=None,
    constants=None,
):
    """Train students, each with a checkpoint in `folder` after each update, resumed from where there is one;
    the accuracy is a function of the weights."""
    students, trainees, lasts, updates = [], [], {}, itertools.count(1)
    keeper = DiskKeeper({}, {}, save_every)
    for seed in seeds:
        torch.manual_seed(seed)
        t5 = T5ForConditionalGeneration(scratch_config('scratch-32x1', 64, dropout))
        students.append(t5)

        def validate(t5=t5, seed=seed):
            lasts[seed] = flat(t5)
            return accuracy(seed, lasts[seed]) if accuracy else float(lasts[seed].double().abs().sum() * 1e3 % 99)

        name = f'run {seed}'
        if folder:
            keeper.folders[name] = folder / str(seed)
            keeper.saved[name] = load_checkpoint(folder / str(seed), name)
        constant = (constants or {}).get(seed)
        trainees.append(Trainee(examples or rows(), validate, seed, name=name, constant=constant))
    engine = StackedEngine(students, rationale_weight=weight)
    results = fit(engine, trainees, config, lambda: next(updates) == stop_at, keeper)
    trained = [Trained(flat(t5), lasts[seed], r) for t5, seed, r in zip(students, seeds, results)]
    return trained if len(seeds) > 1 else trained[0]


class Faulty:
    "`os` as `checkpoints` sees it, which does something instead of the n-th call that writes."

    CALLS = ('open', 'write', 'fsync', 'close', 'rename')

    def __init__(self, n=0, instead=None):
        self.n, self.instead, self.made = n, instead, []

    def __getattr__(self, name):
        call = getattr(os, name)
        if name not in self.CALLS:
            return call

        def counted(*args):
            self.made.append(name)
            return self.instead(call, *args) if len(self.made) == self.n else call(*args)

        return counted


def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def half_then_kill(call, *args):
    if call is os.write:
        call(args[0], args[1][: len(args[1]) // 2])
    kill()


def trains_until_killed(folder, update, call):
    "SIGKILL before an update, or in a call of a save, of which there is one every three updates."
    whole, save, made = training.update, checkpoints.save_checkpoint, itertools.count(1)
    training.update = lambda *args: kill() if next(made) == update else whole(*args)
    checkpoints.save_checkpoint = lambda folder, step, *args: save(folder, step, *args) if step % 3 == 0 else None
    if call:
        checkpoints.os = Faulty(call, half_then_kill)
    train(folder)


@pytest.fixture(scope='module')
def forked():
    "Call in a process that can be killed, forked from one that has imported torch; its exit status."
    context = get_context('forkserver')
    context.set_forkserver_preload(['dsbs.runs.run', 'dsbs.runs.experiments'])

    def call(work, *args):
        p = context.Process(target=work, args=args)
        p.start()
        p.join(120)
        return p.exitcode

    return call


@pytest.fixture(scope='module')
def once():
    return train()


@pytest.fixture(scope='module')
def short():
    return train(config=SHORT)


def steps(trained):
    return [h['step'] for h in trained.result.history]


def at_steps(trained):
    return [r['step'] for r in trained.result.resumed]


@pytest.mark.slow
def test_sigkill_at_20_random_steps_and_save_moments(tmp_path, forked, once, monkeypatch):
    rng, save, counted = random.Random(6), checkpoints.save_checkpoint, Faulty()
    with monkeypatch.context() as m:
        m.setattr(checkpoints, 'os', counted)
        m.setattr(
            checkpoints,
            'save_checkpoint',
            lambda folder, step, *args: save(folder, step, *args) if step % 3 == 0 else None,
        )
        assert train(tmp_path / 'not killed') == once
    for i in range(20):
        update, call = (rng.randint(1, 30), 0) if i < 10 else (0, rng.randint(1, len(counted.made)))
        assert forked(trains_until_killed, tmp_path / str(i), update, call) == -signal.SIGKILL
        again = train(tmp_path / str(i))
        assert again == once and steps(again) == list(range(1, 31)), (update, call)
        assert not update or at_steps(again) == [(update - 1) // 3 * 3] * (update > 3)
        assert all(r['exact'] for r in again.result.resumed)


def test_a_training_killed_again_and_again_gets_to_the_same_end(tmp_path, forked, once):
    for update in (8, 2, 9, 5):
        assert forked(trains_until_killed, tmp_path, update, 0) == -signal.SIGKILL
    again = train(tmp_path)
    assert again == once and at_steps(again) == [6, 12, 15]


@pytest.fixture(scope='module')
def stopped(tmp_path_factory):
    "A training that was told to stop after step 5: the folder with its checkpoints of steps 4 and 5."
    folder = tmp_path_factory.mktemp('stopped')
    with pytest.raises(Interrupted, match='after step 5'):
        train(folder, SHORT, stop_at=5)
    assert [p.name for p in sorted((folder / '0').iterdir())] == ['000004', '000005']
    return folder


PARTS = ('model.safetensors', 'optimizer.safetensors', 'best.safetensors', 'state.json', 'manifest.json')


def test_these_are_all_parts(stopped):
    assert sorted(p.name for p in (stopped / '0' / '000005').iterdir()) == sorted(PARTS)


@pytest.mark.parametrize(
    'left', (None, 0, 25, 50, 75, 99), ids=lambda left: 'deleted' if left is None else f'cut at {left}%'
)
@pytest.mark.parametrize('part', PARTS)
def test_a_file_deleted_or_cut_is_noticed_and_the_one_before_used(tmp_path, stopped, short, capsys, part, left):
    folder = shutil.copytree(stopped, tmp_path / 'copy')
    path = folder / '0' / '000005' / part
    if left is None:
        path.unlink()
    else:
        os.truncate(path, path.stat().st_size * left // 100)
    again, err = train(folder, SHORT), capsys.readouterr().err
    assert err.count('\n') == 1 and part in err and 'going on from step 4' in err
    assert again == short and at_steps(again) == [4] and steps(again) == list(range(1, 9))


def test_when_none_is_whole_the_training_starts_anew(tmp_path, stopped, short, capsys):
    folder = shutil.copytree(stopped, tmp_path / 'copy')
    for path in folder.glob('0/*/optimizer.safetensors'):
        path.unlink()
    again, err = train(folder, SHORT), capsys.readouterr().err
    assert again == short and not again.result.resumed and err.count('\n') == 1 and 'starting anew' in err


def test_each_of_100_flipped_bits_is_found(tmp_path, stopped, capsys):
    rng, folder = random.Random(7), shutil.copytree(stopped, tmp_path / 'copy')
    files = [folder / '0' / '000005' / part for part in PARTS]
    for i in range(100):
        path = rng.choices(files, [p.stat().st_size for p in files])[0] if i < 50 else files[i % 5]
        whole = path.read_bytes()
        at, bit = rng.randrange(len(whole)), rng.randrange(8)
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :])
        assert load_checkpoint(folder / '0', 'run 0').step == 4 and path.name in capsys.readouterr().err, (
            path,
            at,
            bit,
        )
        path.write_bytes(whole)
    assert load_checkpoint(folder / '0', 'run 0').step == 5 and not capsys.readouterr().err


def halves(newest, place):  # what a crash may leave, beside the whole ones
    hidden = place.with_name(f'.{place.name}.half')
    return dict(
        hidden=lambda: shutil.copytree(newest, hidden),
        no_manifest=lambda: shutil.copytree(newest, place, ignore=lambda *_: ['manifest.json']),
        empty=place.mkdir,
        manifest_alone=lambda: (place.mkdir(), shutil.copy(newest / 'manifest.json', place)),
        empty_files=lambda: (place.mkdir(), [(place / p).touch() for p in PARTS]),
        old_tensors=lambda: (
            shutil.copytree(newest, place),
            shutil.copy(newest.with_name('000004') / 'model.safetensors', place),
        ),
    )


@pytest.mark.parametrize('kind', halves(*[checkpoints.Path('x/1')] * 2))
def test_a_half_made_newer_checkpoint_is_passed_over(tmp_path, stopped, short, capsys, kind):
    folder = shutil.copytree(stopped, tmp_path / 'copy')
    halves(folder / '0' / '000005', folder / '0' / '000006')[kind]()
    again, err = train(folder, SHORT), capsys.readouterr().err
    assert again == short and at_steps(again) == [5] and ('000006' in err) == (kind != 'hidden')
    assert [p.name for p in sorted((folder / '0').iterdir())] == (
        ['000006', '000007'] if kind == 'hidden' else ['000007', '000008']
    )


@pytest.mark.parametrize('number', (errno.ENOSPC, errno.EIO), ids=errno.errorcode.get)
def test_a_disk_that_fails_at_any_call_of_a_save_leaves_the_one_before(tmp_path, stopped, monkeypatch, number):
    folder = shutil.copytree(stopped, tmp_path / 'copy') / '0'
    files = lambda: {p.relative_to(folder): p.read_bytes() for p in folder.rglob('*') if p.is_file()}
    parts, before = load_checkpoint(folder, 'run 0').parts, files()

    def fail(call, *args):
        if call is os.write:
            call(args[0], args[1][:100])
        if call is os.close:
            call(*args)
        raise OSError(number, os.strerror(number))

    for n in itertools.count(1):
        faulty = Faulty(n, fail)
        with monkeypatch.context() as m:
            m.setattr(checkpoints, 'os', faulty)
            try:
                save_checkpoint(folder, 6, parts, 'run 0')
                break
            except CheckpointError as e:
                assert e.errno == number and str(e).startswith(
                    ('the disk is full' if number == errno.ENOSPC else 'Input/output error')
                    + ': checkpoint of step 6 not written; the one of step 5 is kept in '
                )
        assert files() == before and not list(folder.glob('.*')) and load_checkpoint(folder, 'run 0').step == 5
    assert (
        n == 4 * len(PARTS) + 3 + 1 + 3 + 1 and faulty.made[-1] == 'rename'
    )  # each file, their folder, its name, the folder above; then an old one could not be removed
    assert load_checkpoint(folder, 'run 0').step == 6


def test_a_write_that_takes_only_a_part_is_gone_on_with(tmp_path, stopped, monkeypatch):
    parts = load_checkpoint(stopped / '0', 'run 0').parts
    monkeypatch.setattr(checkpoints.os, 'write', lambda fd, data, write=os.write: write(fd, data[:1000]))
    save_checkpoint(tmp_path, 5, parts, 'run 0')
    monkeypatch.undo()
    assert (tmp_path / '000001' / 'model.safetensors').read_bytes() == (
        stopped / '0' / '000005' / 'model.safetensors'
    ).read_bytes()


TINY = RunSpec(student='scratch-32x1', n_train=40, max_steps=6, eval_every=3, batch_size=8, learning_rate=1e-3)
SETTINGS = ['student=scratch-32x1', 'n_train=40', 'max_steps=6', 'eval_every=3', 'batch_size=8', 'learning_rate=1e-3']


@pytest.fixture(scope='module')
def tiny():
    return record_of(TINY)


@pytest.mark.parametrize('number', (errno.ENOSPC, errno.EIO), ids=errno.errorcode.get)
def test_the_command_ends_with_1_and_a_line_when_the_disk_fails_and_goes_on_later(
    main, tmp_path, monkeypatch, tiny, number
):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    faulty, keeper = Faulty(90, fail), runs.DiskKeeper
    monkeypatch.setattr(runs, 'DiskKeeper', lambda folders, saved, save_every: keeper(folders, saved, 0.0))
    monkeypatch.setattr(checkpoints, 'os', faulty)
    status, out, err = main('run', *SETTINGS, '--json')
    said = [line for line in err.splitlines() if line.startswith('dsbs:')]
    assert (
        status == 1
        and not out
        and len(said) == 1
        and 'checkpoint of step 4 not written; the one of step 3 is kept' in said[0]
    )
    folder = tmp_path / 'runs' / run_key(TINY)
    assert [p.name for p in sorted((folder / 'checkpoints').iterdir())] == ['000002', '000003'] and not (
        folder / 'record.json'
    ).exists()
    status, out, err = main('run', *SETTINGS, '--json')
    record = json.loads(out)
    assert (
        status == 0
        and same_numbers(record) == same_numbers(tiny)
        and record['provenance']['resumed'] == [dict(step=3, exact=True)]
    )
    assert not (folder / 'checkpoints').exists()


def test_the_last_whole_one_is_never_deleted(tmp_path):
    for step in range(1, 7):
        place = save_checkpoint(tmp_path, step, dict(model=dict(w=torch.ones(step))))
        if step > 1:
            (place / 'model.safetensors').write_bytes(b'')
        assert load_checkpoint(tmp_path).step == 1
    assert [p.name for p in sorted(tmp_path.iterdir())] == ['000001', '000006']


@pytest.mark.parametrize(
    'changed',
    [
        dict(config=replace(SHORT, dtype='bfloat16')),
        dict(config=replace(SHORT, accumulation=3)),
        dict(config=replace(SHORT, schedule='constant')),
        dict(config=replace(SHORT, warmup_ratio=0.4)),
        dict(config=replace(SHORT, warmup_ratio=0.4, schedule='constant')),
        dict(config=replace(SHORT, gradient_checkpointing=True)),
        dict(config=replace(SHORT, batch_size=64)),
        dict(dropout=0.0),
        dict(weight=0.0, examples=rows(why=False)),
        dict(examples=rows(decoder=True)),
    ],
    ids=lambda c: ' '.join(map(str, c)),
)
def test_every_way_of_training_is_gone_on_with_to_the_bit(tmp_path, changed):
    whole = train(**dict(config=SHORT) | changed)
    for stop_at in (2, 5):  # before a validation, and after one, with 2 and 3 more updates made in vain
        with pytest.raises(Interrupted):
            train(tmp_path / str(stop_at), **dict(config=SHORT) | changed, stop_at=stop_at)
        again = train(tmp_path / str(stop_at), **dict(config=SHORT) | changed)
        assert again == whole and again.result.resumed == [dict(step=stop_at, exact=True)]


@pytest.mark.parametrize('dropout', [0.0, 0.1])
def test_students_of_a_stack_are_gone_on_with_together_and_alone(tmp_path, dropout):
    "The second is perfect at the first validation, in step 3, and leaves the stack."
    how = dict(
        config=SHORT,
        dropout=dropout,
        examples=rows(even=True),
        accuracy=lambda seed, weights: 100.0 if seed == 1 else float(weights.double().abs().sum() * 1e3 % 99),
    )
    whole = dict(enumerate(train(**how, seeds=(0, 1, 2))))
    assert [whole[s].result.stopped for s in whole] == ['max_steps', 'perfect', 'max_steps']
    for stop_at, groups in ((2, [(0, 1, 2), (0,), (1,), (2, 0)]), (5, [(0, 2), (0,), (2,), (1,)])):
        with pytest.raises(Interrupted):
            train(tmp_path / str(stop_at), **how, seeds=(0, 1, 2), stop_at=stop_at)
        for i, seeds in enumerate(groups):
            again = train(shutil.copytree(tmp_path / str(stop_at), tmp_path / f'{stop_at} {i}'), **how, seeds=seeds)
            as_saved = seeds == groups[0]
            for seed, one in zip(seeds, again if len(seeds) > 1 else [again]):
                (resumed,) = one.result.resumed or [dict(step=2, exact=True)]  # the second had ended
                assert resumed['step'] == (2 if seed == 1 else stop_at) and (
                    resumed['exact'] == as_saved or seed == 1 and stop_at == 5
                )
                assert one == whole[seed] if as_saved else one.is_near(whole[seed]), (seed, seeds)
    with pytest.raises(ValueError, match=r'different steps cannot train side by side: \[2, 5\]'):
        train(tmp_path / '5', **how, seeds=(0, 1))


def test_patience_that_waits_for_the_plateau_is_gone_on_with(tmp_path):
    "The first student is below its plateau at once, and its patience ends; the second never gets below its own."
    how = dict(
        config=replace(SHORT, max_steps=12, patience=4),
        dropout=0.0,
        examples=rows(even=True),
        accuracy=lambda seed, weights: 50.0,
        constants={0: 1e9, 1: 1e-9},
        seeds=(0, 1),
    )
    whole = train(**how)
    assert [(t.result.stopped, t.result.steps) for t in whole] == [('patience', 9), ('max_steps', 12)]
    with pytest.raises(Interrupted):
        train(tmp_path, **how, stop_at=5)
    assert train(tmp_path, **how) == whole


def test_runs_at_different_steps_and_of_other_keys(tmp_path, capsys):
    specs = [replace(TINY, dropout=0.0, seed=s, subset_seed=s) for s in range(3)]
    alone = [record_of(s) for s in specs]
    prepared = [prepare(s, find_folders(runs=tmp_path)) for s in specs]
    updates = itertools.count(1)
    with pytest.raises(Interrupted):
        train_runs(prepared[1:2], resume=True, stop=lambda: next(updates) == 2)
    shutil.copytree(tmp_path / run_key(specs[1]), tmp_path / run_key(specs[2]))  # another run's
    records = [r for r, *_ in train_runs(prepared, resume=True)]
    assert same_numbers(records[1]) == same_numbers(alone[1]), 'alone before and after'
    assert all(map(nearly_the_same, records, alone)), 'the other two beside each other'
    assert [r['provenance']['resumed'] for r in records] == [[], [dict(step=2, exact=True)], []]
    assert 'belongs to another run' in capsys.readouterr().err


def test_a_record_is_the_same_with_checkpoints_and_its_time_adds_up(tmp_path, tiny):
    data = prepare(TINY, find_folders(runs=tmp_path))
    assert same_numbers(train_runs([data], resume=True)[0].record) == same_numbers(tiny) and not list(
        tmp_path.iterdir()
    )  # too short for one
    updates = itertools.count(1)
    with pytest.raises(Interrupted):
        train_runs([data], resume=True, stop=lambda: next(updates) == 4, save_every=0.0)
    folder = tmp_path / run_key(TINY) / 'checkpoints'
    seconds = load_checkpoint(folder, run_key(TINY)).parts['state']['result']['seconds']
    record = train_runs([data], resume=True, save_every=0.0)[0].record
    assert same_numbers(record) == same_numbers(tiny) and record['provenance']['resumed'] == [dict(step=4, exact=True)]
    assert record['time']['seconds'] > round(seconds, 2) > 0


def test_what_cannot_be_to_the_bit_goes_on_and_says_so(tmp_path, stopped, monkeypatch, capsys):
    made_with = checkpoints.made_with
    monkeypatch.setattr(checkpoints, 'made_with', lambda now: made_with(now) | dict(torch='1.0', threads=64))
    again, err = train(shutil.copytree(stopped, tmp_path / 'copy'), SHORT), capsys.readouterr().err
    (resumed,) = again.result.resumed
    assert (
        resumed['step'] == 5
        and resumed['exact'] is False
        and 'torch 1.0 and not' in resumed['why']
        and 'threads 64 and not 1' in resumed['why']
    )
    assert err == f'dsbs: resumed at step 5, with other last digits: {resumed["why"]}\n' and steps(again) == list(
        range(1, 9)
    )


def test_another_order_of_examples_is_noticed(tmp_path, stopped):
    again = train(shutil.copytree(stopped, tmp_path / 'copy'), SHORT, examples=rows(33))
    assert again.result.resumed[0]['why'] == 'another order of examples'
