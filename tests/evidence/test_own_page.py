"The page of an own task: its numbers are those of the records, it says what it lacks, and no text breaks it."

import json
import re
import statistics
import sys
from dataclasses import asdict, replace
from html.parser import HTMLParser

import pytest
from making import record_of
from small_t5 import own_task, rationale_set

from dsbs.data.tasks import load_task
from dsbs.evidence import own_page as module
from dsbs.evidence.grids import grid, specs_of
from dsbs.evidence.own_page import (
    best_point,
    distinct_points,
    mistakes_of,
    own_page_html,
    own_points,
    read_teaching,
    student_times,
    teacher_row,
    write_own_page,
)
from dsbs.evidence.reporting import Reproduction, figure_notebooks, made_from
from dsbs.records import UsageError, find_folders, write_jsonl, write_text
from dsbs.runs.specs import RunSpec, prepare

HOSTILE = (
    '</dd><script>alert(1)</script> $x_1$ שלום \u202e123 {{7*7}} <img src=//example.org/a.png> of {word} order {i}'
)
SVG = '<svg xmlns="http://www.w3.org/2000/svg" width="331.2pt"><text>a figure</text></svg>'


class Page(HTMLParser):
    "Tags with their attributes, and the text of a page."

    def __init__(self, html):
        super().__init__()
        self.tags, self.words, self.sections, self.at = [], [], {}, ''
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.at = dict(attrs).get('id', self.at) if tag == 'section' else self.at

    def handle_data(self, data):
        self.words.append(data)
        self.sections[self.at] = f'{self.sections.get(self.at, "")} {data}'

    def of(self, section):
        return ' '.join(self.sections[section].split())


@pytest.fixture
def own(tmp_path, monkeypatch):
    "A task, its set, and folders; `wanted` asks for the page."
    monkeypatch.setattr(module, 'student_times', lambda spec, folders: {1: 4.25, 64: 0.5})
    rows = own_task(tmp_path / 'levels')
    rationale_set(tmp_path / 'set', rows)
    return wanted_of(tmp_path)


def wanted_of(folder):
    folders = find_folders(runs=folder / 'runs', reports=folder / 'reports')
    return Reproduction(preset='own', folders=folders, task=str(folder / 'levels'), teacher=str(folder / 'set'))


