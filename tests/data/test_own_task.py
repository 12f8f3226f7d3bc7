"A task folder of a user's own: what is read, and the one line that each mistake gets."

import json

import pytest

from dsbs.data.examples import Task
from dsbs.data.own import load_task_folder
from dsbs.data.tasks import is_task_folder, load_task
from dsbs.records import UsageError

LABELLED = (
    'name = "shop"\ninstruction = "Which desk?"\nanswer = "label"\nlabels = ["billing", "Returns", "not for us"]\n'
)
TEXT = 'name = "shop"\ninstruction = "Which desk?"\nanswer = "text"\n'
EQUATION = TEXT.replace('"text"', '"equation"')


def lines(rows):
    return ''.join(json.dumps(r) + '\n' for r in rows)


def rows(n=20, label='billing', word='message'):
    return [dict(input=f'{word} {i}', label=label) for i in range(n)]


@pytest.fixture
def folder(tmp_path):
    "Write a task folder: `toml`, and the files given as text, bytes or rows."

    def write(toml=LABELLED, train=None, **files):
        here = tmp_path / 'mine'
        here.mkdir(exist_ok=True)
        for old in here.iterdir():
            old.unlink()
        for name, content in dict(
            {'task.toml': toml, 'train.jsonl': rows() if train is None else train},
            **{f'{k}.jsonl': v for k, v in files.items()},
        ).items():
            if content is False:
                continue
            content = lines(content) if isinstance(content, list) else content
            (here / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return here

    return write


def refused(folder, *words):
    with pytest.raises(UsageError) as error:
        load_task(str(folder))
    message = str(error.value)
    assert len(message.splitlines()) == 1 and message.startswith(str(folder)), message
    for word in words:
        assert word in message, message
    return message


def test_a_folder_stands_where_a_name_does(folder):
    shop = load_task(str(folder(exemplars=[dict(input='x?', rationale='Because.', label='Returns')])))
    assert (
        isinstance(shop, Task)
        and shop.name == 'shop'
        and shop.answer == 'text'
        and shop.label_set == ('billing', 'Returns', 'not for us')
    )
    assert {s: len(shop[s]) for s in shop.splits} == {'train': 16, 'validation': 2, 'test': 2} and list(
        shop.splits
    ) == ['train', 'validation', 'test']
    assert shop.note == '2 rows of train.jsonl were held out as test'
    assert shop.brief.instruction == 'Which desk?' and shop.folder.name == 'mine'
    assert [(e.input, e.rationale, e.label) for e in shop.brief.exemplars] == [('x?', 'Because.', 'Returns')]
    assert sorted(i for s in shop.splits for i in shop[s]['id']) == [f'shop-train-{i:06d}' for i in range(1, 21)]
    assert shop.data_hash() == load_task_folder(folder()).data_hash()
    assert shop['train'].column_names == ['id', 'input', 'label']


def test_files_of_their_own_are_kept_as_they_are(folder):
    shop = load_task_folder(folder(train=rows(), validation=rows(3, word='later'), test=rows(4, word='last')))
    assert (
        [len(shop[s]) for s in ('train', 'validation', 'test')] == [20, 3, 4]
        and not shop.note
        and not shop.brief.exemplars
    )
    assert shop['test']['input'] == [f'last {i}' for i in range(4)] and shop['train']['input'] == [
        f'message {i}' for i in range(20)
    ]


def test_without_validation_a_tenth_is_held_out_as_for_cqa(folder):
    import datasets

    shop = load_task_folder(folder(train=rows(95), test=rows(4, word='last')))
    held = datasets.Dataset.from_list(rows(95)).train_test_split(test_size=0.1, seed=0)
    assert (
        not shop.note
        and shop['validation']['input'] == held['test']['input']
        and shop['train']['input'] == held['train']['input']
    )


def test_rows_of_one_input_stay_together(folder):
    shop = load_task_folder(folder(train=rows(15) * 2))
    inputs = [set(shop[s]['input']) for s in shop.splits]
    assert sum(map(len, inputs)) == 15 and sum(len(shop[s]) for s in shop.splits) == 30


def test_rows_without_a_label(folder):
    some = [r | dict(label=None) if i % 2 else {'input': r['input']} if i % 4 == 0 else r for i, r in enumerate(rows())]
    shop = load_task_folder(folder(train=some, test=rows(4, word='last')))
    assert shop.unlabeled('train') + shop.unlabeled('validation') == 15 and shop.unlabeled('test') == 0
    none = load_task_folder(folder(train=[{'input': r['input']} for r in rows()]))
    assert none.unlabeled('train') == len(none['train']) and none.example().label is None


def test_labels_and_inputs_count_in_the_hash(folder):
    def hashes(train):
        return load_task_folder(
            folder(train=train, validation=rows(2, word='later'), test=rows(2, word='last'))
        ).data_hash()

    plain = hashes(rows())
    for other in (
        rows()[:-1] + [dict(input='message 19', label='Returns')],
        rows()[:-1] + [dict(input='message 20', label='billing')],
    ):
        changed = hashes(other)
        assert changed['train'] != plain['train'] and changed['test'] == plain['test']


def test_what_a_person_may_write(folder):
    given = [
        dict(input=' a ', label=' Returns ', id=7),
        dict(input='b', label='not for us', id='x', rationale='Said so.'),
        dict(input='c', label=None, id=None, rationale=None),
    ]
    shop = load_task_folder(folder(train=rows(), test=given))
    assert shop['test'].to_list() == [
        dict(id='7', input=' a ', label='Returns'),
        dict(id='x', input='b', label='not for us'),
        dict(id='shop-test-000003', input='c', label=None),
    ]
    assert load_task_folder(folder(EQUATION, train=rows(label='(10 * 45)'))).answer == 'equation'
    assert load_task_folder(folder(TEXT, train=rows(label='anything'))).label_set == ()


@pytest.mark.parametrize(
    'change',
    [
        lambda b: b'\xef\xbb\xbf' + b,
        lambda b: b.replace(b'\n', b'\r\n'),
        lambda b: b'\n' + b.replace(b'\n', b'\n \n'),
        lambda b: b.rstrip(),
    ],
    ids=['byte-order mark', 'Windows line ends', 'blank lines', 'no last line end'],
)
def test_text_as_editors_save_it(folder, change):
    plain = load_task_folder(folder())
    other = load_task_folder(folder(change(LABELLED.encode()), change(lines(rows()).encode())))
    assert (
        other.brief == plain.brief
        and other.label_set == plain.label_set
        and sorted(text for s in other.splits for text in other[s]['input']) == sorted(r['input'] for r in rows())
    )


@pytest.mark.parametrize(
    'toml, words',
    [
        ('name = shop', ['task.toml: not TOML', 'line 1', 'quotes']),
        ('name = "shop"\nname = "shop"\n', ['not TOML', 'line 2']),
        ('', ["no field 'name'"]),
        (TEXT.replace('name', 'nme'), ["unknown field 'nme': did you mean 'name'?"]),
        (TEXT.replace('instruction', 'Instructions'), ["did you mean 'instruction'?"]),
        (TEXT + 'colour = "red"', ["unknown field 'colour': the fields are name, instruction, answer, labels"]),
        ('[task]\n' + TEXT, ["unknown field 'task'"]),
        ('name = "shop"\nanswer = "text"', ["no field 'instruction'"]),
        ('name = "shop"\ninstruction = "?"', ["no field 'answer'"]),
        (TEXT.replace('"Which desk?"', '" "'), ["'instruction' is empty"]),
        (TEXT.replace('"shop"', '5'), ["'name' should be a text, found 5"]),
        (TEXT.replace('"text"', '"labels"'), ["unknown answer 'labels'", 'label, text, equation']),
        (TEXT.replace('"text"', 'true'), ["'answer' should be a text"]),
        (TEXT.replace('shop', 'my shop'), ["the name 'my shop'", 'letters']),
        (TEXT.replace('shop', 'étal'), ['letters']),
        (TEXT.replace('shop', '../shop'), ['letters']),
        (TEXT.replace('shop', 'cqa'), ["'cqa'", 'built-in']),
        (TEXT.replace('shop', 'same_kind'), ['built-in']),
        (TEXT.replace('"text"', '"label"'), ['needs the labels', 'labels = [']),
        (LABELLED.replace('["billing", "Returns", "not for us"]', '[]'), ['at least two', 'found 0']),
        (LABELLED.replace('"Returns", "not for us"', ''), ['at least two', 'found 1']),
        (LABELLED.replace('"Returns"', '"billing"'), ["'billing' and 'billing'", 'once']),
        (LABELLED.replace('"Returns"', '"Billing."'), ["'billing' and 'Billing.'"]),
        (LABELLED.replace('"Returns"', '1'), ['a text of one line', 'found 1']),
        (LABELLED.replace('"Returns"', '""'), ['a text of one line', "found ''"]),
        (LABELLED.replace('"Returns"', r'"a\nb"'), ['a text of one line']),
        (LABELLED.replace('["billing", "Returns", "not for us"]', '"billing, Returns"'), ["'labels' should be a list"]),
        (LABELLED.replace('"label"', '"text"'), ['labels are for answer = "label"', 'leave them out']),
        (TEXT + 'labels = []', ['leave them out']),
        (TEXT.encode('utf-16'), ['UTF-16', 'save it as UTF-8']),
        (TEXT.encode('utf-16-le'), ['UTF-16']),
        (TEXT.replace('Which', 'Où').encode('latin-1'), [':2: not UTF-8', 'save it as UTF-8']),
        ('a = ' + '[' * 5000, ['not TOML']),
    ],
    ids=lambda x: ascii(x)[:50] if not isinstance(x, list) else '',
)
def test_a_mistake_in_the_settings(folder, toml, words):
    message = refused(folder(toml), 'task.toml', *words)
    assert message.count('task.toml') == 1


@pytest.mark.parametrize(
    'line, words',
    [
        ('{"label": "billing"}', ["no field 'input'"]),
        ('{"text": "a", "label": "billing"}', ["unknown field 'text': the fields are input, label, id, rationale"]),
        ('{"question": "a", "label": "billing"}', ["unknown field 'question': the fields are input"]),
        ('{"Input": "a"}', ["did you mean 'input'?"]),
        ('{"INPUT": "a"}', ["did you mean 'input'?"]),
        ('{"input": "a", "lable": "billing"}', ["unknown field 'lable': did you mean 'label'?"]),
        ('{"input": "a", "rational": "b"}', ["did you mean 'rationale'?"]),
        ('{"input": 5}', ["'input' should be a text, found 5"]),
        ('{"input": null}', ["'input' should be a text, found None"]),
        ('{"input": ["a"]}', ["'input' should be a text"]),
        ('{"input": "  "}', ["'input' is empty"]),
        ('{"input": "a", "label": "shipping"}', ["the label 'shipping' is none of billing, Returns, not for us"]),
        ('{"input": "a", "label": "Billing"}', ["did you mean 'billing'?"]),
        ('{"input": "a", "label": "returns"}', ["did you mean 'Returns'?"]),
        ('{"input": "a", "label": "biling"}', ["did you mean 'billing'?"]),
        ('{"input": "a", "label": "Returns."}', ["did you mean 'Returns'?"]),
        ('{"input": "a", "label": 1}', ["'label' should be a text, found 1"]),
        ('{"input": "a", "label": true}', ["'label' should be a text"]),
        ('{"input": "a", "label": ["billing"]}', ["'label' should be a text"]),
        ('{"input": "a", "label": ""}', ["'label' is empty"]),
        ('{"input": "a", "rationale": 5}', ["'rationale' should be a text"]),
        ('{"input": "a", "rationale": " "}', ["'rationale' is empty"]),
        ('{"input": "a", "id": 1.5}', ["'id' should be a text or a whole number, found 1.5"]),
        ('{"input": "a", "id": true}', ["'id' should be"]),
        ('{"input": "a", "id": ""}', ["'id' is empty"]),
        ('{"input": "a"', ['not JSON', 'one JSON object per line']),
        ("{'input': 'a'}", ['not JSON', 'double quotes']),
        ('{"input": "a"},', ['not JSON']),
        ('["a", "billing"]', ['expected an object, found list']),
        ('"a"', ['expected an object']),
        ('[' * 100_000, ['not JSON']),
        (r'{"input": "\ud800"}', ["'input' holds a broken character"]),
    ],
    ids=lambda x: x[:50] if isinstance(x, str) else '',
)
def test_a_mistake_in_a_row(folder, line, words):
    refused(folder(train=lines(rows(3)) + line + '\n' + lines(rows())), 'train.jsonl:4: ', *words)
    refused(folder(train=rows(), test=lines(rows(1, word='last')) + line), 'test.jsonl:2: ', *words)


@pytest.mark.parametrize(
    'content, words',
    [
        ('input,label\nWhere?,billing', [':1: looks like CSV', '{"input": "...", "label": "..."}']),
        ('input\tlabel\n', [':1: looks like CSV']),
        ('"input","label"\n"a","b"', [':1: looks like CSV']),
        ('[{"input": "a", "label": "billing"}]', [':1: a JSON array', 'one JSON object per line']),
        ('[\n {"input": "a"},\n {"input": "b"}\n]', [':1: a JSON array']),
        ('{\n "input": "a"\n}', [':1: not JSON', 'one JSON object per line']),
        ('Where is my parcel?', [':1: not JSON']),
        ('', ['no rows']),
        ('\n \n', ['no rows']),
        (b'\xef\xbb\xbf', ['no rows']),
        (lines(rows()).encode('utf-16'), ['UTF-16', 'save it as UTF-8']),
        (lines(rows()).encode('utf-16-be'), ['UTF-16']),
        (b'PK\x03\x04\x00\x00', ['save it as UTF-8']),
        (lines(rows(2)).encode() + '{"input": "Où?"}'.encode('latin-1'), [':3: not UTF-8']),
        (lines(rows(9)), ['9 different inputs are too few', 'at least 10']),
        (lines(rows(1) * 30), ['1 different inputs are too few']),
    ],
    ids=lambda x: ascii(x)[:40] if not isinstance(x, list) else '',
)
def test_a_file_of_the_wrong_form(folder, content, words):
    refused(folder(train=content), 'train.jsonl', *words)


@pytest.mark.parametrize(
    'label, words',
    [
        ('x + 1', ["'x' is not arithmetic"]),
        ('10 * (45', ['a bracket is not closed']),
        ('1/0', ['division by zero']),
        ('450 euros', ["'euros' is not arithmetic"]),
    ],
)
def test_an_equation_that_cannot_be_read(folder, label, words):
    refused(
        folder(EQUATION, train=rows(12, '10 * 45') + [dict(input='a', label=label)]),
        'train.jsonl:13: ',
        'not an equation that can be read',
        *words,
    )


def test_ids_stand_once(folder):
    refused(
        folder(train=[dict(input=str(i), id=i % 15) for i in range(20)]),
        "train.jsonl:16: the id '0' stands on train.jsonl:1 already",
    )
    numbered = [dict(input=str(i), id=str(i)) for i in range(20)]
    refused(
        folder(train=numbered, test=[dict(input='a', id=3)]), "test.jsonl:1: the id '3' stands on train.jsonl:4 already"
    )
    refused(
        folder(
            train=numbered, test=[dict(input='a', id='one')], validation=[dict(input='b'), dict(input='c', id='one')]
        ),
        "test.jsonl:1: the id 'one' stands on validation.jsonl:2 already",
    )


@pytest.mark.parametrize('split', ['validation', 'test'])
def test_what_is_scored_was_not_trained_on(folder, split):
    again = [dict(input='new'), dict(input=' message 3', label='Returns', id='again')]
    refused(
        folder(**{split: again}), f'{split}.jsonl:2: the same input as train.jsonl:4', "'again' and 'shop-train-000004'"
    )
    refused(folder(**{split: again + [dict(input='message 5')]}), '2 such pairs')
    twice = [dict(input='new'), dict(input='new')]
    assert len(load_task_folder(folder(**{split: twice}))[split]) == 2


@pytest.mark.parametrize(
    'line, words',
    [
        ('{"input": "a", "label": "billing"}', ["no field 'rationale'"]),
        ('{"input": "a", "rationale": "b"}', ["no field 'label'"]),
        ('{"rationale": "b", "label": "billing"}', ["no field 'input'"]),
        ('{"input": "a", "rationale": null, "label": "billing"}', ["'rationale' should be a text"]),
        ('{"input": "a", "rationale": "", "label": "billing"}', ["'rationale' is empty"]),
        ('{"input": "a", "rationale": "b", "label": "shipping"}', ["the label 'shipping' is none of"]),
        ('{"input": "a", "rationale": "b", "label": "billing", "id": "c"}', ["unknown field 'id'"]),
    ],
)
def test_a_mistake_in_an_exemplar(folder, line, words):
    refused(folder(exemplars=line), 'exemplars.jsonl:1: ', *words)


@pytest.mark.parametrize('split', ['validation', 'test'])
def test_an_exemplar_is_no_row_on_which_we_score(folder, split):
    worked = [
        dict(input='x?', rationale='So.', label='Returns'),
        dict(input=' last 1', rationale='Because.', label='billing'),
    ]
    message = refused(
        folder(exemplars=worked, **{split: rows(3, word='last')}),
        'exemplars.jsonl:2: the same input as',
        f"{split}.jsonl:2 (id 'shop-{split}-000002')",
    )
    assert 'show the teacher other inputs' in message


def test_an_exemplar_is_never_held_out(folder):
    held = {s: load_task_folder(folder())[s]['input'] for s in ('validation', 'test')}
    worked = [dict(input=i, rationale='Because.', label='billing') for some in held.values() for i in some]
    shop = load_task_folder(folder(exemplars=worked))
    assert {e['input'] for e in worked} <= set(shop['train']['input']) and sum(len(shop[s]) for s in shop.splits) == 20
    other = load_task_folder(folder(exemplars=[dict(input='x?', rationale='Because.', label='billing')]))
    assert held == {s: other[s]['input'] for s in held}
    refused(
        folder(exemplars=[dict(input=f'message {i}', rationale='Because.', label='billing') for i in range(11)]),
        'train.jsonl: 9 different inputs beside the exemplars are too few',
    )


def test_a_folder_that_is_none(folder, tmp_path):
    refused(folder(train=False), 'train.jsonl is missing', 'one JSON object per line')
    refused(folder(dev=rows(3, word='later')), 'dev.jsonl: this file should be called validation.jsonl')
    refused(tmp_path / 'mine' / 'task.toml', 'a file and not a folder')
    refused(tmp_path / 'yours', 'there is no such task folder')
    (tmp_path / 'yours').mkdir()
    refused(tmp_path / 'yours', 'no task.toml', 'name, instruction, answer')


def test_names_and_folders(folder, tmp_path, monkeypatch):
    mine = folder()
    monkeypatch.chdir(tmp_path)
    assert (
        is_task_folder('mine')
        and is_task_folder('./mine')
        and is_task_folder(str(mine))
        and is_task_folder('no/where')
        and load_task('mine').name == 'shop'
    )
    assert not any(map(is_task_folder, ('', 'sudoku', 'cqa', 'same_kind')))
    mine.rename(tmp_path / 'cqa')
    assert not is_task_folder('cqa') and load_task('./cqa').name == 'shop'
    monkeypatch.chdir(tmp_path / 'cqa')
    assert load_task('.').name == 'shop' and not is_task_folder('')
    with pytest.raises(UsageError, match='choose one of same_kind, .*, or a folder with a task.toml'):
        load_task('sudoku')
    with pytest.raises(UsageError, match='stand_in=true works for'):
        load_task('.', stand_in=True)
    monkeypatch.setenv('HOME', str(tmp_path))
    assert load_task('~/cqa').name == 'shop'
