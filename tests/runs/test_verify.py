"""`dsbs verify`: a record that was made as it says comes out equal; one that was changed, or made of other data, does
not."""

import copy
import json
import random
from pathlib import Path

import pytest
from making import record_of

from dsbs.records import canonical_json, thinned, write_text
from dsbs.runs import run as runs
from dsbs.runs import verifying
from dsbs.runs.specs import ADDED, key_of, make_spec, recipe
from dsbs.runs.verifying import check_record

pytestmark = pytest.mark.numeric

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / 'reports' / 'results'
SPEC = dict(student='scratch-32x1', max_steps=20, eval_every=4, learning_rate=3e-3, batch_size=8, n_train=32)


@pytest.fixture(scope='module')
def made():
    return json.loads(canonical_json(record_of(make_spec(SPEC))))


@pytest.fixture
def record(made):
    return copy.deepcopy(made)


@pytest.fixture
def no_training(monkeypatch):
    monkeypatch.setattr(verifying, 'train_runs', lambda *args, **kw: pytest.fail('trained'))


def giving(record):
    "A training that gives this record."
    return lambda *args, **kw: [runs.Trained(copy.deepcopy(record), None, None)]


def call(main, path, record, *more):
    write_text(path, json.dumps(record, indent=1))
    status, out, err = main('verify', path, '--json', *more)
    return status, json.loads(out) if out else {}, err.strip().splitlines()[-1] if err else ''


def test_a_record_names_what_made_it(record):
    made = record['provenance']
    assert (
        {'commit', 'dirty', 'python', 'versions', 'machine', 'recipe', 'device', 'device_name', 'isa', 'prompts'}
        <= set(made)
        and made['machine']['processor']
        and made['prompts'] == {}
    )
    assert {'seed', 'subset_seed', 'data_seed', 'dtype', 'threads'} <= set(record['spec']) and all(
        len(record['data'][part]) == 64 for part in ('train', 'validation', 'test', 'teacher')
    )


def test_the_prompt_of_a_teacher_is_named(tmp_path):
    (tmp_path / 'train.card.json').write_text('{"task": "same_kind", "model": "m", "prompt": "abc"}')
    assert runs._prompts(str(tmp_path)) == {'train': 'abc'} and runs._prompts('') == {}


SINCE = (  # Metrics that an old record lacks
    'converged',
    'label_loss_constant',
    'label_loss_end',
    'label_loss_slope',
    'likeliest_label_accuracy',
    'rationale_accuracy',
    'rationale_token_accuracy',
)


@pytest.mark.parametrize('form', ['whole', 'published', 'before there was an isa'])
def test_a_record_as_it_was_made_is_equal(form, record, main, tmp_path):
    """From its file, whole or thinned, by its key; nothing is written into the runs folder, and the old record is not
    taken for the new one."""
    if form == 'published':
        record = thinned(record)
    if form.startswith('before'):
        for name in ('device_name', 'isa', 'prompts', 'students'):
            del record['provenance'][name]
        for name in ADDED:
            del record['spec'][name]
        for name in SINCE:
            del record['metrics'][name]
        del record['answers'], record['correct'], record['provenance']['machine']['model']
    status, told, last = call(main, tmp_path / 'record.json', record)
    assert (
        status == 0
        and told['equal']
        and told['rerun']
        and not told['differences']
        and told['machine']['kind'] == 'same'
    ), (told, last)
    assert {'key', 'equal', 'differences', 'machine', 'recorded_commit', 'this_commit'} <= set(told) and not (
        tmp_path / 'runs'
    ).exists()
    lacks = ['answers', 'correct', *(f'metrics.{name}' for name in SINCE)] if form.startswith('before') else []
    assert told['not_recorded'] == lacks and bool(told['machine']['not_recorded']) == bool(lacks)


