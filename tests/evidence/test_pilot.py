"A pilot: what its rule says of runs whose truth is known, what it costs, and what it writes."

import json
import shlex
from pathlib import Path

import pytest

from dsbs.data.tasks import is_task_folder, load_task
from dsbs.evidence.grids import specs_of
from dsbs.evidence.pilot import (
    CELLS,
    DONT_KNOW,
    GAINS,
    NEEDED,
    NEXT,
    NO,
    YES,
    Budget,
    Cost,
    Design,
    PilotSettings,
    Rounds,
    Truth,
    answer_cost,
    as_typed,
    judge,
    largest_made,
    made_up_runs,
    make_in_rounds,
    pilot_command,
    published_cards,
    read_budget,
    score,
    share_within,
    smaller_designs,
    within_minutes,
)
from dsbs.records import UsageError, reports_dir
from dsbs.teacher.extraction import Reading
from dsbs.tools.cli import parser

COST = Cost(100.0, 'a guess', price=0.01)
WHAT = ('labels all', 'rationales all', 'labels half', 'rationales half', 'shuffled all')


def judged(*accuracy, spread=0.2, teacher=None, seeds=range(3), **more):
    "The rule on made-up runs with these accuracies, in the order of `WHAT`."
    at = dict(zip(NEEDED, accuracy, strict=True)) | {tuple(name.split('_')): a for name, a in more.items()}
    return judge(made_up_runs(at, tuple(seeds), spread), COST, teacher)


@pytest.mark.parametrize(
    'accuracy, teacher, answers, advice',
    [
        ((70, 80, 69.8, 79, 70), 95, (YES, NO), 'rationales'),
        ((80, 80, 70, 70, 80), 95, (NO, YES), 'labels'),
        ((80, 83, 70, 73, 80), 95, (YES, YES), 'labels'),
        ((75, 90, 70, 80, 75), 95, (YES, YES), 'rationales'),
        ((70, 80, 69.8, 79, 80), 71, (NO, NO), 'nothing'),
        ((70, 70, 69.8, 69.8, 70), 95, (NO, NO), 'a larger student'),
        ((70, 70, 69.8, 69.8, 70), 80, (NO, NO), 'filtering'),
        ((70, 70, 69.8, 69.8, 70), 71, (NO, NO), 'nothing'),
        ((99.5, 99.4, 99.3, 99.3, 99.5), None, (NO, NO), 'nothing'),
        ((70, 70, 69.8, 69.8, 70), None, (NO, NO), DONT_KNOW),
    ],
)
def test_the_rule_where_the_truth_is_plain(accuracy, teacher, answers, advice):
    found = judged(*accuracy, teacher=teacher)
    assert (found['answers'], found['advice']) == (dict(rationales=answers[0], rows=answers[1]), advice)
    assert not found['undecided']


def test_where_seeds_differ_much_nothing_is_said_but_how_many_more_would_decide():
    found = judged(60, 64, 58, 60, 60, spread=6.0)
    assert found['answers'] == dict(rationales=DONT_KNOW, rows=DONT_KNOW) and found['advice'] == DONT_KNOW
    assert [u['about'] for u in found['undecided']] == ['rationales', 'rows']
    assert all(u['more_seeds'] is None or u['more_seeds'] > 0 for u in found['undecided'])
    decided = judged(60, 64, 58, 60, 60, spread=6.0, seeds=range(60))
    assert decided['answers']['rationales'] == YES


def test_what_has_not_converged_is_not_judged():
    at = dict(zip(NEEDED, (70, 80, 60, 70, 70), strict=True))
    runs = made_up_runs(at, spread=0.2)
    found = judge(runs.assign(converged=False), COST)
    assert found['answers'] == dict(rationales=DONT_KNOW, rows=DONT_KNOW) and found['advice'] == DONT_KNOW
    assert all('converged' in u['text'] and u['more_seeds'] is None for u in found['undecided'])
    half = runs['curve'].ne('labels') | runs['n_train'].eq(400)
    assert judge(runs.assign(converged=half), COST)['answers'] == dict(rationales=YES, rows=DONT_KNOW)


