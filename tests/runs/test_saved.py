"A student that is saved is the one that was scored: asked as its card says, it gives the recorded answers."

import json
import re

import pytest
import torch
from small_t5 import change, own_task, rationale_set, small_t5
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, ByT5Tokenizer

from dsbs.method.student import make_student
from dsbs.runs import run as runs
from dsbs.runs import saved as saving
from dsbs.runs.saved import ask_saved, model_card, run_and_save
from dsbs.runs.specs import make_spec

QUICK = dict(
    method='standard', max_steps=40, eval_every=20, batch_size=16, learning_rate=5e-3, dropout=0.0, schedule='constant'
)
HABITS = {  # of a checkpoint, which are not those of the scoring
    'beams': dict(num_beams=4, length_penalty=2.0),
    'a least length': dict(min_length=8),
    'no word twice': dict(no_repeat_ngram_size=1, repetition_penalty=5.0),
    'forced': dict(forced_bos_token_id=9, forced_eos_token_id=1),
    'a short answer': dict(max_length=2),
    'forbidden words': dict(suppress_tokens=[4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14]),
    'drawn': dict(do_sample=True, temperature=3.0),
}


def asked_as_the_card_says(folder, questions):
    "The lines of its model card, run as they stand."
    code = re.search(r'```python\n(.*?)```', (folder / 'README.md').read_text(), re.S)[1]
    start, ask = code.split('ids =')
    there = {'FOLDER': folder}
    exec(start, there)
    said = []
    for text in questions:
        exec('ids =' + ask, there | dict(text=text, print=said.append))
    return said


def saved(tmp_path, **settings):
    "The record, and what the saved student says to its questions as they stand in the task."
    rows = own_task(tmp_path / 'task', text=settings.pop('text', '{word} income of order {i}'))
    rationale_set(tmp_path / 'set', rows)
    record = run_and_save(
        make_spec(QUICK | dict(task=str(tmp_path / 'task'), teacher=str(tmp_path / 'set')) | settings),
        tmp_path / 'saved',
    )
    inputs = {r['id']: r['input'] for r in rows}
    return record, asked_as_the_card_says(tmp_path / 'saved', [inputs[i] for i in record['answers']])


@pytest.mark.parametrize('where', ['generation_config.json', 'config.json'])
@pytest.mark.parametrize('name', HABITS)
def test_habits_of_a_checkpoint_are_not_saved(name, where, tmp_path):
    student = small_t5(tmp_path / 't5')
    change(student / where, **HABITS[name])
    if where == 'config.json':
        (student / 'generation_config.json').unlink()
    record, said = saved(tmp_path, student=str(student))
    assert said == list(record['answers'].values()) and set(said) == {'low', 'high'}
    kept = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / 'saved').generation_config
    assert (
        (kept.num_beams, kept.do_sample, kept.max_new_tokens) == (1, False, record['generation']['max_new_tokens'])
        and not kept.min_length
        and not kept.forced_eos_token_id
    )


WAYS = {
    'from random weights': dict(student='scratch-32x1'),
    'a rationale, then the label': dict(method='single_task'),
    'the label, then a rationale': dict(method='answer_first'),
    'two tasks': dict(method='step_by_step'),
    'named at the decoder': dict(method='step_by_step', task_prefix='decoder'),
    'without a prefix': dict(prefix_style='authors'),
    'in bfloat16': dict(dtype='bfloat16'),
    'inputs cut': dict(max_input=4),
    'dropout': dict(dropout=0.1),
    'from random weights, in free text': dict(student='scratch-32x1', text='{word} {i} <pad'),
}


@pytest.mark.parametrize('way', WAYS)
def test_answers_are_those_recorded(way, tmp_path):
    record, said = saved(tmp_path, **dict(student=str(small_t5(tmp_path / 't5'))) | WAYS[way])
    assert said == list(record['answers'].values()) and record['metrics']['test_accuracy'] > 0


@pytest.mark.parametrize(
    'form',
    [
        dict(tie_word_embeddings=False, scale_decoder_outputs=False),
        dict(feed_forward_proj='relu'),
        dict(num_decoder_layers=1),
        'byt5',
        'cleaned up',
        'cut on the left',
    ],
    ids=str,
)
def test_other_forms_too(form, tmp_path):
    if form == 'byt5':
        student = small_t5(tmp_path / 't5', ByT5Tokenizer(), vocab_size=384)
    else:
        student = small_t5(tmp_path / 't5', **form if isinstance(form, dict) else {})
    if form == 'cleaned up':
        change(student / 'tokenizer_config.json', clean_up_tokenization_spaces=True)
    if form == 'cut on the left':
        change(student / 'tokenizer_config.json', truncation_side='left', padding_side='left')
    record, said = saved(tmp_path, student=str(student), max_input=24 if form == 'cut on the left' else 1024)
    assert said == list(record['answers'].values())


