"Claims judged by records and runs that are made up, so that the verdict is known."

import json
import math
import random
import subprocess
import sys
from dataclasses import asdict, replace
from functools import partial

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from dsbs.evidence import claims, grids
from dsbs.evidence.claims import (
    ASKED,
    CLAIMS,
    EMBEDDED_CLAIMS,
    ESNLI_CLAIMS,
    JUDGED,
    PAPER_CLAIMS,
    REPLICATED,
    VERDICTS,
    Question,
    asked_again,
    curves_asked,
    example_panel,
    fresh_curves,
    judge,
    judged,
    panels_asked,
    runs_of,
    scale_of,
)
from dsbs.evidence.grids import (
    COMPUTE_SEEDS,
    FIGURES,
    PANELS,
    REPLICATION_SEEDS,
    grid,
    specs_of,
    with_seed,
)
from dsbs.evidence.plan import plan
from dsbs.evidence.published import OPEN_CHOICES, PAPER_TABLES, REPRODUCTIONS
from dsbs.hub import PINS
from dsbs.records import UsageError

IDS = [
    'fig4-all-sizes',
    'fig4-esnli-12.5',
    'fig4-data-reduction',
    'fig5-all-sizes',
    'fig5-12.5',
    'fig6-all-models',
    'fig6-beats-teacher',
    'fig6-anli-gain',
    'fig7-beats-teacher',
    'fig7-anli-gain',
    'fig7-svamp-asdiv',
    'fig8-esnli',
    'fig8-anli',
    'fig9-anli',
    'tab1-teacher',
    'tab2-multitask',
    'abstract-data',
]
OWN = [
    'emb-half',
    'emb-compute-sizes',
    'emb-compute',
    'emb-control',
    'emb-start',
    'emb-content',
    'emb-share',
    'emb-student',
    'emb-teacher-labels',
]
FIG4, FIG5, FIG6, FIG7, FIG8, FIG9 = [next(f for f in FIGURES if f.startswith(f'fig{i}')) for i in range(4, 10)]
BASE, LARGE, XXL = ('t5-v1_1-base', 't5-v1_1-large', 't5-v1_1-xxl')
OURS = 'step_by_step'
HOLDS, FAILS, EQUIVALENT, UNDECIDED, APART = VERDICTS
WOBBLE = (0, 0.3, -0.2, 0.1)  # of the seeds of step-by-step
BY_ID = {c.id: c for c in CLAIMS}


@pytest.fixture(autouse=True)
def teacher(monkeypatch):
    monkeypatch.setattr(claims, 'teacher_lines', lambda described: dict.fromkeys(PANELS, 75.0))


def record(i, spec, accuracy, **measured):
    metrics = dict(test_accuracy=accuracy, n_train=spec.n_train or 100, majority_accuracy=50.0) | measured
    return dict(key=f'{i:064x}', spec=asdict(spec), metrics=metrics)


def write(folder, figure, preset, accuracy, name='made_up.jsonl', order=lambda rows: rows):
    "Records of a figure: accuracy(panel, curve, spec) in percent, or None where there is no run."
    rows = []
    for panel, curves in runs_of(figure, preset).items():
        for curve, specs in curves.items():
            values = {s: accuracy(panel, curve, s) for s in specs}
            rows += [record(len(rows) + i, s, a) for i, (s, a) in enumerate(values.items()) if a is not None]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(''.join(json.dumps(r) + '\n' for r in order(rows)))
    return folder


