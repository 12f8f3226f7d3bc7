"Grids whose runs train side by side, and fail."

import itertools
import json
from dataclasses import replace

import pytest
from making import record_of
from nearly import nearly_the_same
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from dsbs.method.answering import PlainAnswers, generate, input_batches, label_accuracy
from dsbs.method.training import Interrupted
from dsbs.records import find_folders
from dsbs.runs import experiments
from dsbs.runs import run as runs
from dsbs.runs.run import train_runs
from dsbs.runs.saved import run_and_save
from dsbs.runs.specs import RunSpec, prepare, run_key
from dsbs.runs.verifying import same_numbers

pytestmark = pytest.mark.numeric

TINY = RunSpec(
    student='scratch-32x1', dropout=0.0, n_train=40, max_steps=4, eval_every=2, batch_size=8, learning_rate=1e-3
)
SEEDS = [replace(TINY, seed=s, subset_seed=s) for s in range(3)]


def test_a_run_is_nearly_the_same_beside_others_and_alone(tmp_path):
    specs = [
        *SEEDS,
        replace(TINY, n_train=30),
        replace(TINY, label_source='teacher'),
        replace(TINY, rationales='shuffled', teacher_error=0.3, n_train=5),
        replace(TINY, extra='same_kind', n_extra=7),
    ]
    folders = find_folders(runs=tmp_path)
    for together, spec in zip(train_runs([prepare(s, folders) for s in specs], resume=True), specs):
        assert nearly_the_same(together.record, record_of(spec))


