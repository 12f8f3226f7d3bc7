"""Somebody else's recomputation: every number of the front page's sentences and of the report's opening, from the
published lines of JSON and the table of other people's runs. Nothing of dsbs is imported here."""

import csv
import html
import json
import math
import re
import statistics
from collections import defaultdict
from pathlib import Path

from scipy import stats

ROOT = Path(__file__).resolve().parents[2]
NUMBER = re.compile(r'(?<![\w.-])[+-]?\d+(?:\.\d+)?')

# What the sentences are about, in the words of the records: a spec's settings, those left out as usual
USUAL = dict(
    label_source='human',
    rationales='teacher',
    keep='all',
    rationale_share=1.0,
    rationale_words=None,
    rationale_weight=1.0,
    mutual_information=0.0,
    task_prefix='encoder',
    teacher='',
    teacher_error=0.05,
    extra='',
)


def records(path):
    "The published runs of a preset that have their answers; older ones are void."
    lines = path.read_text(encoding='utf-8').splitlines() if path.is_file() else []
    return [r for r in map(json.loads, lines) if 'correct' in r]


def runs_of(rows, **settings):
    "Runs with these settings, and the usual ones elsewhere: size -> seed -> runs."
    found = defaultdict(lambda: defaultdict(list))
    for r in rows:
        spec = USUAL | r['spec']
        if all(spec.get(name) == value for name, value in (USUAL | settings).items()):
            found[spec['n_train'] or spec['train_fraction']][spec['seed']].append(r)
    return {size: dict(seeds) for size, seeds in sorted(found.items())}


def shortest(runs):
    "Of several runs of a seed, that with the fewest updates."
    return min(runs, key=lambda r: r['spec']['max_steps'])


def longest(runs):
    return max(runs, key=lambda r: r['spec']['max_steps'])


def accuracies(seeds, pick):
    return {seed: pick(runs)['metrics']['test_accuracy'] for seed, runs in seeds.items()}


def student(values, more_variance=0.0, df_more=0):
    "Mean and 95% interval of one value a seed; a further variance of the mean has its own degrees of freedom."
    n, mean = len(values), statistics.fmean(values)
    variance = statistics.variance(values) / n
    total = variance + more_variance
    if not total:
        return mean, mean, mean
    parts = variance**2 / (n - 1) + (more_variance**2 / df_more if df_more else 0)
    half = stats.t.ppf(0.975, total**2 / parts) * math.sqrt(total)
    return mean, mean - half, mean + half


def by_seed(ours, other):
    "Difference of each seed that both have."
    return {seed: ours[seed] - other[seed] for seed in sorted(ours) if seed in other}


def over_sizes(differences):
    "The mean over sizes of each seed that has all of them."
    seeds = set.intersection(*(set(d) for d in differences))
    return [statistics.fmean(d[seed] for d in differences) for seed in sorted(seeds)]


# Each sentence: the numbers in it, in their order, or None where it cannot be said


def independent(table):
    "Runs of T5-base with human labels and PaLM's rationales: task -> method -> share -> run -> accuracy."
    found = defaultdict(lambda: defaultdict(lambda: defaultdict(dict)))
    with table.open(encoding='utf-8', newline='') as lines:
        for row in csv.DictReader(lines):
            palm = row['method'] == 'standard' or row['teacher'].startswith('PaLM')
            base = row['student'] == 't5-v1_1-base' and row['label_source'] == 'human'
            whole = row['method'] == 'standard' or float(row['rationale_share']) == 1
            if palm and base and whole and float(row['learning_rate']) <= 5e-5:
                run = row['run'], row['batch_size'], row['learning_rate']
                found[row['task']][row['method']][row['train_fraction']][run] = float(row['test_accuracy'])
    return found


def binomial(accuracy, n):
    return accuracy * (100 - accuracy) / n


def paired_over_shares(ours, other, n):
    shares = sorted(ours)
    per_run = over_sizes([by_seed(ours[s], other[s]) for s in shares])
    means = [statistics.fmean(side[s].values()) for s in shares for side in (ours, other)]
    return student(per_run, sum(binomial(m, n) for m in means) / len(shares), n - 1)


def all_against_all(ours, other, n):
    sides = [over_sizes(list(side.values())) for side in (ours, other)]
    sources = [(statistics.variance(side) / len(side), len(side) - 1) for side in sides]
    sources += [(binomial(statistics.fmean(side), n), n - 1) for side in sides]
    total, mean = sum(v for v, _ in sources), statistics.fmean(sides[0]) - statistics.fmean(sides[1])
    half = stats.t.ppf(0.975, total**2 / sum(v**2 / df for v, df in sources)) * math.sqrt(total)
    return mean, mean - half, mean + half


