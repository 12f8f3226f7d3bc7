"The report page: its numbers are those of the records, and no text or gap among them breaks it."

import base64
import hashlib
import json
import math
import random
import re
import shutil
import statistics
import subprocess
import sys
import threading
from dataclasses import asdict
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from xml.etree import ElementTree

import nbformat
import pandas as pd
import pytest
from matplotlib import pyplot as plt
from nbconvert import HTMLExporter
from nbconvert.filters import markdown2html

from dsbs.evidence import page as module
from dsbs.evidence.claims import REPLICATED
from dsbs.evidence.grids import FIGURES, SETUPS, grid, specs_of, with_seed
from dsbs.evidence.page import page_html, write_page
from dsbs.evidence.page_style import without_controls
from dsbs.evidence.plotting import THEME, Beside, accuracy_curves
from dsbs.evidence.reporting import run_notebook
from dsbs.runs.saved import model_card
from dsbs.teacher.extraction import Reading

ROOT = Path(__file__).resolve().parents[2]
HOSTILE = [
    '<script>alert(1)</script>',
    '</script><img src=x onerror=alert(2)>',
    '"><svg onload=alert(3)>',
    '</td></table></section>',
    '$\\frac{1}{2}$',
    '\N{FAMILY}\N{GRINNING FACE}\u200d',
    'שלום עולם \u202e123',
    'long ' + 'x' * 10_000,
    'words ' * 2_000,
    '\x00\x1b[31m\ud800',
    '',
    '&lt;b&gt; & &amp;',
    "'; drop table --",
    'https://example.org/',
    'a\nb\r\nc',
    '{{7*7}} {% x %} ${1}',
]
CLAIM = dict(
    id='fig4-all',
    where='Figure 4',
    text='Above at every size.',
    figure='fig4_data_size_human',
    preset='quick',
    data='same_kind',
    verdict='holds',
    effect=8.25,
    unit='points',
    interval=[5.1, 11.4],
    n=3,
    detail='six sizes',
)
CLAIMS = [
    CLAIM,
    CLAIM | dict(data='heavier', verdict='does not hold', effect=-3.0, interval=[-5.0, -1.0]),
    CLAIM | dict(id='fig5', verdict='undecided', effect=0.2, interval=[-1.0, 1.4]),
    CLAIM | dict(preset='paper', data='cqa', verdict='not comparable at this scale', effect=None, interval=None, n=0),
]


def record(spec):
    "A record as `runs` writes it, of numbers that nobody measured."
    rng = random.Random(repr(spec))
    n = spec.n_train or round(8000 * (spec.train_fraction or 1))
    test, validation = (round(rng.uniform(40, 99), 4) for _ in range(2))
    return dict(
        key=hashlib.sha256(repr(spec).encode()).hexdigest(),
        spec=asdict(spec),
        evaluations=[],
        history=[],
        teacher='simulated',
        stand_in='',
        metrics=dict(
            test_accuracy=test,
            validation_accuracy=validation,
            n_train=n,
            n_test=500,
            n_validation=200,
            majority_accuracy=50.0,
            parameters=460_000,
            steps=600,
            tokens=1000,
        ),
        answers={f'{spec.task}-0-test-{i:05d}': rng.choice(['yes', 'no']) for i in range(20)}
        if not spec.stand_in
        else {},
        teacher_quality=dict(
            labeled=n,
            correct=n,
            accuracy=90.0,
            disagrees=3,
            outside=0,
            reasons={'no marker': 2},
            rationale_words=dict(shortest=3, median=9, longest=20),
        ),
        provenance=dict(commit='a' * 40, device='cpu', dirty=False, machine=dict(processor='made up')),
        time=dict(finished='2026-01-02T03:04:05Z', seconds=30.0),
    )


