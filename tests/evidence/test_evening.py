"Preset `evening`: its plan on each card, the order of its runs, what a reader changes, and the whole of it in small."

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import nbformat
import pytest
from small_t5 import small_t5

from dsbs.data.tasks import load_task
from dsbs.evidence import reporting
from dsbs.evidence.claims import judge
from dsbs.evidence.grids import FIGURES, grid, grids_of, made_so_far, presets_of, specs_of, stages
from dsbs.evidence.plan import CARDS
from dsbs.evidence.reporting import Reproduction
from dsbs.records import UsageError, find_folders, write_jsonl
from dsbs.runs.experiments import read_results, run
from dsbs.runs.specs import RunSpec, prepare, run_key

ROOT = Path(__file__).resolve().parents[2]
FIG4 = 'fig4_data_size_human'
EVENING = [figure for figure in FIGURES if 'evening' in presets_of(figure) and FIGURES[figure].curves]


@pytest.fixture
def planned(main, tmp_path):
    def call(*more):
        status, out, err = main(
            'reproduce', '--preset', 'evening', '--dry-run', '--data-dir', tmp_path, *more, '--json'
        )
        assert status == 0, err
        return json.loads(out)

    return call


@pytest.mark.parametrize('card', CARDS)
def test_the_plan_of_each_card(planned, card):
    p = planned('--gpu', card)
    assert p['gpu'] == card and p['cards'] and p['order']
    assert all(0 < g['gpu_memory_gb'] <= CARDS[card].gb for g in p['groups'])
    assert p['order'][-1]['by_then'] == pytest.approx(p['gpu_hours'], abs=0.5)
    assert next(c for c in p['cards'] if c['card'] == card)['gpu_hours'] == pytest.approx(p['gpu_hours'], abs=0.5)
    assert not any('a GPU with' in m['what'] for m in p['missing'])


def test_an_evening_on_a_card_of_24_gb(planned):
    cards = ('RTX 3090', 'RTX 4090', 'L4', 'A10', 'H100', 'T4')
    hours = {card: planned('--gpu', card)['gpu_hours'] for card in cards}
    assert 9 < hours['RTX 4090'] < 10 and hours['A10'] < 10 and hours['L4'] < 10 and hours['RTX 3090'] < 11
    assert hours['H100'] < hours['RTX 4090'] < hours['T4']
    assert planned('--gpu', 'A10', '--task', 'svamp')['gpu_hours'] <= 2.5


def test_on_fast_cards_the_host_decides(planned):
    hours = {card: planned('--gpu', card, '--task', 'svamp')['gpu_hours'] for card in ('A100', 'H200', 'T4')}
    assert hours['A100'] == pytest.approx(hours['H200'], rel=0.02) and hours['T4'] > 2 * hours['A100']


def test_a_small_card_cuts_the_batch_up(planned):
    groups = planned('--gpu', 'T4', '--task', 'anli1')['groups']
    cut = {g['method']: g['accumulation'] for g in groups if g['student'] == 't5-v1_1-base'}
    assert cut['step_by_step'] >= cut['standard'] and cut['step_by_step'] > 1
    assert {g['accumulation'] for g in planned('--gpu', 'H100')['groups']} == {1}


def test_without_a_card_the_plan_names_all(main, tmp_path, monkeypatch):
    monkeypatch.setenv('PATH', str(tmp_path))  # no nvidia-smi
    status, out, _ = main('reproduce', '--preset', 'evening', '--dry-run', '--data-dir', tmp_path)
    assert status == 0 and all(f'\n{card}' in out for card in CARDS) and 'hours of an H100' in out
    for what in ('weights of t5-v1_1-base', 'rows of svamp', 'completions for cqa', 'In this order, one by one'):
        assert what in out


def test_nvidia_smi_names_the_card(planned, tmp_path, monkeypatch):
    smi = tmp_path / 'bin' / 'nvidia-smi'
    smi.parent.mkdir()
    smi.write_text('#!/bin/sh\ncase "$1" in *name*) echo "NVIDIA GeForce RTX 3090";; *) echo 24576;; esac\n')
    smi.chmod(0o755)
    monkeypatch.setenv('PATH', f'{smi.parent}:{os.environ["PATH"]}')
    assert planned()['gpu'] == 'RTX 3090'
    assert planned('--gpu', 'l4')['gpu'] == 'L4'


