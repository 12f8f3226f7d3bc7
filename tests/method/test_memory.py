"Memory that runs short in a training, simulated: it goes on in smaller pieces, or ends with a line."

import itertools
from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch

from dsbs.method import answering, training
from dsbs.method.multitask import Tokenised
from dsbs.method.settings import TrainingConfig
from dsbs.method.stack import StackedEngine
from dsbs.method.student import make_student
from dsbs.method.training import Interrupted, OutOfMemory, PlainEngine, Trainee, fit
from dsbs.records import find_folders, is_near
from dsbs.runs.experiments import run
from dsbs.runs.run import train_runs
from dsbs.runs.specs import RunSpec, prepare
from dsbs.runs.verifying import same_numbers

pytestmark = pytest.mark.numeric

ENGINES = (PlainEngine, StackedEngine)
TINY = RunSpec(student='scratch-32x1', n_train=24, max_steps=6, eval_every=3, batch_size=8, learning_rate=1e-3)
SHORT = (
    torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB'),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4000 bytes"),
    MemoryError(),
)


def narrow(monkeypatch, most, error=SHORT[0], where='forward', from_call=1):
    "Room for so many examples at a time, from that call on; returns how often there was none."
    failures, calls = [], itertools.count(1)

    def forward(whole):
        def narrowed(engine, batch, totals=None):
            rows, late = batch.label_targets.shape[-2], next(calls) >= from_call
            losses = whole(engine, batch, totals)
            if not late or rows <= most:
                return losses
            failures.append(rows)
            if where == 'forward':
                raise error
            losses['loss'].register_hook(raises)
            return losses

        return narrowed

    def raises(_):
        raise error

    for engine in ENGINES:
        monkeypatch.setattr(engine, 'forward', forward(engine.forward))
    return failures


def one_update(engine, monkeypatch):
    "Loss, gradient and result of one update of 13 examples of unlike lengths, one third without a rationale."
    rows = [Tokenised([4] * (2 + i), [5, 1], *([[6] * (2 + i), [7, 5, 1]] if i % 3 else [[], []])) for i in range(13)]
    torch.manual_seed(0)
    student = make_student('scratch-16x2', ['a b c d e f'] * 3, dropout=0.0)[0]
    found, config = [], TrainingConfig(max_steps=1, batch_size=13, eval_every=1)

    def clip(self, largest):
        found.append(torch.cat([p.grad.flatten() for p in self.parameters()]))

    monkeypatch.setattr(engine, 'clip', clip)
    (result,) = fit(engine([student]), [Trainee(rows, lambda: 0.0)], config, ahead=True)
    return found[-1], result