def reports_of(folder, records):
    (folder / 'results').mkdir(parents=True, exist_ok=True)
    (folder / 'results' / 'some.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in records), encoding='utf-8')
    return folder


def all_specs(*presets):
    return list(dict.fromkeys(s for f in FIGURES for p in presets for s in specs_of(grid(f, p))))


def few_specs():
    "Figure 4 as preset quick has it, and two runs whose answers are shown."
    one = grid('compute', 'embedded')['same_kind']
    shown = [s for curve in ('standard', 'step_by_step') for s in one[curve] if s.seed == 0]
    return [*specs_of(grid('fig4_data_size_human', 'quick')), *shown]


@pytest.fixture
def small(tmp_path):
    return reports_of(tmp_path / 'reports', [record(s) for s in few_specs()])


class Cells(HTMLParser):
    "Cells with data attributes and their texts; all tags and attributes; whether tags are balanced."

    def __init__(self, text):
        super().__init__()
        self.cells, self.tags, self.open, self.wrong, self.text = [], [], [], [], ''
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == 'td':
            self.cells.append((dict(attrs), []))
        if tag not in ('meta', 'link', 'img', 'br'):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append((tag, self.getpos()))

    def handle_data(self, data):
        if 'td' in self.open and self.cells:
            self.cells[-1][1].append(data)
        if 'script' not in self.open and 'style' not in self.open:
            self.text += data

    def numbers(self):
        return [(a, ''.join(t)) for a, t in self.cells if 'data-curve' in a]


def rows_of(reports):
    return [
        json.loads(line) for f in sorted((reports / 'results').glob('*.jsonl')) for line in f.read_text().splitlines()
    ]


def says(a):
    "What a cell's curve and figure say of its runs: method, rationales, labels' source, where the task is named."
    curve, figure = a['data-curve'], a['data-figure']
    method = (
        curve.partition(' ')[0]
        if a['data-preset'] == 'search'
        else curve
        if curve in ('single_task', 'answer_first', 'rationale_as_input')
        else 'standard'
        if curve in ('standard', 'task_distillation', 'equal_compute')
        else 'step_by_step'
    )
    few_by_people = a['data-panel'] in ('same_kind_augmented', 'heavier_than_augmented')
    taught = figure in ('fig5_data_size_teacher', 'fig7_model_size_teacher', 'fig9_least_teacher') and not few_by_people
    return (
        method,
        next((r for r in ('shuffled_within', 'shuffled', 'scrambled', 'random', 'human') if curve == r), 'teacher')
        if curve != 'decoder_shuffled'
        else 'shuffled_within',
        'teacher' if taught else 'human',
        'decoder' if curve.startswith('decoder') else 'encoder',
    )


def check_numbers(reports, text):
    "Each cell against the lines of JSON that it names, and that those are what its place says."
    rows, cells = {r['key'][:8]: r for r in rows_of(reports)}, Cells(text).numbers()
    for a, shown in cells:
        runs = [rows[k] for k in a['data-runs'].split()]
        measured = 'validation_accuracy' if a['data-preset'] == 'search' else 'test_accuracy'
        values = [r['metrics'][measured] for r in runs]
        values = [v for v in values if v is not None and math.isfinite(v)]
        assert int(a['data-n']) == len(values) and f'({len(values)})' in shown
        if values:
            mean = pytest.approx(statistics.fmean(values), abs=1e-4)
            assert float(a['data-mean']) == mean
            half_a_digit = 0.05 + 1e-9  # A mean of 85.95 may be shown as 85.9 or 86.0
            assert float(shown.split(' ')[0]) == pytest.approx(statistics.fmean(values), abs=half_a_digit)
        if len(values) > 1:
            error = statistics.stdev(values) / math.sqrt(len(values))
            assert float(a['data-error']) == pytest.approx(error, abs=1e-4) and f'± {error:.1f} ' in shown
        assert len({r['spec']['seed'] for r in runs}) == len(runs)
        for s in (r['spec'] for r in runs):
            assert (s['method'], s['rationales'], s['label_source'], s.get('task_prefix', 'encoder')) == says(a)
            assert (s['student'], s['rationale_weight'], s['rationale_share'], bool(s.get('extra'))) == (
                a['data-student'],
                float(a['data-weight']),
                float(a['data-share']),
                'data-extra' in a,
            )
            assert str(s['train_fraction'] if s['n_train'] is None else s['n_train']) == a['data-x']
            panel = a['data-panel'].removesuffix('_augmented').removesuffix('_fewer').removesuffix('_standin')
            assert s['task'] == panel.removeprefix('quick_')
    return cells


def test_only_a_figure_over_widths_says_with_which_student_settings_were_searched(tmp_path):
    reports = reports_of(tmp_path, [record(s) for s in all_specs('standin')])
    sections = page_html(reports, CLAIMS).split('<section')
    saying = {re.search(r'id="(\w+)"', part)[1] for part in sections if 'other widths take them over' in part}
    assert saying == {'fig6_model_size_human'}


def test_only_figures_with_standard_errors_speak_of_them(published):
    """Those of runs that others drew, such as the same runs on two machines, have intervals or nothing, and say so
    themselves."""
    sections = (published / 'reports' / 'index.html').read_text().split('<section')
    saying = {re.search(r'id="(\w+)"', part)[1] for part in sections if 'Error bars' in part}
    trained = {name for name, figure in FIGURES.items() if figure.curves}
    assert saying == trained - {'fig1_headline', 'compute', 'search', *REPLICATED}


def test_numbers_of_all_figures_are_those_of_the_records(tmp_path):
    presets = 'quick', 'embedded', 'standin', 'search'
    specs = all_specs(*presets)
    reports = reports_of(tmp_path, [record(s) for s in specs])
    cells = check_numbers(reports, page_html(reports, CLAIMS))
    places = [
        (f, p, panel, curve, some)
        for f in FIGURES
        for p in presets
        for panel, curves in grid(f, p).items()
        for curve, some in curves.items()
    ]
    wanted = {(*place, repr(with_seed(s, 0))) for *place, some in places for s in some}
    assert len(cells) == len(wanted)
    assert {k for a, _ in cells for k in a['data-runs'].split()} == {record(s)['key'][:8] for s in specs}


def test_no_more_curves_stand_beside_each_other_than_fit_on_a_screen(tmp_path):
    reports = reports_of(tmp_path, [record(s) for s in all_specs('embedded', 'standin', 'search')])
    rows = re.findall('<tr>.*?</tr>', page_html(reports, CLAIMS), re.S)
    assert 2 <= max(row.count('data-curve') for row in rows) <= 6


def test_numbers_of_the_published_page_are_those_of_the_records():
    check_numbers(ROOT / 'reports', page_html(ROOT / 'reports', []))


def test_weights_and_compute_are_told_apart(small):
    "Curves of one method that differ in the weight, or in the updates."
    reports = reports_of(small, [record(s) for s in all_specs('quick')])
    cells = [a for a, _ in Cells(page_html(reports, [])).numbers()]
    weights = [
        float(a['data-weight']) for a in cells if a['data-figure'] == 'rationale_weight' and a['data-preset'] == 'quick'
    ]
    assert weights == list(SETUPS['quick']()['quick_heavier_than'].weights)
    rows = {r['key'][:8]: r['spec']['max_steps'] for r in rows_of(reports)}
    steps = {a['data-curve']: {rows[k] for k in a['data-runs'].split()} for a in cells if a['data-figure'] == 'compute'}
    assert max(steps['standard']) < min(steps['equal_compute'])


def test_teachers_sizes_and_times_are_those_of_the_records(tmp_path):
    reports = reports_of(tmp_path, [record(s) for s in specs_of(grid('fig4_data_size_human', 'quick'))])
    text = page_html(reports, [])
    parsed = Cells(text)
    rows = rows_of(reports)
    told = [a for a, _ in parsed.cells if 'data-teacher' in a]
    most = {
        t: max(r['teacher_quality']['labeled'] for r in rows if r['spec']['task'] == t)
        for t in ('same_kind', 'heavier_than', 'weight_untold')
    }
    named = [next(r for r in rows if r['key'].startswith(a['data-runs'])) for a in told]
    assert {r['spec']['task']: r['teacher_quality']['labeled'] for r in named} == most and all(
        float(a['data-accuracy']) == r['teacher_quality']['accuracy'] for a, r in zip(told, named)
    )
    assert [a['data-n'] for a, _ in parsed.cells if a.get('data-figure') == 'table3_datasets'] == [
        '720',
        '200',
        '500',
    ] * 3
    assert f'{len(rows)} runs, {sum(r["time"]["seconds"] for r in rows) / 60:.1f} CPU minutes' in parsed.text


def test_claims_come_first_and_what_cannot_be_compared_is_folded(small):
    text = page_html(small, CLAIMS)
    parsed = Cells(text)
    assert text.index('id="claims"') < text.index('id="fig1_headline"') < text.index('id="open"')
    lines = [a for _, a in parsed.tags if 'data-verdict' in a]
    assert [(a['data-claim'], a['data-verdict']) for a in lines] == [
        (CLAIMS[i]['id'], CLAIMS[i]['verdict']) for i in (0, 1, 2, 3)
    ]
    assert [name for name, a in parsed.tags if a.get('data-verdict') == 'not comparable at this scale'] == ['li']
    assert '+8.2 points [+5.1, +11.4]' in text and '−3.0 points' in text


def test_nothing_published_yet(tmp_path):
    text = page_html(tmp_path, [])
    parsed = Cells(text)
    assert not parsed.numbers() and not parsed.wrong
    assert text.count('No runs published yet.') == sum(f.curves is not None for f in FIGURES.values())
    assert 'No claims judged yet.' in text and 'No answers recorded yet.' in text


def scored(row, accuracy):
    return row | dict(metrics=row['metrics'] | dict(test_accuracy=accuracy))


@pytest.mark.parametrize(
    'change, shown',
    [
        (lambda rows: [r for r in rows if r['spec']['seed'] == 0], ' (1) 2 missing'),
        (lambda rows: [scored(r, math.nan) if r['spec']['seed'] == 2 else r for r in rows], ' (2) 1 without a number'),
        (lambda rows: [scored(r, None) for r in rows], 'no number (0) 3 without a number'),
    ],
    ids=['one seed', 'NaN', 'no number'],
)
def test_gaps_are_told(small, change, shown):
    reports = reports_of(small, change(rows_of(small)))
    text = page_html(reports, CLAIMS)
    cells = check_numbers(reports, text)
    assert cells and all(t.endswith(shown) for a, t in cells if a['data-preset'] == 'quick')
    assert all(('data-error' in a) == (int(a['data-n']) > 1) for a, _ in cells) and 'nan' not in ''.join(
        t for _, t in cells
    )


def test_a_method_is_absent(small):
    reports = reports_of(small, [r for r in rows_of(small) if r['spec']['method'] == 'standard'])
    text = page_html(reports, CLAIMS)
    cells = check_numbers(reports, text)
    assert {a['data-curve'] for a, _ in cells} == {'standard', 'equal_compute'}
    missing = sum(
        s.method != 'standard'
        for curves in grid('fig4_data_size_human', 'quick').values()
        for some in curves.values()
        for s in some
    )
    assert f'{missing} runs of this figure have no record yet.' in text and 'no answer recorded' in text


def hostile_reports(folder, monkeypatch, texts=HOSTILE):
    "Reports in which every place that shows a text of a task, a teacher, a student or a judge shows one of these."
    rows = [record(s) for s in few_specs()]
    for i, r in enumerate(rows):
        text = texts[i % len(texts)]
        r['answers'] = {k: texts[(i + j) % len(texts)] for j, k in enumerate(r['answers'])}
        r['teacher'], r['provenance']['machine']['processor'], r['stand_in'] = text, text, text
        r['teacher_quality']['reasons'] = {t: 1 for t in texts[:6]}
    whole = module.teacher_rationales
    monkeypatch.setattr(
        module,
        'teacher_rationales',
        lambda task, split: {
            k: Reading(texts[i % len(texts)], texts[-1 - i % len(texts)]) for i, k in enumerate(whole(task, split))
        },
    )
    claims = [
        CLAIM | dict(id=f'c{i}', text=t, where=t, detail=t, data=t, unit=t, verdict=t if i % 2 else 'holds')
        for i, t in enumerate(texts)
    ]
    others = [dict(source=t, basis=t, method=t, accuracy=dict(cqa=1.5), fractions=dict(cqa={0.5: 2.5})) for t in texts]
    published = dict(tables={}, reproductions=others, choices=[(t, t, t) for t in texts])
    described = [dict(preset='quick', panel=t, split=t, teacher=t, n=1, **rows[0]['teacher_quality']) for t in texts]
    return reports_of(folder, rows), claims, described, published


def test_hostile_texts_stay_texts(tmp_path, monkeypatch):
    given = hostile_reports(tmp_path, monkeypatch)
    path = write_page(*given)
    parsed = Cells(path.read_text(encoding='utf-8'))
    assert not parsed.wrong and not parsed.open
    assert [name for name, _ in parsed.tags].count('script') == 1 and not {'svg', 'iframe'} & {
        name for name, _ in parsed.tags
    }
    assert not [(name, a) for name, a in parsed.tags if any(k.startswith('on') for k in a)]
    for text in HOSTILE:
        seen = without_controls(text).replace('\r\n', '\n')
        assert seen in parsed.text.replace('\r\n', '\n'), text[:40]
    quoted = [a for name, a in parsed.tags if a.get('class') == 'quoted']
    assert quoted and all(a['dir'] == 'auto' for a in quoted)


def no_requests(text):
    for name, a in Cells(text).tags:
        for k, value in a.items():
            assert k not in ('src', 'href', 'srcset', 'data', 'action', 'poster') or value.startswith(('data:', '#')), (
                name,
                k,
                value[:80],
            )
    assert not re.search(r'url\(|@import|//fonts', text)


def test_one_file_that_asks_for_nothing(small):
    (small / 'figures').mkdir()
    for end in 'ab':
        (small / 'figures' / f'fig4_data_size_human_{end}.svg').write_text(
            '<svg xmlns="http://www.w3.org/2000/svg" width="331.2pt" viewBox="0 0 9 9">'
            '<text font-family="\'DejaVu Sans\'">x</text></svg>'
        )
    text = page_html(small, CLAIMS)
    no_requests(text)
    parsed = Cells(text)
    images = [a for name, a in parsed.tags if name == 'img']
    assert len(images) == 2 and all(a['alt'] for a in images)
    assert b'Verdana' in base64.b64decode(images[0]['src'].split(',')[1])
    targets = {a['id'] for _, a in parsed.tags if 'id' in a}
    assert {a['href'][1:] for name, a in parsed.tags if name == 'a'} <= targets
    assert len(targets) == sum('id' in a for _, a in parsed.tags)
    no_requests(page_html(ROOT / 'reports', CLAIMS))


def sections_and_contents(text):
    parsed = Cells(text)
    sections = [a['id'] for name, a in parsed.tags if name in ('section', 'footer') and 'id' in a]
    contents = re.search('<nav.*?</nav>', text, re.DOTALL)[0]
    return sections, re.findall('href="#(.*?)"', contents)


def test_the_contents_name_each_section(small):
    for reports in (small, ROOT / 'reports'):
        sections, contents = sections_and_contents(page_html(reports, CLAIMS))
        assert contents == sections and ('students' in contents) == (reports / 'students').is_dir()


def test_the_script_is_the_one_the_policy_allows(small):
    text = page_html(small, [])
    script, policy = (
        re.search(r'<script>(.*?)</script>', text, re.S)[1],
        next(a['content'] for _, a in Cells(text).tags if a.get('http-equiv')),
    )
    assert (
        f"script-src 'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" in policy
        and "default-src 'none'" in policy
    )


def test_the_same_bytes_again(small):
    once = write_page(small, CLAIMS).read_bytes()
    reports_of(small, reversed(rows_of(small)))
    assert write_page(small, CLAIMS).read_bytes() == once


def test_structure(small):
    parsed = Cells(page_html(small, CLAIMS))
    names = [name for name, _ in parsed.tags]
    assert not parsed.wrong and names.count('h1') == names.count('main') == names.count('nav') == 1
    assert all('scope' in a for name, a in parsed.tags if name == 'th') and ('html', {'lang': 'en'}) in parsed.tags


def test_reading_the_page_module_loads_no_torch():
    code = """import sys, dsbs.evidence.page
sys.exit(' '.join({'torch', 'transformers', 'datasets'} & set(sys.modules)) or None)"""
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


PROBE = """
const said = [], told = {}
addEventListener('error', e => said.push(`error: ${e.message || e.target.outerHTML}`), true)
addEventListener('securitypolicyviolation', e => said.push(`policy: ${e.violatedDirective} ${e.blockedURI}`))
for (const name of ['error', 'warn']) console[name] = (...texts) => said.push(`${name}: ${texts}`)
for (const name of ['alert', 'confirm', 'prompt']) window[name] = text => said.push(`${name}: ${text}`)
addEventListener('load', () => setTimeout(() => {
  const shown = () => [...document.querySelectorAll('#browser article')].filter(card => card.offsetParent)
  const first = shown()[0]?.textContent
  const next = [...document.querySelectorAll('.controls button')].find(b => b.textContent == 'Next')
  told.articles = shown().length
  next?.click()
  told.moved = shown().length == 1 && shown()[0].textContent != first
  const [task, seed] = document.querySelectorAll('.controls select')
  if (seed) {
    seed.value = 1; seed.onchange()
    told.rows = shown()[0].querySelectorAll('tbody tr:not([hidden])').length
    seed.value = 0; seed.onchange()
  }
  document.querySelectorAll('details').forEach(fold => { fold.open = true })
  told.width = innerWidth; told.scroll = document.documentElement.scrollWidth
  const asked = performance.getEntriesByType('resource').filter(e => !e.name.startsWith('data:'))
  told.requests = asked.map(e => e.name).join(' ')
  told.broken = [...document.images].filter(i => !i.naturalWidth).length
  told.ground = getComputedStyle(document.body).backgroundColor
  parent.postMessage({...told, said}, '*')
}, 300))
"""


@pytest.fixture
def look(tmp_path):
    "Open a page in a browser, in a frame as wide as asked (a window has a least width), and ask it what happened."
    chromium = shutil.which('chromium')
    if not chromium:
        pytest.skip('needs a browser: chromium is not installed (apt-get install chromium)')

    def open_page(text, width, dark=False, policy=True):
        allowed = base64.b64encode(hashlib.sha256(PROBE.encode()).digest()).decode()
        watched = text.replace('script-src &#39;', f'script-src &#39;sha256-{allowed}&#39; &#39;', 1).replace(
            '<title>', f'<script>{PROBE}</script><title>', 1
        )
        assert watched.count(allowed) == policy and watched.count(PROBE) == 1
        (tmp_path / 'watched.html').write_text(watched, encoding='utf-8')
        frame = f'<iframe src="watched.html" style="border:0;width:{width}px;height:3000px"></iframe>'
        (tmp_path / 'frame.html').write_text(
            f'<!doctype html>{frame}<script>onmessage = e => document.body.append(JSON.stringify(e.data))</script>'
        )
        quiet = [
            '--no-first-run',
            '--disable-background-networking',
            '--disable-component-update',
            '--disable-sync',
            '--disable-quic',
            f'--user-data-dir={tmp_path / "profile"}',
        ]
        options = [
            '--headless',
            '--no-sandbox',
            '--disable-gpu',
            '--window-size=1400,3000',
            f'--blink-settings=preferredColorScheme={0 if dark else 1}',
            *quiet,
            '--virtual-time-budget=5000',
            '--dump-dom',
        ]
        done = subprocess.run(
            [chromium, *options, (tmp_path / 'frame.html').as_uri()],
            capture_output=True,
            text=True,
            timeout=600,
            encoding='utf-8',
        )
        assert done.returncode == 0 and '{"' in done.stdout, done.stderr[-1000:] + done.stdout[-1000:]
        return json.loads(Cells(done.stdout).text)

    return open_page


def fine(told, width):
    assert (told['said'], told['requests'], told['broken'], told['width']) == ([], '', 0, width) and told[
        'scroll'
    ] <= width


@pytest.mark.parametrize('width', [1280, 390])
def test_in_a_browser(tmp_path, look, width):
    reports = reports_of(tmp_path / 'reports', [record(s) for s in [*few_specs(), *all_specs('standin')]])
    shutil.copytree(ROOT / 'reports' / 'figures', reports / 'figures')
    claims = CLAIMS + [CLAIM | dict(id=f'long-{i}', detail='a rather long detail ' * 10) for i in range(3)]
    told = look(page_html(reports, claims), width)
    fine(told, width)
    assert (told['articles'], told['moved'], told['rows']) == (1, True, 1)


def test_dark_is_dark(small, look):
    text = page_html(small, CLAIMS)
    light, dark = (sum(map(int, re.findall(r'\d+', look(text, 390, dark=d)['ground'])[:3])) for d in (False, True))
    assert light > 700 and dark < 120


def test_nothing_hostile_runs_in_a_browser(tmp_path, monkeypatch, look):
    text = write_page(*hostile_reports(tmp_path / 'reports', monkeypatch)).read_text(encoding='utf-8')
    for width in (1280, 390):
        fine(look(text, width), width)


def test_an_empty_page_in_a_browser(tmp_path, look):
    fine(look(page_html(tmp_path / 'reports', []), 390), 390)


# Script payloads through every path on which a text is shown. Each would call alert, which is watched, and ask a
# server, which counts.


def payloads(url):
    do = lambda n: f'alert({n});fetch(`{url}/js{n}`)'
    made = [
        '<script>{do}</script>',
        '<ScRiPt src={url}/{n}></ScRiPt>',
        '</script><script>{do}</script>',
        '</textarea></title></style><script>{do}</script>',
        '<img src=x onerror="{do}">',
        '<img src="{url}/{n}">',
        '<svg onload="{do}">',
        '<svg><script>{do}</script></svg>',
        '<body onload="{do}">',
        '<details open ontoggle="{do}">',
        '<input autofocus onfocus="{do}">',
        '<video src={url}/{n} onerror="{do}"></video>',
        '<iframe src="javascript:parent.{do}"></iframe>',
        '<iframe srcdoc="<script>parent.{do}</script>"></iframe>',
        '<object data="{url}/{n}"></object>',
        '<embed src="{url}/{n}">',
        '<link rel=stylesheet href="{url}/{n}">',
        '<style>@import "{url}/{n}";</style>',
        '<div style="background:url({url}/{n})">x</div>',
        '<meta http-equiv=refresh content="0;url={url}/{n}">',
        '<base href="{url}/{n}/">',
        '<form action="{url}/{n}"><button autofocus>x</button></form><script>document.forms[0].submit()</script>',
        '" onmouseover="{do}" autofocus onfocus="{do}" x="',
        "' autofocus onfocus='{do}' x='",
        '[x](javascript:{do})',
        '![x]({url}/{n})',
        '<a href="javascript:{do}" id=x>x</a><script>x.click()</script>',
        '<a href="data:text/html,<script>{do}</script>">x</a>',
        '$\\href{{javascript:{do}}}{{x}}$ \\(\\require{{x}}\\)',
        '{{{{constructor.constructor("{do}")()}}}} ${{{do}}} <%= {do} %>',
        '<template><script>{do}</script></template><slot onslotchange="{do}">',
        '--><script>{do}</script><!--',
        ']]><script>{do}</script>',
        '<math><mtext><img src=x onerror="{do}"></mtext></math>',
        '\x1b]8;;{url}/{n}\x07x\x1b]8;;\x07 \u202e<script>{do}</script>',
        '<script type=module>import "{url}/{n}"</script>',
        '<noscript><img src="</noscript><img src=x onerror={do}>">',
        '```html\n<script>{do}</script>\n```\n<script>{do}</script>',
    ]
    return [text.format(do=do(n), url=url, n=n) for n, text in enumerate(made)]


@pytest.fixture
def server():
    "Its address, and the list of what it was asked for."
    asked = []

    class Counting(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(204)
            self.send_header('Access-Control-Allow-Origin', '*')
            self.end_headers()

        do_POST = do_OPTIONS = do_GET

        def log_message(self, *args):
            pass

    running = ThreadingHTTPServer(('127.0.0.1', 0), Counting)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{running.server_port}', asked
    running.shutdown()
    running.server_close()


def bare(body):
    return f'<!doctype html><html><head><title>x</title></head><body>{body}</body></html>'


def dead(told, asked):
    assert (told['said'], told['requests'], asked) == ([], '', []), (told['said'][:5], told['requests'], asked[:5])


def no_live_tags(text, allowed=()):
    tags = Cells(text).tags
    assert not {name for name, _ in tags} & (
        {
            'script',
            'iframe',
            'object',
            'embed',
            'base',
            'form',
            'link',
            'meta',
            'video',
            'template',
            'svg',
            'math',
            'input',
            'slot',
            'noscript',
        }
        - set(allowed)
    )
    assert not [
        (name, a)
        for name, a in tags
        if any(k.startswith('on') or k in ('srcdoc', 'formaction') for k in a)
        or any((v or '').strip().lower().startswith(('javascript:', 'data:text')) for v in a.values())
    ]


def test_payloads_are_alive_where_nothing_is_done(look, server):
    "What the other tests watch with does see them."
    url, asked = server
    texts = [
        p
        for p in payloads(url)
        if not any(
            w in p for w in ('http-equiv', '<base', '<form', '<noscript', '<template', '</textarea', '-->', '\x1b')
        )
    ]
    told = look(bare(''.join(texts)), 1280, policy=False)
    called = {int(m) for s in told['said'] for m in re.findall(r'^alert: (\d+)', s)}
    assert len(payloads(url)) >= 30 and len(called) >= 8 and len(set(asked)) >= 12, (sorted(called), sorted(set(asked)))


def test_payloads_are_dead_in_the_report(tmp_path, monkeypatch, look, server):
    url, asked = server
    text = write_page(*hostile_reports(tmp_path / 'reports', monkeypatch, payloads(url))).read_text(encoding='utf-8')
    shown = Cells(text).text
    assert all(without_controls(p).replace('\r\n', '\n') in shown for p in payloads(url)), 'each is there, as text'
    told = look(text, 1280)
    fine(told, 1280)
    dead(told, asked)


SHOW = """from IPython.display import HTML, Javascript, Latex, Markdown, SVG, display
import pandas as pd
class Model:
    def __init__(self, text): self.text = text
    def __repr__(self): return self.text
    def _repr_html_(self): return self.text
    def _repr_markdown_(self): return self.text
    def _repr_svg_(self): return f'<svg xmlns="http://www.w3.org/2000/svg">{self.text}</svg>'
    def _repr_javascript_(self): return 'alert(99)'
display(pd.DataFrame(dict(text=texts), index=texts).rename_axis(texts[0]), pd.DataFrame([texts], columns=texts), texts)
for t in texts:
    print(t)
    display(Model(t), HTML(t), Markdown(t), Latex(t), Javascript(f'alert("{len(t)}")'))
    display({'text/plain':t, 'application/vnd.custom+json':dict(html=t)})
display({'text/plain':'x', 'text/html':texts[0], 'application/json':dict(x=texts)}, raw=True)
pd.DataFrame(dict(text=texts)).style"""


def executed(tmp_path, texts):
    cells = [
        nbformat.v4.new_code_cell('texts: list = []  # such', id='a', metadata=dict(tags=['parameters'])),
        nbformat.v4.new_code_cell(SHOW, id='b'),
    ]
    nbformat.write(
        nbformat.v4.new_notebook(
            cells=cells, metadata=dict(kernelspec=dict(name='python3', display_name='python3', language='python'))
        ),
        tmp_path / 'in.ipynb',
    )
    return nbformat.read(run_notebook(tmp_path / 'in.ipynb', tmp_path / 'out.ipynb', dict(texts=texts)), 4)


def as_html(notebook):
    return (
        HTMLExporter(mathjax_url='', require_js_url='', jquery_url='', mermaid_js_url='', widget_renderer_url='')
        .from_notebook_node(notebook)[0]
        .replace('<script src=""></script>', '')
        .replace('<script src=""> </script>', '')
    )


def test_payloads_are_dead_in_an_executed_notebook(tmp_path, look, server):
    "As it stands, which is what JupyterLab shows, and as nbconvert makes a page of it."
    url, asked = server
    notebook = executed(tmp_path, payloads(url))
    outputs = [o for c in notebook.cells for o in c.get('outputs', [])]
    kinds = {kind for o in outputs for kind in o.get('data', {})}
    assert kinds == {'text/plain', 'text/html'} and sum('text/html' in o.get('data', {}) for o in outputs) >= 2, (
        'tables stay'
    )
    for o in outputs:
        no_live_tags(o.get('data', {}).get('text/html', ''))
    assert all(p[:20] in str(outputs) or repr(p)[1:20] in str(outputs) for p in payloads(url)), (
        'and what they say stays, as plain text'
    )
    text = as_html(notebook)
    told = look(text, 1280, policy=False)
    dead(told, asked)


def test_payloads_are_dead_in_a_figure(tmp_path, look, server):
    "As titles, labels and notes of an svg, put into a page as if it were part of it."
    url, asked = server
    texts = payloads(url)
    runs = pd.DataFrame([dict(curve='standard', n_train=n, test_accuracy=50.0 + s) for n in (10, 20) for s in (0, 1)])
    fig, axes = plt.subplots(len(texts) // 4 + 1, 4)
    for ax, text in zip(axes.flat, texts):
        accuracy_curves(ax, runs, 'n_train', Beside(text.replace('\x1b', '').replace('\x07', '')))
    with plt.rc_context(THEME):
        fig.savefig(tmp_path / 'fig.svg')
        plt.close(fig)
    elements = list(ElementTree.parse(tmp_path / 'fig.svg').iter())
    tags = {e.tag.rpartition('}')[2] for e in elements}
    assert not tags & {'script', 'foreignObject', 'a', 'iframe', 'image', 'animate', 'set', 'handler'}, tags
    assert not [
        e.attrib
        for e in elements
        for k, v in e.attrib.items()
        if k.startswith('on') or k.endswith('href') and not v.startswith('#')
    ]
    drawn = (tmp_path / 'fig.svg').read_text(encoding='utf-8')
    drawn = drawn[drawn.index('<svg') :]
    assert drawn.count('&lt;script') > 10
    dead(look(bare(drawn), 1280, policy=False), asked)


def test_payloads_are_dead_in_a_model_card(tmp_path, look, server):
    "The README of a student that was saved, whose teacher and task somebody named."
    url, asked = server
    row = record(specs_of(grid('fig4_data_size_human', 'quick'))[0])
    row['metrics'] |= dict(best_step=1, n_rationales=1)
    cards = [
        model_card(
            row
            | dict(teacher=t, stand_in=t, spec=row['spec'] | dict(task=t.replace('/', ''), student=t.replace('/', ''))),
            't5',
        )
        for t in payloads(url)
    ]
    text = ''.join(map(str, map(markdown2html, cards)))
    no_live_tags(text)
    assert '<img' not in text and text.count('&lt;script') > 10
    dead(look(bare(text), 1280, policy=False), asked)


def test_the_readme_has_nothing_alive():
    text = str(markdown2html((ROOT / 'README.md').read_text(encoding='utf-8')))
    no_live_tags(text)
    sources = [a['src'] for name, a in Cells(text).tags if name == 'img']
    assert not [s for s in sources if re.match(r'[a-z]+:|//', s)], 'an image is one of this project'