def test_a_measured_minute_takes_the_place_of_the_published_speed(planned, main, tmp_path):
    row = dict(implementation='ours', device='NVIDIA L4', parameters=247_577_856, gflops=20_000.0)
    file = tmp_path / 'bench.json'
    hours = {}
    for gflops in (20_000.0, 40_000.0):
        file.write_text(json.dumps([row | dict(implementation='reference', gflops=1.0), row | dict(gflops=gflops)]))
        hours[gflops] = planned('--gpu', 'L4', '--measured', file)['gpu_hours']
    assert 1.5 < hours[20_000.0] / hours[40_000.0] < 2.0
    file.write_text(json.dumps([row | dict(device='AMD EPYC 9B14')]))
    for wrong in (file, tmp_path, ROOT / 'Makefile'):
        status, _, err = main('reproduce', '--dry-run', '--gpu', 'L4', '--measured', wrong)
        assert status == 2 and err.count('\n') == 1 and '--measured' in err


@pytest.mark.parametrize(
    'wrong, words',
    [
        (['--gpu', 'Voodoo 2', '--dry-run'], "unknown GPU 'Voodoo 2': choose one of T4, RTX 3090"),
        (['--gpu', 'T4'], 'go with --dry-run'),
        (['--task', 'sudoku'], "unknown task 'sudoku': choose one of svamp, cqa, anli1, esnli"),
        (['--task', 'svamp,sudoku', '--dry-run'], "unknown task 'sudoku'"),
        (['--set', 'max_step=3'], 'did you mean max_steps?'),
        (['--set', 'max_steps=few', '--dry-run'], 'max_steps=few: should be a whole number'),
        (['--set', 'max_steps'], 'write KEY=VALUE'),
        (['--set', 'seed=1', 'fig4'], 'name them in seeds'),
        (['--set', 'max_steps=3', 'table3'], 'takes no settings'),
        (['--set', 'extra_teacher=x', '--dry-run'], 'extra_teacher needs extra'),
        (['--teacher', 'x'], 'go with --preset own'),
    ],
)
def test_what_is_wrong_is_said_in_a_line(main, tmp_path, wrong, words):
    status, out, err = main('reproduce', '--preset', 'evening', *wrong, '--reports', tmp_path / 'reports')
    assert (status, out, err.count('\n')) == (2, '', 1) and words in err


def test_each_stop_leaves_a_figure():
    grids = grids_of(EVENING, 'evening')
    found = stages(grids)
    assert [s.seed for some in found.values() for s in some] == sorted(s.seed for some in found.values() for s in some)
    first = list(found)[:4]
    assert first == [(0, FIG4, f'evening_{task}') for task in ('svamp', 'cqa', 'anli1', 'esnli')]
    assert {(s.method, s.train_fraction) for s in found[first[0]][:2]} == {('standard', 0.25), ('step_by_step', 0.25)}
    made = [s for some in found.values() for s in some]
    assert len(made) == len(set(made)) and set(made) == {s for panels in grids.values() for s in specs_of(panels)}


def test_an_evening_has_what_it_promises():
    fig4 = grid(FIG4, 'evening')
    assert list(fig4) == ['evening_svamp', 'evening_cqa', 'evening_anli1', 'evening_esnli']
    for panel, curves in fig4.items():
        sizes = sorted({s.train_fraction for s in curves['step_by_step']})
        assert sizes == [part * (0.125 if 'esnli' in panel else 1) for part in (0.25, 0.5, 1)]
        assert set(curves) == {'standard', 'step_by_step', 'shuffled_within', 'equal_compute'}
    specs = [s for figure in EVENING for s in specs_of(grid(figure, 'evening'))]
    assert {s.seed for s in specs} == {0, 1, 2} and {s.dtype for s in specs} == {'bfloat16'}
    assert {s.student for s in specs} == {'t5-v1_1-small', 't5-v1_1-base'} and {s.batch_size for s in specs} == {64}
    assert {'single_task', 'answer_first', 'rationale_as_input'} <= {s.method for s in specs}
    assert not {s for s in specs} & {s for figure in FIGURES for s in specs_of(grid(figure, 'paper'))}


def test_paper_has_equal_compute_and_pinto():
    assert all('equal_compute' in curves for curves in grid('compute', 'paper').values())
    assert all('rationale_as_input' in curves for curves in grid('table2_training_format', 'paper').values())
    added = specs_of({'': grid('fig7_model_size_teacher', 'paper')['svamp_augmented']})
    assert {s.extra_teacher for s in added} == {'rationales/asdiv'}


