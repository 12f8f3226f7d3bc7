"The split of a gain: its parts add up, whatever the runs; and other people's runs, recomputed with nothing of ours."

import csv
import json
import re
import statistics
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
from scipy.stats import binom

from dsbs.evidence.statistics import PARTS, at_chance, part_gains, share_leaving, split_gain
from dsbs.evidence.study import split_table

ROOT = Path(__file__).resolve().parents[2]
ROWS = list(csv.DictReader((ROOT / 'reports' / 'independent_runs.csv').open(encoding='utf-8')))


def runs(accuracies, seeds=None):
    seeds = range(len(accuracies)) if seeds is None else seeds
    return pd.DataFrame(dict(test_accuracy=accuracies, majority_accuracy=100 / 3, n_test=1000, seed=seeds))


@pytest.mark.parametrize('seed', range(20))
def test_the_parts_add_up(seed):
    rng = np.random.default_rng(seed)
    ours, other = (rng.choice([34.1, 35.0, 36.3, 36.4, 44.0, 52.0], size=rng.integers(1, 8)) for _ in range(2))
    row = split_gain(runs(ours), runs(other))
    assert row['gain'] == pytest.approx(ours.mean() - other.mean())
    total = sum(row[part] for part in PARTS)
    told = row['left_other'] > 0 or row['left_ours'] == 0
    assert total == pytest.approx(row['gain']) if told else np.isnan(total)


def test_the_limit_is_a_number_of_right_answers():
    for right, stays in ((363, True), (364, False)):
        assert at_chance(runs([round(right / 10, 4)])).tolist() == [stays]
    assert at_chance(runs([36.7]), 37).tolist() == [True]
    free_text = runs([0.0]).assign(majority_accuracy=None)
    assert at_chance(free_text).tolist() == [False]


def test_runs_that_belong_together_are_drawn_together():
    ours, other = runs([50.0, 60, 70, 80]), runs([45.0, 55, 65, 75])
    together, apart = split_gain(ours, other), split_gain(ours, runs([45.0, 55, 65, 75], range(4, 8)))
    assert together['gain_low'] == together['gain_high'] == pytest.approx(5)
    assert apart['gain_low'] < 0 < apart['gain_high'] and apart['gain'] == together['gain']
    table = split_table(pd.DataFrame([together, apart]))
    assert list(table['runs in pairs']) == ['yes', 'no']


def test_too_few_runs_have_no_interval():
    one, rare = split_gain(runs([48.0]), runs([44.0])), split_gain(runs([48.0, 49, 50]), runs([44.0] + [34.0] * 8))
    assert np.isnan([one['gain_low'], rare['starting_low'], rare['generalising_high']]).all()
    assert rare['starting'] > 0 and not np.isnan(rare['gain_low'])
    never = part_gains((np.array([48.0, 49]), np.zeros(2, bool)), (np.array([34.0, 35]), np.ones(2, bool)), True)
    assert np.isnan(never['starting'].mean) and never['gain'].mean == 14


def test_a_share_has_a_width_where_all_leave():
    (row,) = share_leaving(runs([50.0] * 3).assign(curve='standard'), ['curve']).to_dict('records')
    assert (row['left'], row['runs'], row['share']) == (3, 3, 100) and 43 < row['low'] < 45


def accuracies(method, share):
    wanted = dict(task='anli1', student='t5-v1_1-base', method=method, label_source='human', train_fraction=share)
    teacher = '' if method == 'standard' else 'PaLM 540B, few-shot (the recorded completions)'
    wanted |= dict(teacher=teacher) | ({} if method == 'standard' else dict(rationale_share='1.0'))
    return [float(r['test_accuracy']) for r in ROWS if all(r[c] == value for c, value in wanted.items())]


def by_hand(share, limit):
    "Starting and generalising, where all runs of step-by-step leave chance."
    ours, other = accuracies('step_by_step', share), accuracies('standard', share)
    left, stay = [a for a in other if a > limit], [a for a in other if a <= limit]
    assert min(ours) > limit
    starting = (1 - len(left) / len(other)) * (statistics.mean(left) - statistics.mean(stay))
    generalising = statistics.mean(ours) - statistics.mean(left)
    assert starting + generalising == pytest.approx(statistics.mean(ours) - statistics.mean(other))
    return len(left), statistics.mean(left), starting, generalising


def said(name='start_or_generalise'):
    "What a figure's notebook says of these runs, in its prose."
    cells = nbformat.read(ROOT / 'nbs' / 'figures' / f'{name}.ipynb', 4).cells
    return ' '.join(' '.join(c.source.split()) for c in cells if c.cell_type == 'markdown')


