"Every figure and table: its notebook, its runs, its published records, and what a reader changes."

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import nbformat
import pytest

from dsbs.evidence.grids import FIGURES, grid, presets_of, specs_of
from dsbs.evidence.page import images_of
from dsbs.evidence.reporting import Reproduction, check_preset, figure_notebooks, run_figures
from dsbs.evidence.study import NOTHING_RUN, Study
from dsbs.records import canonical_json, find_folders
from dsbs.runs.experiments import read_results

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
RESULTS = ROOT / 'reports' / 'results'


def test_each_figure_has_its_notebook():
    assert {p.stem for p in figure_notebooks()} == set(FIGURES)


@pytest.mark.parametrize('figure', FIGURES)
def test_a_notebook_names_its_presets_and_defines_nothing(figure):
    path = ROOT / 'nbs' / 'figures' / f'{figure}.ipynb'
    for preset in presets_of(figure):
        check_preset(path, preset)
    code = [c.source for c in nbformat.read(path, 4).cells if c.cell_type == 'code']
    assert not any(line.startswith(('def ', 'class ')) for source in code for line in source.splitlines())


@pytest.mark.parametrize('preset', ['embedded', 'quick', 'standin', 'search'])
def test_every_published_record_belongs_to_a_figure(preset):
    if not (RESULTS / f'{preset}.jsonl').is_file():
        pytest.skip('nothing is published for this preset yet')
    specs = [s for f in FIGURES if preset in presets_of(f) for s in specs_of(grid(f, preset))]
    wanted = {canonical_json(asdict(s)) for s in specs}
    found = set(read_results(RESULTS / f'{preset}.jsonl'))
    assert found == wanted, 'records that no figure shows, or runs without a record'


def test_gains_have_one_digit_also_where_a_panel_lacks_the_curve():
    gains = Study('task_prefix').gains('decoder_longer', ['step_by_step', 'standard'])
    assert len(gains) and len(gains) < len(Study('task_prefix').gains('decoder', ['step_by_step', 'standard']))
    numbers = gains[['gain', 'low', 'high']]
    assert set(map(str, numbers.dtypes)) == {'float64'} and numbers.equals(numbers.round(1))


def test_each_picture_stands_with_one_figure():
    "Also one whose name begins with another figure's."
    drawn = {p.stem for p in (ROOT / 'reports' / 'figures').glob('*.svg')} - {'headline'}
    if not drawn:
        pytest.skip('nothing is published yet')
    assert sorted(p.stem for f in FIGURES for p in images_of(f, ROOT / 'reports')) == sorted(drawn)


