"The student's arithmetic: T5 of both forms against committed logits, and updates however a batch is cut."

import json
import math
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import T5Config, T5ForConditionalGeneration

from dsbs.method.multitask import Tokenised
from dsbs.method.settings import TrainingConfig
from dsbs.method.stack import Stack, StackedAnswers, StackedEngine, decode, encode, stacked_logits
from dsbs.method.student import make_student, train_tokenizer
from dsbs.method.training import micro_batches, set_up, update

pytestmark = pytest.mark.numeric

GOLDEN = Path(__file__).with_name('golden_logits.json')
TINY = dict(
    vocab_size=40,
    d_model=16,
    d_kv=4,
    d_ff=24,
    num_layers=2,
    num_decoder_layers=1,
    num_heads=4,
    relative_attention_num_buckets=8,
    relative_attention_max_distance=16,
    dropout_rate=0.0,
)
FORMS = {  # as their config.json says it; what is not tied is not scaled either
    'v1.0': dict(feed_forward_proj='relu', tie_word_embeddings=True),  # one table for words read and written
    'v1.1': dict(
        feed_forward_proj='gated-gelu', tie_word_embeddings=True
    ),  # the form of our students from random weights
    'v1.1 untied': dict(feed_forward_proj='gated-gelu', tie_word_embeddings=False),
}  # the form of Google's checkpoints


def fixed_student(form):
    "Weights that follow from their place alone: no generator, whose draws a release may change."
    t5 = T5ForConditionalGeneration(T5Config(**TINY, **FORMS[form], decoder_start_token_id=0)).eval()
    if not FORMS[form]['tie_word_embeddings']:
        t5.lm_head.weight = torch.nn.Parameter(t5.lm_head.weight.detach().clone())  # as loading such a checkpoint does
    with torch.no_grad():
        for i, (name, p) in enumerate(sorted(t5.named_parameters())):
            wave = torch.sin(torch.arange(p.numel(), dtype=torch.float64) * (0.37 + 0.013 * i) + i).view_as(p)
            p.copy_(1 + 0.1 * wave if 'norm' in name else 0.3 * wave)
    return t5


def asked():
    ids = torch.tensor([[3 + (7 * i + 5 * j) % 37 for j in range(9)] for i in range(3)])
    ids[1, 6:] = 0
    return ids, (ids != 0).long(), torch.tensor([[0] + [3 + (11 * i + 3 * j) % 37 for j in range(4)] for i in range(3)])


def library_logits(t5):
    ids, mask, written = asked()
    with torch.inference_mode():
        return t5(input_ids=ids, attention_mask=mask, decoder_input_ids=written).logits


def stack_logits(t5):
    ids, mask, written = (t[None] for t in asked())
    stack = Stack([t5]).eval()
    with torch.inference_mode():
        return stacked_logits(stack, decode(stack, written, encode(stack, ids, mask), mask)).view(
            *written.shape[1:], -1
        )


def cached_logits(t5):
    "Two tokens first, then one after the other."
    ids, mask, written = (t[None] for t in asked())
    stack, cache = Stack([t5]).eval(), {}
    with torch.inference_mode():
        memory = encode(stack, ids, mask)
        parts = [
            stacked_logits(stack, decode(stack, new, memory, mask, cache)).unflatten(1, new.shape[1:])
            for new in written.split([2, 1, 1, 1], 2)
        ]
    return torch.cat(parts, 2)[0]


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('forward', [library_logits, stack_logits, cached_logits])
def test_golden_logits(form, forward):
    golden = torch.tensor(json.loads(GOLDEN.read_text())[form])
    assert golden.shape == (3, 5, 40) and golden.std() > 0.1
    torch.testing.assert_close(forward(fixed_student(form)), golden, rtol=0, atol=1e-5)


@pytest.mark.parametrize('form', FORMS)
def test_greedy_generation_is_the_library_s(form):
    "Rows end at different tokens; what ended is padded."
    t5 = fixed_student(form)
    ids = torch.tensor([[3 + (7 * i + 5 * j + i * j) % 37 for j in range(9)] for i in range(12)])
    mask = torch.ones_like(ids)
    mask[::3, 5:] = 0

    def theirs(end):
        t5.generation_config.eos_token_id = end
        return t5.generate(input_ids=ids, attention_mask=mask, max_new_tokens=7, do_sample=False)[:, 1:].tolist()

    rows = theirs(None)
    t5.config.eos_token_id = end = max(range(40), key=lambda t: len({row.index(t) for row in rows if t in row}))
    asked = StackedAnswers(t5)
    with torch.inference_mode():
        ours = asked.answer(asked.encode(ids, mask), mask, 7, 0).tolist()
    assert ours == theirs(end) != rows and len({row.index(end) if end in row else 7 for row in ours}) > 1


