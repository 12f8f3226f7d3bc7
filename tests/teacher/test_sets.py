"Rationale sets: what ties them to their task, what is refused, and what a new call may not take away."

import json
import unicodedata

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsbs.data.examples import input_hash
from dsbs.data.tasks import load_task
from dsbs.records import UsageError
from dsbs.runs.specs import RunSpec, prepare
from dsbs.teacher.extraction import Reading
from dsbs.teacher.prompts import prompt_of
from dsbs.teacher.questions import Answer, AnswerStore
from dsbs.teacher.sets import ExtractSettings, extract, read_set, set_name

TOML = 'name = "signs"\ninstruction = "Say which."\nanswer = "label"\nlabels = ["low", "high"]\n'


class Teacher:
    "Always right, and its rationale names the input; says nothing of use where `mute` says so."

    endpoint = 'here'

    def __init__(self, model='m', mute=lambda text: False):
        self.model, self.mute, self.asked = model, mute, []

    async def ask(self, question, sampling):
        asked = question.asked if isinstance(question.asked, str) else question.asked[-1]['content']
        text = asked.rsplit('Q: ', 1)[1].removesuffix('\nA:')
        self.asked.append(text)
        if self.mute(text):
            return Answer('No idea.', prompt_tokens=9, completion_tokens=3)
        label = 'high' if 'up' in text else 'low'
        return Answer(f'The text says "{text}". So the answer is {label}.', prompt_tokens=9, completion_tokens=9)


def lines(rows):
    return ''.join(json.dumps(r, ensure_ascii=False) + '\n' for r in rows)


def said(i):
    return f'case {i} is {"up" if i % 2 else "down"}'


class Away(Teacher):
    "A server that is not there."

    async def ask(self, question, sampling):
        raise UsageError('no such model')


@pytest.fixture
def mine(tmp_path):
    "A task folder with three files, and what changes or reads it."

    class Mine:
        folder, out = tmp_path / 'task', tmp_path / 'set'
        store = tmp_path / 'answers.sqlite'

        def __init__(self):
            self.folder.mkdir()
            (self.folder / 'task.toml').write_text(TOML)
            for split, first, n in (('train', 0, 20), ('validation', 100, 4), ('test', 200, 4)):
                self.write(split, [dict(input=said(first + i), label='high' if i % 2 else 'low') for i in range(n)])

        def write(self, split, rows):
            (self.folder / f'{split}.jsonl').write_text(lines(rows), encoding='utf-8')

        def rows(self, split='train'):
            return [
                json.loads(line) for line in (self.folder / f'{split}.jsonl').read_text(encoding='utf-8').splitlines()
            ]

        def change(self, change, split='train'):
            rows = self.rows(split)
            self.write(split, change(rows) or rows)

        def task(self):
            return load_task(str(self.folder))

        def extract(self, split='train', teacher=None, **how):
            teacher, task = teacher or Teacher(), self.task()
            store = AnswerStore(self.store)
            card = extract(task, split, teacher, store, self.out, ExtractSettings(**how))
            store.close()
            return card, sorted(teacher.asked)

        def set_rows(self, split='train'):
            return [json.loads(line) for line in (self.out / f'{split}.jsonl').read_text(encoding='utf-8').splitlines()]

        def forget(self):
            for p in tmp_path.glob('answers.sqlite*'):
                p.unlink()

        def read(self, split='train'):
            return read_set(self.out, self.task(), split)

        def by_hand(self, rows, split='train', card='{"task": "signs", "model": "Ada"}'):
            self.out.mkdir(exist_ok=True)
            text = rows if isinstance(rows, (str, bytes)) else lines(rows)
            (self.out / f'{split}.jsonl').write_bytes(text if isinstance(text, bytes) else text.encode())
            if card is not None:
                (self.out / f'{split}.card.json').write_text(card, encoding='utf-8')

        def refused(self, *words, split='train'):
            with pytest.raises(UsageError) as e:
                self.read(split)
            message = str(e.value)
            assert '\n' not in message and all(w in message for w in words), message

    return Mine()


def own(mine, split='train'):  # every rationale is of its own row
    task = mine.task()
    return all(text in r.rationale for r, text in zip(mine.read(split).values(), task[split]['input']) if r.ok)


