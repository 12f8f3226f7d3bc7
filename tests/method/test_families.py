"Students of every family: each loads, has the library's loss, trains, is saved, and answers alike afterwards."

import json
import shutil
from itertools import count

import pytest
import torch
from families import FAMILIES, bart_tokenizer, family, gemma_tokenizer
from small_t5 import change, own_task, rationale_set, small_tokenizer
from transformers import AutoTokenizer, ByT5Tokenizer

from dsbs.data.examples import Example
from dsbs.method.answering import PlainAnswers, generate, input_batches
from dsbs.method.multitask import collate, step_by_step_loss, tokenise
from dsbs.method.student import make_student
from dsbs.method.training import Interrupted
from dsbs.method.views import make_views
from dsbs.records import UsageError, find_folders
from dsbs.runs.run import train_runs
from dsbs.runs.saved import ask_saved, run_and_save
from dsbs.runs.specs import make_spec, prepare

EXAMPLES = [
    Example('1', 'low income of order 1', 'low', 'It says low.'),
    Example('2', 'my card says high', 'high', 'It says high. So the answer is high'),
    Example('3', 'high order', 'high', ''),
]


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "Folders, each made once."
    folders = {}

    def of(name):
        if name not in folders:
            folders[name] = family(name, tmp_path_factory.mktemp(name) / 'student')
        return folders[name]

    return of


def views_of(examples):
    return [make_views(e if e.rationale else Example(e.id, e.input, e.label)) for e in examples]


def loaded(folder):
    student, tokenizer = make_student(str(folder), dropout=0.0)
    return student.eval(), tokenizer


@pytest.mark.parametrize('name', FAMILIES)
def test_the_loss_is_the_library_s(name, made):
    "Encoded once for both tasks, vocabulary logits only where there is a target: two forward passes give the same."
    student, tokenizer = loaded(made(name))
    rows = tokenise(views_of(EXAMPLES), tokenizer)
    batch = collate(rows, student.config.pad_token_id)
    found = step_by_step_loss(student, batch, rationale_weight=0.5)
    n = len(batch.label_targets)
    passes = ((slice(0, n), batch.label_targets), (slice(n, None), batch.rationale_targets))
    read = dict(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    label, why = (student(**{k: v[at] for k, v in read.items()}, labels=targets).loss for at, targets in passes)
    assert found['label_loss'].item() == pytest.approx(label.item(), abs=1e-5)
    assert found['rationale_loss'].item() == pytest.approx(why.item(), abs=1e-5)
    assert found['loss'].item() == pytest.approx((label + 0.5 * why).item(), abs=2e-5)


@pytest.mark.parametrize('name', FAMILIES)
def test_all_parts_learn(name, made):
    "Every weight that reads text has a gradient, and a few updates lower the loss."
    student, tokenizer = loaded(made(name))
    batch = collate(tokenise(views_of(EXAMPLES), tokenizer), student.config.pad_token_id)
    learning = {n: p for n, p in student.named_parameters() if p.requires_grad}
    assert all('vision' in n or 'multi_modal' in n for n, p in student.named_parameters() if n not in learning)
    optimizer, losses = torch.optim.Adam(learning.values(), lr=1e-3), []
    for _ in range(5):
        optimizer.zero_grad()
        loss = step_by_step_loss(student, batch)['loss']
        loss.backward()
        losses.append(loss.item())
        still = {n for n, p in learning.items() if p.grad is None or not p.grad.any()} - {'final_logits_bias'}
        assert not {n for n in still if 'eoi_embedding' not in n}, still
        optimizer.step()
    assert losses[-1] < losses[0]


@pytest.mark.parametrize('name', FAMILIES)
def test_generation_is_the_library_s(name, made):
    student, tokenizer = loaded(made(name))
    inputs = [make_views(e).label[0] for e in EXAMPLES]
    said = generate(PlainAnswers(student), tokenizer, input_batches(tokenizer, inputs), max_new_tokens=6)
    one = tokenizer(inputs, padding=True, return_tensors='pt')
    theirs = student.generate(**one, max_new_tokens=6, do_sample=False)
    assert said == tokenizer.batch_decode(theirs, skip_special_tokens=True)


CALLED = dict(mt5='An mT5', umt5='A UMT5', bart='A BART', t5gemma='A T5Gemma', t5gemma2='A T5Gemma 2')  # Else "A T5"
QUICK = dict(max_steps=100, eval_every=25, batch_size=16, learning_rate=5e-3, dropout=0.0, schedule='constant')


@pytest.mark.parametrize('name', FAMILIES)
def test_a_run_is_saved_and_answers_alike(name, made, tmp_path):
    rows = own_task(tmp_path / 'task', n=90, text='{word} income of order {i}')
    rationale_set(tmp_path / 'set', rows)
    given = dict(task=str(tmp_path / 'task'), teacher=str(tmp_path / 'set'), student=str(made(name)), engine='plain')
    record = run_and_save(make_spec(QUICK | given), tmp_path / 'saved')
    assert record['metrics']['test_accuracy'] > 60, record['metrics']
    student, tokenizer = make_student(str(tmp_path / 'saved'), dropout=0.0)
    inputs = {r['id']: f'[label] {r["input"]}' for r in rows}
    asked = [inputs[i] for i in record['answers']]
    how = dict(max_new_tokens=record['generation']['max_new_tokens'])
    again = generate(PlainAnswers(student.eval()), tokenizer, input_batches(tokenizer, asked), **how)
    assert again == list(record['answers'].values())
    assert [answer for answer, _ in ask_saved(tmp_path / 'saved', asked, **record['generation'])] == again
    card = (tmp_path / 'saved' / 'README.md').read_text()
    assert f'\n{CALLED.get(name, "A T5")} of {record["metrics"]["parameters"]:,} parameters (student)' in card


def test_a_t5gemma_has_its_end_behind_and_its_start_in_front_of_what_it_reads(made, tmp_path):
    student, tokenizer = loaded(made('t5gemma'))
    raw = AutoTokenizer.from_pretrained(made('t5gemma'))
    (row,) = tokenise(views_of(EXAMPLES[:1]), tokenizer)
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert row.label_input == [*raw(f'[label] {EXAMPLES[0].input}').input_ids, end] and row.label_input[0] == start
    assert row.label_target == [*raw('low', add_special_tokens=False).input_ids, end]
    assert row.rationale_target[0] != start and row.rationale_target[-1] == end
    assert student.config.decoder_start_token_id == student.generation_config.decoder_start_token_id == start
    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)('low').input_ids == tokenizer('low').input_ids