def write_scale(folder, preset, accuracy):
    "Records of everything that a preset is asked."
    found = {}
    for claim in ASKED[preset]:
        for panel, curves in panels_asked(claim, preset).items():
            found |= {s: accuracy(panel, s) for specs in curves.values() for s in specs}
    rows = [
        record(i, s, a, n_test=500 if s.n_train else 10**6) for i, (s, a) in enumerate(found.items()) if a is not None
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f'{preset}.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in rows))
    return folder


def verdicts(folder, claim, preset='paper'):
    "Rows of a claim by panel; a folded row by each of its panels."
    rows = [r for r in judge(folder, preset) if r['id'] == claim]
    return {panel: r for r in rows for panel in BY_ID[claim].on if PANELS[panel] in r['data']}


def by_panel(found):
    return {panel: r['verdict'] for panel, r in found.items()}


def share(s):
    return s.train_fraction or s.n_train / 720


def ahead(gain, base=lambda s: 50 + 20 * share(s)):
    return lambda panel, curve, s: base(s) + s.seed + (gain(panel, s) + WOBBLE[s.seed % 4] if curve == OURS else 0)


def test_the_claims_are_those_of_the_paper_and_our_own():
    assert [c.id for c in PAPER_CLAIMS] == IDS and [c.id for c in EMBEDDED_CLAIMS] == OWN
    assert len({c.id for c in CLAIMS}) == len(CLAIMS)
    for c in CLAIMS:
        preset = next(p for p in ('paper', 'embedded', 'standin') if c in ASKED[p])
        assert c.figure in FIGURES and set(c.on) == set(panels_asked(c, preset)) and c.text.endswith('.'), c.id
    assert all(len(row) == 3 for row in OPEN_CHOICES) and set(PAPER_TABLES) <= set(FIGURES)
    assert all({'source', 'basis', 'method', 'accuracy'} <= set(r) for r in REPRODUCTIONS)


@pytest.mark.parametrize('preset', ['paper', 'embedded', 'standin'])
def test_a_claim_finds_all_its_curves(preset):
    for claim in ASKED[preset]:
        for curves in panels_asked(claim, preset).values():
            assert OURS in curves and len(curves) > 1 and all(curves.values()), claim.id
            assert set(claim.curves) - set(curves) <= {'standard', 'task_distillation'}, claim.id


def test_no_verdict_without_records(tmp_path):
    rows = judge(tmp_path)
    assert {r['verdict'] for r in rows} == {UNDECIDED, APART} and all(r['effect'] is None for r in rows)
    assert all(r['detail'] and not r['n'] and r['more'] is None for r in rows)
    assert {r['preset'] for r in rows} == {'embedded', 'quick', 'standin', 'evening', 'paper'}
    assert judge(tmp_path / 'none') == rows == judge(tmp_path, 'recorded')
    json.dumps(rows, allow_nan=False)
    with pytest.raises(UsageError, match="unknown preset 'fast'"):
        judge(tmp_path, 'fast')


def test_the_papers_claims_are_not_comparable_elsewhere(tmp_path):
    for preset in ('embedded', 'quick', 'standin'):
        rows = [r for r in judge(write_scale(tmp_path, preset, lambda panel, s: 60.0 + s.seed), preset)]
        asked = [r for r in rows if r['id'] in IDS]
        assert [r['id'] for r in asked] == IDS and {r['verdict'] for r in asked} == {APART}
        assert {r['id'] for r in rows} - set(IDS) == {c.id for c in ASKED[preset]}


@pytest.mark.parametrize(
    'figure,claim', [(FIG4, 'fig4-all-sizes'), (FIG5, 'fig5-all-sizes'), (FIG6, 'fig6-all-models')]
)
def test_above_at_every_point(tmp_path, figure, claim):
    def gain(panel, s):
        if not (share(s) == 0.5 if figure != FIG6 else s.student == LARGE):
            return 5
        return dict(anli1=-5, cqa=(-6, 6, 5, -5)[s.seed]).get(panel, 5)

    found = verdicts(write(tmp_path, figure, 'paper', ahead(gain)), claim)
    svamp = {} if figure == FIG6 else dict(svamp=found['svamp']['verdict'])
    assert by_panel(found) == dict(esnli=HOLDS, anli1=FAILS, cqa=UNDECIDED, svamp=HOLDS) | svamp
    r = found['esnli']
    assert (r['effect'], r['n'], r['unit'], r['more']) == (5.05, 4, 'points', None)
    assert r['interval'][0] < 5.05 < r['interval'][1] < 5.6 and r['p'] < 0.025
    assert r['detail'].count('[') == (3 if figure == FIG6 else 5)


def test_a_share_of_the_data_against_all(tmp_path):
    gains = dict(esnli=25, anli1=10, cqa=2, svamp=0)

    def accuracy(panel, curve, s):
        return 70 + 20 * share(s) + s.seed / 10 + (WOBBLE[s.seed] / 10 + gains[panel] if curve == OURS else 0)

    folder = write(tmp_path, FIG4, 'paper', accuracy)
    assert verdicts(folder, 'fig4-esnli-12.5')['esnli']['verdict'] == HOLDS  # 97.5 against 90
    found = verdicts(folder, 'fig4-data-reduction')
    assert by_panel(found) == dict.fromkeys(('anli1', 'cqa', 'svamp'), FAILS)  # 85, 87, 86 against 90
    assert found['anli1']['effect'] == pytest.approx(-5, abs=0.02) and found['anli1']['unit'] == 'points'
    gains |= dict.fromkeys(gains, 16)
    write(tmp_path, FIG4, 'paper', accuracy)
    assert set(by_panel(verdicts(folder, 'fig4-data-reduction')).values()) == {HOLDS}
    assert verdicts(folder, 'fig4-esnli-12.5')['esnli']['verdict'] == FAILS  # 88.5 against 90


@pytest.mark.parametrize(
    'gain,best,verdict', [(19, 0, HOLDS), (16, 0, FAILS), (6, 20, FAILS), (16, 20, HOLDS), (2, 0, FAILS)]
)
def test_less_data_on_average_and_at_most(tmp_path, monkeypatch, gain, best, verdict):
    "Over 50% on average, and over 85% on some dataset: 12.5% of the data have to be enough there."
    more = {panel: replace(setup, seeds=tuple(range(10))) for panel, setup in grids.SETUPS['paper']().items()}
    monkeypatch.setitem(grids.SETUPS, 'paper', lambda: more)  # of four seeds that need the same share, none decides
    for module in (claims, sys.modules[__name__]):
        monkeypatch.setattr(module, 'runs_of', runs_of.__wrapped__)
    monkeypatch.setitem(ASKED, 'paper', [BY_ID['abstract-data']])
    folder = write(tmp_path, FIG4, 'paper', ahead(lambda panel, s: best if best and panel == 'esnli' else gain))
    found = verdicts(folder, 'abstract-data')
    assert list(by_panel(found).values()) == [verdict] * 4 and found['esnli']['unit'] == '% of the data'


def test_students_above_the_teacher_and_smaller_ones_below(tmp_path):
    sizes = {BASE: 70, LARGE: 80, XXL: 90}

    def accuracy(panel, curve, s):
        return sizes[s.student] + WOBBLE[s.seed] + (0 if curve == OURS else -8)

    for figure in (FIG6, FIG7):
        write(tmp_path, figure, 'paper', accuracy, f'{figure}.jsonl')
    found = verdicts(tmp_path, 'fig6-beats-teacher')
    assert by_panel(found) == dict(esnli=FAILS, anli1=HOLDS, cqa=FAILS, svamp=HOLDS)  # 770M is above on CQA, too
    assert found['anli1']['effect'] == 4.95 and '770M above the teacher: +5.0' in found['anli1']['detail']
    found = verdicts(tmp_path, 'fig7-beats-teacher')
    assert by_panel(found) == dict(esnli=FAILS, anli1=HOLDS, cqa=HOLDS, svamp=FAILS)  # of SVAMP: none is


@pytest.mark.parametrize('gain,verdict', [(14, HOLDS), (8, UNDECIDED), (6, UNDECIDED), (1, FAILS), (-2, FAILS)])
def test_a_number_is_tested_as_that_number(tmp_path, gain, verdict):
    folder = write(tmp_path, FIG6, 'paper', ahead(lambda panel, s: gain))
    row = verdicts(folder, 'fig6-anli-gain')['anli1']
    assert (row['verdict'], row['effect']) == (verdict, round(gain + 0.05, 2))


def test_a_gain_that_varies_is_undecided(tmp_path):
    folder = write(tmp_path, FIG7, 'paper', ahead(lambda panel, s: (-20, 60, 45, 4)[s.seed]))
    row = verdicts(folder, 'fig7-anli-gain')['anli1']
    assert row['verdict'] == UNDECIDED and row['interval'][0] < 0 < 13 < row['interval'][1] and row['more'] > 4


@pytest.mark.parametrize(
    'ours,other,verdict', [(80, 65, HOLDS), (74.8, 65, HOLDS), (80, 78, FAILS), (70, 65, FAILS), (60, 55, FAILS)]
)
def test_added_rows(tmp_path, ours, other, verdict):
    def accuracy(panel, curve, s):
        return ((ours if curve == OURS else other) if s.extra else 60 if curve == OURS else 55) + WOBBLE[s.seed] / 3

    row = verdicts(write(tmp_path, FIG7, 'paper', accuracy), 'fig7-svamp-asdiv')['svamp_augmented']
    assert row['verdict'] == verdict and 'with labels alone, below' in row['detail']


@pytest.mark.parametrize('other,verdict', [(70, HOLDS), (78, FAILS)])
def test_least_data_and_smallest_student(tmp_path, other, verdict):
    folder = write(tmp_path, FIG8, 'paper', lambda panel, curve, s: (80 if curve == OURS else other) + WOBBLE[s.seed])
    assert verdicts(folder, 'fig8-esnli')['esnli']['verdict'] == HOLDS
    row = verdicts(folder, 'fig8-anli')['anli1']
    assert row['verdict'] == verdict and 'with labels alone, below' in row['detail']


@pytest.mark.parametrize(
    'weak,best,verdict', [(5, 6, HOLDS), (5, 4.5, HOLDS), (5, 1, FAILS), (-3, 6, FAILS), (0, 6, UNDECIDED)]
)
def test_teachers(tmp_path, weak, best, verdict):
    curves = dict(standard=(0, 0), step_by_step=(best, 0.1), weaker_teacher=(weak, -0.1))

    def accuracy(panel, curve, s):
        gain, wobble = curves[curve]
        return 60 + gain + wobble * (WOBBLE[s.seed] - 0.05)

    assert verdicts(write(tmp_path, 'table1_teachers', 'paper', accuracy), 'tab1-teacher')['cqa']['verdict'] == verdict


def test_training_format(tmp_path):
    curves = dict(standard=60, single_task=62, step_by_step=65, rationale_as_input=60)
    accuracy = lambda panel, c, s: curves[c] + WOBBLE[s.seed] / 10 * (c != 'single_task')
    found = verdicts(write(tmp_path, 'table2_training_format', 'paper', accuracy), 'tab2-multitask')
    assert by_panel(found) == dict(esnli=HOLDS, svamp=HOLDS, anli1=FAILS, cqa=FAILS)


def test_without_a_known_teacher_nobody_is_above_it(tmp_path):
    folder = write(tmp_path, FIG6, 'paper', lambda panel, curve, s: 90.0 + s.seed)
    (row,) = [r for r in judge(folder, 'paper', FIG6, teachers={}) if r['id'] == 'fig6-beats-teacher']
    assert row['verdict'] == APART and "the teacher's accuracy on the test split is not known" in row['detail']


def own_accuracy(gain, control=0.0):
    "Step-by-step with the teacher's rationales is so far ahead of everything else."

    def accuracy(panel, s):
        learns = s.method == OURS and s.rationales == 'teacher'
        noise = (s.seed * 7 + (s.n_train or 0) + 3 * learns) % 5 / 4
        return (
            60
            + (s.n_train or 800 * s.train_fraction) / 100
            + noise
            + learns * (control if panel == 'weight_untold' else gain)
        )

    return accuracy


@pytest.mark.parametrize('gain,verdict', [(6, HOLDS), (-6, FAILS)])
def test_our_own_claims(tmp_path, gain, verdict):
    folder = write_scale(tmp_path, 'embedded', own_accuracy(gain))
    rows = [r for r in judge(folder, 'embedded') if r['id'] in OWN]
    found = {(r['id'], r['data'].split(':')[0]): r for r in rows}
    assert len(rows) == len(found) == 16 and {r['n'] for r in rows if r['verdict'] != UNDECIDED} == {10}
    assert found['emb-control', 'weight_untold']['verdict'] == EQUIVALENT
    others = {name: r['verdict'] for (name, _), r in found.items() if name not in ('emb-control', 'emb-start')}
    assert set(others) == {*OWN} - {'emb-control', 'emb-start'} and set(others.values()) == {verdict}
    margins = {r['id']: r['margin'] for r in rows if r['margin']}
    assert margins == {'emb-half': 1.0, 'emb-control': 2.0, 'emb-student': 1.0}
    json.dumps(rows, allow_nan=False)


def test_a_gain_on_the_negative_control_fails(tmp_path):
    folder = write_scale(tmp_path, 'embedded', own_accuracy(6, control=6))
    assert verdicts(folder, 'emb-control', 'embedded')['weight_untold']['verdict'] == FAILS


def test_quick_is_asked_what_it_has(tmp_path):
    folder = write_scale(tmp_path, 'quick', own_accuracy(6))
    found = verdicts(folder, 'emb-content', 'quick')
    assert found['heavier_than']['n'] == 3 and found['same_kind']['detail'] == 'no such runs'
    assert found['same_kind']['verdict'] == APART


SHIPPED = claims.WITHHELD


@pytest.fixture(autouse=True)
def nothing_withheld(monkeypatch):
    "How a claim is judged is tested on all of them."
    monkeypatch.setattr(claims, 'WITHHELD', {})


def test_a_claim_that_is_withheld_has_no_verdict_and_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, 'WITHHELD', SHIPPED)
    folder = write_scale(tmp_path, 'standin', own_accuracy(6))
    rows = [r for r in judge(folder, 'standin') if r['id'] in claims.WITHHELD]
    assert {r['id'] for r in rows} == set(claims.WITHHELD) < {c.id for c in ESNLI_CLAIMS}
    assert {(r['verdict'], r['detail'], r['n'], r['p']) for r in rows} == {(APART, claims.POOR_SETTINGS, 0, None)}