def test_a_stopped_evening_is_published_as_far_as_it_is_made(tmp_path, monkeypatch, capsys):
    folders = find_folders(runs=tmp_path / 'runs', reports=tmp_path / 'reports')
    few = [RunSpec(n_train=20, student='scratch-32x1', max_steps=2, eval_every=2, seed=s) for s in (0, 1)]
    run(few[0], folders)

    def stopped(*given, **more):
        raise KeyboardInterrupt('stopped: 1 of 2 runs are done')

    monkeypatch.setattr(reporting, 'measure', stopped)
    monkeypatch.setattr(reporting, 'grids_of', lambda *given, **more: {FIG4: {'a panel': {'a curve': few}}})
    with pytest.raises(KeyboardInterrupt):
        reporting.make_results(Reproduction(preset='evening', folders=folders), [FIG4])
    results = tmp_path / 'reports' / 'results' / 'evening.jsonl'
    assert [r['spec']['seed'] for r in read_results(results).values()] == [0]
    assert '--preset recorded draws' in capsys.readouterr().err
    assert made_so_far({'': {'': few[1:]}}, folders) == {'': {'': []}}
    results.unlink()
    with pytest.raises(KeyboardInterrupt):
        reporting.make_results(Reproduction(preset='quick', folders=folders), [FIG4])
    assert not results.parent.joinpath('quick.jsonl').exists()


def first_rows(source, target, name, n):
    "The first rows of a dataset's split, and what the teacher wrote about them."
    task, word = name.split('_')
    rows = (source / task / f'{name}.json').read_text(encoding='utf-8').splitlines()
    (target / task / 'llm').mkdir(parents=True, exist_ok=True)
    (target / task / f'{name}.json').write_text('\n'.join(rows[:n]) + '\n', encoding='utf-8')
    written = json.loads((source / task / 'llm' / f'{word}_CoT_0.json').read_text(encoding='utf-8'))
    (target / task / 'llm' / f'{word}_CoT_0.json').write_text(json.dumps(written[:n]), encoding='utf-8')


@pytest.fixture
def few_rows(recorded, tmp_path):
    "A data folder with the first rows of CQA, SVAMP and ASDiv."
    data = tmp_path / 'data'
    for name, n in dict(cqa_train=50, cqa_test=12, svamp_train=50, svamp_test=12).items():
        first_rows(Path(recorded), data, name, n)
    xml = Path(recorded) / 'asdiv'
    if not (xml / 'ASDiv.xml').is_file():
        pytest.skip('needs ASDiv.xml in the data folder')
    from dsbs.data.fetch import fetch

    fetch(['asdiv'], data, str(xml))
    for word, n in dict(train=30, test=5).items():
        file = data / 'asdiv' / f'asdiv_{word}.json'
        file.write_text('\n'.join(file.read_text(encoding='utf-8').splitlines()[:n]) + '\n', encoding='utf-8')
    return data


@pytest.fixture
def asdiv_set(few_rows, tmp_path):
    "What a teacher might have written about these rows of ASDiv."
    folder, task = tmp_path / 'asdiv_rationales', load_task('asdiv', few_rows)
    folder.mkdir()
    for split in task.splits:
        more = dict(rationale='We count them.', votes=1, others=[])
        write_jsonl(folder / f'{split}.jsonl', [row | more for row in task[split].to_list()])
        (folder / f'{split}.failures.jsonl').write_text('')
        (folder / f'{split}.card.json').write_text(json.dumps(dict(task='asdiv', model='a model')))
    return folder


def test_a_rationale_set_for_added_rows(few_rows, asdiv_set, tmp_path):
    plain = RunSpec(task='svamp', student='scratch-32x1')
    with_set = replace(plain, extra='asdiv', extra_teacher=str(asdiv_set))
    folders = find_folders(few_rows)
    assert len(prepare(with_set, folders).extra) == 35
    moved, changed = (shutil.copytree(asdiv_set, tmp_path / name) for name in ('moved', 'changed'))
    first = changed / 'train.jsonl'
    first.write_text(first.read_text().replace('We count them.', 'We add them.', 1))
    keys = [run_key(replace(with_set, extra_teacher=str(folder)), folders) for folder in (asdiv_set, moved, changed)]
    assert keys[0] == keys[1] != keys[2]
    with pytest.raises(UsageError, match='extra_teacher needs extra'):
        replace(plain, extra_teacher=str(asdiv_set))