def test_a_set_says_what_it_was_made_for(mine):
    card, asked = mine.extract()
    assert len(asked) == 20 and card['label_set'] == ['low', 'high'] and card['prompt'] == prompt_of(mine.task()).hash
    assert [r['input_sha256'] for r in mine.set_rows()] == [input_hash(said(i)) for i in range(20)] and own(mine)


def swap(rows, a, b):
    rows[a], rows[b] = rows[b], rows[a]


@pytest.mark.parametrize(
    'change, line, new',
    [
        (lambda rows: rows[1:], 1, 0),
        (lambda rows: rows[:7] + rows[8:], 8, 0),
        (lambda rows: rows[:5] + [dict(input='a new one, up', label='high')] + rows[5:], 6, 1),
        (lambda rows: rows[::-1], 1, 0),
        (lambda rows: swap(rows, 3, 9), 4, 0),
        (lambda rows: rows[2].update(input='case 2 is downn'), 3, 1),
        (lambda rows: rows[2].update(input='Case 2 is down'), 3, 1),
    ],
    ids=['first deleted', 'one deleted', 'one inserted', 'reordered', 'swapped', 'typo', 'case'],
)
def test_rows_that_moved_or_changed_are_named_and_only_new_ones_asked(mine, change, line, new):
    mine.extract()
    mine.change(change)
    mine.refused(f'train.jsonl:{line}: ', f"'signs-train-{line:06d}'", 'extract again', 'only changed rows are asked')
    mine.forget()  # the store is gone: what is known stands in the set
    card, asked = mine.extract()
    assert len(asked) == new
    assert card['kept'] == card['rows'] == len(mine.rows())
    assert card['reused'] == len(mine.rows()) - new
    assert own(mine)
    assert all(r.ok for r in mine.read().values())


@pytest.mark.parametrize(
    'change',
    [
        lambda t: unicodedata.normalize('NFD', t),
        lambda t: t.replace('\n', '\r\n'),
        lambda t: t + ' ',
    ],
    ids=['NFD', 'CRLF', 'a space after'],
)
def test_inputs_that_look_the_same_are_the_same(mine, change):
    mine.change(lambda rows: [r | dict(input=r['input'] + '\nà côté') for r in rows])
    mine.extract()
    mine.change(lambda rows: [r | dict(input=change(r['input'])) for r in rows])
    mine.forget()
    assert all(r.ok for r in mine.read().values()) and mine.extract()[1] == []


def test_ids_of_their_own_may_move_but_not_change_hands(mine):
    mine.change(lambda rows: [r | dict(id=f'r{i}') for i, r in enumerate(rows)])
    mine.extract()
    mine.change(lambda rows: rows[:0:-1])
    assert own(mine) and len(mine.read()) == 19
    hands = dict(r3='r4', r4='r3')
    mine.change(lambda rows: [r | dict(id=hands.get(r['id'], r['id'])) for r in rows])
    mine.refused("train.jsonl:4: the id 'r3'")


def test_another_label_set_another_prompt_another_name(mine):
    mine.extract()
    toml = mine.folder / 'task.toml'
    toml.write_text(TOML.replace('"low", "high"', '"low", "high", "middle"'))
    mine.refused('train.card.json', 'labels high, low', 'now has high, low, middle', 'extract again')
    toml.write_text(TOML.replace('Say which.', 'Say which it is.'))
    mine.refused('train.card.json', 'another prompt', 'extract again')
    toml.write_text(TOML.replace('"signs"', '"sign"'))
    mine.refused("made for task 'signs', not 'sign'")
    toml.write_text(TOML)
    assert own(mine)
    (mine.folder / 'exemplars.jsonl').write_text(lines([dict(input='x', rationale='Up it is.', label='high')]))
    mine.refused('another prompt')
    card = mine.out / 'train.card.json'
    card.write_text(json.dumps({k: v for k, v in json.loads(card.read_text()).items() if k != 'prompt'}))
    assert own(mine)


def test_files_of_another_split(mine):
    mine.extract()
    mine.extract('validation')
    for kind in ('jsonl', 'card.json', 'failures.jsonl'):
        (mine.out / f'validation.{kind}').replace(mine.out / f'train.{kind}')
    mine.refused("made for split 'validation', not 'train'")
    (mine.out / 'train.card.json').write_text('{"task": "signs", "model": "m"}')
    mine.refused("none of its 4 ids, such as 'signs-validation-000001'", "signs train, such as 'signs-train-000001'")