def counting(folder):
    "A task whose inputs are one word longer or shorter."
    folder.mkdir()
    (folder / 'task.toml').write_text('name = "counting"\ninstruction = "Is it so?"\nanswer = "text"\n')
    numbers = ('one', 'two', 'six', 'ten', 'no', 'all', 'few', 'many')
    asked = [(a, b, now) for a in numbers for b in numbers for now in ('', ' now')]
    rows = [dict(input=f'Are {a} more than {b}{now}?', label='yes' if a > b else 'no') for a, b, now in asked]
    (folder / 'train.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    return folder


@pytest.mark.parametrize(
    'change',
    [dict(task='weight_untold'), dict(task='counting', method='standard'), dict(rationales='random')],
    ids=str,
)
def test_examples_of_about_one_length_are_padded_to_one_shape_and_train_side_by_side(change, monkeypatch, tmp_path):
    monkeypatch.chdir(counting(tmp_path / 'counting').parent)
    specs, fit, beside = [replace(s, **change) for s in SEEDS], runs.fit, []
    monkeypatch.setattr(
        runs, 'fit', lambda model, trainees, *args: beside.append(len(trainees)) or fit(model, trainees, *args)
    )
    together = [r for r, *_ in train_runs(list(map(prepare, specs)))]
    assert (
        max(beside) > 1
        and len({tuple(map(len, vars(r).values())) for r in runs.Run(prepare(specs[0])).rows}) > 1
        or change.get('rationales') == 'random'
    )
    for record, spec in zip(together, specs):
        assert nearly_the_same(record, record_of(spec))


@pytest.mark.parametrize(
    'change', [dict(dropout=0.1), dict(keep='agree', teacher_error=0.3), dict(rationale_share=0.5)], ids=str
)
def test_what_may_not_be_stacked_is_trained_one_by_one(tmp_path, change):
    specs = [replace(s, **change) for s in SEEDS[:2]]
    folders = find_folders(runs=tmp_path)
    for together, spec in zip(train_runs([prepare(s, folders) for s in specs], resume=True), specs):
        assert same_numbers(together.record) == same_numbers(record_of(spec))


def test_without_rationales_runs_train_side_by_side_as_standard_finetuning_does():
    none, standard = (
        [replace(s, **change) for s in SEEDS] for change in (dict(rationale_share=0), dict(method='standard'))
    )
    for one, other in zip(train_runs(list(map(prepare, none))), train_runs(list(map(prepare, standard)))):
        assert one.record['provenance']['students'] == len(SEEDS)
        assert one.record['history'] == other.record['history']
        assert one.record['metrics'] == other.record['metrics']


def test_runs_on_facts_of_their_own_train_side_by_side(tmp_path, monkeypatch):
    "Their tokenizers have different sizes; stopped, resumed, and beside each other they are as alone."
    specs, fit, beside = [replace(TINY, seed=s, data_seed=s) for s in range(4)], runs.fit, []
    monkeypatch.setattr(
        runs, 'fit', lambda model, trainees, *args: beside.append(len(trainees)) or fit(model, trainees, *args)
    )
    prepared, updates = [prepare(s, find_folders(runs=tmp_path)) for s in specs], itertools.count(1)
    assert len({len(runs.Run(p).tokenizer) for p in prepared}) > 1
    with pytest.raises(Interrupted):
        train_runs(prepared, resume=True, stop=lambda: next(updates) == 3)
    together = [r for r, *_ in train_runs(prepared, resume=True)]
    assert beside == [4, 4] and {r['provenance']['resumed'][0]['exact'] for r in together} == {True}
    assert [same_numbers(r) for r in together] == [same_numbers(r) for r, *_ in train_runs(list(map(prepare, specs)))]
    assert all(nearly_the_same(record, record_of(spec)) for record, spec in zip(together, specs))


def test_what_the_tasks_share_is_learned_side_by_side_as_alone():
    "Also where vocabularies differ."
    specs = [replace(TINY, seed=s, data_seed=s, mutual_information=0.1) for s in range(4)]
    assert len({len(runs.Run(prepare(s)).tokenizer) for s in specs}) > 1
    for together, spec in zip(train_runs(list(map(prepare, specs))), specs):
        assert nearly_the_same(together.record, record_of(spec))
        assert all('mutual_information_loss' in h for h in together.record['history'])


def test_when_a_stack_fails_its_runs_are_made_one_by_one(tmp_path, monkeypatch):
    whole = runs.train_runs

    def fails_together(prepared, *args, **kwargs):
        if len(prepared) > 1:
            raise MemoryError('too much')
        return whole(prepared, *args, **kwargs)

    monkeypatch.setattr(runs, 'train_runs', fails_together)
    folders = find_folders(runs=tmp_path)
    prepared = [prepare(s, folders) for s in SEEDS]
    attempt = experiments._attempt(prepared, lambda step, loss: None, lambda: False)
    assert attempt == experiments.Attempt()
    assert [experiments.find_record(p.key, folders)['spec']['seed'] for p in prepared] == [0, 1, 2]
    assert not list(tmp_path.glob('*/error.txt')) and not list(tmp_path.glob('*/lease.*'))


def test_a_failing_run_leaves_its_log_and_the_others(tmp_path):
    bad = replace(TINY, learning_rate=1e30)
    with pytest.raises(RuntimeError, match='1 of 2 runs failed; the others are kept.*smaller learning_rate'):
        experiments.run_all([TINY, bad], find_folders(runs=tmp_path), workers=1)
    assert (tmp_path / run_key(TINY) / 'record.json').is_file() and 'FloatingPointError' in (
        tmp_path / run_key(bad) / 'error.txt'
    ).read_text()


def test_settings_added_later_leave_old_names_alone():
    "A run of before a setting was added has the name it had; this one since the embedded questions are what they are."
    assert (
        run_key(RunSpec(n_train=40, student='scratch-32x1', dropout=0.0))
        == '3b32c1265f002e62db00620cfc629f4bd528f496e090cb95d19794b668cf3b7e'
    )
    assert (
        len(
            {
                run_key(replace(TINY, **c))
                for c in (dict(), dict(keep='agree'), dict(task_prefix='decoder'), dict(gradient_checkpointing=True))
            }
        )
        == 4
    )


def test_dropout_drawn_in_another_way_has_another_name():
    before = '1e7c8597e5def07451ad14d23d2d27b86762f2cfa9b268180f28f3d85aa659e8'
    assert run_key(RunSpec(n_train=40, student='scratch-32x1')) != before


def test_task_named_at_the_decoder(tmp_path):
    "It trains beside others as alone, reads each example once, and its student is asked without a prefix."
    decoder = [replace(s, task_prefix='decoder') for s in SEEDS]
    alone = [record_of(s) for s in decoder[:2]]
    assert all(nearly_the_same(r, one) for (r, *_), one in zip(train_runs(list(map(prepare, decoder))), alone))
    encoder = record_of(SEEDS[0])
    assert (
        alone[0]['metrics']['tokens'] < encoder['metrics']['tokens']
        and alone[0]['history'][0]['rationale_loss'] != encoder['history'][0]['rationale_loss']
    )
    kept = run_and_save(decoder[0], tmp_path / 'student')
    assert (
        same_numbers(kept) == same_numbers(alone[0])
        and 'prefix' not in (tmp_path / 'student' / 'README.md').read_text()
    )
    t5, tokenizer = (
        AutoModelForSeq2SeqLM.from_pretrained(tmp_path / 'student'),
        AutoTokenizer.from_pretrained(tmp_path / 'student'),
    )
    test = prepare(decoder[0]).task['test']
    answers = generate(PlainAnswers(t5), tokenizer, input_batches(tokenizer, test['input']), 4)
    assert label_accuracy(answers, test['label']) == kept['metrics']['test_accuracy']


def test_what_stands_beside_exact_match():
    "The likeliest label and the rationale are measured where they can be, and never take exact match's place."
    methods = ('standard', 'step_by_step', 'single_task', 'answer_first')
    standard, both, single, first = (record_of(replace(TINY, method=m))['metrics'] for m in methods)
    names = ('likeliest_label_accuracy', 'rationale_accuracy', 'rationale_token_accuracy')
    assert (
        [standard[n] is None for n in names] == [first[n] is None for n in names] == [False, True, True]
        and [both[n] is None for n in names] == [False] * 3
        and single[names[0]] is None
    )
