"Reasoning teachers: thoughts are kept apart, and are the rationale on request."

import json
import re
import sqlite3

import pytest
from stub_server import THOUGHTS, Stub, Thinks

from dsbs.data.tasks import load_task
from dsbs.teacher.extraction import count_words, sentences
from dsbs.teacher.sets import read_set

SENTENCES = [f'This is the thought of number {i}, which goes on for a while.' for i in range(40)]
THOUGHT = '\n'.join(['So the answer is no. Wait, it is not.', *SENTENCES, 'So the answer is yes.'])


@pytest.fixture
def extract(main, tmp_path):
    "Ask about 12 rows: (exit status, result, standard error, rows of the set, failures, card)."

    def call(stub, *more, out='set'):
        settings = ['--limit', '12', '--out', tmp_path / out, '--json', *more]
        status, printed, err = main('extract', 'same_kind', '--base-url', stub.url, '--model', 'm', *settings)
        card = tmp_path / out / 'train.card.json'
        files = [tmp_path / out / f'train.{kind}' for kind in ('jsonl', 'failures.jsonl')]
        rows = [[json.loads(line) for line in f.read_text().splitlines()] if f.is_file() else [] for f in files]
        return status, json.loads(printed), err, *rows, json.loads(card.read_text()) if card.is_file() else None

    return call


@pytest.mark.parametrize('form', THOUGHTS)
def test_thoughts_are_the_rationale_on_request(form, extract, tmp_path):
    with Thinks(form, THOUGHT, 'It is said. So the answer is yes.') as stub:
        status, printed, _, rows, _, card = extract(stub)
        assert (status, printed['kept'], printed['sent']) == (0, 12, 12)
        assert {(r['rationale'], r['label']) for r in rows} == {('It is said.', 'yes')}
        assert card['rationale'] == 'answer' and card['thinking']['answers'] == 12
        assert card['thinking']['words'] == count_words(THOUGHT) and 'shortened' not in card['thinking']
        status, printed, _, rows, _, card = extract(stub, '--rationale', 'thinking')
        assert (status, printed['kept'], printed['sent']) == (0, 12, 0), 'the answers are paid for already'
        (rationale,) = {r['rationale'] for r in rows}
        assert {r['label'] for r in rows} == {'yes'}
        assert sentences(rationale) == SENTENCES[-len(sentences(rationale)) :] and 'answer is' not in rationale
        assert 120 - count_words(SENTENCES[0]) < count_words(rationale) <= 120
        thinking = card['thinking']
        assert (card['rationale'], card['thinking_words'], thinking['shortened']) == ('thinking', 120, 1.0)
        assert thinking['kept_words'] == count_words(rationale) == card['quality']['rationale_words']['median']
        assert thinking['tokens'] == 12 * 90 if form == 'counted' else 12 * 90 < thinking['tokens'] <= 12 * 100
        assert extract(stub)[1]['sent'] == 0
    assert {r.rationale for r in read_set(tmp_path / 'set', load_task('same_kind'), 'train').values() if r.ok} == {
        'It is said.'
    }


@pytest.mark.parametrize('form', THOUGHTS)
def test_a_bare_answer_has_its_thoughts_as_the_rationale(form, extract):
    with Thinks(form, 'Both are birds. So the answer is no.') as stub:
        status, printed, err, rows, failures, _ = extract(stub)
        assert (status, printed['kept'], {f['reason'] for f in failures}) == (1, 0, {'no rationale'})
        status, printed, err, rows, failures, card = extract(stub, '--rationale', 'thinking')
        assert (status, printed['sent'], failures) == (0, 0, [])
        assert {(r['rationale'], r['label']) for r in rows} == {('Both are birds.', 'yes')}, 'the label of the answer'


@pytest.mark.parametrize('how', ['length', 'stop'])
@pytest.mark.parametrize('form', THOUGHTS)
def test_thoughts_that_are_cut_fail_with_their_reason(form, how, extract):
    cut = lambda text: how if len(text) % 2 else ''
    with Thinks(form, THOUGHT, cut=cut) as stub:
        status, printed, err, rows, failures, card = extract(stub, '--rationale', 'thinking', '--max-failed', '1')
        n = sum(bool(cut(text)) for text in stub.seen)
    apart = form in ('counted', 'field', 'parts')
    reason = 'cut short' if how == 'length' else 'empty' if apart else 'only thinking'
    assert 0 < n < 12 and [f['reason'] for f in failures] == [reason] * n and len(rows) == 12 - n
    assert card['quality']['reasons'] == {reason: n} and card['thinking']['answers'] == 12
    assert not {f['id'] for f in failures} & {r['id'] for r in rows}


def test_a_teacher_without_thoughts_says_what_would_help(extract):
    class Plain(Stub):
        pass

    with Plain() as stub:
        status, printed, err, rows, failures, card = extract(stub, '--rationale', 'thinking')
    assert status == 1 and {f['reason'] for f in failures} == {'no thinking'} and '--rationale answer' in err
    assert card['thinking'] == dict(answers=0, tokens=0, words=None)


def test_a_sentence_that_does_not_fit_is_not_cut(extract):
    with Thinks('tags', 'word ' * 50 + 'end.') as stub:
        status, printed, err, rows, failures, _ = extract(stub, '--rationale', 'thinking', '--thinking-words', '50')
        assert {f['reason'] for f in failures} == {'thinking too long'} and 'raise --thinking-words' in err
        status, printed, _, rows, _, _ = extract(stub, '--rationale', 'thinking', '--thinking-words', '51')
    assert (status, printed['sent']) == (0, 0) and {count_words(r['rationale']) for r in rows} == {51}


def test_another_choice_loses_no_rationale(extract, tmp_path):
    "A set is replaced by one of the other kind only where that has as many rows."
    with Thinks('tags', THOUGHT, 'Hm. So the answer is yes.') as stub:
        extract(stub)
        stub.answer = 'Hm.'
        [p.unlink() for p in (tmp_path / 'runs').glob('answers.sqlite*')]
        status, printed, err, rows, _, card = extract(stub, '--rationale', 'thinking', '--max-failed', '1')
    assert status == 1 and 'stays as it is' in err and card['rationale'] == 'answer' and len(rows) == 12


def test_a_script_without_spaces_is_shortened_by_its_characters(extract):
    thought = ''.join(f'これは{i}番目の文です。' for i in range(10, 60))
    with Thinks('field', thought) as stub:
        status, printed, _, rows, _, card = extract(stub, '--rationale', 'thinking', '--thinking-words', '40')
    (rationale,) = {r['rationale'] for r in rows}
    assert re.fullmatch('(これは[0-9]+番目の文です。)+', rationale) and rationale.endswith('これは59番目の文です。')
    assert 20 < count_words(rationale) <= 40


def test_the_store_keeps_the_thoughts(extract, tmp_path):
    with Thinks('field', THOUGHT, 'Hm. So the answer is yes.') as stub:
        extract(stub)
    with sqlite3.connect(tmp_path / 'runs' / 'answers.sqlite') as db:
        kept = [json.loads(answer) for (answer,) in db.execute('SELECT answer FROM answers')]
    assert len(kept) == 12 and {a['thinking'] for a in kept} == {THOUGHT}


@pytest.mark.parametrize('wrong', [('--rationale', 'both'), ('--thinking-words', '0')])
def test_wrong_choices_are_refused(main, wrong):
    status, out, err = main('extract', 'same_kind', '--base-url', 'http://127.0.0.1:9/v1', '--model', 'm', *wrong)
    assert status == 2 and not out and wrong[0] in err and len(err.strip().splitlines()) == 1
