"A task in another language from end to end: asked, extracted, trained, answered, saved, loaded; no character is lost."

import json
from unicodedata import normalize

import pytest
from families import family
from small_t5 import small_t5
from stub_server import Stub, completion

from dsbs.data.answers import is_correct
from dsbs.data.tasks import load_task
from dsbs.method.answering import PlainAnswers, generate, input_batches
from dsbs.method.student import make_student
from dsbs.runs.saved import ask_saved, run_and_save
from dsbs.runs.specs import make_spec
from dsbs.teacher.sets import read_set

LANGUAGES = {  # instruction, question, the two words that decide, their labels, rationale
    'german': (
        'Wie schmeckt der Apfel? Antworte mit süß oder säuerlich.',
        'Körbchen {i}: ein {word} Apfel – über 5 €, aus Österreich.',
        ('größter', 'grüner'),
        ('süß', 'säuerlich'),
        'Ein {word} Apfel schmeckt gewöhnlich {label}.',
    ),
    'japanese': (
        'りんごは甘いですか。',
        '{i}番のかごに{word}りんごがあります。甘いですか？',
        ('赤い', '青い'),
        ('はい', 'いいえ'),
        '{word}りんごはたいてい「{label}」と言えます。',
    ),
}
STUDENTS = ('byt5', 'mt5', 'scratch-32x1')
HOW = dict(max_steps=150, eval_every=25, batch_size=16, learning_rate=5e-3, dropout=0.0, schedule='constant')


def rows_of(language, n=100):
    "Rows and their rationales; every second label is written with its accents apart, as some files have them."
    _, question, words, labels, why = LANGUAGES[language]
    rows = []
    for i in range(n):
        word, label = words[i % 2], labels[i % 2]
        text = question.format(i=i, word=word)
        rows.append(dict(id=f'r{i}', input=text, label=label, why=why.format(word=word, label=label)))
    return [r | dict(label=normalize('NFD' if i % 4 > 1 else 'NFC', r['label'])) for i, r in enumerate(rows)]


def task_folder(language, folder, rows):
    instruction, _, _, labels, _ = LANGUAGES[language]
    named = json.dumps(list(labels), ensure_ascii=False)
    lines = f'name = "{language}"\ninstruction = "{instruction}"\nanswer = "label"\nlabels = {named}\n'
    folder.mkdir()
    (folder / 'task.toml').write_text(lines, encoding='utf-8')
    written = [json.dumps({k: r[k] for k in ('id', 'input', 'label')}, ensure_ascii=False) for r in rows]
    (folder / 'train.jsonl').write_text('\n'.join(written), encoding='utf-8')


class Speaks(Stub):
    "A teacher that answers each question in its language."

    def __init__(self, rows):
        super().__init__()
        self.rows = rows

    def _reply(self, fault, asked):
        text = asked['messages'][-1]['content']
        row = max((r for r in self.rows if r['input'] in text), key=lambda r: len(r['input']))
        return 200, '', completion(f'{row["why"]} So the answer is {row["label"]}.', model=asked['model'])


@pytest.fixture(scope='module')
def asked(tmp_path_factory):
    "Folder of a task and of what a teacher said about it, each made once."
    made = {}

    def of(language, main):
        if language not in made:
            folder, rows = tmp_path_factory.mktemp(language), rows_of(language)
            task_folder(language, folder / 'task', rows)
            with Speaks(rows) as stub:
                for split in ('train', 'validation', 'test'):
                    where = ['--base-url', stub.url, '--model', 'm', '--split', split, '--out', folder / 'set']
                    status, out, err = main('extract', folder / 'task', *where, '--json')
                    assert (status, json.loads(out)['failed']) == (0, 0), err
            made[language] = folder, rows
        return made[language]

    return of