def bits(right):
    return ''.join(
        f'{int("".join(four), 2):x}' for four in re.findall('.{4}', right.ljust(-(-len(right) // 4) * 4, '0'))
    )


def made_up(spec, folders, wrong, validation=None):
    "A record of a run that nobody made; `wrong`: places of the test questions that are not right."
    data = prepare(spec, folders)
    ids, labels = data.task['test']['id'], data.task['test']['label']
    right = ''.join('01'[i not in wrong] for i in range(len(ids)))
    accuracy = 100 * right.count('1') / len(ids)
    metrics = dict(
        test_accuracy=accuracy,
        validation_accuracy=accuracy if validation is None else validation,
        majority_accuracy=50.0,
        converged=spec.seed < 2,
        n_train=round((spec.train_fraction or 1) * len(data.task['train'])),
        n_test=len(ids),
        n_validation=6,
        parameters=95_000,
    )
    said = {
        i: label if yes == '1' else f'<b>no {spec.seed % 2}' for i, label, yes in zip(ids, labels, right, strict=True)
    }
    return dict(
        key=data.key,
        spec=asdict(spec),
        metrics=metrics,
        correct=bits(right),
        answers=said,
        stand_in=data.task.note,
        time=dict(finished='2026-01-01T00:00:00Z', seconds=30.0),
    )


def usual_wrong(spec):
    "Rationales help: without them, and with fewer rows, one more question is wrong."
    fewer = spec.method == 'standard', spec.rationales != 'teacher', spec.train_fraction < 1
    return set(range(sum(fewer))) | ({5} if spec.seed == 0 else set())


def keep(wanted, figure='fig4_data_size_human', wrong=usual_wrong, **more):
    "Put made-up records of a figure where `reproduce` keeps them."
    specs = specs_of(grid(figure, 'own', wanted.task, wanted.teacher))
    records = [made_up(s, wanted.folders, wrong(s), **more) for s in specs]
    write_jsonl(wanted.target / 'results' / 'own.jsonl', records)
    return records


def points_of(wanted):
    return distinct_points(own_points(wanted.task, wanted.teacher, wanted.target / 'results', wanted.folders))


def test_the_page_answers_its_questions(own):
    records = keep(own)
    drawn = write_text(own.target / 'figures' / 'fig4_data_size_human_levels.svg', SVG)
    page = Page(own_page_html(own, [drawn], price=0.5))
    mine = [r for r in records if r['spec']['method'] == 'step_by_step' and r['spec']['train_fraction'] == 1]
    mine = [r for r in mine if r['spec']['rationales'] == 'teacher']
    accuracy = statistics.fmean(r['metrics']['test_accuracy'] for r in mine)
    assert 'Say which.' in page.of('asked') and 'It says low.' in page.of('asked') and 'train: 48' in page.of('asked')
    assert f'{accuracy:.1f}% [' in page.of('good') and 'on 6 questions' in page.of('good')
    assert 'Converged 2 of 3 runs' in page.of('good')
    for other in ('commonest label', 'The teacher itself', 'Standard finetuning', 'shuffled within the label'):
        assert other in page.of('good')
    assert '(3 seeds)' in page.of('good') and ('ahead' in page.of('good') or 'undecided' in page.of('good'))
    assert '4.25 seconds' in page.of('cost') and '0.5 seconds' in page.of('cost') and '12.0 minutes' in page.of('cost')
    assert 'wrong in 1 of 3 runs' in page.of('mistakes') and '<b>no 0' in page.of('mistakes')
    assert re.search(r'Buy next: (labels|rationales|filtering|a larger student|nothing|don\'t know)\.', page.of('next'))
    assert 'Accuracy against data size, human labels' in page.of('figures')
    assert sum(tag == 'img' for tag, _ in page.tags) == 1


def test_money_and_tokens_follow_from_the_card(own, tmp_path):
    keep(own)
    card = tmp_path / 'set' / 'train.card.json'
    card.write_text(json.dumps(dict(task='levels', model='m', sent=60, tokens=6000)))
    costs = Page(own_page_html(own, price=0.5)).of('cost')
    assert '100,000' in costs and ' 50 ' in costs
    assert 'no --price given' in Page(own_page_html(own)).of('cost')


def test_the_best_is_chosen_by_validation_and_is_one_to_use(own):
    keep(own)
    points = points_of(own)
    assert (best_point(points).curve, best_point(points).place.size) == ('step_by_step', 1.0)

    def validating(p):  # the worst on test, the best on validation
        standard = p.curve == 'standard' and p.place.size == 0.25
        told = [r | dict(metrics=r['metrics'] | dict(validation_accuracy=99.0)) for r in p.records]
        return replace(p, records=tuple(told)) if standard or p.curve == 'shuffled_within' else p

    best = best_point([validating(p) for p in points])
    assert (best.curve, best.place.size) == ('standard', 0.25)


def test_the_teacher_is_compared_question_by_question(own, tmp_path):
    "Student and teacher err on the same question: level, whatever chance is in the questions."
    task = load_task(own.task)
    first = task['test']['id'][0]
    rows = [json.loads(line) for line in (tmp_path / 'levels' / 'train.jsonl').read_text().splitlines()]
    other = dict(low='high', high='low')
    for path in (tmp_path / 'set').iterdir():
        path.unlink()
    (tmp_path / 'set').rmdir()
    rationale_set(tmp_path / 'set', rows, label=lambda r: other[r['label']] if r['id'] == first else r['label'])
    keep(own, wrong=lambda spec: {0})
    best, teaching = best_point(points_of(own)), read_teaching(task, own.teacher)
    name, accuracy, gain, verdict = teacher_row(best, teaching)
    assert (accuracy, gain.text, verdict.text) == ('83.3%', '+0.0 [+0.0, +0.0]', '? undecided')
    keep(own, wrong=lambda spec: {1})
    *_, gain, verdict = teacher_row(best_point(points_of(own)), teaching)
    low, high = map(float, re.findall(r'[+-][\d.]+', gain.text)[1:])
    assert gain.text.startswith('+0.0 [-') and high == -low > 10 and verdict.text == '? undecided'


def test_mistakes_are_those_that_most_seeds_make(own):
    keep(own, wrong=lambda spec: {3, 1 + spec.seed} if spec.seed < 2 else {3})
    task = load_task(own.task)
    found = mistakes_of(best_point(points_of(own)), read_teaching(task, own.teacher), own.folders)
    ids = task['test']['id']
    assert [(m.id, m.wrong) for m in found] == [(ids[3], 3), (ids[1], 1), (ids[2], 1)]
    assert found[0].answers == (('<b>no 0', 2), ('<b>no 1', 1))
    assert found[0].teacher.rationale == f'It says {found[0].label}.'


def test_texts_of_the_user_stay_texts(tmp_path, monkeypatch):
    monkeypatch.setattr(module, 'student_times', lambda spec, folders: {1: 1.0})
    rows = own_task(tmp_path / 'levels', labels=('<i>low</i>', '$high$'), text=HOSTILE)
    rationale_set(tmp_path / 'set', rows, rationale=lambda row: f'{HOSTILE} {row["label"]}')
    settings = tmp_path / 'levels' / 'task.toml'
    settings.write_text(settings.read_text().replace('Say which.', '<script>alert(2)</script> & say'))
    for card in (tmp_path / 'set').glob('*.card.json'):
        card.write_text(json.dumps(dict(task='levels', model='<img src=x onerror=alert(3)>')))
    wanted = wanted_of(tmp_path)
    keep(wanted)
    html = own_page_html(wanted)
    page, plain = Page(html), ' '.join(''.join(Page(html).words).split())
    scripts = [attrs for tag, attrs in page.tags if tag == 'script']
    assert len(scripts) == 1 and not [tag for tag, _ in page.tags if tag in ('i', 'b') and 'low' in tag]
    assert not [attrs for tag, attrs in page.tags if tag == 'img' and not attrs['src'].startswith('data:')]
    for text in ('alert(1)', 'alert(2)', '$x_1$', 'שלום', '{{7*7}}', '<i>low</i>', '$high$', 'onerror'):
        assert text in plain, text
    assert not [attrs for _, attrs in page.tags if any(name.startswith('on') for name in attrs)]


def test_the_page_asks_nothing_of_the_network(own):
    keep(own)
    page = Page(own_page_html(own, [write_text(own.target / 'figures' / 'fig4_data_size_human_levels.svg', SVG)]))
    for tag, attrs in page.tags:
        for name in ('src', 'href', 'action', 'srcset', 'data'):
            assert not attrs.get(name) or attrs[name].startswith(('data:', '#')), (tag, attrs)
    assert not re.search(r'url\(|@import', ''.join(page.words))
    policy = next(attrs['content'] for _, attrs in page.tags if 'http-equiv' in attrs)
    assert "default-src 'none'" in policy and 'sha256-' in policy
    assert str(own.folders.reports.parent) not in ''.join(page.words), 'a folder of this machine'


def test_without_known_labels_the_page_says_what_its_numbers_are(tmp_path, monkeypatch):
    monkeypatch.setattr(module, 'student_times', lambda spec, folders: {1: 1.0})
    rows = own_task(tmp_path / 'levels')
    bare = [dict(id=r['id'], input=r['input']) for r in rows]
    (tmp_path / 'levels' / 'train.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in bare))
    rationale_set(tmp_path / 'set', rows)
    wanted = wanted_of(tmp_path)
    keep(wanted)
    page = Page(own_page_html(wanted))
    assert 'No test row has a known label' in page.sections[''] and 'no known labels' in page.of('good')
    assert '48, 0 of them with a known label' in page.of('asked')
    assert "none: scored by the teacher's label" in page.of('mistakes')


def test_some_test_labels_are_known(tmp_path, monkeypatch):
    monkeypatch.setattr(module, 'student_times', lambda spec, folders: {1: 1.0})
    rows = own_task(tmp_path / 'levels')
    more = [dict(id=f't{i}', input=f'low income of test {i}') | (dict(label='low') if i < 5 else {}) for i in range(8)]
    (tmp_path / 'levels' / 'test.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in more))
    answered = [r | dict(label='low') for r in more]
    rationale_set(tmp_path / 'set', rows + answered, label=lambda r: 'high' if r['id'] == 't0' else r['label'])
    wanted = wanted_of(tmp_path)
    keep(wanted)
    page = Page(own_page_html(wanted))
    assert '3 of 8 test rows do not have a known label' in page.sections['']
    assert 'on 5 test rows with a known label 80.0%' in page.of('good')


def test_what_is_missing_is_said(own, monkeypatch):
    nothing = Page(own_page_html(own))
    named, command = (own.task, own.teacher), 'dsbs pilot {} --teacher {}'
    assert 'No run yet.' in nothing.of('good') and command.format(*named) in nothing.of('next')
    assert 'dsbs reproduce fig4 --preset own --task {} --teacher {}'.format(*named) in nothing.of('next')
    records = keep(own, 'fig6_model_size_human', wrong=lambda spec: set())
    page = Page(own_page_html(own))
    assert command.format(*named) in page.of('next') and 'No mistake on the test' in page.of('mistakes')
    assert 'still allows for 50% of errors' in page.of('good') and 'drew none' in page.of('figures')
    monkeypatch.chdir(own.folders.runs.parent)
    assert 'dsbs pilot ./levels --teacher ./set' in Page(own_page_html(own)).of('next')
    old = [{name: value for name, value in r.items() if name != 'correct'} for r in records]
    write_jsonl(own.target / 'results' / 'own.jsonl', old)
    assert 'do not say which' in Page(own_page_html(own)).of('mistakes')


def test_records_of_rows_that_changed_since_do_not_count(own, tmp_path):
    keep(own)
    assert points_of(own)
    path = tmp_path / 'levels' / 'train.jsonl'
    path.write_text(path.read_text() + json.dumps(dict(id='new', input='a new row', label='low')) + '\n')
    from dsbs.runs import specs

    specs._load_large.cache_clear()
    assert not points_of(own)


def test_a_real_record_keeps_its_wrong_answers_and_a_student_is_timed(tmp_path):
    rationale_set(tmp_path / 'set', own_task(tmp_path / 'levels'))
    wanted = wanted_of(tmp_path)
    tiny = dict(student='scratch-16x2', max_steps=2, eval_every=1, batch_size=8)
    spec = RunSpec(task=wanted.task, teacher=wanted.teacher, method='step_by_step', **tiny)
    record = record_of(spec)
    task = load_task(wanted.task)
    wrong = [i for i, bit in zip(task['test']['id'], f'{int(record["correct"], 16):08b}', strict=False) if bit == '0']
    assert list(record['mistakes']) == wrong and wrong
    times = student_times(spec, wanted.folders, repeats=1)
    assert list(times) == [1, 64] and all(ms > 0 for ms in times.values())


def test_figures_of_one_task_are_not_taken_for_those_of_another(own):
    keep(own)
    path = figure_notebooks(['fig4'])[0]
    assert made_from(path, own) == made_from(path, replace(own)) != made_from(path, replace(own, task='another'))


def test_the_page_is_written_beside_the_figures(own, tmp_path):
    keep(own)
    assert write_own_page(own) == tmp_path / 'reports' / 'own' / 'index.html'
    with pytest.raises(UsageError, match='preset own needs --task'):
        write_own_page(replace(own, task=''))


@pytest.mark.parametrize('call', [['--price', '1'], ['--preset', 'own', '--price', '-1']])
def test_a_price_belongs_to_the_own_preset(call, capsys):
    from dsbs.tools.cli import main

    assert main(['reproduce', *call]) == 2
    assert '--price goes with --preset own' in capsys.readouterr().err


def test_reading_the_page_loads_no_torch():
    import subprocess

    lines = 'import sys, dsbs.evidence.own_page; sys.exit("torch" in sys.modules)'
    assert subprocess.run([sys.executable, '-c', lines]).returncode == 0


@pytest.mark.parametrize('changed', [(), ('--set', 'max_steps=4')])
def test_changed_settings_get_no_page(changed, main, monkeypatch, tmp_path):
    "Its records would be looked for where the preset's own are."
    pages = []
    monkeypatch.setattr('dsbs.evidence.reporting.reproduce', lambda wanted: [])
    monkeypatch.setattr(
        'dsbs.evidence.own_page.write_own_page', lambda *asked: pages.append(asked) or tmp_path / 'index.html'
    )
    status, _, err = main('reproduce', 'fig4', '--preset', 'own', '--task', 't', '--teacher', 's', *changed)
    assert status == 0, err
    assert len(pages) == (0 if changed else 1)