@pytest.mark.parametrize('limit', [36.3, 37])
def test_what_the_notebook_says_of_a_limit(limit):
    left, mean, starting, generalising = by_hand('1.0', limit)
    sentence = f'{left} of 9 standard runs leave chance and reach {mean:.1f} on average: {starting:.1f} points of'
    assert f'{sentence} starting and {generalising:.1f} of generalising' in said()


def test_what_the_notebook_says_of_all_shares():
    parts = {share: by_hand(share, 36.3) for share in ('0.125', '0.25', '0.5', '1.0')}
    assert [round(statistics.mean(some), 1) for some in zip(*parts.values(), strict=True)][2:] == [5.3, 3.3]
    assert sum(left for left, *_ in parts.values()) == 13
    assert '13 of 36 standard runs' in said() and 'all 13 of step-by-step' in said()
    assert re.search(r'5\.3 points of starting and 3\.3 of generalising', said())


FIRST, FRESH, AT_EQUAL_COMPUTE = range(20), range(20, 60), range(200, 250)  # Seeds: of the claims, and asked again


def our_runs(n_train, seeds=FIRST, **wanted):
    "Our runs, read with nothing of ours: does each leave chance, did it converge, and how well it ends."
    usual = dict(student='scratch-32x2', label_source='human', rationales='teacher', rationale_weight=1.0)
    usual |= dict(n_train=n_train, rationale_share=1.0, teacher_error=0.05, mutual_information=0.0)
    usual |= dict(extra='', task_prefix='encoder') | wanted
    records = [json.loads(line) for line in (ROOT / 'reports' / 'results' / 'embedded.jsonl').open(encoding='utf-8')]
    records = sorted((r for r in records if r['spec']['seed'] in seeds), key=lambda r: r['spec']['seed'])
    runs = [r['metrics'] for r in records if all(r['spec'][name] == value for name, value in usual.items())]
    least = binom.ppf(0.975, 500, 0.5) / 5  # Percent that guessing passes in 2.5% of cases
    return [(m['test_accuracy'] > least, m['converged'], m['test_accuracy']) for m in runs]


THIRD = dict(method='step_by_step', rationale_share=0.33)


def same_kind_runs(n_train, **wanted):
    return our_runs(n_train, task='same_kind', **wanted)


def leaving(runs):  # "8 of 10"
    return f'{sum(left for left, *_ in runs)} of {len(runs)}'


def passing(runs, limit=None):
    "The accuracies of runs that leave chance, or that pass another limit."
    return [accuracy for left, _, accuracy in runs if (left if limit is None else accuracy > limit)]


def gain_and_generalising(ours, other, limit=None):
    leave = [passing(runs, limit) for runs in (ours, other)]
    better = statistics.mean(leave[0]) - statistics.mean(leave[1])
    gain = statistics.mean(r[2] for r in ours) - statistics.mean(r[2] for r in other)
    return gain, len(leave[0]) / len(ours) * better


def test_what_the_notebook_says_of_our_runs():
    by_rationales = dict(method='step_by_step', n_train=150)
    plain = [same_kind_runs(n, method='standard', max_steps=2000) for n in (100, 150, 300)]
    ours = [same_kind_runs(n, method='step_by_step') for n in (100, 150, 300)]
    longer = same_kind_runs(150, method='standard', max_steps=4000)
    text = said()
    assert f'{leaving(plain[1])} standard runs leave chance, {leaving(longer)} with equal compute' in text
    assert f'and {leaving(ours[1])} of step-by-step' in text
    assert f'at 100 rows: {leaving(plain[0])} leave, and {leaving(ours[0])} of step-by-step' in text
    gain, generalising = gain_and_generalising(ours[1], plain[1])
    assert f'With 150 rows {generalising:.1f} of {gain:.1f} points are generalising' in text
    scrambled, within = (same_kind_runs(**by_rationales, rationales=r) for r in ('scrambled', 'shuffled_within'))
    assert f'{leaving(scrambled)} leave with scrambled words, {leaving(within)} with rationales shuffled' in text
    assert f'and {leaving(same_kind_runs(**by_rationales, rationale_weight=0.0))} with weight 0' in text
    staying = [converged for runs in plain + ours for left, converged, _ in runs if not left]
    assert all(staying) and f'All {len(staying)} have fitted their rows' in text