@pytest.mark.parametrize('language', LANGUAGES)
def test_a_teacher_s_words_keep_their_characters(language, asked, main):
    folder, rows = asked(language, main)
    task = load_task(str(folder / 'task'))
    readings, why = read_set(folder / 'set', task, 'train'), {r['id']: r['why'] for r in rows}
    assert all(x.ok and x.rationale == why[i] for i, x in readings.items())
    assert {x.label for x in readings.values()} == set(LANGUAGES[language][3]), 'one spelling of each label'


@pytest.mark.parametrize('name', STUDENTS)
@pytest.mark.parametrize('language', LANGUAGES)
def test_a_task_in_another_language(language, name, asked, main, tmp_path):
    folder, rows = asked(language, main)
    texts = [f'[label] [rationale] {r["input"]} {r["label"]} {r["why"]}' for r in rows]
    texts += [normalize('NFC', text) for text in texts]
    student = name if name.startswith('scratch') else str(family(name, tmp_path / name, texts))
    given = dict(task=str(folder / 'task'), teacher=str(folder / 'set'), student=student, engine='plain')
    record = run_and_save(make_spec(HOW | given), tmp_path / 'saved')

    metrics, labels = record['metrics'], LANGUAGES[language][3]
    assert {v for k, v in metrics.items() if k.startswith('unknown_share_')} == {0.0} and not metrics['cut_test_inputs']
    assert metrics['labels_not_written'] == 0 and metrics['test_accuracy'] > 80, metrics
    assert set(record['answers'].values()) <= set(labels)

    loaded, tokenizer = make_student(str(tmp_path / 'saved'), dropout=0.0)
    questions = {r['id']: f'[label] {r["input"]}' for r in rows}
    questions = [questions[i] for i in record['answers']]
    longest = record['generation']['max_new_tokens']
    again = generate(PlainAnswers(loaded.eval()), tokenizer, input_batches(tokenizer, questions), longest)
    assert again == list(record['answers'].values())
    assert [said for said, _ in ask_saved(tmp_path / 'saved', questions, **record['generation'])] == again
    for text in (rows[0]['input'], rows[1]['why'], *labels):
        back = tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True)
        assert normalize('NFC', back) == normalize('NFC', text)


def test_a_student_without_the_letters_says_so(asked, main, tmp_path):
    folder, _ = asked('japanese', main)
    given = dict(task=folder / 'task', method='standard', student=small_t5(tmp_path / 't5'), max_steps=2)
    status, out, err = main('run', *[f'{k}={v}' for k, v in given.items()])
    assert (status, out) == (2, '') and "cannot write the label 'いいえ'" in err and 'a ByT5 writes every' in err


def test_letters_that_a_student_lacks_are_counted(asked, main, tmp_path):
    "The labels can be written here, and the questions cannot be read."
    folder, rows = asked('japanese', main)
    task_folder('japanese', tmp_path / 'task', [r | dict(label=('low', 'high')[int(r['id'][1:]) % 2]) for r in rows])
    card = (tmp_path / 'task' / 'task.toml').read_text(encoding='utf-8')
    (tmp_path / 'task' / 'task.toml').write_text(card.replace('"はい", "いいえ"', '"low", "high"'), encoding='utf-8')
    given = dict(task=tmp_path / 'task', method='standard', student=small_t5(tmp_path / 't5'), max_steps=2)
    status, out, err = main('run', *[f'{k}={v}' for k, v in given.items()], '--json')
    assert status == 0 and json.loads(out)['metrics']['unknown_share_train_inputs'] > 0.05
    assert 'has no piece for' in err


@pytest.mark.parametrize('label', ['süß', 'säuerlich', 'いいえ', 'が'])
def test_a_label_is_right_in_every_spelling_of_its_characters(label):
    for form in ('NFC', 'NFD', 'NFKC', 'NFKD'):
        assert is_correct(normalize(form, label), label) and is_correct(label, normalize(form, label))
    assert not is_correct('suss', 'süß') and not is_correct('か', 'が')