SMALLER = """
from dataclasses import replace
from dsbs.evidence import grids

SMALL = dict(max_steps=2, eval_every=2, max_input=64, max_target=80)
whole_setup = grids.evening_setup


def evening_setup(*given):
    setup = whole_setup(*given)
    base, ours = (replace(s, **SMALL) for s in (setup.standard, setup.step_by_step))
    formats = ('answer_first', 'rationale_as_input')
    return replace(setup, standard=base, step_by_step=ours, seeds=(0, 1), formats=formats)


grids.EVENING_STUDENTS = {students!r}
grids.PRETRAINED = ({students!r}[1], *grids.PRETRAINED[1:])
grids.evening_setup = evening_setup
"""


@pytest.fixture
def tiny(few_rows, tmp_path):
    "Call `dsbs` where preset evening has two tiny students in the place of T5, and few updates."
    students = tuple(str(small_t5(tmp_path / f't5-{width}', d_model=width)) for width in (16, 32))
    (tmp_path / 'site').mkdir()
    (tmp_path / 'site' / 'sitecustomize.py').write_text(SMALLER.format(students=students))
    path = os.pathsep.join([str(tmp_path / 'site'), str(ROOT)])
    env = os.environ | dict(PYTHONPATH=path, DSBS_RUNS=str(tmp_path / 'runs'), DSBS_DATA=str(few_rows))

    def call(*words):
        call = [Path(sys.executable).parent / 'dsbs', *map(str, words)]
        done = subprocess.run(call, cwd=ROOT, env=env, capture_output=True, text=True, timeout=1800)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return call


@pytest.mark.slow
def test_an_evening_from_end_to_end_with_a_tiny_student(tiny, asdiv_set, tmp_path):
    reports = tmp_path / 'reports'
    words = ['reproduce', '--preset', 'evening', '--reports', reports, '--workers', 2]
    written = tiny(*words, *EVENING, '--task', 'svamp,cqa').splitlines()
    for figure in EVENING:
        part = '_evening' if figure == FIG4 else ''
        assert (reports / 'figures' / f'{figure}{part}.svg').is_file()
        assert str(reports / 'notebooks' / f'{figure}.evening.ipynb') in written
    records = read_results(reports / 'results' / 'evening.jsonl')
    assert len(records) == 56 and {r['spec']['task'] for r in records.values()} == {'svamp', 'cqa'}
    assert all('converged' in r['metrics'] for r in records.values())
    drawn = (reports / 'figures' / f'{FIG4}_evening.svg').read_text()
    assert 'SVAMP, an evening' in drawn and 'ANLI-R1' not in drawn
    page = (reports / 'index.html').read_text()
    assert 'One evening on one GPU' in page and '56 runs' in page
    rows = json.loads(tiny('claims', '--preset', 'evening', '--reports', reports, '--json'))
    answered = {(r['id'], r['data']) for r in rows if r['n'] == 2}
    assert {('fig4-all-sizes', 'SVAMP'), ('fig4-all-sizes', 'CommonsenseQA')} <= answered
    assert all('updates (paper: 10,000)' in r['detail'] for r in rows if r['n'])

    more = ['--set', 'extra=asdiv', '--set', f'extra_teacher={asdiv_set}', '--set', 'max_steps=3']
    tiny(*words, 'fig5', '--task', 'svamp', *more)
    changed = read_results(reports / 'changed' / 'results' / 'evening.jsonl').values()
    assert {r['spec']['extra'] for r in changed} == {'asdiv'} and {r['metrics']['steps'] for r in changed} == {3}
    assert len(read_results(reports / 'results' / 'evening.jsonl')) == 56
    assert (reports / 'changed' / 'figures' / 'fig5_data_size_teacher.svg').is_file()
    executed = reports / 'changed' / 'notebooks' / 'fig5_data_size_teacher.evening.ipynb'
    assert 'extra_teacher' in ''.join(c.source for c in nbformat.read(executed, 4).cells)


def test_before_any_run_no_claim_is_judged(tmp_path):
    rows = judge(tmp_path, 'evening')
    assert {r['verdict'] for r in rows} == {'undecided', 'not comparable at this scale'}
    assert {r['n'] for r in rows} == {0} and all(r['detail'] for r in rows)
    asked = {(r['id'], r['data']) for r in rows if r['verdict'] == 'undecided'}
    assert ('fig6-all-models', 'SVAMP') not in asked and any(i == 'fig4-all-sizes' for i, _ in asked)


def test_a_pretrained_student_on_an_embedded_task_is_planned_without_an_estimate(main):
    status, out, err = main('reproduce', 'fig4', '--preset', 'quick', '--dry-run', '--set', 'student=t5-v1_1-small')
    assert (status, err) == (0, '') and 'CPU minutes not known' in out and 'dsbs weights get t5-v1_1-small' in out