def started(ours, other, n):
    "The points that come of more runs leaving chance, where guessing is right in a third of the cases."
    limit = stats.binom.ppf(0.975, n, 1 / 3) + 0.5
    left, stay = (
        [[a for a in side.values() if (n * a / 100 >= limit) == leaves] for side in (ours, other)]
        for leaves in (True, False)
    )
    if not left[1]:
        return math.nan
    shares = [len(some) / len(side) for some, side in zip(left, (ours, other), strict=True)]
    chance = statistics.fmean(stay[1] or stay[0] or left[1])
    return (shares[0] - shares[1]) * (statistics.fmean(left[1]) - chance)


FRESH = range(20, 60)  # Seeds of the runs that ask three lines again
AT_EQUAL_COMPUTE = range(200, 250)  # Seeds of the runs that ask two lines at equal compute again


def equal_compute_sides(rows, task):
    """Step-by-step and standard finetuning with more updates: size -> seed -> run; of fresh seeds alone once all of
    them are made."""
    sides = both_methods(rows, task=task, student='scratch-32x2')
    if sides is None:
        return None
    ours, other = sides
    more = {
        size: {seed: longest(runs) for seed, runs in seeds.items() if seed in AT_EQUAL_COMPUTE or len(runs) > 1}
        for size, seeds in other.items()
    }
    if not all(more.values()):
        return None
    ours = {size: {seed: shortest(runs) for seed, runs in seeds.items()} for size, seeds in ours.items()}
    fresh = all(set(AT_EQUAL_COMPUTE) <= set(side[size]) for side in (ours, more) for size in more)
    return [
        {
            size: {seed: r for seed, r in seeds.items() if (seed in AT_EQUAL_COMPUTE) == fresh}
            for size, seeds in s.items()
        }
        for s in (ours, more)
    ]


def equal_compute(rows, task):
    "Step-by-step minus standard finetuning with more updates: mean over sizes, a value for each seed."
    sides = equal_compute_sides(rows, task)
    if sides is None:
        return None
    scores = [
        {size: {seed: r['metrics']['test_accuracy'] for seed, r in seeds.items()} for size, seeds in side.items()}
        for side in sides
    ]
    return over_sizes([by_seed(scores[0][size], scores[1][size]) for size in scores[0]]), len(scores[0])


def result(rows, table):
    if not table.is_file():
        return None
    runs = independent(table)
    cqa, anli = ([runs[task][m] for m in ('step_by_step', 'standard')] for task in ('cqa', 'anli1'))
    numbers = [*paired_over_shares(*cqa, 1221), *all_against_all(*anli, 1000)]
    starting = statistics.fmean(started(anli[0][s], anli[1][s], 1000) for s in anli[0])
    numbers += [] if math.isnan(starting) else [starting]
    ours = [equal_compute(rows, task) for task in ('same_kind', 'heavier_than')]
    return numbers + ([x for values, _ in ours for x in student(values)] if None not in ours else [])


def information(rows):
    found = equal_compute(rows, 'heavier_than')
    return found and [*sized(student(found[0])), found[1], len(found[0])]


def sized(interval):
    "As a sentence says it: how far ahead or behind, both without a sign; with it where that is undecided."
    mean, low, high = interval
    return (-mean, -high, -low) if high < 0 else interval


def both_methods(rows, **settings):
    "Step-by-step and standard finetuning, where both have several sizes; else None."
    sides = [runs_of(rows, method=method, **settings) for method in ('step_by_step', 'standard')]
    return sides if min(map(len, sides)) > 1 else None


def leaves(r):
    m = r['metrics']
    return m['test_accuracy'] * m['n_test'] / 100 > stats.binom.ppf(0.975, m['n_test'], m['majority_accuracy'] / 100)


def shares_that_leave(side, seeds):
    "Percent of a seed's runs that leave chance; `side` has one run for each size and seed."
    return {seed: statistics.fmean(100.0 * leaves(runs[seed]) for runs in side.values()) for seed in seeds}


def start(rows):
    sides = both_methods(rows, task='same_kind', student='scratch-32x2')
    if sides is None:
        return None
    sides = [{size: {s: shortest(runs) for s, runs in seeds.items()} for size, seeds in side.items()} for side in sides]
    there = set.intersection(*(set(seeds) for side in sides for seeds in side.values())) - set(AT_EQUAL_COMPUTE)
    asked = set(FRESH) if set(FRESH) <= there else there - set(FRESH)
    shares = [shares_that_leave(side, sorted(asked)) for side in sides]
    values = list(by_seed(*shares).values())
    numbers = [*(statistics.fmean(side.values()) for side in shares), *student(values), len(values)]
    if longer := equal_compute_sides(rows, 'same_kind'):
        both = set.intersection(*(set(seeds) for side in longer for seeds in side.values()))
        values = list(by_seed(*(shares_that_leave(side, sorted(both)) for side in longer)).values())
        numbers += [*student(values), len(values)]
    return numbers


