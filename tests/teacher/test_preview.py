"A preview of an extraction: what it shows, what it writes, and what it pays."

import json

import pytest
from stub_server import Stub

from dsbs.data.tasks import load_task
from dsbs.teacher.questions import AnswerStore
from dsbs.teacher.sets import ExtractSettings, TeacherModel, ask_teacher, doubtful_rows, preview_teacher

CALL = ('extract', 'same_kind', '--model', 'm')


@pytest.fixture
def stub():
    with Stub() as server:
        yield server


def test_it_shows_prompt_answers_and_costs_and_writes_no_set(main, stub, tmp_path):
    out = tmp_path / 'set'
    call = (*CALL, '--base-url', stub.url, '--preview', '--out', out)
    status, text, err = main(*call, '--limit', '4', '--price', '0.5', '--json')
    assert status == 0, err
    found, rows = json.loads(text), load_task('same_kind')['train']
    assert [row['id'] for row in found['seen']] == rows['id'][:4] and not out.exists()
    assert found['seen'][0]['input'] in found['prompt'][-1]['content'] == found['seen'][0]['asked']
    assert all((row['rationale'], row['label'], row['tokens']) == ('Because.', 'yes', 30) for row in found['seen'])
    known = rows['label'][:4]
    assert [row['agrees'] for row in found['seen']] == [label == 'yes' for label in known]
    assert (found['quality']['labeled'], found['quality']['correct']) == (4, known.count('yes'))
    assert found['cost'] == dict(rows=720, tokens_per_row=30.0, tokens=21600, paid=120, money=10.8)
    assert (found['sent'], found['tokens']) == (4, 120)
    status, text, err = main(*call)
    assert status == 0 and 'Because.' in text and 'about 21,600 tokens' in text
    assert sum(stub.served.values()) == 20, 'twenty rows unless a limit is named, and the first four are paid already'


def test_the_whole_extraction_does_not_pay_again(main, stub, tmp_path):
    call = (*CALL, '--base-url', stub.url, '--out', tmp_path / 'set', '--json')
    assert main(*call, '--preview', '--limit', '5')[0] == 0
    status, text, err = main(*call, '--limit', '12')
    assert (json.loads(text)['sent'], json.loads(text)['kept']) == (7, 12)
    assert set(stub.served.values()) == {1}
    before = sorted(p.read_bytes() for p in (tmp_path / 'set').iterdir())
    for p in (tmp_path / 'runs').glob('answers.sqlite*'):
        p.unlink()
    shown = json.loads(main(*call, '--preview', '--limit', '12')[1])
    assert shown['sent'] == 0 and all(row['rationale'] == 'Because.' for row in shown['seen'])
    assert sorted(p.read_bytes() for p in (tmp_path / 'set').iterdir()) == before


def test_answers_that_cannot_be_read_are_shown_with_the_reason(tmp_path):
    task = load_task('same_kind')
    bad = {row['input']: fault for row, fault in zip(task['train'].select(range(3)), ('length', 'refusal', 'blank'))}
    with Stub(fault=lambda text: next((f for asked, f in bad.items() if asked in text), None)) as stub:
        found = preview_teacher(
            task, 'train', TeacherModel('m', stub.url), ExtractSettings(limit=6), tmp_path / 'set', folders=tmp_path
        )
    assert [row['reason'] for row in found['seen']] == ['cut short', 'refusal', 'empty', '', '', '']
    assert found['quality']['reasons'] == {'cut short': 1, 'empty': 1, 'refusal': 1}
    assert [row['agrees'] is None for row in found['seen']] == [True] * 3 + [False] * 3


def test_a_budget_ends_it(tmp_path, stub):
    task, settings = load_task('same_kind'), ExtractSettings(limit=9, budget=1)
    found = preview_teacher(task, 'train', TeacherModel('m', stub.url), settings, tmp_path / 'set', folders=tmp_path)
    assert found['stopped'] == 'budget' and found['cost']['tokens'] is None
    assert {row['reason'] for row in found['seen']} == {'not asked'}


def test_rows_that_cannot_both_be_right():
    texts = ['Is it up?', 'is IT  up?', 'Up it is, 7.', 'Is it up?', 'Is it down?', 'Is it down?']
    labels = ['yes', 'no', 'yes', None, 'no', None]
    rows = [dict(id=str(i), input=t, label=x) for i, (t, x) in enumerate(zip(texts, labels, strict=True))]
    assert doubtful_rows(rows) == dict(same_words=[['0', '1', '2', '3'], ['4', '5']], conflicting=[['0', '1', '3']])
    assert doubtful_rows(rows[4:]) == dict(same_words=[['4', '5']], conflicting=[])


def test_a_price_belongs_to_a_preview(main):
    status, out, err = main(*CALL, '--local', '--price', '2')
    assert (status, out, err.count('\n')) == (2, '', 1) and '--preview' in err


def test_samples_are_paid_for_each(tmp_path, stub):
    task, model, settings = load_task('same_kind'), TeacherModel('m', stub.url), ExtractSettings(limit=2, samples=3)
    found = preview_teacher(task, 'train', model, settings, tmp_path / 'set', folders=tmp_path)
    assert found['sent'] == 6 and found['cost']['tokens_per_row'] == 90.0
    assert [len(row['answers']) for row in found['seen']] == [3, 3]


def test_it_uses_the_answers_of_an_earlier_call(tmp_path, stub, monkeypatch):
    monkeypatch.setenv('DSBS_RUNS', str(tmp_path / 'runs'))
    task, model = load_task('same_kind'), TeacherModel('m', stub.url)
    ask_teacher(task, 'train', model, ExtractSettings(limit=3), tmp_path / 'set')
    assert len(AnswerStore(tmp_path / 'runs' / 'answers.sqlite')) == 3
    assert preview_teacher(task, 'train', model, ExtractSettings(limit=4), tmp_path / 'set')['sent'] == 1
