"What is written of other people's runs, recomputed from the table with nothing of ours; and how it is drawn."

import csv
import re
import statistics
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[2]
ROWS = list(csv.DictReader((ROOT / 'reports' / 'independent_runs.csv').open(encoding='utf-8')))
PALM, GPT = 'PaLM 540B, few-shot (the recorded completions)', 'GPT-3.5, zero-shot'
SHARES = ('0.125', '0.25', '0.5', '1.0')
FIGURES = (
    'fig4_data_size_human',
    'fig5_data_size_teacher',
    'fig6_model_size_human',
    'fig7_model_size_teacher',
    'table1_teachers',
    'rationale_content',
    'rationale_share',
)


def runs(task, student='base', **columns):
    "Accuracies of the runs with these values, those at ten times the paper's learning rate left out."
    wanted = dict(task=task, student=f't5-v1_1-{student}') | columns
    usual = [r for r in ROWS if float(r['learning_rate']) <= 5e-5]
    return [float(r['test_accuracy']) for r in usual if all(r[c] == value for c, value in wanted.items())]


def labels_alone(task, student='base', teacher='', **columns):
    return runs(task, student, method='standard', teacher=teacher, **columns)


def with_rationales(task, student='base', teacher=PALM, note='', **columns):
    columns = dict(rationale_share='1.0', teacher_note=note) | columns
    return runs(task, student, method='step_by_step', teacher=teacher, **columns)


def gains(task, labels, teachers=(PALM, GPT)):
    "Step-by-step minus labels alone, at each share of the rows and for each teacher."
    found = []
    for teacher in teachers:
        for share in SHARES:
            at = dict(label_source=labels, train_fraction=share)
            other = labels_alone(task, teacher=teacher if labels == 'teacher' else '', **at)
            found.append(statistics.mean(with_rationales(task, teacher=teacher, **at)) - statistics.mean(other))
    return found


def says(figure):
    "What a figure's notebook says of these runs."
    cells = nbformat.read(ROOT / 'nbs' / 'figures' / f'{figure}.ipynb', 4).cells
    (found,) = [' '.join(c.source.split()) for c in cells if c.source.startswith("## Other people's runs")]
    return found


@pytest.mark.parametrize(
    'figure, labels, tasks',
    [('fig4_data_size_human', 'human', ['cqa']), ('fig5_data_size_teacher', 'teacher', ['cqa', 'anli1'])],
)
def test_gains_over_data_sizes(figure, labels, tasks):
    spans = re.findall(r'by ([\d.]+) to ([\d.]+\d)', says(figure))
    assert len(spans) == len(tasks)
    for task, (low, high) in zip(tasks, spans, strict=True):
        found = gains(task, labels)
        assert (float(low), float(high)) == (round(min(found), 1), round(max(found), 1))


def test_who_stays_at_chance():
    limit = 36.3  # 1,000 questions, three labels: guessing gets more in one of forty cases
    few = [labels_alone('anli1', label_source='human', train_fraction=share) for share in SHARES]
    assert [sum(a <= limit for a in some) for some in few] == [8, 5, 7, 3] and {len(some) for some in few} == {9}
    assert not [r for r in ROWS if r['method'] == 'step_by_step' and float(r['test_accuracy']) <= limit]
    assert sum(float(r['test_accuracy']) <= limit for r in ROWS if r['task'] == 'anli1') == 43
    for student in ('small', 'base', 'large', 'xl'):
        other = labels_alone('anli1', student, PALM, label_source='teacher', train_fraction='1.0')
        assert any(a <= limit for a in other)


def test_gains_over_students():
    found = {}
    at = dict(label_source='human', train_fraction='1.0')
    for student in ('small', 'base', 'large'):
        other = statistics.mean(labels_alone('anli1', student, **at))
        ours = (statistics.mean(with_rationales('anli1', student, teacher, **at)) for teacher in (PALM, GPT))
        found[student] = [round(a - other) for a in ours]
    assert found == dict(small=[4, 4], base=[9, 8], large=[2, 2])
    assert round(statistics.mean(with_rationales('anli1', 'xl', **at))) == 72


def test_shares_and_lengths_of_rationales():
    at, shown = dict(label_source='human', train_fraction='1.0'), 'teacher shown the label'
    third, whole = (with_rationales('anli1', 'base', GPT, shown, **at, rationale_share=s) for s in ('0.33', '1.0'))
    assert statistics.mean(third) > statistics.mean(whole)
    shares = [
        with_rationales('cqa', 'base', GPT, **at, rationale_share=s)
        for s in ('0.15', '0.33', '0.5', '0.66', '0.85', '1.0')
    ]
    assert max(map(statistics.mean, shares)) - min(map(statistics.mean, shares)) < 2
    lost = []
    for student in ('small', 'base', 'large'):
        usual, long = (
            with_rationales('anli1', student, GPT, note, **at) for note in (shown, f'{shown}, long rationales')
        )
        lost.append(round(statistics.mean(usual) - statistics.mean(long)))
    assert (min(lost), max(lost)) == (5, 8)


def test_each_figure_has_its_picture_and_others_have_none(tmp_path):
    from dsbs.evidence.published import INDEPENDENT_FIGURES
    from dsbs.evidence.study import Study

    assert set(INDEPENDENT_FIGURES) == set(FIGURES)
    assert Study('compute', stage=str(tmp_path)).independent() is None
    assert Study('table1_teachers', stage=str(tmp_path), reports=str(tmp_path)).independent() is None
    assert Study('table1_teachers', stage=str(tmp_path)).independent()
    made = tmp_path / 'figures' / 'table1_teachers_independent.svg'
    assert 'independent runs' in made.read_text() and '3/9' in made.read_text()