@pytest.mark.parametrize('engine', ENGINES)
@pytest.mark.parametrize('error', SHORT, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize('where', ['forward', 'backward'])
def test_loss_and_gradient_are_those_of_the_whole(monkeypatch, capsys, engine, error, where):
    gradient, whole = one_update(engine, monkeypatch)
    failures = narrow(monkeypatch, 2, error, where)
    again, result = one_update(engine, monkeypatch)
    assert failures == [13, 7, 4] and result.divided == [dict(step=1, accumulation=8)]
    assert is_near(whole.history[0]['loss'], result.history[0]['loss'])
    assert (gradient - again).norm() <= 1e-5 * gradient.norm()
    assert capsys.readouterr().err.count('out of memory at step 1: it goes on with accumulation=8') == 1


@pytest.mark.parametrize('engine', ['stack', 'plain'])
def test_a_run_goes_on_and_its_record_says_so(monkeypatch, tmp_path, engine):
    "From the update on in which it happened; resumed, it does not run out of memory again."
    spec = replace(TINY, engine=engine, dropout=0.0)
    (whole, *_), *_ = train_runs([prepare(spec)])
    failures = narrow(monkeypatch, 4, from_call=3)
    data, updates = prepare(spec, find_folders(runs=tmp_path)), itertools.count(1)
    with pytest.raises(Interrupted):
        train_runs([data], stop=lambda: next(updates) == 4, resume=True)
    assert failures == [8]
    (record, *_), *_ = train_runs([data], resume=True)
    assert failures == [8] and record['key'] == whole['key'] and record['spec'] == whole['spec']
    assert record['provenance']['divided'] == [dict(step=3, accumulation=2)]
    assert record['provenance']['resumed'] == [dict(step=4, exact=True)] and whole['provenance']['divided'] == []
    for a, b in zip(whole['history'], record['history'], strict=True):
        assert is_near(a['loss'], b['loss'], 1e-3)
    assert whole['history'][:2] == record['history'][:2]


@pytest.mark.parametrize(
    'changes, words',
    [
        (dict(), 'set gradient_checkpointing=true'),
        (dict(gradient_checkpointing=True), 'set dtype=bfloat16'),
        (dict(gradient_checkpointing=True, dtype='bfloat16'), 'take a smaller student, or a smaller max_input'),
    ],
    ids=str,
)
def test_what_does_not_fit_at_all_ends_with_one_line(monkeypatch, main, changes, words):
    monkeypatch.setattr(training, 'has_bfloat16', lambda device='cpu': True)
    failures = narrow(monkeypatch, 0)
    settings = dict(student='scratch-32x1', n_train=4, batch_size=4, max_steps=1, eval_every=1, engine='plain')
    status, out, err = main('run', *(f'{name}={value}' for name, value in (settings | changes).items()))
    assert (status, out) == (1, '') and failures == [4, 2, 1]
    assert err.splitlines()[-1] == f'dsbs: out of memory with one example at a time: {words}'


@pytest.mark.parametrize(
    'accumulation, words',
    [(1, 'in one of 2 processes: set accumulation=2$'), (4, 'with one example at a time: set gradient_checkpointing')],
)
def test_processes_that_train_together_do_not_part(accumulation, words):
    "One alone cannot divide a batch, since the others wait for it; the line names what all of them can do."
    there = training.set_up(PlainEngine([make_student('scratch-16x2', ['a b c'] * 3)[0]]), TrainingConfig())
    config, two = replace(there.config, accumulation=accumulation), Mock(num_processes=2, device=torch.device('cpu'))
    with pytest.raises(OutOfMemory, match=words):
        training.divide(replace(there, accelerator=two, config=config), n=8)


def test_a_step_that_was_made_by_half_is_not_kept(monkeypatch, tmp_path):
    "The run ends, resumes from its last checkpoint, and is the run that it would have been."
    data, steps = prepare(TINY, find_folders(runs=tmp_path)), itertools.count(1)
    (whole, *_), *_ = train_runs([prepare(TINY)])
    step = torch.optim.AdamW.step

    def by_half(self, closure=None):
        if next(steps) != 4:
            return step(self, closure)
        with torch.no_grad():
            self.param_groups[0]['params'][0].add_(1)
        raise SHORT[0]

    monkeypatch.setattr(torch.optim.AdamW, 'step', by_half)
    with pytest.raises(OutOfMemory, match="in the optimizer's step.*nothing of this update is kept"):
        train_runs([data], resume=True, save_every=0)
    (record, *_), *_ = train_runs([data], resume=True, save_every=0)
    assert record['provenance']['resumed'] == [dict(step=3, exact=True)] and record['provenance']['divided'] == []
    assert same_numbers(record) == same_numbers(whole)


@pytest.mark.parametrize('engine', ['stack', 'plain'])
def test_questions_are_asked_in_smaller_batches(monkeypatch, tmp_path, engine):
    from dsbs.runs.run import ANSWERS

    spec, failures = replace(TINY, engine=engine), []
    (whole, *_), *_ = train_runs([prepare(spec)])
    encode = ANSWERS[engine].encode

    def narrowed(asked, ids, mask):
        if len(ids) > 50:
            failures.append(len(ids))
            raise SHORT[0]
        return encode(asked, ids, mask)

    monkeypatch.setattr(ANSWERS[engine], 'encode', narrowed)
    record = run(spec, find_folders(runs=tmp_path))
    splits = [record['metrics'][name] for name in ('test_accuracy', 'validation_accuracy')]
    assert splits == pytest.approx([whole['metrics'][name] for name in ('test_accuracy', 'validation_accuracy')], abs=1)
    asked = len(failures)
    assert asked and record['metrics']['n_test'] == 500
    monkeypatch.setattr(ANSWERS[engine], 'encode', encode)
    monkeypatch.setattr(answering, 'has_bfloat16', lambda device: False)
    monkeypatch.setattr(ANSWERS[engine], 'encode', lambda *_: (_ for _ in ()).throw(SHORT[0]))
    with pytest.raises(OutOfMemory, match='one question at a time: take a smaller student, or a smaller max_input'):
        train_runs([prepare(spec)])


def test_best_weights_wait_in_the_hosts_memory_where_the_device_has_no_room(monkeypatch):
    clone, tries = torch.Tensor.clone, []

    def full(tensor, **how):
        tries.append(tensor)
        raise SHORT[0]

    student = make_student('scratch-16x2', ['a b c'] * 3)[0]
    learner = training.Learner(Trainee([], lambda: 50.0), student, iter(()))
    learner.result.history = [dict(loss=1.0)]
    there = training.set_up(PlainEngine([student]), TrainingConfig())
    monkeypatch.setattr(torch.Tensor, 'clone', full)
    training.judge(learner, there, 1)
    monkeypatch.setattr(torch.Tensor, 'clone', clone)
    assert tries and all(torch.equal(learner.best[name], p) for name, p in student.named_parameters())
    assert not {p.data_ptr() for p in student.parameters()} & {w.data_ptr() for w in learner.best.values()}