def run_papermill(figure, out, tmp_path, **parameters):
    given = [
        word
        for name, value in ({'reports': str(tmp_path / 'reports')} | parameters).items()
        for word in ('-p', name, str(value))
    ]
    env = os.environ | {'DSBS_RUNS': str(tmp_path / 'runs')}
    done = subprocess.run(
        [BIN / 'papermill', f'nbs/figures/{figure}.ipynb', out, '--no-progress-bar', '--cwd', 'nbs/figures', *given],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return nbformat.read(out, 4)


@pytest.mark.slow
@pytest.mark.parametrize('figure', ['task_prefix', 'search', 'start_or_generalise', 'machines'])
def test_papermill_by_hand(figure, tmp_path):
    run_papermill(figure, tmp_path / 'out.ipynb', tmp_path, preset='smoke')
    assert not (tmp_path / 'reports' / 'figures').exists(), 'smoke writes beside the published figures, not over them'


@pytest.mark.slow
def test_every_figure_can_be_made(dsbs, tmp_path):
    reports = tmp_path / 'reports'
    status, _, err = dsbs('reproduce', '--preset', 'smoke', '--reports', reports)
    assert status == 0, err
    assert {p.stem.removesuffix('.smoke') for p in (reports / 'smoke' / 'notebooks').iterdir()} == set(FIGURES)


def shown_by(notebook):
    "What an executed notebook shows, as plain text."
    outputs = [o for c in notebook.cells if c.cell_type == 'code' for o in c.outputs]
    return [o.data.get('text/plain', '') for o in outputs if 'data' in o]


@pytest.mark.parametrize('figure', ['fig6_model_size_human', 'rationale_words'])
def test_without_any_record_a_figure_says_so_and_draws_nothing(figure, tmp_path):
    notebook = run_papermill(figure, tmp_path / 'out.ipynb', tmp_path, preset='recorded')
    assert NOTHING_RUN in shown_by(notebook) and len(notebook.cells) > 8
    assert not (tmp_path / 'reports' / 'figures').exists()


def test_a_picture_that_is_no_longer_made_goes_from_the_reports_and_the_page(tmp_path):
    """Its runs were removed, so it would show what nothing stands behind. What a person changed stays."""
    if not RESULTS.is_dir():
        pytest.skip('nothing is published yet')
    reports, name = tmp_path / 'reports', 'rationale_weight'
    shutil.copytree(RESULTS, reports / 'results')
    wanted = Reproduction([name], 'recorded', folders=find_folders(runs=tmp_path / 'runs', reports=reports))
    (path,) = figure_notebooks([name])
    files = run_figures([path], wanted)
    assert {p.name for p in files} == {f'{name}.png', f'{name}.svg', f'{name}.recorded.ipynb'}
    assert [p.name for p in images_of(name, reports)] == [f'{name}.svg'] and run_figures([path], wanted) == files
    shutil.rmtree(reports / 'results')
    (reports / 'figures' / f'{name}.png').write_bytes(b'mine')
    assert [p.name for p in run_figures([path], wanted)] == [f'{name}.recorded.ipynb']
    assert [p.name for p in (reports / 'figures').iterdir()] == [f'{name}.png']


def test_a_reader_changes_a_figure(tmp_path):
    """Other seeds than the published ones: those that were made are drawn, the missing ones are counted, and the
    published figure stays."""
    if not (RESULTS / 'quick.jsonl').is_file():
        pytest.skip('nothing is published yet')
    shutil.copytree(RESULTS, tmp_path / 'reports' / 'results')
    source = nbformat.read(ROOT / 'nbs' / 'figures' / 'fig5_data_size_teacher.ipynb', 4)
    for cell in source.cells:
        if 'parameters' in cell.metadata.get('tags', []):
            cell.source = cell.source.replace('seeds: list = []', 'seeds: list = [1, 2, 77]')
    changed = tmp_path / 'changed.ipynb'
    nbformat.write(source, changed)
    done = subprocess.run(
        [
            BIN / 'papermill',
            changed,
            tmp_path / 'out.ipynb',
            '--no-progress-bar',
            '--cwd',
            ROOT / 'nbs' / 'figures',
            '-p',
            'reports',
            tmp_path / 'reports',
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    drawn = tmp_path / 'reports' / 'changed' / 'figures' / 'fig5_data_size_teacher.svg'
    assert 'runs missing' in drawn.read_text() and not (tmp_path / 'reports' / 'figures').exists()


@pytest.mark.slow
def test_what_is_as_it_should_be_is_not_made_again(dsbs, tmp_path):
    reports = tmp_path / 'reports'
    if RESULTS.is_dir():
        shutil.copytree(RESULTS, reports / 'results')
    made = json.loads(dsbs('reproduce', 'fig5', '--preset', 'recorded', '--reports', reports, '--json')[1])['written']
    before, page = (
        {p: Path(p).stat().st_mtime_ns for p in made if Path(p).stem not in ('index', 'headline')},
        (reports / 'index.html').read_bytes(),
    )
    assert (
        json.loads(dsbs('reproduce', 'fig5', '--preset', 'recorded', '--reports', reports, '--json')[1])['written']
        == made
    )
    assert {p: Path(p).stat().st_mtime_ns for p in before} == before and (reports / 'index.html').read_bytes() == page
    figure = next(Path(p) for p in before if p.endswith('.png'))
    good = figure.read_bytes()
    figure.write_bytes(b'spoilt')
    dsbs('reproduce', 'fig5', '--preset', 'recorded', '--reports', reports)
    assert figure.read_bytes() == good


@pytest.mark.slow
def test_every_figure_made_twice_is_the_same_bytes(tmp_path, published):
    """Figures, executed notebooks and the page, from the published records, in two processes whose hashes differ;
    nothing is taken from the first."""
    if not RESULTS.is_dir():
        pytest.skip('nothing is published yet')
    made = []
    for seed in '12':
        reports = tmp_path / seed
        shutil.copytree(published / 'reports' / 'results', reports / 'results')
        for name in ('datasets.jsonl', 'independent_runs.csv'):
            shutil.copy(published / 'reports' / name, reports)
        done = subprocess.run(
            [BIN / 'dsbs', 'reproduce', '--preset', 'recorded', '--reports', reports, '--json'],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=3600,
            env=os.environ | {'PYTHONHASHSEED': seed},
        )
        assert done.returncode == 0, done.stderr[-3000:]
        made.append({str(p.relative_to(reports)): p.read_bytes() for p in reports.rglob('*') if p.is_file()})
    figures = {name for name in made[0] if name.startswith('figures/')}
    assert (
        {Path(n).stem for n in made[0] if n.startswith('notebooks/')}
        == {f'{f}.recorded' for f in FIGURES if 'recorded' in presets_of(f)}
        and len(figures) >= len(FIGURES)
        and 'index.html' in made[0]
    )
    assert sorted(n for n in made[0].keys() | made[1].keys() if made[0].get(n) != made[1].get(n)) == []
    for name in figures:
        if name.endswith('.svg') and (published / 'reports' / name).is_file():
            assert made[0][name] == (published / 'reports' / name).read_bytes(), f'{name} is not the committed one'


def test_reading_and_drawing_do_not_load_torch():
    code = """import sys, dsbs.evidence.claims, dsbs.evidence.grids, dsbs.evidence.study
assert not {"torch", "transformers", "datasets"} & set(sys.modules)"""
    subprocess.run([sys.executable, '-c', code], cwd=ROOT, check=True)


def test_the_report_and_the_readme_show_the_published_records(published):
    from dsbs.evidence.claims import judge
    from dsbs.evidence.headline import as_markdown, headline_sentences
    from dsbs.evidence.page import page_html
    from dsbs.evidence.published import INDEPENDENT, read_described
    from dsbs.evidence.reporting import verdicts

    reports = published / 'reports'
    if not (reports / 'results' / 'quick.jsonl').is_file():
        pytest.skip('nothing is published yet')
    claims = judge(reports / 'results')
    assert (reports / 'index.html').read_text() == page_html(
        reports, claims, read_described(reports / 'datasets.jsonl')
    )
    readme = (published / 'README.md').read_text()
    assert as_markdown(headline_sentences(reports / 'results', reports / INDEPENDENT)).strip() in readme
    assert verdicts(claims) in readme


@pytest.mark.parametrize('preset', ['embedded', 'quick', 'standin'])
def test_equal_compute_is_at_least_the_tokens_of_step_by_step(preset):
    "With all updates: a run that answers everything stops early."
    if not (RESULTS / f'{preset}.jsonl').is_file():
        pytest.skip('nothing is published for this preset yet')
    found = read_results(RESULTS / f'{preset}.jsonl')

    def tokens(spec):
        metrics = found[canonical_json(asdict(spec))]['metrics']
        return metrics['tokens'] / metrics['steps'] * spec.max_steps

    for curves in grid('fig4_data_size_human', preset).values():
        ours = {(s.n_train, s.train_fraction, s.seed): tokens(s) for s in curves['step_by_step']}
        for s in curves.get('equal_compute', ()):
            assert tokens(s) >= 0.98 * ours[s.n_train, s.train_fraction, s.seed], s