def test_the_same_questions_about_esnli(tmp_path):
    folder = write_scale(tmp_path, 'standin', own_accuracy(6))
    rows = {r['id']: r for r in judge(folder, 'standin') if r['id'] not in IDS}
    assert list(rows) == [c.id for c in ESNLI_CLAIMS] and {r['verdict'] for r in rows.values()} == {HOLDS}
    fewer = {r['id'] for r in rows.values() if r['data'] == PANELS['esnli_standin_fewer']}
    assert fewer == {'esnli-share', 'esnli-student'}
    assert {r['data'] for r in rows.values()} == {PANELS['esnli_standin'], PANELS['esnli_standin_fewer']}


@pytest.mark.parametrize('behind,ahead_in,verdict', [(9, 10, HOLDS), (9, 5, UNDECIDED), (0, 0, UNDECIDED)])
def test_runs_that_leave_chance(behind, ahead_in, verdict):
    panel = example_panel((3, 3, 3))
    standard = panel.runs['curve'] == 'standard'
    panel.runs['test_accuracy'] = 60.0 - behind * (standard & (panel.runs['seed'] < ahead_in))
    claim = BY_ID['emb-start']
    row = judged([Question(claim, 'embedded', (panel,), {})])[0]
    assert (row['verdict'], row['unit']) == (verdict, '% of the runs')
    assert f'{ahead_in} seeds ahead, 0 behind' in row['detail']


