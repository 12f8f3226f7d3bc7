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


SETTINGS = ('init_factor', 'learning_rate', 'batch_size', 'dropout', 'warmup_ratio')
IN_THE_FIGURES = dict(standard=(1.0, 0.002, 16, 0.0, 0.0), step_by_step=(1.0, 0.006, 16, 0.0, 0.1))


def tried_to_the_end(method, seed=106, **wanted):
    "What the third round of the search measured: settings -> metrics."
    wanted = dict(method=method, seed=seed) | (wanted or dict(stand_in=True, train_fraction=0.5))
    found = [r for r in records('search') if wanted.items() <= r['spec'].items()]
    tried = {tuple(r['spec'][name] for name in SETTINGS): r['metrics'] for r in found}
    assert len(tried) == len(found) == 16
    return tried


def test_what_is_said_of_the_search_to_the_end():
    text, figure = said('figures/search'), said('figures/fig4_data_size_human')
    now, best = {}, {}
    for method, settings in IN_THE_FIGURES.items():
        tried = tried_to_the_end(method)
        now[method], best[method] = tried[settings], max(tried.values(), key=lambda m: m['validation_accuracy'])
        assert max(tried, key=lambda s: tried[s]['validation_accuracy'])[0] == 0.3
    missed = {m: best[m]['validation_accuracy'] - now[m]['validation_accuracy'] for m in now}
    assert f'ends {missed["standard"]:.1f} points of validation below its best' in text
    assert f'that of step-by-step {missed["step_by_step"]:.1f} below' in text
    ends = [m[method]['test_accuracy'] for m in (now, best) for method in ('standard', 'step_by_step')]
    numbers = '{:.1f} (standard finetuning) and {:.1f}, the best by validation {:.1f} and {:.1f}.'.format(*ends)
    assert f'the settings in the figures reach {numbers}' in text
    gains = ends[1] - ends[0], ends[3] - ends[2]
    assert 'So a difference of {:.1f} points becomes one of {:.1f}, in one seed'.format(*gains) in text
    ranked = sorted(tried_to_the_end('step_by_step').values(), key=lambda m: m['validation_accuracy'])
    assert f'with the second best of step-by-step it would be {ranked[-2]["test_accuracy"] - ends[2]:.1f}' in text
    dropped = [m for s in IN_THE_FIGURES for k, m in tried_to_the_end(s).items() if k[3]]
    assert len(dropped) == unconverged(dropped) == 16 and not any(m['converged'] for m in best.values())
    worth = ends[2] - ends[0], ends[3] - ends[1]
    assert 'worth {:.1f} points to standard finetuning and {:.1f} to step-by-step'.format(*worth) in figure
    assert f'standard finetuning ends {worth[0]:.1f} points higher' in said('figures/rationale_content')


def test_what_is_said_of_speed_in_the_search():
    first = [r for r in records('search') if r['spec']['stand_in'] and r['spec']['seed'] == 100]
    stay = {
        method: sum(r['metrics']['validation_accuracy'] < 34.3 for r in first if r['spec']['method'] == method)
        for method in IN_THE_FIGURES
    }
    text = said('figures/search')
    assert f'{stay["standard"]} of 16 settings of standard finetuning still give the commonest answer' in text
    assert f'and so do {stay["step_by_step"]} of step-by-step' in text
    leave = {m: sum(t['test_accuracy'] > 35 for t in tried_to_the_end(m).values()) for m in IN_THE_FIGURES}
    assert leave == dict(standard=15, step_by_step=16)
    assert '15 of 16 and all 16 leave' in said('figures/start_or_generalise')


def test_what_is_said_of_heavier_than_in_the_third_round():
    here, validation, test = ('0.3/0.006/64/0.1/0', {}, {})
    for method in IN_THE_FIGURES:
        for seed in (106, 107):
            for settings, m in tried_to_the_end(method, seed, task='heavier_than', n_train=160).items():
                name = '/'.join(f'{value:g}' for value in settings)
                validation.setdefault((method, name), []).append(m['validation_accuracy'])
                test.setdefault((method, name), []).append(m['test_accuracy'])
    best = {m: max((n for k, n in validation if k == m), key=lambda n: sum(validation[m, n])) for m in IN_THE_FIGURES}
    means = {key: statistics.fmean(values) for key, values in test.items()}
    ahead = statistics.fmean(validation['standard', best['standard']]) - statistics.fmean(validation['standard', here])
    behind = means['standard', here] - means['standard', best['standard']]
    gains = [means['step_by_step', s] - means['standard', t] for s, t in ((here, here), tuple(best.values())[::-1])]
    text = said('figures/search')
    assert f'by {ahead:.1f} points of validation with two seeds, and behind by {behind:.1f} on test' in text
    sentence = (
        'With the settings in the figures the difference on test is {:.1f} points there, with the best by validation'
    )
    assert f'{sentence.format(gains[0])} {gains[1]:.1f}' in text