@pytest.mark.parametrize('form', FORMS)
def test_a_checkpoint_of_each_form_loads_as_what_it_is(form, tmp_path):
    fixed_student(form).save_pretrained(tmp_path)
    train_tokenizer(['a b a b c c']).save_pretrained(tmp_path)
    config = json.loads((tmp_path / 'config.json').read_text())
    config.pop('scale_decoder_outputs')
    (tmp_path / 'config.json').write_text(json.dumps(config | FORMS[form]))
    t5, _ = make_student(str(tmp_path), dropout=0.0)
    for forward in (library_logits, stack_logits):
        torch.testing.assert_close(
            forward(t5.eval()), torch.tensor(json.loads(GOLDEN.read_text())[form]), rtol=0, atol=1e-5
        )


def test_the_forms_differ():
    "Else a golden file of one form would pass for another."
    golden = {form: torch.tensor(logits) for form, logits in json.loads(GOLDEN.read_text()).items()}
    assert set(golden) == set(FORMS) and all(
        (golden[a] - golden[b]).abs().max() > 0.1 for a in golden for b in golden if a != b
    )


def examples(shared):
    "Eight of uneven lengths, some without a rationale; `shared`: both views read the same."
    word = lambda *place: 3 + sum((7, 13, 29)[k] * p for k, p in enumerate(place)) % 36
    made = []
    for i in range(8):
        read = [word(i, j) for j in range(3 + 5 * i % 11)] + [1]
        why = [word(i, j, 2) for j in range(1 + 7 * i % 9)] + [1] if i % 4 != 1 else []
        made.append(
            Tokenised(
                [4, *read],
                [word(i, j, 3) for j in range(1 + i % 3)] + [1],
                [] if not why else [4 if shared else 5, *read],
                why,
            )
        )
    assert len({e.length for e in made}) > 4
    return made


def updated(method, task_prefix, accumulation, clip, steps=2):
    "Weights after updates of SGD, whose step is the gradient itself."
    t5 = fixed_student('v1.1')
    rows = examples(task_prefix == 'decoder')
    if method == 'standard':
        rows = [Tokenised(e.label_input, e.label_target, [], []) for e in rows]
    engine = StackedEngine([t5], rationale_weight=0.5 if method == 'step_by_step' else 0.0)
    training = set_up(engine, TrainingConfig(batch_size=8, accumulation=accumulation, clip=clip), cpu=True)
    training.optimizer = torch.optim.SGD(engine.parameters(), lr=0.1)
    training.schedule = torch.optim.lr_scheduler.ConstantLR(training.optimizer, 1.0)
    losses = [update(training, micro_batches(training, [rows])) for _ in range(steps)]
    return {n: p.detach().clone() for n, p in t5.named_parameters()}, {n: v.item() for n, v in losses[-1].items()}


class Asked(TorchDispatchMode):
    "Operations that make the program wait for a tensor's values."

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        if f._overloadpacket in (
            torch.ops.aten._local_scalar_dense,
            torch.ops.aten.nonzero,
            torch.ops.aten.masked_select,
            torch.ops.aten._unique2,
        ):
            self.shapes.append(args[0].shape)
        return f(*args, **(kwargs or {}))


@pytest.mark.parametrize('task_prefix', ['encoder', 'decoder'])
def test_an_update_waits_for_no_tensor_of_the_device(task_prefix):
    "But for the count of rationale tokens, once for each micro-batch, which is on the host."
    training = set_up(StackedEngine([fixed_student('v1.1')]), TrainingConfig(batch_size=8, accumulation=2), cpu=True)
    batches = micro_batches(training, [examples(task_prefix == 'decoder')])
    with Asked() as asked:
        update(training, batches)
    assert asked.shapes == [torch.Size([])] * 2
    with Asked() as asked:
        batches[0].label_targets.max().item()
    assert len(asked.shapes) == 1, 'else this would see nothing'


@pytest.mark.parametrize('clip', [1.0, 100.0], ids=['clipped', 'unclipped'])
@pytest.mark.parametrize('task_prefix', ['encoder', 'decoder'])
@pytest.mark.parametrize('method', ['standard', 'step_by_step'])
def test_updates_do_not_depend_on_accumulation(method, task_prefix, clip):
    "8x1, 4x2, 2x4 and 1x8: micro-batches whose numbers of tokens, and of rationales, differ."
    start = {n: p.detach().clone() for n, p in fixed_student('v1.1').named_parameters()}
    whole, losses = updated(method, task_prefix, 1, clip)
    assert max((whole[n] - start[n]).abs().max() for n in whole) > 1e-2, (
        'the updates should be large against the tolerance'
    )
    for accumulation in (2, 4, 8):
        weights, same = updated(method, task_prefix, accumulation, clip)
        for n in whole:
            torch.testing.assert_close(weights[n], whole[n], rtol=0, atol=1e-5)
        assert same == pytest.approx(losses, abs=1e-5) and all(map(math.isfinite, same.values()))