def test_seeds_are_added_once_and_a_first_verdict_stays():
    claim = BY_ID['esnli-mean']
    first = example_panel((4, 4, 4), seeds=20)
    late = (first.runs['curve'] == OURS) & (first.runs['seed'] >= 10)
    first.runs.loc[late, 'test_accuracy'] -= 20  # the second look would say otherwise
    unsure = example_panel((4, 4, 4), seeds=20)
    early = (unsure.runs['curve'] == OURS) & (unsure.runs['seed'] < 10)
    unsure.runs.loc[early, 'test_accuracy'] += 5 * (unsure.runs['seed'] % 3 - 1)
    alone = replace(unsure, runs=unsure.runs[unsure.runs['seed'] < 10])
    rows = judged([Question(claim, 'standin', (p,), {}) for p in (first, unsure, alone)])
    assert [r['verdict'] for r in rows] == [HOLDS, HOLDS, UNDECIDED]
    assert [r['more'] is None for r in rows] == [True, True, False]
    assert [r['n'] for r in rows] == [10, 20, 10] and rows[0]['effect'] > 3


def test_a_second_look_waits_for_all_of_its_runs():
    unsure, other = example_panel((4, 4, 4), seeds=20), example_panel((4, 4, 4), seeds=20)
    early = (unsure.runs['curve'] == OURS) & (unsure.runs['seed'] < 10)
    unsure.runs.loc[early, 'test_accuracy'] += 5 * (unsure.runs['seed'] % 3 - 1)
    lacking = replace(other, runs=other.runs.assign(made=other.runs['seed'] != 15))
    for panel, seen in ((lacking, (UNDECIDED, 10)), (other, (HOLDS, 20))):
        row = judged([Question(BY_ID['esnli-mean'], 'standin', (p,), {}) for p in (unsure, panel)])[0]
        assert (row['verdict'], row['n']) == seen


