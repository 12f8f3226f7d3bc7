"The recomputation of the headline finds what is right and what is not, on records that nobody made."

import json
import random
import re
import shutil
from dataclasses import asdict

import pytest
from test_headline import ROOT, differences, expected, in_readme, in_report

from dsbs.evidence.grids import grid, specs_of
from dsbs.evidence.headline import as_markdown, headline_sentences
from dsbs.evidence.page import page_html

NEEDED = [
    ('fig4_data_size_human', 'embedded'),
    ('fig4_data_size_human', 'standin'),
    ('rationale_content', 'embedded'),
    ('fig4_data_size_human', 'quick'),
    ('search', 'search'),
]
QUESTIONS = 199  # So that no mean lies between two tenths


def record(spec, ahead):
    "A run that is right as often as chance would have it."
    rng = random.Random(repr(spec))
    starts = spec.task != 'same_kind' or spec.method != 'standard' or rng.random() < 0.7
    gain = ahead * (spec.method == 'step_by_step') * (1 if spec.rationales == 'teacher' else 0.5)
    share = 0.7 + gain / 100 + rng.gauss(0, 0.02) if starts else 0.5
    bits = ''.join('1' if rng.random() < share else '0' for _ in range(QUESTIONS))
    return dict(
        key=f'{rng.getrandbits(256):064x}',
        spec=asdict(spec),
        correct=f'{int(bits + "0", 2):0{(QUESTIONS + 1) // 4}x}',
        metrics=dict(
            test_accuracy=100 * bits.count('1') / QUESTIONS,
            validation_accuracy=rng.uniform(40, 60),
            n_train=spec.n_train or 1000,
            n_test=QUESTIONS,
            n_validation=QUESTIONS,
            majority_accuracy=50.0,
            parameters=57_792,
        ),
        provenance=dict(commit='a' * 40, device='cpu', machine=dict(processor='made up')),
        time=dict(finished='2026-01-02T03:04:05Z', seconds=30.0),
    )


def reports_of(folder, ahead, needed=NEEDED, table=True):
    (folder / 'results').mkdir(parents=True)
    for preset in {preset for _, preset in needed}:
        specs = dict.fromkeys(s for figure, p in needed if p == preset for s in specs_of(grid(figure, p)))
        lines = [json.dumps(record(s, ahead)) + '\n' for s in specs]
        (folder / 'results' / f'{preset}.jsonl').write_text(''.join(lines), encoding='utf-8')
    if table:
        shutil.copy(ROOT / 'reports' / 'independent_runs.csv', folder)
    return folder


def front_page(reports):
    "As much of a front page as is read."
    sentences = headline_sentences(reports / 'results', reports / 'independent_runs.csv')
    return f'![](reports/figures/headline.png)\n\n{as_markdown(sentences)}\n\nGains are points'


@pytest.mark.parametrize('ahead', [12, 0, -12])
def test_all_sentences_are_recomputed(tmp_path, ahead):
    reports = reports_of(tmp_path / 'reports', ahead)
    sentences, wanted = in_readme(front_page(reports)), expected(reports)
    assert len(sentences) == len(wanted) == 5 and not differences(sentences, wanted)


def test_the_report_says_the_same(tmp_path):
    reports = reports_of(tmp_path / 'reports', 5, NEEDED[:2])
    assert in_report(page_html(reports, [])) == in_readme(front_page(reports))


def test_each_number_that_is_off_by_a_tenth_is_found(tmp_path):
    reports = reports_of(tmp_path / 'reports', 5)
    sentences, wanted = in_readme(front_page(reports)), expected(reports)
    for i, sentence in enumerate(sentences):
        for number in re.finditer(r'\d+\.\d', sentence):
            other = f'{float(number[0]) + 0.1:.1f}'
            changed = sentence[: number.start()] + other + sentence[number.end() :]
            assert differences([*sentences[:i], changed, *sentences[i + 1 :]], wanted), (sentence, number[0])
    assert differences(sentences[:-1], wanted)
    assert differences([sentences[0].replace('.', ', of 7.', 1), *sentences[1:]], wanted)


@pytest.mark.parametrize('left', range(4))
def test_what_has_no_records_is_not_said(tmp_path, left):
    some = reports_of(tmp_path / 'some', 5, NEEDED[:left] if left < 3 else NEEDED[1:], table=left != 2)
    sentences, wanted = in_readme(front_page(some)), expected(some)
    assert len(sentences) == len(wanted) < 5 and not differences(sentences, wanted)


def test_a_run_that_is_missing_takes_its_sentences_away(tmp_path):
    reports = reports_of(tmp_path / 'reports', 5)
    path = reports / 'results' / 'embedded.jsonl'
    rows = [json.loads(line) for line in path.read_text(encoding='utf-8').splitlines()]

    def is_the_one(spec):
        usual = spec['method'] == 'standard' and spec['student'] == 'scratch-32x2'
        return usual and (spec['task'], spec['n_train'], spec['seed']) == ('heavier_than', 80, 3)

    kept = [r for r in rows if not is_the_one(r['spec'])]
    assert len(kept) < len(rows)
    path.write_text(''.join(json.dumps(r) + '\n' for r in kept), encoding='utf-8')
    said = [s.partition(' ')[0] for s in in_readme(front_page(reports))]
    assert said == ['Step-by-step', 'Starting', 'Content,', 'e-SNLI']
    assert 'on our benchmark' not in in_readme(front_page(reports))[0]
