"The loss of a large vocabulary, summed over pieces of the positions: the same, with fewer logits at a time."

import pytest
import torch
from torch.nn.functional import cross_entropy

from dsbs.method import multitask, stack
from dsbs.method.multitask import Tokenised
from dsbs.method.settings import SCRATCH, TrainingConfig
from dsbs.method.stack import StackedEngine
from dsbs.method.student import make_student
from dsbs.method.training import PlainEngine, Trainee, fit
from dsbs.runs.specs import RunSpec, recipe

pytestmark = pytest.mark.numeric

WORDS = ['a b c d e f g h i j k l m n o p'] * 3


def rows(shared, why=True):
    return [
        Tokenised(
            [4 + i % 5, *[5 + j for j in range(i % 4)], 1],
            [4 + i % 7, 1],
            *(
                [
                    [4 + i % 5, *[5 + j for j in range(i % 4)], 1] if shared else [9, 4, 1],
                    [6 + j for j in range(3 + i % 5)] + [1],
                ]
                if why and i % 5
                else [[], []]
            ),
        )
        for i in range(12)
    ]


def found(monkeypatch, most, students=1, dtype=torch.float32, engine=StackedEngine, **kwargs):
    "Loss of each student, gradient, and the most positions whose logits were computed at once."
    made, several = [], cross_entropy
    for module in (multitask, stack):
        monkeypatch.setattr(module, 'LOGITS', most)
        monkeypatch.setattr(
            module,
            'cross_entropy',
            lambda logits, *rest, **how: made.append(len(logits)) or several(logits, *rest, **how),
        )
    model = engine([make_student('scratch-32x1', WORDS, seed=k, dropout=0.0)[0] for k in range(students)])
    with torch.autocast('cpu', torch.bfloat16, enabled=dtype != torch.float32):
        loss = model(model.collate([rows(**kwargs)] * students))['loss']
    loss.sum().backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters()]), max(made) // students


VOCABULARY = len(make_student('scratch-32x1', WORDS)[1])


@pytest.mark.parametrize('positions', [1, 5, 7, 1000])
@pytest.mark.parametrize(
    'way',
    [
        dict(shared=False),
        dict(shared=True),
        dict(shared=False, why=False),
        dict(shared=False, students=3),
        dict(shared=False, engine=PlainEngine),
        dict(shared=True, engine=PlainEngine),
    ],
    ids=['encoder', 'decoder', 'standard', 'stack', 'plain encoder', 'plain decoder'],
)
def test_the_same_loss_and_gradient(monkeypatch, way, positions):
    (loss, gradient, at_once), (same, again, fewer) = (
        found(monkeypatch, 10**9, **way),
        found(monkeypatch, positions * VOCABULARY, **way),
    )
    torch.testing.assert_close(same, loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(again, gradient, rtol=1e-4, atol=1e-6)
    assert fewer == min(positions, at_once) and at_once > 20
    if positions == 1000:
        assert torch.equal(same, loss) and torch.equal(again, gradient)


def test_in_bfloat16(monkeypatch):
    (loss, gradient, _), (same, again, fewer) = (
        found(monkeypatch, most, shared=False, dtype=torch.bfloat16) for most in (10**9, 5 * VOCABULARY)
    )
    assert fewer == 5
    torch.testing.assert_close(same, loss, rtol=1e-3, atol=0)
    torch.testing.assert_close(again, gradient, rtol=0.05, atol=2e-3)


def test_with_checkpointed_blocks_and_dropout(monkeypatch):
    "Dropout is drawn before the logits, so what is computed again draws none."

    def trained(most, checkpointing):
        monkeypatch.setattr(stack, 'LOGITS', most)
        student = make_student('scratch-32x1', WORDS, dropout=0.1)[0]
        fit(
            StackedEngine([student]),
            [Trainee(rows(shared=False), lambda: 0.0)],
            TrainingConfig(
                max_steps=6, batch_size=6, eval_every=6, learning_rate=1e-3, gradient_checkpointing=checkpointing
            ),
        )
        return torch.cat([p.detach().flatten() for p in student.parameters()])

    plain, pieces = trained(10**9, False), trained(5 * VOCABULARY, False)
    torch.testing.assert_close(pieces, plain, rtol=0, atol=2e-4)
    assert torch.equal(trained(5 * VOCABULARY, True), pieces)


def test_a_student_from_random_weights_is_never_in_pieces_at_the_usual_sizes():
    "Its runs keep their names; those of T5's own vocabulary have a new one."
    assert (
        multitask.LOGITS // 4096 >= 64 * 256
        and {recipe(RunSpec(student=s, dropout=0.0)) for s in SCRATCH} == {2}
        and recipe(RunSpec(student='t5-base')) == recipe(RunSpec(student='t5-v1_1-base', dtype='bfloat16')) == 4
    )