def put(gains, name='same_kind', seeds=10):
    "A question to a made-up panel; step-by-step is ahead by so much at each size."
    panel = example_panel(gains, name=name, seeds=seeds)
    return Question(BY_ID['emb-compute-sizes'], 'embedded', (panel,), dict(other='standard'))


@pytest.mark.parametrize('gains', [(3, 3, 3), (-3, -3, -3)])
def test_fresh_seeds_answer_what_two_looks_left_undecided(gains):
    "Whichever way; the row says what it was before, and a line that was decided stays as it was."
    rows = judged([put((0, 0, 0)), put((5, 5, 5), 'heavier_than')])
    assert [row['verdict'] for row in rows] == [UNDECIDED, HOLDS]
    before = json.loads(json.dumps(rows))
    after = asked_again(rows, [put(gains, name, 40) for name in ('same_kind', 'heavier_than')])
    assert after[0]['verdict'] == (HOLDS if gains[0] > 0 else FAILS) and after[0]['n'] == 40
    assert after[0]['detail'].startswith('40 fresh seeds: ')
    assert f'10 seeds before: {before[0]["effect"]:+.1f} {before[0]["interval"]}, undecided' in after[0]['detail']
    assert after[1] == before[1]


def test_fresh_seeds_are_looked_at_once_all_of_them():
    rows, fresh = judged([put((0, 0, 0))]), put((3, 3, 3), seeds=40)
    runs = fresh.panels[0].runs
    runs['made'] = runs['seed'] != 39
    assert asked_again([dict(row) for row in rows], [fresh]) == rows and rows[0]['verdict'] == UNDECIDED
    runs['made'] = True
    assert asked_again([dict(row) for row in rows], [fresh])[0]['verdict'] == HOLDS


FRESH = dict(replication=REPLICATION_SEEDS, replication_compute=COMPUTE_SEEDS)


@pytest.mark.parametrize('figure', REPLICATED)
def test_fresh_seeds_belong_to_no_other_run_and_are_what_each_line_compares(figure):
    specs = specs_of(grid(figure, scale_of(figure)))
    tasks, seeds = {s.task for s in specs}, set(FRESH[figure])
    others = [(f, p) for f in FIGURES for p in ('embedded', 'quick', 'standin', 'search') if f != figure]
    taken = {s.seed for f, p in others for s in specs_of(runs_of(f, p)) if s.task in tasks}
    assert {s.seed for s in specs} == seeds and taken and not seeds & taken
    claims = {c.id: c for c in ASKED[scale_of(figure)]}
    for claim, panel in REPLICATED[figure]:
        asked = curves_asked(claims[claim], scale_of(figure), panel)
        for curve, fresh in fresh_curves(figure, claims[claim], panel).items():
            points = {with_seed(s, 0) for s in fresh}
            assert points <= {with_seed(s, 0) for s in asked[curve]}, (claim, curve)
            assert len(fresh) == len(seeds) * len(points) > 0, (claim, curve)