@pytest.mark.parametrize('name', ['t5gemma', 't5gemma2'])
def test_dropout_is_that_of_the_run_on_both_sides(name, made):
    student, _ = make_student(str(made(name)), dropout=0.3)
    assert {m.p for m in student.modules() if isinstance(m, torch.nn.Dropout)} == {0.3}


def side(**settings):
    def work(folder):
        config = json.loads((folder / 'config.json').read_text())
        config['decoder'] |= settings
        (folder / 'config.json').write_text(json.dumps(config))

    return work


UNFIT = {
    'an unknown activation': ('t5gemma', side(hidden_activation='swiglu'), "names 'swiglu'"),
    'another width': ('t5gemma', side(intermediate_size=48), 'in the file and'),
    'another start': ('t5gemma', lambda f: change(f / 'config.json', decoder_start_token_id=0), 'front token (2)'),
    'another end': ('t5gemma2', lambda f: change(f / 'config.json', eos_token_id=[7, 8]), 'and [7, 8] in its'),
    'no padding': ('t5gemma2', lambda f: change(f / 'config.json', pad_token_id=None), 'and None in its config.json'),
    'the tokenizer of a T5': ('t5gemma', lambda f: small_tokenizer().save_pretrained(f), 'front token (None)'),
    'the tokenizer of a T5Gemma': ('bart', lambda f: gemma_tokenizer().save_pretrained(f), 'has 290 pieces'),
    'the tokenizer of a BART': ('mt5', lambda f: bart_tokenizer().save_pretrained(f), 'pieces'),
    'bytes for pieces': ('t5-efficient', lambda f: ByT5Tokenizer().save_pretrained(f), 'pieces (the last is 383)'),
    'half of a T5Gemma': ('t5gemma', lambda f: change(f / 'config.json', model_type='gemma2'), "model_type 'gemma2'"),
    'a T5Gemma 2 that should be the first': (
        't5gemma2',
        lambda f: change(f / 'config.json', model_type='t5gemma'),
        'safetensors cannot be read',
    ),
    'no start of a BART': ('bart', lambda f: change(f / 'config.json', decoder_start_token_id=None), 'start somewhere'),
}


@pytest.mark.parametrize('name', UNFIT)
def test_what_does_not_fit_says_so_at_load(name, made, tmp_path):
    family_name, spoil, why = UNFIT[name]
    folder = shutil.copytree(made(family_name), tmp_path / 'student')
    if 'tokenizer' in name or 'bytes' in name:
        [p.unlink() for p in folder.glob('token*')]
    spoil(folder)
    with pytest.raises(UsageError) as e:
        make_student(str(folder))
    assert why in str(e.value) and '\n' not in str(e.value)


def test_the_end_of_a_turn_beside_the_end_of_a_text_is_not_used(made, tmp_path):
    folder = shutil.copytree(made('t5gemma'), tmp_path / 'student')
    change(folder / 'config.json', eos_token_id=[1, 8])
    student, tokenizer = make_student(str(folder))
    assert student.config.eos_token_id == student.generation_config.eos_token_id == tokenizer.eos_token_id == 1


@pytest.mark.parametrize('name', ['t5gemma2', 'bart'])
def test_the_command_trains_it(name, made, main, tmp_path):
    rows = own_task(tmp_path / 'task')
    rationale_set(tmp_path / 'set', rows)
    given = dict(task=tmp_path / 'task', teacher=tmp_path / 'set', student=made(name), eval_every=2)
    arguments = [f'{k}={v}' for k, v in (given | dict(max_steps=4, batch_size=8)).items()]
    status, out, err = main('run', *arguments, '--json')
    assert status == 0, err
    (folder,) = (tmp_path / 'runs').rglob('record.json')
    assert json.loads(folder.read_text())['answers'] == json.loads(out)['answers']


@pytest.mark.parametrize('name', ['t5gemma2', 'bart'])
def test_a_run_is_resumed_where_it_was_stopped(name, made, tmp_path):
    "What sees images does not learn, so it has no moments to keep."
    rows = own_task(tmp_path / 'task')
    rationale_set(tmp_path / 'set', rows)
    given = dict(task=str(tmp_path / 'task'), teacher=str(tmp_path / 'set'), student=str(made(name)), engine='plain')
    spec, updates = make_spec(QUICK | given | dict(max_steps=8, eval_every=2, batch_size=8)), count(1)
    data = prepare(spec, find_folders(runs=tmp_path / 'runs'))
    with pytest.raises(Interrupted):
        train_runs([data], resume=True, stop=lambda: next(updates) == 5, save_every=0.0)
    record = train_runs([data], resume=True, save_every=0.0)[0].record
    assert [r['step'] for r in record['provenance']['resumed']] == [5]
    whole = train_runs([data])[0].record
    losses = [[h['loss'] for h in r['history']] for r in (record, whole)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4) and len(losses[0]) == 8
