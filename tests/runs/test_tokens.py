"Tokens kept on the disk, and batches collated ahead: nothing of a run changes, and what is damaged is seen."

import errno
import itertools
import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from dsbs.data.examples import Example
from dsbs.method import training
from dsbs.method.multitask import Tokenised, tokenise
from dsbs.method.settings import TrainingConfig
from dsbs.method.stack import StackedEngine
from dsbs.method.student import make_student, train_tokenizer
from dsbs.method.training import Interrupted, Trainee, fit
from dsbs.method.views import make_views
from dsbs.records import find_folders
from dsbs.runs import run as runs
from dsbs.runs import tokens
from dsbs.runs.checkpoints import DiskKeeper, load_checkpoint
from dsbs.runs.experiments import run_all, run_status
from dsbs.runs.run import train_runs
from dsbs.runs.specs import make_spec, prepare
from dsbs.runs.tokens import TokenTable, cut, cut_rows, tokenise_once, tokens_key
from dsbs.runs.verifying import check_record, record_named, same_numbers

pytestmark = pytest.mark.numeric

EXAMPLES = [
    Example(
        str(i),
        f'is {i} more than {i * 7 % 40} ?',
        'yes' if i * 7 % 40 < i else 'no',
        f'{i} comes after {i - 1} .' if i % 5 else None,
    )
    for i in range(40)
]


@pytest.fixture(autouse=True)
def many(monkeypatch):
    "What is many, and what is tokenised at a time."
    monkeypatch.setattr(tokens, 'MANY', 16)
    monkeypatch.setattr(tokens, 'PIECE', 7)


def tokenizer():
    return train_tokenizer([t for e in EXAMPLES for t in (e.input, e.label, e.rationale or '', '[label] [rationale]')])


def lists(view=make_views):
    return tokenise([view(e) for e in EXAMPLES], tokenizer())


def kept(folder, **kwargs):
    return tokenise_once(EXAMPLES, make_views, kwargs.pop('tokenizer', None) or tokenizer(), folder=folder, **kwargs)


def names(folder):
    return sorted(p.name for p in folder.iterdir())


# ---- tokens on the disk


@pytest.mark.parametrize('where', ['encoder', 'decoder'])
@pytest.mark.parametrize('on_disk', [True, False])
def test_kept_rows_are_the_rows(tmp_path, where, on_disk):
    view = partial(make_views, task_prefix=where)
    plain = lists(view)
    for _ in range(2):
        rows = tokenise_once(EXAMPLES, view, tokenizer(), folder=tmp_path if on_disk else None)
        assert (
            isinstance(rows, TokenTable) and len(rows) == len(plain) and list(rows) == plain and rows[-3] == plain[-3]
        )
        with pytest.raises(IndexError):
            rows[len(rows)]
        short = cut_rows(rows, 6, 3)
        assert isinstance(short, TokenTable) and list(short) == cut_rows(plain, 6, 3) == [
            cut(r, 6, 3) for r in plain
        ] != plain == list(rows)
    assert len(names(tmp_path)) == on_disk


def test_found_again_nothing_is_tokenised(tmp_path, monkeypatch):
    first = list(kept(tmp_path))
    monkeypatch.setattr(tokens, 'tokenise', None)
    assert list(kept(tmp_path)) == first


def test_few_rows_and_no_folder_write_nothing(tmp_path, monkeypatch):
    kept(None)
    monkeypatch.setattr(tokens, 'MANY', 41)
    assert kept(tmp_path) == lists() and not names(tmp_path)


def test_another_name_for_all_that_changes_tokens():
    tok = tokenizer()
    key = lambda examples=EXAMPLES, view=make_views, tok=tok: tokens_key(examples, view, tok)
    other = tokenizer()
    other.add_tokens('after')
    moved = [replace(EXAMPLES[0], input=EXAMPLES[0].input + ' ' + EXAMPLES[0].label), *EXAMPLES[1:]]
    keys = [
        key(),
        key(moved),
        key(EXAMPLES[::-1]),
        key(EXAMPLES[:-1]),
        key([replace(e, rationale=e.rationale or 'x') for e in EXAMPLES]),
        key(view=partial(make_views, task_prefix='decoder')),
        key(tok=other),
    ]
    assert len(set(keys)) == len(keys)
    tok(['a'], max_length=3, truncation=True, padding=True)
    assert key() == keys[0] == key(tok=tokenizer())  # what it was used for does not matter