def test_lines_at_equal_compute_are_asked_of_all_their_points():
    for claim, sizes in (('emb-compute-sizes', {100, 150, 300}), ('emb-compute', {150})):
        curves = fresh_curves('replication_compute', BY_ID[claim], 'same_kind')
        assert set(curves) == {'step_by_step', 'equal_compute'}
        assert all({s.n_train for s in specs} == sizes for specs in curves.values())


def test_holm_goes_over_all_lines_of_a_scale():
    claim = BY_ID['esnli-mean']
    panel = example_panel((0.35, 0.35, 0.35))
    likely, nothing = (Question(claim, 'standin', (p,), {}) for p in (panel, example_panel((0, 0, 0))))
    assert judged([likely])[0]['p'] * 10 == pytest.approx(judged([likely] + [nothing] * 9)[0]['p'], rel=0.01)


INDEPENDENT = 'task,student,method,teacher,teacher_note,label_source,train_fraction,rationale_share,batch_size,'
INDEPENDENT += 'learning_rate,run,best_or_last_step,test_accuracy,validation_accuracy\n'
PALM, GPT = 'PaLM 540B, few-shot (the recorded completions)', 'GPT-3.5, zero-shot'


def independent_row(task, student, method, fraction, run, accuracy, teacher='', rate=5e-5, labels='human'):
    share = '' if method == 'standard' else 1.0
    row = [task, student, method, f'"{teacher}"' if teacher else '', '', labels, fraction, share, 32, rate, run]
    return ','.join(map(str, [*row, 10000, accuracy, accuracy])) + '\n'


def write_independent(folder, gain, students=(BASE,), **more):
    "A table in which step-by-step is ahead by so much, apart from runs that do not count."
    text = INDEPENDENT
    for student in students:
        for fraction in (0.125, 0.25, 0.5, 1.0):
            for run in range(4):
                at = ('cqa', student), (fraction, run)
                standard = 50 + 10 * fraction + run
                text += independent_row(*at[0], 'standard', *at[1], standard, **more)
                ours = standard + gain + WOBBLE[run]
                text += independent_row(*at[0], OURS, *at[1], ours, PALM, **more)
                text += independent_row(*at[0], OURS, *at[1], 5.0, GPT, **more)
                text += independent_row(*at[0], OURS, *at[1], 5.0, PALM, rate=5e-4)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'independent_runs.csv').write_text(text)
    return folder / 'results'


@pytest.mark.parametrize('gain,verdict', [(30, HOLDS), (-30, FAILS), (1, UNDECIDED)])
def test_other_peoples_runs(tmp_path, gain, verdict):
    "GPT-3.5's rationales and ten times the rate are not the paper's; 75% of the data is lacking."
    rows = judge(write_independent(tmp_path, gain), 'independent')
    found = verdicts(tmp_path / 'results', 'fig4-all-sizes', 'independent')
    assert by_panel(found) == dict(esnli=APART, anli1=APART, cqa=verdict, svamp=APART)
    assert found['cqa']['effect'] == pytest.approx(gain + 0.05) and 'no run at 75%' in found['cqa']['detail']
    assert [r['id'] for r in rows if r['n']] == ['fig4-all-sizes']
    assert {r['id'] for r in rows} == set(IDS)
    json.dumps(rows, allow_nan=False)


def test_what_other_people_lack_is_named(tmp_path):
    results = write_independent(tmp_path, 5, students=(BASE, LARGE))
    detail = {r['id']: r['detail'] for r in judge(results, 'independent') if not r['n']}
    for claim, words in {
        'fig4-data-reduction': 'at 75% of the data',
        'fig4-esnli-12.5': 'no run',
        'fig6-all-models': 'of the 11B student',
        'fig6-beats-teacher': 'of the 11B student',
        'tab1-teacher': 'no 20B teacher (GPT-3.5 is none)',
        'tab2-multitask': 'no single-task training',
        'abstract-data': 'no run on e-SNLI, ANLI-R1, SVAMP',
    }.items():
        assert words in detail[claim], claim


def test_one_run_of_other_people_decides_nothing(tmp_path):
    text = ''.join(
        independent_row('cqa', BASE, m, 1.0, 0, a, t) for m, a, t in (('standard', 50, ''), (OURS, 90, PALM))
    )
    (tmp_path / 'independent_runs.csv').write_text(INDEPENDENT + text)
    row = verdicts(tmp_path / 'results', 'fig4-all-sizes', 'independent')['cqa']
    assert (row['verdict'], row['n'], row['effect']) == (UNDECIDED, 1, None)