def test_a_new_call_takes_nothing_away(mine):
    mine.extract()
    before = mine.set_rows()
    mine.forget()
    card, asked = mine.extract(limit=3)
    assert (card['requested'], card['kept'], card['rows'], asked, mine.set_rows()) == (3, 3, 20, [], before)
    mine.forget()
    assert mine.extract(teacher=Teacher(mute=lambda text: True))[1] == [] and mine.set_rows() == before
    mine.forget()
    card, asked = mine.extract(max_tokens=999)
    assert asked == [] and mine.set_rows() == before
    mine.change(lambda rows: rows + [dict(input='new, up')])
    mine.forget()
    card, asked = mine.extract(budget=1)
    assert (card['stopped'], card['rows'], asked, mine.set_rows()) == ('budget', 20, [], before)
    card, asked = mine.extract(teacher=Teacher(mute=lambda text: 'new' in text))
    assert (asked, card['failed'], mine.set_rows()) == (['new, up'], 1, before)
    mine.forget()
    assert (mine.extract(limit=5)[0]['failed'], mine.set_rows()) == (0, before)
    assert mine.read()['signs-train-000021'] == Reading(reason='no marker')  # what failed before is still named


@pytest.mark.parametrize(
    'how',
    [
        dict(limit=3, samples=3),
        dict(limit=3, temperature=0.5),
        dict(limit=3, asked_as='completion'),
        dict(teacher=Teacher(mute=lambda text: '7' in text), temperature=0.5),
    ],
    ids=['samples', 'temperature', 'form', 'one fails'],
)
def test_a_set_is_not_replaced_by_an_emptier_one_asked_in_another_way(mine, how):
    mine.extract()
    before = {p.name: p.read_bytes() for p in mine.out.iterdir()}
    card, asked = mine.extract(**how)
    assert asked
    assert 'stays as it is, with 20 rationales' in card['unwritten']
    assert 'name another folder with --out' in card['unwritten']
    assert {p.name: p.read_bytes() for p in mine.out.iterdir()} == before and own(mine)


def test_a_full_set_of_another_prompt_replaces_the_old_one(mine):
    mine.extract()
    (mine.folder / 'exemplars.jsonl').write_text(lines([dict(input='x', rationale='Up it is.', label='high')]))
    card, asked = mine.extract(limit=19)
    assert card['unwritten'] and len(asked) == 19
    mine.refused('another prompt')
    card, asked = mine.extract()
    assert not card['unwritten'] and len(asked) == 1 and own(mine)


def test_a_call_that_breaks_off_leaves_the_set(mine):
    class Dead(Teacher):
        async def ask(self, question, sampling):
            raise UsageError('the server is gone')

    mine.extract()
    before = {p.name: p.read_bytes() for p in mine.out.iterdir()}
    mine.change(lambda rows: rows + [dict(input='new, up')])
    with pytest.raises(UsageError, match='gone'):
        mine.extract(teacher=Dead())
    assert {p.name: p.read_bytes() for p in mine.out.iterdir()} == before


def test_a_set_half_written_is_noticed_or_the_same(mine, monkeypatch):
    import dsbs.teacher.sets

    mine.extract(limit=10)

    def broken(path, text):
        raise OSError('no space left')

    with monkeypatch.context() as m:
        m.setattr(dsbs.teacher.sets, 'write_text', broken)
        with pytest.raises(OSError):
            mine.extract()
        # more rows, the same card: they say themselves what they are about
        assert own(mine)
        assert sum(r.ok for r in mine.read().values()) == 20
        with pytest.raises(OSError):
            mine.extract(temperature=0.5)
    mine.refused('no train.card.json')  # another way of asking: the old card is gone
    card, asked = mine.extract(temperature=0.5)
    assert not asked and own(mine)


def test_a_set_of_before_hashes_is_not_trusted_but_its_answers_are_kept(mine):
    mine.extract()
    old = [{k: v for k, v in r.items() if k != 'input_sha256'} for r in mine.set_rows()]
    mine.by_hand(old, card=json.dumps(dict(task='signs', model='m', prompt='x')))
    mine.change(lambda rows: rows[1:])
    assert mine.extract()[1] == [] and own(mine) and len(mine.set_rows()) == 19