def flipped(place):  # a bit of the byte at a share of the file
    def damage(path):
        data = bytearray(path.read_bytes())
        data[int(place * (len(data) - 1))] ^= 1
        path.write_bytes(data)

    return damage


DAMAGE = {
    **{f'a bit flipped at {place:.0%}': flipped(place) for place in (0, 0.005, *(i / 20 for i in range(1, 21)))},
    **{
        f'cut to {share:.0%}': lambda path, share=share: path.write_bytes(
            path.read_bytes()[: int(share * path.stat().st_size)]
        )
        for share in (0, 0.01, 0.1, 0.5, 0.99)
    },
    'a byte short': lambda path: path.write_bytes(path.read_bytes()[:-1]),
    'a byte more': lambda path: path.write_bytes(path.read_bytes() + b'x'),
    'a folder': lambda path: (path.unlink(), path.mkdir()),
    'text': lambda path: path.write_text('tokens'),
}


@pytest.mark.parametrize('how', DAMAGE)
def test_damaged_tokens_are_seen_and_made_anew(tmp_path, capsys, how):
    kept(tmp_path)
    (path,) = tmp_path.iterdir()
    DAMAGE[how](path)
    assert list(kept(tmp_path)) == lists()
    said = capsys.readouterr().err.splitlines()
    assert path.name in said[0] and 'made anew' in said[0]
    if how == 'a folder':
        assert len(said) == 2 and 'stay in memory' in said[1]
        return
    assert (
        list(kept(tmp_path)) == lists()
        and len(said) == 1
        and not capsys.readouterr().err
        and names(tmp_path) == [path.name]
    )


def test_tokens_under_the_name_of_others_are_not_taken(tmp_path, capsys):
    kept(tmp_path)
    (path,) = tmp_path.iterdir()
    path.rename(tmp_path / f'{tokens_key(EXAMPLES[:20], make_views, tokenizer())}.safetensors')
    assert (
        list(tokenise_once(EXAMPLES[:20], make_views, tokenizer(), folder=tmp_path)) == lists()[:20]
        and 'made anew' in capsys.readouterr().err
    )


@pytest.mark.parametrize('damaged', [False, True], ids=['none there', 'a damaged one there'])
def test_workers_at_once_all_end_with_a_whole_one(tmp_path, monkeypatch, capsys, damaged):
    if damaged:
        kept(tmp_path)
        next(tmp_path.iterdir()).write_bytes(b'')
    keep, together = tokens._keep, threading.Barrier(4)

    def at_once(*args):
        together.wait()
        keep(*args)

    monkeypatch.setattr(tokens, '_keep', at_once)
    plain = lists()
    own = [tokenizer() for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda tok: kept(tmp_path, tokenizer=tok), own))
    assert (
        all(list(rows) == plain for rows in made)
        and len(names(tmp_path)) == 1
        and capsys.readouterr().err.count('made anew') == 4 * damaged
    )
    monkeypatch.setattr(tokens, 'tokenise', None)
    assert list(kept(tmp_path)) == plain and not capsys.readouterr().err


def test_a_full_disk_costs_the_tokens_and_not_the_run(tmp_path, monkeypatch, capsys):
    def full(*args):
        raise OSError(errno.ENOSPC, 'No space left on device')

    monkeypatch.setattr(Path, 'write_bytes', full)
    times = []
    monkeypatch.setattr(tokens, 'tokenise', lambda views, *rest: times.append(len(views)) or tokenise(views, *rest))
    assert list(kept(tmp_path)) == lists() and not names(tmp_path) and sum(times) == len(EXAMPLES)
    said = capsys.readouterr().err
    assert said.count('\n') == 1 and 'No space left' in said and 'stay in memory' in said