SAME = dict(preset='standin', claim='esnli-sizes')


@pytest.mark.parametrize('gain,more', [(5, 4), (0, None), (-5, 4)])
def test_five_seeds_that_agree_exactly_decide_nothing(tmp_path, gain, more):
    "They have no spread, which is no proof that others would have none: for five lines the sign test asks for nine."
    folder = write(tmp_path, FIG4, 'standin', lambda panel, curve, s: 50.0 + (gain if curve == OURS else 0))
    row = verdicts(folder, **SAME)['esnli_standin']
    assert (row['verdict'], row['interval'], row['more']) == (UNDECIDED, [gain, gain], more)


def test_one_seed_decides_nothing(tmp_path):
    for preset in ('embedded', 'standin', 'paper'):
        one = lambda panel, s: (90.0 if s.method == OURS else 10.0) if s.seed == 1 else None
        write_scale(tmp_path, preset, one)
    rows = judge(tmp_path)
    assert {r['verdict'] for r in rows} == {UNDECIDED, APART} and {r['effect'] for r in rows} == {None}
    assert all('one seed decides nothing' in r['detail'] for r in rows if r['n'])


@pytest.mark.parametrize('lost', [math.nan, math.inf, 'text'])
def test_runs_without_an_accuracy(tmp_path, lost):
    "One such seed leaves the others; with fewer than two left, there is no verdict."

    def accuracy(bad):
        whole = ahead(lambda panel, s: 10, lambda s: 50)
        return lambda panel, curve, s: lost if curve == OURS and s.seed in bad else whole(panel, curve, s)

    found = {}
    for bad in ((0,), (0, 2, 3)):
        folder = write(tmp_path, FIG4, 'paper', accuracy(bad))
        found[len(bad)] = verdicts(folder, 'fig4-esnli-12.5')['esnli']
        assert f'{5 * len(bad)} of 40 runs without a finite accuracy' in found[len(bad)]['detail']
    assert (found[1]['n'], found[3]['n'], found[3]['effect'], found[3]['verdict']) == (3, 1, None, UNDECIDED)


def test_missing_curve_and_missing_metrics(tmp_path):
    row = verdicts(write(tmp_path, FIG4, 'standin', lambda panel, curve, s: None if curve == OURS else 50.0), **SAME)
    assert row['esnli_standin']['verdict'] == UNDECIDED
    assert row['esnli_standin']['detail'] == 'no run is made; 20 of 40 runs missing'
    file = tmp_path / 'made_up.jsonl'
    without = [json.loads(line) | dict(metrics=dict(n_train=1)) for line in file.read_text().splitlines()]
    file.write_text('\n'.join(map(json.dumps, without)))
    assert verdicts(tmp_path, **SAME)['esnli_standin']['n'] == 0


def test_the_order_of_lines_and_files_changes_nothing(tmp_path):
    noise, values = random.Random(0), {}

    def accuracy(panel, curve, s):
        return values.setdefault((panel, curve, s), noise.uniform(40, 60) + (8 if curve == OURS else 0))

    first = judge(write(tmp_path / 'a', FIG4, 'standin', accuracy), 'standin')
    mixed = lambda rows: random.Random(1).sample(rows, len(rows))
    shuffled = write(tmp_path / 'b', FIG4, 'standin', accuracy, 'x.jsonl', order=mixed)
    lines = (shuffled / 'x.jsonl').read_text().splitlines()
    (shuffled / 'x.jsonl').write_text('\n'.join(lines[:20]))
    (shuffled / 'a.jsonl').write_text('\n'.join(lines[20:]))
    assert judge(shuffled, 'standin') == first


def test_a_figures_rows_are_judged_among_all_of_their_scale(tmp_path):
    folder = write_scale(tmp_path, 'standin', own_accuracy(6))
    some = judge(folder, 'standin', figure=FIG4)
    assert some and some == [r for r in judge(folder, 'standin') if r['figure'] == FIG4]


ONE_SIZE_DECIDES = [38, 0, 68, 29, 0, math.nan, 0, 0, math.nan, math.nan, 0, math.nan, 0, math.nan, 0, 0, math.nan]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.one_of(st.floats(0, 100), st.just(math.nan)), min_size=18, max_size=18))
@example([*ONE_SIZE_DECIDES, math.nan])  # and another has one seed
def test_a_verdict_agrees_with_the_interval(values):
    panel = example_panel((0, 0, 0), seeds=3)
    panel.runs['test_accuracy'] = values
    for claim in (BY_ID['esnli-sizes'], BY_ID['esnli-mean'], BY_ID['emb-control'], BY_ID['emb-half']):
        asked = next(iter(claim.on.values()))
        row = judged([Question(claim, 'embedded', (panel,), asked)])[0]
        assert row['verdict'] in VERDICTS and (row['n'] >= 2) == (row['interval'] is not None)
        if row['n'] < 2:
            assert row['verdict'] == UNDECIDED
        if row['verdict'] == HOLDS:
            assert row['interval'][0] >= -(asked.get('margin') or 0)