def content(rows):
    numbers = []
    for task in ('same_kind', 'heavier_than'):
        ours, other, standard = (
            runs_of(rows, task=task, student='scratch-32x2', **settings)
            for settings in (
                dict(method='step_by_step'),
                dict(method='step_by_step', rationales='shuffled_within'),
                dict(method='standard'),
            )
        )
        if not other:
            return None
        (size,) = other
        above = [
            by_seed(accuracies(side[size], shortest), accuracies(other[size], shortest)) for side in (ours, standard)
        ]
        gain, harm = (student(list(values.values())) for values in above)
        numbers += [*gain, *([min(gain[0], harm[0])] if min(gain[1], harm[1]) > 0 else [])]
    sides = both_methods(rows, task='weight_untold', student='scratch-32x2')
    if sides is None:
        return None
    control = [by_seed(*(accuracies(side[s], shortest) for side in sides)) for s in sides[0]]
    return [*numbers, *student(over_sizes(control))]


def esnli(rows):
    "Of each method, the test accuracy of the run with the best validation, where all settings were tried to the end."
    rows = [
        r for r in rows if r['spec']['stand_in'] and r['spec']['seed'] == 106 and r['spec']['train_fraction'] == 0.5
    ]
    if not rows:
        return None
    found = {}
    for method in ('step_by_step', 'standard'):
        tried = [r for r in rows if r['spec']['method'] == method]
        assert len(tried) == 16
        found[method] = max(tried, key=lambda r: r['metrics']['validation_accuracy'])['metrics']['test_accuracy']
    return list(found.values())


def expected(reports):
    "The numbers of each sentence that can be said."
    embedded, search = (records(reports / 'results' / f'{preset}.jsonl') for preset in ('embedded', 'search'))
    ours = [information(embedded), start(embedded), content(embedded), esnli(search)]
    found = [result(embedded, reports / 'independent_runs.csv'), *ours]
    return [numbers for numbers in found if numbers]


def in_readme(text):
    "The sentences of the front page: one in bold, the others a list below it."
    after = text.split('reports/figures/headline.png)')[1].split('Gains are points')[0]
    return [line.strip('*').removeprefix('- ') for line in after.splitlines() if line.strip()]


def in_report(text):
    "The sentences of the report's opening."
    listed = re.search(r'<ul class="said">(.*?)</ul>', text, re.S)
    return [html.unescape(s).strip() for s in re.findall(r'<li>(.*?)\s<a ', listed[1] if listed else '', re.S)]


def differences(sentences, wanted):
    "What a sentence says otherwise than the records; an empty list where all is right."
    said = [[float(n) for n in NUMBER.findall(re.sub(r'\(\w+\)', '', s))] for s in sentences]
    if [len(s) for s in said] != [len(w) for w in wanted]:
        return [(said, wanted)]
    wrong = []
    for text, numbers, should in zip(sentences, said, wanted, strict=True):
        written = NUMBER.findall(text)
        for shown, number, true in zip(written, numbers, should, strict=True):
            half_a_digit = 0.5 if '.' not in shown else 0.05
            wrong += [(text, number, true)] if abs(number - true) > half_a_digit + 1e-6 else []
    return wrong


def test_the_front_page_and_the_report_say_what_the_records_say(published):
    reports, readme = published / 'reports', (published / 'README.md').read_text(encoding='utf-8')
    wanted = expected(reports)
    assert wanted and not differences(in_readme(readme), wanted)
    assert not differences(in_report((reports / 'index.html').read_text(encoding='utf-8')), wanted)


def tokens_planned(seeds, pick):
    "Tokens of all updates, those after the best possible validation included, which are not made."
    spent = [(r['metrics'], r['spec']['max_steps']) for r in map(pick, seeds.values())]
    return statistics.fmean(m['tokens'] / m['steps'] * updates for m, updates in spent)


def test_equal_compute_has_as_many_tokens_or_more_as_the_front_page_says(published):
    rows = records(published / 'reports' / 'results' / 'embedded.jsonl')
    times = []
    for task in ('same_kind', 'heavier_than'):
        ours, other = both_methods(rows, task=task, student='scratch-32x2')
        equal = {size: {seed: runs for seed, runs in seeds.items() if len(runs) > 1} for size, seeds in other.items()}
        times += [tokens_planned(equal[s], longest) / tokens_planned(ours[s], shortest) for s in ours]
    assert min(times) > 0.97
    readme = (published / 'README.md').read_text(encoding='utf-8')
    assert f"step-by-step's tokens, or up to {max(times):.1f} times" in ' '.join(readme.split())
