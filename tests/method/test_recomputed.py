"Gradient checkpointing: each block is computed twice, and no bit of a student shows it."

import random
from collections import Counter
from dataclasses import replace

import pytest
import torch
from making import record_of
from transformers import T5ForConditionalGeneration

from dsbs.method import stack
from dsbs.method.multitask import Tokenised
from dsbs.method.settings import TrainingConfig
from dsbs.method.stack import Stack, StackedEngine, decode, encode
from dsbs.method.student import scratch_config
from dsbs.method.training import Trainee, fit
from dsbs.runs.specs import RunSpec, run_key

pytestmark = pytest.mark.numeric

CONFIG = TrainingConfig(max_steps=5, eval_every=5, batch_size=8, learning_rate=3e-3)


def rows(even=False, decoder=False, why=True):
    "Examples of words that mean nothing, some without a rationale."
    rng = random.Random(0)

    def words(low, high):
        return [rng.randrange(3, 64) for _ in range(high if even else rng.randint(low, high))] + [1]

    asked = [words(3, 9) for _ in range(24)]
    return [
        Tokenised(x, words(1, 3), x if decoder else words(3, 9), words(4, 9))
        if why and (even or i % 5)
        else Tokenised(x, words(1, 3), [], [])
        for i, x in enumerate(asked)
    ]


def trained(config, examples, weight=1.0, seeds=(0,), dropout=0.1):
    "Weights, losses, and the states of the generators of dropout after a training."
    students = []
    for seed in seeds:
        torch.manual_seed(seed)
        students.append(T5ForConditionalGeneration(scratch_config('scratch-32x2', 64, dropout)))
    model = StackedEngine(students, rationale_weight=weight)
    results = fit(model, [Trainee(examples, lambda: 0.0, seed) for seed in seeds], config)
    return (
        [p.detach().clone() for t5 in students for p in t5.parameters()],
        [r.history for r in results],
        [each.random(4).tolist() for each in model.stack.random],
    )


WAYS = {
    'standard': dict(examples=rows(why=False), weight=0.0),
    'step_by_step': dict(examples=rows()),
    'named at the decoder': dict(examples=rows(decoder=True)),
    'accumulation': dict(examples=rows(), config=replace(CONFIG, accumulation=3)),
    'a stack of two': dict(examples=rows(even=True), seeds=(0, 1)),
    'bfloat16': dict(examples=rows(), config=replace(CONFIG, dtype='bfloat16')),
    'bfloat16 named at the decoder': dict(
        examples=rows(decoder=True), config=replace(CONFIG, dtype='bfloat16', accumulation=2)
    ),
    'two threads': dict(examples=rows(), config=replace(CONFIG, threads=2)),
    'no dropout': dict(examples=rows(), dropout=0.0),
}


@pytest.mark.parametrize('way', WAYS)
def test_weights_are_equal_to_the_bit(way, monkeypatch):
    went, whole = [], stack.feed_forward
    monkeypatch.setattr(
        stack, 'feed_forward', lambda stack, hidden, layer: went.append(layer) or whole(stack, hidden, layer)
    )
    how = dict(config=CONFIG) | WAYS[way]
    plain = trained(**how)
    once = Counter(went)
    went.clear()
    again = trained(**how | dict(config=replace(how['config'], gradient_checkpointing=True)))
    assert all(torch.equal(a, b) for a, b in zip(plain[0], again[0], strict=True)) and plain[1:] == again[1:]
    assert len(once) == 4 and Counter(went) == {layer: 2 * n for layer, n in once.items()}, (
        'as often in the backward pass as in the forward pass'
    )


def model(on):
    torch.manual_seed(0)
    made = StackedEngine([T5ForConditionalGeneration(scratch_config('scratch-32x2', 64))]).train()
    made.stack.gradient_checkpointing = on
    return made


def gradients(on, between=lambda random: None):
    "Gradients, what was drawn between the forward and the backward pass, and what is drawn next."
    m = model(on)
    loss = m(m.collate([rows()[:8]]))['loss'].sum()
    (random,) = m.stack.random
    drawn = between(random)
    loss.backward()
    return torch.cat([p.grad.flatten() for p in m.parameters()]), drawn, random.random()


@pytest.mark.parametrize(
    'between', [lambda random: None, lambda random: random.random()], ids=['at once', 'others draw in between']
)
def test_the_generator_is_where_it_would_be(between):
    plain, again = gradients(False, between), gradients(True, between)
    assert torch.equal(plain[0], again[0]) and plain[1:] == again[1:]


def test_masks_drawn_anew_would_show(monkeypatch):
    "Else the equalities above would say nothing."
    monkeypatch.setattr(stack.Redrawn, '__enter__', lambda self: setattr(self, 'now', stack.states(self.random)))
    assert not torch.equal(gradients(False)[0], gradients(True)[0])


def test_a_backward_pass_may_be_made_again():
    m = model(True)
    loss = m(m.collate([rows()[:8]]))['loss'].sum()
    once, twice = (torch.autograd.grad(loss, list(m.parameters()), retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, twice))


def waiting(on):
    "Bytes that wait for the backward pass, but for the weights."
    stack = Stack([T5ForConditionalGeneration(scratch_config('scratch-512x6', 64))]).train()
    stack.gradient_checkpointing = on
    kept = {p.untyped_storage().data_ptr(): 0 for p in stack.parameters()}

    def count(x):
        kept.setdefault(x.untyped_storage().data_ptr(), x.untyped_storage().nbytes())
        return x

    ids, written = torch.full((1, 4, 32), 5), torch.full((1, 4, 16), 5)
    with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
        mask = torch.ones_like(ids)
        decode(stack, written, encode(stack, ids, mask), mask)
    return sum(kept.values())


def test_little_waits_for_the_backward_pass():
    assert 10 * waiting(True) < waiting(False)


def test_only_training_with_gradients_computes_twice(monkeypatch):
    monkeypatch.setattr(stack, 'checkpoint', lambda *args, **how: pytest.fail('a block was to be computed again'))
    batch = model(True).collate([rows()[:8]])
    model(True).eval()(batch)
    model(False)(batch)
    with torch.no_grad():
        model(True)(batch)


def test_a_run_has_the_same_numbers_and_a_name_of_its_own():
    spec = RunSpec(student='scratch-32x1', n_train=40, max_steps=4, eval_every=2, batch_size=8, learning_rate=1e-3)
    plain, again = (record_of(replace(spec, gradient_checkpointing=on)) for on in (False, True))
    for part in ('metrics', 'history', 'evaluations', 'answers', 'data'):
        assert plain[part] == again[part]
    assert plain['key'] != again['key'] == run_key(replace(spec, gradient_checkpointing=True))