HAND = [
    dict(id=f'signs-train-{i + 1:06d}', rationale='It says so.', label='high' if i % 2 else 'low') for i in range(20)
]


def test_a_set_by_hand_is_read_and_said_to_rest_on_its_ids(mine, capsys):
    mine.by_hand(HAND)
    read = mine.read()
    mine.read()
    assert read['signs-train-000002'] == Reading('It says so.', 'high') and set_name(mine.out) == 'Ada'
    err = capsys.readouterr().err
    assert err.count('\n') == 1 and 'by their ids alone' in err
    mine.by_hand([r | dict(input=said(i)) for i, r in enumerate(HAND)])
    mine.read()
    assert not capsys.readouterr().err
    mine.by_hand([r | dict(input=said(i + (i > 6))) for i, r in enumerate(HAND)])
    mine.refused("train.jsonl:8: the id 'signs-train-000008'", 'another input')


def test_a_set_extended_by_hand(mine, capsys):
    mine.extract(limit=10)
    mine.by_hand(mine.set_rows() + HAND[10:], card=None)
    assert all(r.ok for r in mine.read().values()) and 'by their ids alone' in capsys.readouterr().err


def test_some_ids_of_a_set_may_be_strange_and_are_counted(mine, capsys):
    mine.by_hand(HAND + [dict(id='else', rationale='So.', label='low')])
    mine.read()
    assert "1 of 21 ids are those of no row of signs, such as 'else'" in capsys.readouterr().err


def test_one_file_may_hold_the_ids_of_all_splits(mine):
    others = [f'signs-{s}-{i + 1:06d}' for s in ('validation', 'test') for i in range(4)]
    every = [r | dict(votes=1, others=[]) for r in HAND + [dict(id=i, rationale='So.', label='low') for i in others]]
    for split in ('train', 'validation', 'test'):
        mine.by_hand(every, split, card='{"task": "signs", "model": "exact", "prompt": "x"}')
    for split in ('train', 'validation', 'test'):
        assert all(r.ok for r in mine.read(split).values())


@pytest.mark.parametrize(
    'content',
    [
        b'\xef\xbb\xbf' + lines(HAND).encode(),
        lines(HAND).replace('\n', '\r\n'),
        '\n' + lines(HAND).replace('\n', '\n\n'),
        lines(HAND).rstrip(),
    ],
    ids=['BOM', 'CRLF', 'blank lines', 'no last line end'],
)
def test_sets_as_editors_save_them(mine, content):
    mine.by_hand(content, card='\ufeff{"task": "signs",\r\n "model": "Ada"}')
    assert all(r.ok for r in mine.read().values())


@pytest.mark.parametrize(
    'change, words',
    [
        (dict(rationale=None), ["train.jsonl:3: field 'rationale' should be a text, found None"]),
        (dict(rationale=' '), [":3: field 'rationale' is empty"]),
        (dict(rationale=['a']), [":3: field 'rationale' should be a text"]),
        (dict(label='LOW'), [":3: the label 'LOW' is none of low, high; did you mean 'low'?"]),
        (dict(label='medium'), [":3: the label 'medium' is none of low, high"]),
        (dict(label=1), [":3: field 'label' should be a text"]),
        (dict(label=None), [':3: ', "'label'"]),
        (dict(id='signs-train-000001'), [":3: the id 'signs-train-000001' stands on line 1 already"]),
        (dict(id=1.5), [":3: field 'id'"]),
        (dict(id=None), [":3: field 'id'"]),
        (dict(why='x'), [":3: unknown field 'why': the fields are id, rationale, label"]),
        (dict(rational='x'), [":3: unknown field 'rational': did you mean 'rationale'?"]),
        (dict(votes='many'), [":3: field 'votes' should be a whole number"]),
        (dict(others='x'), [":3: field 'others' should be a list"]),
        (dict(input=5), [":3: field 'input' should be a text"]),
        (dict(input_sha256='0'), [":3: the id 'signs-train-000003'", 'another input']),
    ],
    ids=lambda x: str(x)[:40] if isinstance(x, dict) else '',
)
def test_a_mistake_in_a_line_of_a_set(mine, change, words):
    mine.by_hand([r | change if i == 2 else r for i, r in enumerate(HAND)])
    mine.refused(*words)


