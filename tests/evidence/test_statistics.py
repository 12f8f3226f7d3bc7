"Gains over seeds and questions, checked another way and on ragged runs."

import math

import numpy as np
import pandas as pd
import pytest

from dsbs.evidence.statistics import crossed_gain, from_bits, paired_differences, paired_gains

RNG = np.random.default_rng(5)
BITS = RNG.random((4, 30)) < 0.6


def runs(seeds, **columns):
    bits = [BITS[s] for s in seeds]
    accuracy = [100 * b.mean() for b in bits]
    return pd.DataFrame(dict(seed=list(seeds), test_accuracy=accuracy, correct=bits, n_test=30) | columns)


def test_the_crossed_error_is_what_products_of_other_cells_leave():
    "The squared mean is too large by its error. Products of cells that share no seed and no question are not."
    table = RNG.normal(size=(5, 1)) + RNG.normal(size=40) + RNG.normal(size=(5, 40))
    n_seeds, n_questions = table.shape
    apart = table.sum() ** 2 - (table.sum(1) ** 2).sum() - (table.sum(0) ** 2).sum() + (table**2).sum()
    unbiased = apart / (table.size * (n_seeds - 1) * (n_questions - 1))
    assert crossed_gain(table).error ** 2 == pytest.approx(table.mean() ** 2 - unbiased)


def test_only_seeds_of_both_count():
    found = paired_differences(runs([0, 1, 2]), runs([3, 2, 1]).assign(seed=[3, 2, 1]))
    assert list(found.by_seed.index) == list(found.table.index) == [1, 2] and found.gain.mean == 0


@pytest.mark.parametrize(
    'change', [dict(correct=None), dict(n_test=None), dict(data_seed=[0, 1, 2]), dict(seed=[0, 1, 1])]
)
def test_without_shared_bits_there_is_no_table(change):
    ours = runs([0, 1, 2]).assign(**change)
    assert paired_differences(ours, ours).table is None


def test_bits_of_two_lengths_make_no_table():
    ours, other = runs([0, 1]), runs([0, 1])
    other['correct'] = [b[:20] for b in other['correct']]
    assert paired_differences(ours, other.assign(n_test=20)).table is None


def test_a_run_without_a_number_is_left_out():
    frame = pd.concat([runs([0, 1, 2], curve='standard'), runs([1, 2, 3], curve='step_by_step')])
    frame = frame.assign(panel='t', n_train=10).reset_index(drop=True)
    frame.loc[1, 'test_accuracy'] = math.nan
    (row,) = paired_gains(frame, ['standard']).to_dict('records')
    assert (row['n'], row['gain'], row['verdict']) == (1, 0, 'undecided')


@pytest.mark.parametrize('n_test', [1, 3, 4, 5, 30])
def test_bits_come_back_as_a_record_wrote_them(n_test):
    from dsbs.runs.run import as_bits

    right = BITS[0][:n_test].tolist()
    assert from_bits(as_bits(right), n_test).tolist() == right
