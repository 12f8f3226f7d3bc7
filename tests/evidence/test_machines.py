"The same runs on two machines: what is paired, what counts as moved, and what is said; all records are made up."

import json
import math
import re
from dataclasses import asdict, replace

import pytest

from dsbs.evidence.grids import FIGURES, grid, specs_of
from dsbs.evidence.published import by_point, drawn_gains, drawn_points, read_machines
from dsbs.evidence.reporting import Reproduction, figure_notebooks, made_from
from dsbs.evidence.statistics import run_moves
from dsbs.evidence.study import Study, machine_facts, machine_lines, machine_moves, machines_figure
from dsbs.records import UsageError, canonical_json, find_folders, write_jsonl

SPECS = list(dict.fromkeys(s for f in FIGURES for s in specs_of(grid(f, 'quick'))))
PAIR, WHERE = next(iter(drawn_gains().items()))


def record(spec, accuracy, processor='here'):
    machine = dict(processor=processor, system='Linux', arch='x86_64', cores=2)
    made = dict(machine=machine, isa='AVX2', commit='0123456789', python='3.11', versions=dict(torch='2'))
    metrics = dict(test_accuracy=accuracy, n_train=spec.n_train, n_test=500)
    return dict(key='', spec=asdict(spec), metrics=metrics, evaluations=[], history=[], provenance=made)


def made_here():
    "Step-by-step is 3 to 5 points ahead, everywhere."
    return {s: 60.0 + s.seed + (3 + s.seed) * (s.method == 'step_by_step') for s in SPECS}


@pytest.fixture
def study(tmp_path):
    "Write records of this machine and of others, and give the study over them."

    def written(here, **others):
        write_jsonl(tmp_path / 'results' / 'quick.jsonl', [record(*run) for run in here.items()])
        for name, there in others.items():
            write_jsonl(tmp_path / 'machines' / f'{name}.jsonl', [record(*run, name) for run in there.items()])
        return Study('machines', reports=str(tmp_path))

    return written


def test_runs_are_paired_by_their_settings_and_equal_only_if_all_numbers_are():
    one, two, three = (record(s, 60.0) for s in SPECS[:3])
    here = {canonical_json(r['spec']): r for r in (one, two)}
    other = two | dict(history=[dict(step=1, loss=2.0)], provenance={})
    there = {canonical_json(r['spec']): r for r in (three, other, one | dict(provenance={}))}
    moves = run_moves(here, there)
    assert moves['equal'].tolist() == [True, False] and moves['moved'].tolist() == [0, 0]
    assert not len(run_moves(here, {}))


def test_each_point_and_gain_of_the_figures_stands_once():
    points, gains = drawn_points(), drawn_gains()
    assert set(SPECS) == {s for runs in points for s in runs}
    assert all(len({replace(s, seed=0, subset_seed=0, data_seed=0) for s in runs}) == 1 for runs in points)
    assert {runs for pair in gains for runs in pair} <= set(points)
    for ours, other in gains:
        assert ours != other and [s.seed for s in ours] == [s.seed for s in other]
        assert (ours[0].student, ours[0].n_train) == (other[0].student, other[0].n_train)
    fig4 = grid('fig4_data_size_human', 'quick')['quick_heavier_than']
    assert len(by_point(fig4['standard'])) == sum(
        runs[0].student == fig4['standard'][0].student
        for (ours, runs), where in gains.items()
        if (where['panel'], where['against']) == ('quick_heavier_than', 'standard')
    )


def test_nothing_moves_where_the_machines_agree(study):
    (moves,) = machine_moves(study(made_here(), same=made_here())).values()
    assert moves.runs['equal'].all() and len(moves.runs) == len(SPECS)
    assert not moves.means['moved'].any() and len(moves.means) == len(drawn_points())
    assert not moves.gains[['sign_moved', 'outside', 'verdict_moved']].any(axis=None)
    text = machine_lines(dict(same=moves))
    assert f'Runs on both machines: {len(SPECS)}, of which {len(SPECS)} equal in all numbers and 0 more than 5' in text
    assert '0 with another verdict.' in text