def test_no_folder_can_be_made(tmp_path, capsys):
    (tmp_path / 'tokens').write_text('a file')
    assert list(kept(tmp_path / 'tokens')) == lists() and 'stay in memory' in capsys.readouterr().err


def test_deleted_or_replaced_while_in_use(tmp_path):
    kept(tmp_path)
    rows = kept(tmp_path)
    (path,) = tmp_path.iterdir()
    other = tmp_path / 'other'
    other.write_bytes(bytes(path.stat().st_size))
    other.replace(path)
    assert list(rows) == lists()
    shutil.rmtree(tmp_path)
    assert list(rows) == lists() == list(kept(tmp_path))


# ---- runs

SPEC = make_spec(
    dict(
        task='same_kind',
        n_train=40,
        max_steps=8,
        eval_every=4,
        batch_size=8,
        learning_rate=2e-3,
        student='scratch-32x1',
    )
)
OTHERS = dict(
    spec=[SPEC],
    decoder=[replace(SPEC, task_prefix='decoder', accumulation=2)],
    standard=[replace(SPEC, method='standard')],
    stack=[replace(SPEC, seed=s, subset_seed=s, dropout=0.0) for s in range(3)],
)


def records(specs, runs_dir=None, **kwargs):
    prepared = [prepare(s, find_folders(runs=runs_dir)) for s in specs]
    kwargs |= dict(resume=True) if runs_dir else {}
    return [same_numbers(r) for r, *_ in train_runs(prepared, **kwargs)]


@pytest.mark.parametrize('which', OTHERS)
def test_records_with_tokens_on_the_disk_are_the_records_without(tmp_path, monkeypatch, which):
    specs = OTHERS[which]
    on_disk = records(specs, runs_dir=tmp_path)
    assert names(tmp_path) == ['tokens'] and len(names(tmp_path / 'tokens')) == len(specs)
    in_memory = records(specs)
    monkeypatch.setattr(tokens, 'MANY', 10**6)
    assert on_disk == in_memory == records(specs, runs_dir=tmp_path)


def test_nothing_trips_over_the_folder(tmp_path, monkeypatch):
    monkeypatch.setenv('DSBS_RUNS', str(tmp_path))
    folders = find_folders(runs=tmp_path)
    train_runs([prepare(replace(SPEC, max_steps=1, eval_every=1), folders)], resume=True)
    assert names(tmp_path) == ['tokens']
    assert run_status(folders)['done'] == 0
    monkeypatch.setattr(
        'dsbs.runs.experiments._launch',
        lambda todo, *rest: [
            train_runs(
                [prepare(s, folders)],
                done=lambda r: (todo.folder(k) / 'record.json').write_text(json.dumps(r)),
                resume=not todo.folder(k).mkdir(),
            )
            for k, s in todo.specs.items()
        ],
    )
    (record,) = run_all([SPEC], folders)
    assert run_all([SPEC], folders) == [record] == [record_named(record['key'][:8], folders)]
    assert {n: run_status(folders)[n] for n in ('done', 'running', 'failed', 'pending')} == dict(
        done=1, running=0, failed=0, pending=0
    ) and check_record(record) == []


# ---- batches collated ahead


@pytest.fixture
def ahead(monkeypatch):
    "Makes `fit` collate ahead, and tells in which threads batches were collated."
    threads, collate = [], StackedEngine.collate

    def seen(*args):
        threads.append(threading.current_thread() is threading.main_thread())
        return collate(*args)

    monkeypatch.setattr(StackedEngine, 'collate', seen)

    def switch(on):
        threads.clear()
        monkeypatch.setattr(runs, 'fit', partial(fit, ahead=on))
        return threads

    return switch


@pytest.mark.parametrize('which', OTHERS)
def test_records_with_batches_collated_ahead_are_the_records_without(ahead, which):
    threads = ahead(None)
    plain = records(OTHERS[which])
    assert all(threads)
    threads = ahead(True)
    assert records(OTHERS[which]) == plain
    assert {True, False} == set(threads) and sum(threads) == len(
        threads
    ) // 4  # the first after a validation in the main thread, and three in the other