@pytest.mark.parametrize('questions, answer', [(45, DONT_KNOW), (500, NO)])
def test_runs_that_are_all_alike_are_as_sure_as_their_questions(questions, answer):
    runs = made_up_runs(dict.fromkeys(NEEDED, 100.0), spread=0.0).assign(n_test=questions)
    found = judge(runs, COST)
    assert found['answers'] == dict(rationales=answer, rows=answer)
    assert found['advice'] == (DONT_KNOW if answer == DONT_KNOW else 'nothing')


def test_rationales_that_help_no_more_than_shuffled_ones_are_not_bought():
    assert judged(70, 80, 60, 70, 70)['answers']['rationales'] == YES
    assert judged(70, 80, 60, 70, 80)['answers']['rationales'] == NO


def test_rows_that_have_no_room_left_are_not_bought():
    found = judged(99, 99, 60, 60, 99)
    assert found['answers']['rows'] == NO and found['next_doubling']['labels']['mean'] < 2


def test_a_third_that_does_as_well_and_a_teacher_that_errs_are_mentioned():
    both = judged(70, 80, 60, 70, 70, third_all=80, teacher=85)['also']
    assert [line.split()[1] for line in both] == ['third', 'teacher']
    assert judged(70, 80, 60, 70, 70, third_all=74, teacher=95)['also'] == []


def test_a_gain_is_told_with_its_price():
    gains = {g['name']: g for g in judged(70, 80, 60, 70, 70, third_all=78)['gains']}
    assert set(gains) == set(GAINS)
    assert [gains[name]['tokens'] for name in ('rationales', 'rows', 'content')] == [40000, 20000, None]
    assert gains['third']['tokens'] == round(0.67 * 40000)
    assert gains['rationales']['money'] == pytest.approx(0.4)
    assert gains['rationales']['per_1000_tokens']['gain'] == pytest.approx(gains['rationales']['gain'] / 40)
    assert gains['rationales']['low'] < gains['rationales']['gain'] < gains['rationales']['high']


def test_real_data_counts_questions_too():
    "The same accuracies with questions that all seeds share: chance in the questions widens the interval."
    runs = made_up_runs(dict(zip(NEEDED, (70, 76, 60, 66, 70), strict=True)), spread=0.01)
    own = judge(runs, COST)['gains'][0]
    shared = judge(runs.assign(data_seed=0), COST)['gains'][0]
    assert shared['questions'] == 500 and shared['gain'] == own['gain']
    assert shared['high'] - shared['low'] > 5 > own['high'] - own['low']


def test_what_is_scored():
    found = judged(75, 90, 70, 80, 75)
    assert score(found, Truth(15.0, 1.0))['advice'] == 'right'
    assert score(found, Truth(15.0, 40.0))['advice'] == 'helps, but less than another'
    assert score(found, Truth(0.0, 5.0)) | dict(inside=0) == dict(
        rationales='wrong', rows='right', advice='wrong', inside=0
    )


def test_the_score_card_of_published_runs():
    results = reports_dir() / 'results'
    if not (results / 'embedded.jsonl').is_file():
        pytest.skip('nothing is published yet')
    cards = published_cards(results)
    assert cards.groupby(['case', 'seeds']).size().min() >= 20
    false = (cards['rationales'] == 'wrong') & cards['case'].str.startswith('weight_untold')
    assert false.mean() <= 0.05, 'rationales that say nothing are sold'
    helps = cards[cards['case'].str.startswith('heavier_than') & (cards['seeds'] == 5)]
    assert (helps['rationales'] == 'right').mean() > 0.8
    assert (cards['rationales'] == DONT_KNOW).any(), 'three seeds cannot decide everything'


def test_budgets():
    assert read_budget('50k') == read_budget('50000 tokens') == Budget(tokens=50000)
    assert read_budget('1.5h') == read_budget('90min') == Budget(minutes=90)
    for wrong in ('0', '-5', 'x', '5 days', '1e9'):
        with pytest.raises(UsageError, match='write tokens'):
            read_budget(wrong)
    assert share_within(50 * 100, 200, COST) == 0.25
    with pytest.raises(UsageError, match='pays for 19 rows.*give 2000 tokens'):
        share_within(1999, 200, COST)


