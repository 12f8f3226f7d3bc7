"Parity with the authors' code, run unchanged: its losses, and ours with its prefixes and its form of the loss."

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

from dsbs.data.tasks import load_task
from dsbs.method.multitask import tokenise
from dsbs.method.settings import TrainingConfig
from dsbs.method.stack import StackedEngine
from dsbs.method.student import train_tokenizer
from dsbs.method.training import PlainEngine, micro_batches, set_up, update
from dsbs.method.views import make_views
from dsbs.teacher.sets import teacher_rationales

pytestmark = pytest.mark.numeric

TASKS = json.loads(Path(__file__).with_name('authors_parity.json').read_text(encoding='utf-8'))['tasks']


@pytest.fixture(scope='module', params=TASKS)
def both(request):
    "What their code gave, our task, and our reading of its teacher."
    import os

    if not Path(os.environ.get('DSBS_DATA', 'nowhere'), 'cqa', 'cqa_test.json').is_file():
        pytest.skip('needs the recorded data: set DSBS_DATA')
    task = load_task(request.param)
    return TASKS[request.param], task, teacher_rationales(task, 'train')


def fixed_student(pieces):
    "Weights that follow from their place alone."
    shape = dict(d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, feed_forward_proj='gated-gelu')
    how = dict(dropout_rate=0, scale_decoder_outputs=True, decoder_start_token_id=0)
    student = T5ForConditionalGeneration(T5Config(vocab_size=pieces, **shape, **how))
    with torch.no_grad():
        for i, (name, p) in enumerate(student.named_parameters()):
            wave = 0.05 * torch.sin(0.7 * torch.arange(p.numel(), dtype=torch.float64) + i)
            p.copy_(torch.ones_like(p) if 'layer_norm' in name else wave.view_as(p))
    return student


def test_the_same_splits(both):
    theirs, task, _ = both
    assert {split: len(task[split]) for split in ('train', 'validation', 'test')} == {
        split: theirs[split] for split in ('train', 'validation', 'test')
    }
    assert {i for batch in theirs['batches'] for i in batch} <= set(task['train']['id'])


def test_the_rationales_that_differ_are_those_named(both):
    "Where theirs learns a blank or keeps a line break, ours leaves the rationale out, or writes it in one line."
    theirs, _, readings = both
    for row in theirs['rationales_that_differ']:
        ours = readings[row['id']].rationale or ''
        assert ours.startswith(row['ours']) if row['ours'] else not ours, row
        assert ours[: len(row['theirs'])] != row['theirs'] or len(ours) != len(row['theirs'])


@pytest.mark.parametrize('engine', [PlainEngine, StackedEngine])
def test_twelve_updates_have_the_same_losses(both, engine):
    theirs, task, readings = both
    rows = {row['id']: row for row in task['train'].to_list()}
    tokenizer = train_tokenizer(rows[i]['input'] for i in sorted(rows))
    assert len(tokenizer) == theirs['pieces']
    model = engine([fixed_student(len(tokenizer))], rationale_weight=1.0, loss_form='authors')
    training = set_up(model, TrainingConfig(batch_size=8, clip=1.0), cpu=True)
    training.optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    training.schedule = torch.optim.lr_scheduler.ConstantLR(training.optimizer, 1.0)
    where = {i: n for n, i in enumerate(task['train']['id'])}
    losses = []
    for batch in theirs['batches']:
        examples = [replace(task.example('train', where[i]), rationale=readings[i].rationale) for i in batch]
        views = [make_views(e, 'step_by_step', prefix_style='authors') for e in examples]
        losses.append(update(training, micro_batches(training, [tokenise(views, tokenizer)]))['loss'].item())
    assert losses == pytest.approx(theirs['losses'], abs=1e-4)