def test_stopped_with_a_batch_drawn_ahead_and_gone_on_with(tmp_path, ahead):
    "Before, at and after a validation, with the thread in one or both of the parts."
    plain = records([SPEC])
    for stop_at, first, second in ((3, True, True), (4, True, None), (5, None, True), (6, True, None)):
        updates, data = itertools.count(1), prepare(SPEC, find_folders(runs=tmp_path / str(stop_at)))
        ahead(first)
        with pytest.raises(Interrupted):
            train_runs([data], resume=True, stop=lambda: next(updates) == stop_at)
        ahead(second)
        (again,) = (r for r, *_ in train_runs([data], resume=True))
        assert same_numbers(again) == plain[0] and again['provenance']['resumed'] == [dict(step=stop_at, exact=True)]


ROWS = [Tokenised([4 + i % 5, 5, 1], [4 + i % 7, 1], [], []) for i in range(12)]
CONFIG = TrainingConfig(max_steps=24, batch_size=4, eval_every=4, patience=4)


def trained(ahead, scores, rows=ROWS, config=CONFIG, constants=(), **kwargs):
    students = [
        make_student('scratch-32x1', ['a b c d e f g h i j k l'] * 3, seed=k, dropout=0.0)[0]
        for k in range(len(scores))
    ]
    found = fit(
        StackedEngine(students),
        [
            Trainee(rows, partial(next, iter(map(float, s))), k, constant=constant)
            for k, (s, constant) in enumerate(itertools.zip_longest(scores, constants))
        ],
        config,
        ahead=ahead,
        **kwargs,
    )
    return [(r.history, r.stopped, r.steps) for r in found], [
        torch.cat([p.detach().flatten() for p in s.parameters()]) for s in students
    ]


def test_students_leave_a_stack_while_batches_are_collated_ahead():
    scores = [(1, 2, 3, 4, 5, 6), (5, 4), (1, 2, 100), (1, 2, 3, 3)]
    (plain, weights), (found, same) = trained(None, scores), trained(True, scores)
    assert found == plain and [steps for *_, steps in found] == [24, 8, 12, 16] and all(map(torch.equal, weights, same))


def test_each_student_of_a_stack_has_a_plateau_of_its_own():
    "The same accuracies, and losses that are below the first one's plateau, above the second's, and of no known one."
    scores = [(5, 4, 4, 4, 4, 4)] * 3
    found, _ = trained(None, scores, constants=(1e9, 1e-9, None), config=replace(CONFIG, patience=8))
    assert [(stopped, steps) for _, stopped, steps in found] == [('patience', 12), ('max_steps', 24), ('patience', 12)]


class Torn(list):
    "Rows of which one cannot be read."

    def __getitem__(self, i):
        if i == 7:
            raise OSError('row 7 cannot be read')
        return super().__getitem__(i)


@pytest.mark.parametrize('seed', range(3))
def test_an_error_in_the_thread_comes_out_of_fit(seed):
    "At the same update, with the same words, and no thread is left."

    def ends(ahead):
        made = []
        with pytest.raises(OSError, match='row 7 cannot be read'):
            student, _ = make_student('scratch-32x1', ['a b c d e f g h i j k l'] * 3)
            fit(
                StackedEngine([student]),
                [Trainee(Torn(ROWS), lambda: 50.0, seed)],
                CONFIG,
                stop=lambda: made.append(1),
                ahead=ahead,
            )
        return len(made)

    before = threading.active_count()
    assert ends(True) == ends(None) < 3 and threading.active_count() == before


def test_the_checkpoint_is_of_the_last_update(tmp_path):
    student, _ = make_student('scratch-32x1', ['a b c d e f g h i j k l'] * 3)
    drawn, updates = training.batch_order([5] * 12, 4, 0), itertools.count(1)
    with pytest.raises(Interrupted):
        fit(
            StackedEngine([student]),
            [Trainee(ROWS, lambda: 50.0)],
            CONFIG,
            stop=lambda: next(updates) == 6,
            keeper=DiskKeeper({'': tmp_path}),
            ahead=True,
        )
    assert load_checkpoint(tmp_path).parts['state']['batch'] == [next(drawn) for _ in range(6)][-1]