def test_a_gain_that_turns_is_counted_and_named(study):
    ours, other = PAIR
    there = made_here() | {s: 50.0 + 2 * s.seed for s in ours}
    (moves,) = machine_moves(study(made_here(), turned=there)).values()
    before = {s: a for s, a in made_here().items() if s in (*ours, *other)}
    row = moves.gains.loc[list(drawn_gains()).index(PAIR)]
    for where, made in (('here', before), ('there', there)):
        expected = sum(made[a] - made[b] for a, b in zip(ours, other, strict=True)) / len(ours)
        assert row[f'gain_{where}'] == pytest.approx(expected)
    assert (row['verdict_here'], row['verdict_there']) == ('ahead', 'behind') and row['sign_moved'] and row['outside']
    far = sum(abs(there[s] - a) > 5 for s, a in made_here().items())
    text = machine_lines(dict(turned=moves))
    assert f'{far} more than 5 points apart' in text and '(ahead as published, behind there)' in text
    named = int(re.search(r'(\d+) with another verdict', text)[1])
    assert named == moves.gains['verdict_moved'].sum() == text.count(' as published, ')


def test_a_point_that_lacks_a_seed_is_left_out(study):
    there = {s: a for s, a in made_here().items() if s != PAIR[0][1]}
    (moves,) = machine_moves(study(made_here(), fewer=there)).values()
    assert len(moves.runs) == len(SPECS) - 1
    lost = sum(PAIR[0] in pair for pair in drawn_gains())
    assert (len(moves.means), len(moves.gains)) == (len(drawn_points()) - 1, len(drawn_gains()) - lost)


def test_one_run_in_common_is_drawn_without_gains(study):
    few = study(made_here(), one={SPECS[0]: 61.5})
    moves = machine_moves(few)
    text = machine_lines(moves)
    assert 'Runs on both machines: 1, of which' in text and 'Gains' not in text
    assert len(few.draw(machines_figure, moves).axes) == 2


def test_the_figure_has_a_row_for_each_machine_and_names_in_red(study, tmp_path):
    moved = made_here() | {s: 50.0 + 2 * s.seed for s in PAIR[0]}
    both = study(made_here(), avx512=moved, arm=made_here())
    moves = machine_moves(both)
    fig = both.draw(machines_figure, moves)
    assert list(moves) == ['arm', 'avx512'] and len(fig.axes) == 4
    red = [[label.get_color() for label in ax.get_yticklabels()].count('#a00000') for ax in fig.axes[1::2]]
    assert red == [0, moves['avx512'].gains['verdict_moved'].sum()] and red[1] > 0
    assert {p.name for p in (tmp_path / 'figures').iterdir()} == {'machines.png', 'machines.svg'}


def test_without_records_of_another_machine_nothing_is_compared(study):
    alone = study(made_here())
    assert machine_moves(alone) == {} and machine_lines({}) == ''
    assert list(machine_facts(alone)) == ['published']
    apart = study(made_here(), other={replace(SPECS[0], seed=77): 60.0})
    assert machine_moves(apart) == {} and machine_facts(apart).loc['published_too', 'other'] == 0


def test_the_table_shows_what_else_differs(study):
    facts = machine_facts(study(made_here(), arm=made_here()))
    differ = [fact for fact in facts.index if facts.loc[fact, 'published'] != facts.loc[fact, 'arm']]
    assert differ == ['processor'] and facts.loc['processor', 'arm'] == 'arm'


def test_a_file_that_holds_no_records_is_named(tmp_path):
    (tmp_path / 'machines').mkdir()
    (tmp_path / 'machines' / 'odd.jsonl').write_text(json.dumps(dict(a=1)) + '\n')
    with pytest.raises(UsageError, match='odd.jsonl:1: no record of a run'):
        read_machines(tmp_path)


def test_a_new_machine_makes_the_figure_anew(study, tmp_path):
    wanted = Reproduction(preset='recorded', folders=find_folders(reports=tmp_path))
    (path,) = figure_notebooks(['machines'])
    study(made_here())
    before = made_from(path, wanted)
    study(made_here(), arm=made_here())
    assert made_from(path, wanted) != before


def test_one_seed_decides_nothing_and_moves_no_verdict():
    from dsbs.evidence.statistics import gain_move, gain_over_seeds, mean_move

    move = gain_move(gain_over_seeds([4.0]), gain_over_seeds([-4.0]))
    assert move['sign_moved'] and not move['outside'] and not move['verdict_moved']
    assert math.isnan(mean_move([50.0], [51.0])['error'])