def test_what_is_said_of_fresh_seeds():
    counts = {
        n: [same_kind_runs(n, seeds=FRESH, method=method) for method in ('standard', 'step_by_step')]
        for n in (100, 150, 300)
    }
    left = {n: [sum(left for left, *_ in runs) for runs in both] for n, both in counts.items()}
    assert {len(runs) for both in counts.values() for runs in both} == {40} and left[300] == [40, 40]
    at_150, at_100 = (' and '.join(map(str, left[n])) for n in (150, 100))
    assert f'at 150 rows {at_150} of 40 leave, at 100 rows {at_100}, at 300 all' in said()
    text = said('replication')
    shares = [100 * sum(left[n][i] for n in left) / 120 for i in (1, 0)]
    assert "{:.0f}% of step-by-step's runs leave chance on `same_kind`, and {:.0f}% of".format(*shares) in text
    third, standard = (same_kind_runs(150, seeds=FRESH, **more) for more in (THIRD, dict(method='standard')))
    gain = statistics.mean(r[2] for r in third) - statistics.mean(r[2] for r in standard)
    assert f'keeps a gain of {gain:.1f} points' in text
    half = our_runs(320, seeds=FRESH, task='heavier_than', method='step_by_step')
    whole = our_runs(640, seeds=FRESH, task='heavier_than', method='standard')
    differences = [ours[2] - other[2] for ours, other in zip(half, whole, strict=True)]
    assert f'In {sum(d < -0.01 for d in differences)} of 40 seeds' in text
    assert f'on the median by {-statistics.median(differences):.1f} points' in text
    started = [d for d, (left, *_) in zip(differences, whole, strict=True) if left]
    assert len(started) == 39
    assert f'from {statistics.mean(started):.1f} to {statistics.mean(differences):.1f}' in text


def starting_part(ours, other, limit=None):
    "The points that come of more runs passing a limit."
    stay = [accuracy for *_, accuracy in other if accuracy not in passing(other, limit)]
    more = (len(passing(ours, limit)) - len(passing(other, limit))) / len(ours)
    return more * (statistics.mean(passing(other, limit)) - statistics.mean(stay))


def test_what_is_said_of_fresh_seeds_at_equal_compute():
    methods = ('step_by_step', 'standard')
    runs = {n: [same_kind_runs(n, seeds=AT_EQUAL_COMPUTE, method=m) for m in methods] for n in (100, 150, 300)}
    assert {len(some) for both in runs.values() for some in both} == {50}
    left = {n: [len(passing(some, None)) for some in both] for n, both in runs.items()}
    gains = {n: statistics.mean(r[2] for r in a) - statistics.mean(r[2] for r in b) for n, (a, b) in runs.items()}
    means = [statistics.mean(passing(some, None)) for some in runs[150]]
    text = said('replication_compute')
    assert left[150] == [43, 43] and left[300] == [50, 50]
    assert 'by this limit: 43 of 50 runs leave chance on either side' in text
    assert 'get to {:.1f}%, those of standard finetuning to {:.1f}%'.format(*means) in text
    assert f'With 100 rows {left[100][0]} of 50 leave against {left[100][1]}, and the gain is {gains[100]:.1f}' in text
    assert f'{gain_and_generalising(*runs[100])[1]:.1f} of them are generalising, and starting is undecided' in text
    assert f'both sides end at 99%, and the gain is {gains[300]:.1f}' in text
    assert {round(statistics.mean(r[2] for r in some)) for some in runs[300]} == {99}
    assert f'and {gains[150]:.1f} points with 150 rows' in text
    assert f'is {statistics.mean(gains.values()):.1f} points ahead as the mean' in text
    passed = [len(passing(some, 75)) for some in runs[150]]
    assert 'With 150 rows {} of 50 runs of step-by-step pass 75%, and {} of standard'.format(*passed) in text
    parts = starting_part(*runs[150], 75), gain_and_generalising(*runs[150], 75)[1]
    rest = gains[150] - sum(parts)
    assert f'Then {parts[0]:.1f} of the {gains[150]:.1f} points are starting, {parts[1]:.1f} generalising' in text
    assert f'and {rest:.1f} come of the runs that stay' in text
    counts = f'at 150 rows 43 of 50 leave on either side, at 100 rows {left[100][1]} and {left[100][0]}, at 300 all'
    assert counts in said()
    generalising = {at: gain_and_generalising(*runs[150], at)[1] for at in (None, 75)}
    assert f'{gains[150]:.1f} points ahead there, and {generalising[None]:.1f} of them are generalising' in said()
    assert f'{generalising[None]:.1f} of them generalising, or {generalising[75]:.1f} at the stricter limit' in said()


def test_what_the_notebook_says_of_the_negative_control():
    both = {m: our_runs(160, task='weight_untold', method=m, max_steps=2400) for m in ('standard', 'step_by_step')}
    stay = {m: sum(not left for left, *_ in runs) for m, runs in both.items()}
    text = f'{stay["step_by_step"]} of 20 of its runs at 160 rows end on the plateau, and {stay["standard"]} of 20'
    assert text in said() and {len(runs) for runs in both.values()} == {20}