def test_a_budget_of_minutes_leaves_out_in_a_stated_order_and_never_what_advice_needs():
    design = Design('same_kind', '', seeds=tuple(range(5)))
    sizes = [len(specs_of(dict(pilot=d.specs()))) for d, _ in smaller_designs(design)]
    assert sizes == [40, 32, 24, 21, 18, 15]
    smallest, left_out = list(smaller_designs(design))[-1]
    assert smallest.cells == NEEDED and len(smallest.seeds) == 3 and len(left_out) == 1 + len(CELLS) - len(NEEDED)
    made = set(specs_of(dict(pilot=design.specs()))[:10])
    fits, _ = within_minutes(design, 30, 1.0, made.__contains__)
    assert len(fits.seeds) == 5
    with pytest.raises(UsageError, match='too little for the smallest pilot'):
        within_minutes(design, 3, 1.0, made.__contains__)


@pytest.mark.parametrize('slower', [1, 2, 5], ids='a machine that gets {} times as slow'.format)
@pytest.mark.parametrize('minutes', [5, 15, 16, 18, 24, 30, 33, 40, 100])
def test_minutes_hold_and_what_is_compared_has_the_same_seeds(minutes, slower):
    "Runs of a minute, of which the machine makes some before another program comes."
    design, made, seconds = Design('same_kind', '', seeds=tuple(range(5))), set(), [0]

    def make(specs):
        for spec in specs:
            if rounds.is_over():
                break
            seconds[0] += 60 if len(made) < 10 else 60 * slower
            made.add(spec)

    rounds = Rounds(minutes, made.__contains__, make, lambda: seconds[0], minutes_of=1.0)
    make_in_rounds(design, rounds)
    assert seconds[0] < 60 * (minutes + slower), 'one run more than there was time for'
    found = largest_made(design, made.__contains__)
    assert bool(found) == (len(made) >= 15)
    if found:
        whole, left_out = found
        specs = specs_of(dict(pilot=whole.specs()))
        assert set(specs) <= made and len(specs) == len(whole.cells) * len(whole.seeds)
        assert bool(left_out) == (whole != design)
    if minutes >= 40 * slower:
        assert found == (design, [])


def test_minutes_that_are_over_before_there_is_advice_say_how_to_go_on(main, monkeypatch, tmp_path):
    monkeypatch.setattr('dsbs.evidence.pilot.run_all', lambda specs, *rest: [None] * len(specs))
    status, out, err = main('pilot', 'heavier_than', '--budget', '5min', '--seeds', '4', '--set', 'max_steps=7')
    assert (status, out, err.count('\n')) == (1, '', 1)
    assert '--budget 5min is over: 0 of the 15 runs' in err
    assert err.strip().endswith('dsbs pilot heavier_than --seeds 4 --set max_steps=7')


def test_a_command_names_folders_so_that_it_can_be_pasted(tmp_path, monkeypatch):
    for name in ('my shop', 'cqa'):
        (tmp_path / name).mkdir()
        (tmp_path / name / 'task.toml').touch()
        monkeypatch.chdir(tmp_path)
        (near,) = shlex.split(as_typed(name))
        assert near == f'./{name}' and is_task_folder(near)
        monkeypatch.chdir('/')
        (far,) = shlex.split(as_typed(tmp_path / name))
        assert Path('/', far) == tmp_path / name and is_task_folder(far)
    words = shlex.split(pilot_command('heavier_than', str(tmp_path / 'a set'), PilotSettings(4, price=0.5)))
    wanted = parser().parse_args(words[1:])
    assert (wanted.task, wanted.seeds, wanted.price) == ('heavier_than', 4, 0.5)
    assert Path('/', wanted.teacher) == tmp_path / 'a set'


def test_runs_are_paired_and_nested():
    by_arm = Design('same_kind', '', share=0.5).specs()
    for specs in by_arm.values():
        assert [(s.train_fraction, s.seed) for s in specs] == [(f, s) for f in (0.5, 0.25) for s in (0, 1, 2)]
        assert all(s.seed == s.subset_seed == s.data_seed for s in specs)