def test_a_rationale_in_the_input_is_asked_with_it(tmp_path):
    rows = own_task(tmp_path / 'task')
    rationale_set(tmp_path / 'set', rows)
    record = run_and_save(
        make_spec(
            QUICK
            | dict(
                task=str(tmp_path / 'task'),
                teacher=str(tmp_path / 'set'),
                method='rationale_as_input',
                student='scratch-32x1',
            )
        ),
        tmp_path / 'saved',
    )
    questions = {r['id']: f'{r["input"]} It says {r["label"]}.' for r in rows}
    assert asked_as_the_card_says(tmp_path / 'saved', [questions[i] for i in record['answers']]) == list(
        record['answers'].values()
    )
    assert 'the input, a space and the rationale' in (tmp_path / 'saved' / 'README.md').read_text()


def test_special_pieces_are_written_as_the_card_says(tmp_path):
    rows = own_task(tmp_path / 'task', text='order {i} <pad> </s> {word}')
    record = run_and_save(
        make_spec(QUICK | dict(task=str(tmp_path / 'task'), student='scratch-32x1')), tmp_path / 'saved'
    )
    assert 'with a space after its first character' in (tmp_path / 'saved' / 'README.md').read_text() and record[
        'metrics'
    ]['special_pieces'] == len(rows)
    written = {r['id']: r['input'].replace('<pad>', '< pad>').replace('</s>', '< /s>') for r in rows}
    assert asked_as_the_card_says(tmp_path / 'saved', [written[i] for i in record['answers']]) == list(
        record['answers'].values()
    )


def test_a_saved_student_is_a_student(tmp_path):
    saved(tmp_path, student='scratch-32x1')
    assert make_student(str(tmp_path / 'saved'))[0].num_parameters()


# ---- answers as long as what was learned


@pytest.mark.parametrize('source', ['the teacher', 'the label of one row'])
def test_the_longest_answer_is_that_of_all_labels_learned(source, tmp_path):
    "Gold is a number; the teacher writes the equation, which is worth the same."
    rows = own_task(tmp_path / 'task', ('2', '5'), answer='equation')
    said = {'2': '(1 + 1)', '5': '((2 * 2) + 1)'}
    rationale_set(tmp_path / 'set', rows, rationale=lambda r: 'It says so.', label=lambda r: said[r['label']])
    record = run_and_save(
        make_spec(
            QUICK
            | dict(
                task=str(tmp_path / 'task'),
                teacher=str(tmp_path / 'set'),
                label_source='teacher',
                student='scratch-32x1',
                max_steps=120,
                eval_every=30,
            )
        ),
        tmp_path / 'saved',
    )
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / 'saved')
    assert record['generation']['max_new_tokens'] == 1 + max(len(tokenizer(x).input_ids) for x in said.values())
    assert record['metrics']['test_accuracy'] == 100.0 and set(record['answers'].values()) == set(said.values())


# ---- what was not scored is not saved


def test_a_student_that_answers_otherwise_is_not_saved(tmp_path, monkeypatch, main):
    own_task(tmp_path / 'task')
    spoil = saving.answer_as_scored

    def other(t5, n):
        spoil(t5, n)
        with torch.no_grad():
            t5.shared.weight.copy_(t5.shared.weight.flip(0))

    monkeypatch.setattr(saving, 'answer_as_scored', other)
    call = (
        'run',
        '--json',
        f'task={tmp_path / "task"}',
        *(f'{k}={v}' for k, v in (QUICK | dict(student='scratch-32x1')).items()),
    )
    status, out, err = main(*call, '--save', tmp_path / 'saved')
    last = err.strip().splitlines()[-1]
    assert status == 1 and not out and 'answers otherwise than was scored' in last and 'its record is kept in' in last
    assert sorted(p.name for p in tmp_path.iterdir()) == ['runs', 'task']
    (path,) = (tmp_path / 'runs').rglob('record.json')
    monkeypatch.setattr(runs, 'train_runs', lambda *a, **k: pytest.fail('trained'))
    status, out, _ = main(*call)
    assert status == 0 and json.loads(out)['key'] == json.loads(path.read_text())['key']


def test_as_good_as_equal_is_no_difference(tmp_path):
    "Two pieces of one embedding are told apart by no number; which comes first is not the student's."
    record, said = saved(tmp_path, student='scratch-32x1')
    folder = tmp_path / 'saved'
    other = record | dict(answers={i: 'another answer' for i in record['answers']})
    questions = [f'[label] {i}' for i in record['answers']]
    with pytest.raises(RuntimeError, match='answers otherwise'):
        saving.check_saved(folder, other, questions)
    t5 = AutoModelForSeq2SeqLM.from_pretrained(folder)
    with torch.no_grad():
        t5.shared.weight[:] = t5.shared.weight[5]
    t5.save_pretrained(folder)
    assert all(ahead < 1e-3 for _, ahead in ask_saved(folder, questions, 3))
    saving.check_saved(folder, other, questions)


def test_a_card_of_an_older_record(tmp_path):
    record, _ = saved(tmp_path, student='scratch-32x1')
    old = {k: v for k, v in record.items() if k != 'generation'}
    assert f'max_new_tokens={record["spec"]["max_target"]}' in model_card(old, 't5')
    assert f'max_new_tokens={record["generation"]["max_new_tokens"]}' in model_card(record, 't5')
