"What notebooks say of e-SNLI's main figures, recomputed from the records with nothing of ours."

import json
import statistics
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[2]


def records(preset):
    return [json.loads(r) for r in (ROOT / f'reports/results/{preset}.jsonl').read_text('utf-8').splitlines()]


RECORDS = records('standin')
UPDATES = {0.125: 2400, 0.25: 2400, 0.5: 11520, 1.0: 23040}  # Of both methods
MORE = 2.4  # Times as many at equal compute


def said(notebook):
    "The texts of a notebook, with single spaces."
    cells = nbformat.read(ROOT / 'nbs' / f'{notebook}.ipynb', 4).cells
    return ' '.join(' '.join(c.source for c in cells if c.cell_type == 'markdown').split())


def runs(method='step_by_step', share=1.0, times=1, rationales='teacher', weight=1.0):
    "The five runs of one way of training, with the updates of the main figures."
    wanted = dict(student='scratch-32x2', method=method, train_fraction=share, rationales=rationales)
    wanted |= dict(rationale_weight=weight, max_steps=round(times * UPDATES[share]))
    wanted |= dict(rationale_share=1.0, rationale_words=None, mutual_information=0.0)
    found = [r for r in RECORDS if all(r['spec'][name] == value for name, value in wanted.items())]
    assert sorted(r['spec']['seed'] for r in found) == [0, 1, 2, 3, 4], wanted
    return [r['metrics'] for r in found]


def mean(some):
    return statistics.fmean(m['test_accuracy'] for m in some)


def unconverged(some):
    return sum(m['converged'] is False for m in some)


def test_both_methods_converged_at_every_size():
    for share in UPDATES:
        assert not unconverged(runs('standard', share)) + unconverged(runs(share=share))
    assert 'All runs of the two methods converged' in said('figures/fig4_data_size_human')


def test_what_figure_4_says_of_the_gains():
    text = said('figures/fig4_data_size_human')
    gains = [mean(runs(share=share)) - mean(runs('standard', share)) for share in UPDATES]
    assert max(map(abs, gains[:2])) < 1 and 'the two methods differ by less than a point' in text
    assert f'step-by-step is ahead by {gains[2]:.1f} and {gains[3]:.1f} points' in text
    more = [mean(runs('standard', share, MORE)) - mean(runs('standard', share)) for share in UPDATES]
    assert max(map(abs, more)) < 1
    assert 'More updates leave standard finetuning where it was, at every size to less than a point' in text


def test_what_is_said_of_content():
    text, ours, labels = said('figures/rationale_content'), runs(), runs('standard')
    shuffled, scrambled = runs(rationales='shuffled_within'), runs(rationales='scrambled')
    assert round(mean(shuffled) - mean(labels)) == 4 and round(mean(ours) - mean(shuffled)) == 2
    assert 'Shuffled rationales end 4 points above standard finetuning and 2 below step-by-step' in text
    assert unconverged(shuffled) == 2 and 'two of the shuffled runs, the lowest, had still not converged' in text
    assert not unconverged(scrambled)
    assert f'({mean(scrambled):.1f} beside {mean(ours):.1f}, a difference of' in text
    alone = runs(weight=0.0)
    assert mean(alone) < mean(labels) < mean(shuffled)
    assert 'On e-SNLI shuffled texts are above standard finetuning.' in text
    assert f'{mean(alone):.1f}% are reached' in said('figures/rationale_share')


def test_what_is_said_of_labels_alone_with_the_settings_of_step_by_step():
    text, alone = said('figures/rationale_content'), runs(weight=0.0)
    (early,) = [m for m in alone if m['converged']]
    assert 'Four of these five runs had not converged' in text and 'still 0.37 to 0.42' in text
    for m in alone:
        assert m is early or 0.37 <= round(m['label_loss_end'], 2) <= 0.42
    low, high = (pick(m['test_accuracy'] for m in runs('standard')) for pick in (min, max))
    assert f'ends at {early["test_accuracy"]:.1f}' in text and f'({low:.1f} to {high:.1f})' in text
    assert early['test_accuracy'] > high
    assert early['test_accuracy'] == pytest.approx(mean(runs(rationales='shuffled_within')), abs=0.5)
    assert f'ends at {early["test_accuracy"]:.1f}' in said('figures/start_or_generalise')


def test_what_is_said_of_labels_alone_in_the_search():
    wanted = dict(stand_in=True, method='standard', learning_rate=0.006, batch_size=64, train_fraction=1.0)
    wanted |= dict(max_steps=4800)  # As many as the second round has
    found = [r['metrics'] for r in records('search') if wanted.items() <= r['spec'].items()]
    low, high = sorted(m['test_accuracy'] for m in found)
    assert f'with a batch of 64, learned early too, and ended at {low:.1f} and {high:.1f}' in said(
        'figures/rationale_content'
    )