@pytest.mark.parametrize('field', ['id', 'rationale', 'label'])
def test_a_field_that_is_not_there(mine, field):
    mine.by_hand([{k: v for k, v in r.items() if k != field} if i == 2 else r for i, r in enumerate(HAND)])
    mine.refused(f"train.jsonl:3: no field '{field}'")


@pytest.mark.parametrize(
    'content, words',
    [
        ('id,rationale,label\n1,So.,low\n', ['train.jsonl:1: looks like CSV', '"rationale"']),
        (json.dumps(HAND), ['train.jsonl:1: a JSON array', '"rationale"']),
        ('', ['no rows']),
        ('{"id": 1', [':1: not JSON']),
        (lines(HAND[:2]) + '[1]\n', [':3: expected an object, found list']),
        (lines(HAND).encode('utf-16'), ['UTF-16']),
        (lines(HAND[:1]).encode() + '{"id": "é"}'.encode('latin-1'), [':2: not UTF-8']),
    ],
    ids=lambda x: ascii(x)[:20] if not isinstance(x, list) else '',
)
def test_a_set_of_another_form(mine, content, words):
    mine.by_hand(content)
    mine.refused(*words)


@pytest.mark.parametrize(
    'card, words',
    [
        (None, ['no train.card.json beside train.jsonl', '{"task": "levels", "model": "who wrote the rationales"}']),
        ('{"task": "signs"}', ["train.card.json: no field 'model'", '"model"']),
        ('{"model": "Ada"}', ["no field 'task'"]),
        ('{"task": "signs", "model": ""}', ["'model' is empty"]),
        ('{"task": "signs", "model": 5}', ["'model' should be a text"]),
        ('["signs"]', ['expected an object, found list']),
        ('task: signs', ['train.card.json: not JSON']),
        ('', ['not JSON']),
        ('{"task": "other", "model": "Ada"}', ["made for task 'other', not 'signs'"]),
    ],
)
def test_a_mistake_in_a_card(mine, card, words):
    mine.by_hand(HAND, card=card)
    mine.refused(*words)


def test_failures_by_hand(mine):
    mine.by_hand(HAND[:10])
    lost = mine.out / 'train.failures.jsonl'
    lost.write_text(lines([dict(id='signs-train-000015', reason='refusal')]))
    assert mine.read()['signs-train-000015'].reason == 'refusal'
    assert mine.read()['signs-train-000016'].reason == 'not asked'
    lost.write_text(lines([dict(id='signs-train-000015')]))
    mine.refused("train.failures.jsonl:1: no field 'reason'")
    lost.write_text('')
    assert mine.read()['signs-train-000001'].ok


def test_ids_may_be_numbers_and_are_compared_in_one_form(mine):
    mine.change(lambda rows: [r | dict(id=i if i else 'ca\u0301') for i, r in enumerate(rows)])
    mine.by_hand([r | dict(id=i if i % 2 else str(i) if i else '\u0063\u00e1') for i, r in enumerate(HAND)])
    assert all(r.ok for r in mine.read().values())


def test_equations_of_a_set_must_be_readable(mine):
    (mine.folder / 'task.toml').write_text('name = "signs"\ninstruction = "Count."\nanswer = "equation"\n')
    mine.change(lambda rows: [r | dict(label='2') for r in rows], 'train')
    for split in ('validation', 'test'):
        mine.change(lambda rows: [r | dict(label='2') for r in rows], split)
    mine.by_hand([r | dict(label='1 × 2') for r in HAND])
    assert mine.read()['signs-train-000001'].label == '1 × 2'
    mine.by_hand([r | dict(label='two') for r in HAND])
    mine.refused(":1: the label 'two' is not an equation")


def test_all_files_that_a_run_will_read_are_checked_before_it_trains(mine):
    mine.by_hand(HAND)
    spec = RunSpec(task=str(mine.folder), teacher=str(mine.out))
    prepare(spec)
    mine.by_hand([dict(id='signs-test-000001', rationale=None, label='low')], 'test')
    with pytest.raises(UsageError, match='test.jsonl:1: field .rationale.'):
        prepare(RunSpec(task=str(mine.folder), teacher=f'{mine.out}/'))
    (mine.out / 'test.jsonl').unlink()
    (mine.out / 'test.card.json').write_text('{')
    with pytest.raises(UsageError, match='test.card.json: not JSON'):
        prepare(RunSpec(task=str(mine.folder), teacher=f'{mine.out}//'))