def test_reading_claims_loads_no_heavy_library():
    heavy = ('torch', 'datasets', 'transformers')
    code = f'import sys, dsbs.evidence.claims; print([m for m in {heavy} if m in sys.modules])'
    assert (
        subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == '[]'
    )


CONTRACT = {'id', 'where', 'text', 'preset', 'data', 'verdict', 'effect', 'interval', 'n'}


def test_claims_command(main, tmp_path):
    write_scale(tmp_path / 'results', 'embedded', own_accuracy(6))
    status, out, _ = main('claims', '--preset', 'embedded', '--reports', tmp_path, '--json')
    rows = json.loads(out)
    assert status == 0 and {r['id'] for r in rows} == {*IDS, *OWN}
    assert all(CONTRACT | {'margin', 'p', 'more', 'detail'} <= set(r) for r in rows)
    status, out, _ = main('claims', '--preset', 'embedded', '--reports', tmp_path)
    assert status == 0 and len(out.splitlines()) == len(rows) + 1 and '+6.0 [' in out
    assert main('claims', '--preset', 'fast')[0] == 2
    assert {r['preset'] for r in json.loads(main('claims', '--reports', tmp_path, '--json')[1])} <= set(JUDGED)


def test_dry_run_of_the_paper(main, tmp_path, monkeypatch):
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_CACHE', str(tmp_path / 'hub'))
    call = partial(
        main, 'reproduce', 'fig6', 'table1', '--preset', 'paper', '--dry-run', '--data-dir', tmp_path / 'data'
    )
    status, out, _ = call('--json')
    p = json.loads(out)
    assert (
        status == 0
        and p['figures'] == {FIG6: 96, 'table1_teachers': 48}
        and p['runs'] == sum(g['runs'] for g in p['groups']) == 112
        and p['made'] == 0
    )
    assert abs(p['gpu_hours'] - sum(g['runs'] * g['gpu_hours'] for g in p['groups'])) < 0.1
    assert all(g['gpu_memory_gb'] > 170 for g in p['groups'] if g['student'] == XXL)
    missing = ' '.join(m['what'] for m in p['missing'])
    for what in (BASE, LARGE, XXL, 'rows of esnli', 'completions for cqa', 'gpt-neox-20b/svamp'):
        assert what in missing
    status, out, _ = call()
    assert status == 0 and '112 runs in all' in out and 'hours of an H100' in out
    for name in (BASE, LARGE):
        there = tmp_path / 'hub' / f'models--google--{name}' / 'snapshots' / PINS[f'google/{name}']
        there.mkdir(parents=True)
        for file in ('config.json', 'pytorch_model.bin', 'spiece.model'):
            (there / file).write_text('{}')
    for name in ('cqa_train', 'cqa_test'):
        (tmp_path / 'data' / 'cqa' / 'llm').mkdir(parents=True, exist_ok=True)
        (tmp_path / 'data' / 'cqa' / f'{name}.json').write_text(
            json.dumps(dict(id='1', question='one two three four five six', choices=list('abcde'), answer='a')) + '\n'
        )
    for i in range(10):
        (tmp_path / 'data' / 'cqa' / 'llm' / f'train_CoT_{i}.json').write_text(
            json.dumps(['Because it is so. So the answer is (a) a.'])
        )
    p = json.loads(call('--json')[1])
    missing = ' '.join(m['what'] for m in p['missing'])
    assert (
        f'weights of {BASE}' not in missing
        and f'weights of {XXL}' in missing
        and 'of cqa' not in missing
        and 'completions for cqa' not in missing
    )
    assert (
        p['tokens']['cqa'] == dict(input=24.3, rationale=5.4, label=1.4, counted=True)
        and not p['tokens']['svamp']['counted']
    )  # 18, 4 and 1 words
    assert not (tmp_path / 'runs').exists()


def test_dry_runs_of_the_others(main, tmp_path):
    for preset in ('quick', 'embedded', 'standin', 'search', 'smoke'):
        status, out, _ = main('reproduce', '--preset', preset, '--dry-run', '--json')
        assert status == 0 and json.loads(out)['gpu_hours'] == 0 and not (tmp_path / 'runs').exists()
    status, _, err = main('reproduce', 'fig2', '--dry-run')
    assert status == 2 and err.count('\n') == 1
    assert main('reproduce', '--preset', 'fast', '--dry-run')[0] == main('reproduce', 'fig', '--dry-run')[0] == 2


def test_a_plan_counts_each_run_once():
    specs = specs_of(grid('fig1_headline', 'paper'))
    assert plan(specs + specs)['runs'] == plan(grid('fig1_headline', 'paper'))['runs'] == len(specs)
