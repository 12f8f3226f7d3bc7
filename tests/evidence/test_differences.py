"What a figure does otherwise than the paper follows from its specs."

import pytest

from dsbs.evidence.grids import FIGURES, PAPER_FIGURES, grid, presets_of, specs_of, vary
from dsbs.evidence.published import differences


def table(lines):
    "Fact -> text for each column; the heads of the columns."
    head, rule, *rows = [line.strip('| ').split(' | ') for line in lines]
    assert rule == ['|'.join(['---'] * (1 + len(head)))] and all(len(row) == 1 + len(head) for row in rows)
    return {fact: texts for fact, *texts in rows}, head


PAIRS = [
    (f, p)
    for f in FIGURES
    for p in presets_of(f)
    if FIGURES[f].curves and (FIGURES[f].data or p == 'smoke') and p != 'own'
]


@pytest.mark.parametrize('figure, preset', PAIRS)
def test_only_what_differs_is_told_and_each_cell_follows_from_the_specs(figure, preset):
    facts, head = table(differences(figure, preset))
    assert head[0] == 'paper' and len(head) > 1
    assert all(len(set(texts)) > 1 for texts in facts.values()) and 'checkpoint' in facts
    specs = [
        s for s in specs_of(grid(figure, preset)) if preset != 'recorded' or s.task in ('same_kind', 'heavier_than')
    ]
    if specs and 'seeds' in facts:
        assert str(len({s.seed for s in specs})) in facts['seeds'][1:]
    if preset not in ('recorded', 'paper') and specs[0].student.startswith('scratch'):
        assert 'random weights' in facts['student'][1] and 'pretrained' in facts['student'][0]


@pytest.mark.parametrize('figure', [f for f in PAPER_FIGURES if f.startswith(('fig1', 'fig4', 'fig6', 'fig8'))])
def test_the_preset_of_the_paper_differs_in_the_checkpoint_alone(figure):
    beyond = ['controls'] if figure.startswith('fig4') else []  # Equal compute
    assert list(table(differences(figure, 'paper'))[0]) == [*beyond, 'checkpoint']


def test_the_figures_differ_in_their_own_ways():
    quick = {f: table(differences(f, 'quick'))[0] for f in FIGURES if grid(f, 'quick')}
    assert quick['fig4_data_size_human']['training examples'][1] == '80 to 320'
    assert quick['fig6_model_size_human']['training examples'] == ['100% of the training split', '160']
    assert quick['table1_teachers']['teacher'][1] == 'simulated, 5% false beliefs; simulated, 20% false beliefs'
    assert quick['fig4_data_size_human']['controls'][1] == 'shuffled within, equal compute'
    assert 'labels' in quick['fig7_model_size_teacher'] and 'labels' not in quick['fig5_data_size_teacher']


def test_what_a_reader_changes_is_told():
    panels = vary(grid('fig5_data_size_teacher', 'quick'), (50, 100), range(7), student='scratch-32x1')
    facts, _ = table(differences('fig5_data_size_teacher', 'quick', panels))
    assert facts['training examples'][1] == '50 to 100' and facts['seeds'][1] == '7'
    assert facts['student'][1] == 'T5 v1.1 architecture, random weights, layers: 1, width: 32'


def test_a_task_of_ones_own_has_a_column(tmp_path):
    _, head = table(differences('fig4_data_size_human', 'own', grid('fig4_data_size_human', 'own', tmp_path / 'mine')))
    assert head == ['paper', 'own task mine']