def test_extract_names_what_is_wrong_with_what_lies_there_before_it_asks(mine):
    mine.by_hand('nonsense', card='{"task": "signs", "model": "m"}')
    teacher = Teacher()
    for change in (lambda: None, lambda: mine.by_hand(HAND, card='{"task": "signs"}')):
        change()
        with pytest.raises(UsageError):
            mine.extract(teacher=teacher)
    assert not teacher.asked


def test_a_minimal_set_from_the_command_line(mine, main):
    mine.by_hand(HAND)
    call = ['run', f'task={mine.folder}', 'student=scratch-16x2', 'max_steps=2', 'learning_rate=5e-3']
    status, out, err = main(*call, f'teacher={mine.out}', '--json')
    assert status == 0
    assert json.loads(out)['metrics']['n_rationales'] == 20
    assert json.loads(out)['teacher'] == 'Ada'
    assert err.count('by their ids alone') == 1
    mine.change(lambda rows: rows[1:])
    mine.by_hand([r | dict(input=said(i)) for i, r in enumerate(HAND)])
    status, out, err = main(*call, f'teacher={mine.out}/', '--json')
    assert status == 2 and not out and err.count('\n') == 1 and 'train.jsonl:1: ' in err


def test_extract_ends_with_1_when_it_leaves_the_set_as_it_is(mine, main, monkeypatch):
    import dsbs.teacher.sets

    monkeypatch.setattr(dsbs.teacher.sets, 'Server', lambda url, model, *more: Teacher(model))
    call = ['extract', mine.folder, '--base-url', 'http://localhost:9/v1', '--model', 'm', '--out', mine.out]
    assert main(*call)[0] == 0
    before = mine.set_rows()
    status, out, err = main(*call, '--limit', '2', '--temperature', '0.5')
    assert status == 1 and 'stays as it is, with 20 rationales' in err and mine.set_rows() == before


def test_rows_that_are_held_out_anew_are_not_asked_again(mine):
    for split in ('validation', 'test'):
        (mine.folder / f'{split}.jsonl').unlink()
    for split in ('train', 'validation', 'test'):
        mine.extract(split)
    mine.change(lambda rows: rows[1:])
    mine.forget()  # another tenth is held out now
    for split in ('train', 'validation', 'test'):
        assert mine.extract(split)[1] == []
    for split in ('train', 'validation', 'test'):
        assert own(mine, split) and all(r.ok for r in mine.read(split).values())


plain = st.none() | st.booleans() | st.integers(-1, 2) | st.text(max_size=3) | st.just('low')
junk = st.recursive(
    plain,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=3,
)
names = st.sampled_from(['id', 'rationale', 'label', 'votes', 'others', 'input', 'input_sha256', 'prompt', 'label_set'])


@given(st.dictionaries(names, junk, max_size=4), st.dictionaries(names, junk, max_size=3))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_stands_in_a_set_is_read_or_refused_in_one_line(mine, row, card):
    mine.by_hand([*HAND[:2], HAND[2] | row], card=json.dumps(dict(task='signs', model='m') | card))
    try:
        assert mine.read()['signs-train-000001'].ok
    except UsageError as e:
        assert '\n' not in str(e)
    card, asked = mine.extract()
    assert card['rows'] == 20 and own(mine)


def test_a_call_that_fails_leaves_no_folder(mine, tmp_path):
    mine.out = tmp_path / 'new' / 'set'
    with pytest.raises(UsageError, match='no such model'):
        mine.extract(teacher=Away())
    assert not (tmp_path / 'new').exists()
    mine.extract()
    before = {p.name: p.read_bytes() for p in mine.out.iterdir()}
    mine.forget()
    mine.change(lambda rows: rows + [dict(input='one more is up', label='high')])
    with pytest.raises(UsageError, match='no such model'):
        mine.extract(teacher=Away())
    assert {p.name: p.read_bytes() for p in mine.out.iterdir()} == before