def test_a_record_is_found_by_its_key(record, main, tmp_path):
    path = tmp_path / 'runs' / record['key'] / 'record.json'
    write_text(path, canonical_json(record))
    before = path.read_bytes()
    status, out, err = main('verify', record['key'][:8])
    assert status == 0 and 'all numbers are equal' in out and path.read_bytes() == before, err


def claims(record, more):
    "More questions, in a record that does not say which."
    m = record['metrics']
    m['test_accuracy'] = round(m['test_accuracy'] + 100 * more / m['n_test'], 4)
    del record['correct']


def digit(value):
    return float(str(value)[:-1] + str((int(str(value)[-1]) + 1) % 10))


FOUND_AT_ONCE = {
    'a seed': lambda r: r['spec'].update(seed=1),
    'the learning rate': lambda r: r['spec'].update(learning_rate=0.0031),
    'the method': lambda r: r['spec'].update(method='standard'),
    'a digit of the key': lambda r: r.update(key=('1' if r['key'][0] == '0' else '0') + r['key'][1:]),
    'a data hash': lambda r: r['data'].update(train='0' * 64),
    'a hash left out': lambda r: r['data'].pop('teacher'),
    'a digit of an accuracy': lambda r: r['metrics'].update(test_accuracy=digit(r['metrics']['test_accuracy'])),
    'a question more than the bits say': lambda r: r['metrics'].update(
        test_accuracy=round(r['metrics']['test_accuracy'] + 100 / r['metrics']['n_test'], 4)
    ),
    'a bit': lambda r: r.update(correct=f'{int(r["correct"][0], 16) ^ 8:x}{r["correct"][1:]}'),
    'a digit of the bits left out': lambda r: r.update(correct=r['correct'][1:]),
    'bits that are none': lambda r: r.update(correct=[1, 0]),
    'the validation accuracy': lambda r: r['metrics'].update(
        validation_accuracy=r['metrics']['validation_accuracy'] + 0.5
    ),
    'the best step': lambda r: r['metrics'].update(best_step=5),
    'steps': lambda r: r['metrics'].update(steps=9),
    'an evaluation left out': lambda r: r['evaluations'].pop(),
    'history left out': lambda r: r.update(history=r['history'][:3]),
}


@pytest.mark.parametrize('what', FOUND_AT_ONCE)
def test_a_tampered_record_is_found_without_training(what, record, main, tmp_path, no_training):
    FOUND_AT_ONCE[what](record)
    status, told, last = call(main, tmp_path / 'record.json', record)
    assert (
        status == 1
        and not told['equal']
        and told['differences']
        and not told['rerun']
        and 'contradicts itself' in last
        and last.startswith('dsbs: ')
    )