def test_what_tokens_are_counted_from(tmp_path):
    task = load_task('same_kind')
    readings = {i: Reading('a b', 'yes') for i in task['train']['id'][:5]}
    readings |= {i: Reading(reason='not asked') for i in task['train']['id'][5:10]}
    assert answer_cost(task, '', readings).counted.startswith('words')
    card = dict(task='same_kind', model='m', tokens=900, sent=10, samples=2)
    (tmp_path / 'train.card.json').write_text(json.dumps(card))
    cost = answer_cost(task, str(tmp_path), readings)
    assert (cost.tokens, cost.answered, cost.of(10)) == (180.0, 0.5, 900.0) and 'card' in cost.counted
    (tmp_path / 'train.card.json').write_text(json.dumps(card | dict(sent=0, tokens=0)))
    assert answer_cost(task, str(tmp_path), readings).counted.startswith('words')


@pytest.mark.parametrize(
    'call, words',
    [
        (['heavier_than', '--seeds', '2'], ['at least 3']),
        (['heavier_than', '--budget', '100'], ['pays for 0 rows', 'give']),
        (['heavier_than', '--price', '-1'], ['--price']),
        (['heavier_than', '--set', 'n_train=3'], ['sets n_train itself']),
        (['heavier_than', '--set', 'magic=3'], ["unknown setting 'magic'"]),
        (['heavier_than', '--set', 'max_steps'], ['KEY=VALUE']),
        (['sudoku'], ["unknown task 'sudoku'"]),
        (['heavier_than', '--teacher', 'nowhere'], ['no rationale set']),
    ],
    ids=lambda x: ' '.join(x),
)
def test_a_wrong_call_gets_one_line(main, call, words):
    status, out, err = main('pilot', *call)
    lines = [line for line in err.splitlines() if line.strip()]
    assert status == 2 and not out and len(lines) == 1, err
    assert all(word in lines[0] for word in words), lines[0]


@pytest.mark.slow
def test_a_pilot_from_end_to_end(dsbs, tmp_path):
    "On a task folder with a set: made, written, made again without a run, and again for less time."
    folder, out = tmp_path / 'signs', tmp_path / 'page'
    folder.mkdir()
    labels = ('low', 'high')
    (folder / 'task.toml').write_text(
        'name = "signs"\ninstruction = "Say which."\nanswer = "label"\nlabels = ["low", "high"]\n'
    )
    rows = [dict(input=f'case {i} is {"up" if i % 2 else "down"}', label=labels[i % 2]) for i in range(60)]
    (folder / 'train.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    train = load_task(str(folder))['train']
    given = [dict(id=r['id'], input=r['input'], rationale='It says so.', label=r['label']) for r in train.to_list()]
    (tmp_path / 'set').mkdir()
    (tmp_path / 'set' / 'train.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in given))
    (tmp_path / 'set' / 'train.card.json').write_text('{"task": "signs", "model": "Ada"}')
    call = ['pilot', folder, '--teacher', tmp_path / 'set', '--price', '0.5', '--out', out, '--json']
    for setting in ('student=scratch-16x2', 'max_steps=4', 'eval_every=2'):
        call += ['--set', setting]
    status, text, err = dsbs(*call)
    assert status == 0, err
    found = json.loads(text)
    assert {p.name for p in out.iterdir()} == {'pilot.md', 'pilot.json', 'pilot.png', 'pilot.svg'}
    assert json.loads((out / 'pilot.json').read_text()) | dict(written=found['written']) == found
    assert (found['task'], found['teacher'], len(found['runs']), found['left_out']) == ('signs', 'Ada', 24, [])
    assert found['advice'] in NEXT and found['advice'] in (out / 'pilot.md').read_text()
    assert len(found['accuracy']) == 8 and all(0 <= p['low'] <= p['high'] <= 100 for p in found['accuracy'])
    records = {p.parent.name: p.stat().st_mtime_ns for p in (tmp_path / 'runs').glob('*/record.json')}
    assert set(records) == set(found['runs'])
    assert json.loads(dsbs(*call, '--budget', '0.001min')[1])['runs'] == found['runs'], 'what is made costs no time'
    assert {p.parent.name: p.stat().st_mtime_ns for p in (tmp_path / 'runs').glob('*/record.json')} == records