FOUND_BY_TRAINING = {
    'a question more': (
        lambda r: claims(r, 1),
        'metrics.test_accuracy',
        True,
    ),
    'ten points more': (
        lambda r: claims(r, r['metrics']['n_test'] // 10),
        'metrics.test_accuracy',
        False,
    ),
    'which questions were right': (lambda r: r.update(correct=r['correct'][4:] + r['correct'][:4]), 'correct', True),
    'a digit of a loss': (
        lambda r: r['history'][3].update(loss=round(r['history'][3]['loss'] + 1e-4, 5)),
        'history[4].loss',
        True,
    ),
    'a digit of a loss between': (
        lambda r: r['history'][2].update(loss=round(r['history'][2]['loss'] + 1e-4, 5)),
        'history[3].loss',
        True,
    ),
    'the first loss': (lambda r: r['history'][0].update(loss=r['history'][0]['loss'] + 0.1), 'history[1].loss', False),
    'the tokens of rationales': (
        lambda r: r['metrics'].update(rationale_token_accuracy=r['metrics']['rationale_token_accuracy'] + 20),
        'metrics.rationale_token_accuracy',
        True,
    ),
    'an answer': (lambda r: r['answers'].update({next(iter(r['answers'])): 'perhaps'}), 'answers.', True),
    'the parameters': (lambda r: r['metrics'].update(parameters=1), 'metrics.parameters', False),
}


@pytest.mark.parametrize('what', FOUND_BY_TRAINING)
def test_a_tampered_number_is_found_by_training_again(what, record, main, tmp_path, made, monkeypatch):
    monkeypatch.setattr(verifying, 'train_runs', giving(made))  # what training again gives, as the test above shows
    change, field, near = FOUND_BY_TRAINING[what]
    change(record)
    status, told, last = call(main, tmp_path / 'record.json', record)
    assert (
        status == 1
        and len(told['differences']) == 1
        and told['differences'][0]['field'].startswith(field)
        and set(told['differences'][0]) == {'field', 'recorded', 'rerun'}
    )
    assert (
        told['rerun']
        and not told['equal']
        and not told['holds']
        and told['within_tolerance'] == near
        and told['beyond'] == told['differences']
    )
    assert 'compared to the last digit' in last


@pytest.mark.parametrize('what', FOUND_BY_TRAINING)
@pytest.mark.parametrize('why', ['another machine', 'another instruction set', 'beside others', 'resumed elsewhere'])
def test_where_digits_may_differ_what_is_near_holds(what, why, record, main, tmp_path, made, monkeypatch):
    monkeypatch.setattr(verifying, 'train_runs', giving(made))
    change, field, near = FOUND_BY_TRAINING[what]
    change(record)
    changed = {
        'another machine': dict(machine=record['provenance']['machine'] | dict(processor='another')),
        'another instruction set': dict(isa='another'),
        'beside others': dict(students=6),
        'resumed elsewhere': dict(resumed=[dict(step=4, exact=False, why='torch')]),
    }
    record['provenance'].update(changed[why])
    status, told, last = call(main, tmp_path / 'record.json', record)
    assert (
        told['holds'] == near
        and status == (not near)
        and not told['equal']
        and told['compared'] == 'within tolerance'
        and told['why']
    )
    if not near:
        assert 'compared within tolerance' in last and field in last


def test_the_tolerance_is_stated(record, main, tmp_path, made, monkeypatch):
    monkeypatch.setattr(verifying, 'train_runs', giving(made))
    record['provenance']['isa'] = 'another'
    record['history'][0]['loss'] *= 1.0005
    write_text(tmp_path / 'record.json', json.dumps(record))
    status, out, err = main('verify', tmp_path / 'record.json')
    assert status == 0, err
    assert (
        'another kind of machine' in out
        and 'losses of the first 10 updates to 0.001' in out
        and 'test accuracy to 4.47 points' in out
        and '1 numbers differ, 0 of them more than they may' in out
    )


def test_an_old_record_that_may_have_had_others_beside_it(record, no_training):
    "Before a record told how many trained side by side, one without dropout may have been one of several."
    del record['provenance']['students']
    same = dict(kind='same')
    assert verifying._why_digits_differ(record, same) == []
    record['spec']['dropout'] = 0.0
    assert verifying._why_digits_differ(record, same) == ['trained beside other students']


def test_another_machine_is_named(record, main, tmp_path, made, monkeypatch):
    monkeypatch.setattr(verifying, 'train_runs', giving(made))
    record['provenance']['machine']['processor'] = 'another'
    record['provenance']['versions']['torch'] = '2.13.1'
    record['provenance']['device'] = 'cuda:0'
    record['history'][3]['loss'] += 1e-3
    status, told, last = call(main, tmp_path / 'record.json', record)
    assert (
        status == 0
        and told['machine']['kind'] == 'different'
        and {d['field'] for d in told['machine']['differences']} == {'machine.processor', 'versions.torch', 'device'}
        and not told['equal']
    )


@pytest.mark.parametrize(
    'change, words',
    [
        (lambda r: r['provenance'].update(recipe=1), ['made by recipe 1', 'check out commit']),
        (lambda r: r['spec'].update(max_stepz=3), ['unknown setting', 'max_steps']),
        (lambda r: r['spec'].update(method='magic'), ["unknown method 'magic'"]),
        (lambda r: r['spec'].update(task='anli1'), ['is missing']),
        (lambda r: r.pop('metrics'), ['lacks metrics']),
        (lambda r: r.pop('evaluations'), ['lacks evaluations']),
    ],
    ids=['recipe', 'setting', 'method', 'data missing', 'no metrics', 'no evaluations'],
)
def test_what_cannot_be_verified_is_a_wrong_call(change, words, record, main, tmp_path, no_training):
    change(record)
    status, told, last = call(main, tmp_path / 'record.json', record, '--data-dir', tmp_path / 'nowhere')
    assert status == 2 and not told and all(w in last for w in words), last


def test_other_data_are_a_wrong_call(record, main, tmp_path, no_training):
    "A record that fits itself, made of rows that are not those at hand."
    record['data']['train'] = '0' * 64
    record['key'] = key_of(make_spec(record['spec']), 'same_kind', record['data'])
    status, told, last = call(main, tmp_path / 'record.json', record)
    assert status == 2 and 'the data here are not those of the record: train of same_kind differ' in last


@pytest.mark.parametrize(
    'name, words',
    [
        ('nowhere.json', ['no file, and no key']),
        ('abc', ['first 8 digits']),
        ('0' * 8, ['no record of']),
        ('../../etc/passwd.json', ['no file, and no key']),
        (ROOT / 'settings.ini', ['not JSON']),
        (RESULTS / 'quick.jsonl', ['stands for']),
    ],
    ids=str,
)
def test_what_is_no_record_is_a_wrong_call(name, words, main, no_training):
    status, out, err = main('verify', name)
    assert status == 2 and not out and len(err.splitlines()) == 1 and all(w in err for w in words), err


def test_two_records_of_one_key_that_differ_are_told(record, main, tmp_path, no_training, monkeypatch):
    for i in range(2):
        record['metrics']['tokens'] += 1
        write_text(tmp_path / 'runs' / (record['key'] + 'ab' * i) / 'record.json', canonical_json(record))
    status, out, err = main('verify', record['key'][:9])
    assert status == 2 and 'that differ' in err


def published():
    return [
        json.loads(line)
        for file in sorted(RESULTS.glob('*.jsonl'))
        for line in file.read_text(encoding='utf-8').splitlines()
    ]


def test_the_accuracies_of_every_published_record_fit():
    for r in published():
        assert all(said == fits for _, said, fits in verifying._of_accuracies(r['metrics'], r['evaluations'])), r['key']


def test_every_published_record_fits_itself():
    """Key, settings and data's hashes of each that this code's recipe made; and one digit changed in any of them no
    longer does."""
    rows = [r for r in published() if r['provenance']['recipe'] == recipe(make_spec(ADDED | r['spec']))]
    if not rows:
        pytest.skip('nothing is published yet that this code would make again')
    for r in rows:
        assert key_of(make_spec(ADDED | r['spec']), r['spec']['task'], r['data']) == r['key'], r['key']
    for r in random.Random(1).sample(rows, min(20, len(rows))):
        assert (
            key_of(make_spec(ADDED | r['spec'] | dict(seed=r['spec']['seed'] + 1)), r['spec']['task'], r['data'])
            != r['key']
        )
    for r in [r for r in rows if not r['spec']['stand_in']][:3]:
        assert check_record(r) == []


@pytest.mark.slow
def test_a_published_record_is_made_again(main):
    "The cheapest. To the last digit where that is promised, and within tolerance elsewhere."
    rows = [r for r in published() if r['provenance']['recipe'] == recipe(make_spec(ADDED | r['spec']))]
    if not rows:
        pytest.skip('nothing is published yet that this code would make again')
    cheapest = min(rows, key=lambda r: r['time']['seconds'])
    status, out, err = main('verify', cheapest['key'], '--json')
    told = json.loads(out)
    assert told['rerun'] and told['holds'] and status == 0, err
