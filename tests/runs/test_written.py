"What a student can write and read: labels, special pieces in texts, texts that are cut."

import json
from dataclasses import replace

import pytest
from making import record_of, trained
from small_t5 import own_task, rationale_set, small_t5, small_tokenizer
from transformers import ByT5Tokenizer

from dsbs.method.answering import unwritable
from dsbs.method.student import SPECIAL, make_student, special_pieces, train_tokenizer
from dsbs.method.views import ANSWER_MARK, REASON_MARK, as_text, cut_ids
from dsbs.records import UsageError, find_folders
from dsbs.runs import run as runs
from dsbs.runs.specs import make_spec, prepare, recipe
from dsbs.runs.tokens import lost

QUICK = dict(
    method='standard', student='scratch-32x1', max_steps=1, eval_every=1, batch_size=8, learning_rate=5e-3, dropout=0.0
)
LOST = [
    '<=50K',
    '{"a": 1}',
    'a~b',
    '2^3',
    'a²',
    '½',
    'ﬁt',
    '™',
    'ＡＢ',
    '正面',
    'سلبي',
    'да',
    '🙂',
    'a\\b',
    'low</s>',
    '<pad>',
    '<unk>',
    'a\u2581b',
]
KEPT = [
    'low',
    'Low',
    'a b',
    'a  b',
    ' a\tb ',
    'café',
    '>50K',
    'C#',
    "don't",
    "do n't",
    'yes , no',
    '1,200',
    '[label]',
    '[label] low',
    '(2 + 3)',
    'St. Gallen.',
    '$5 & 10%',
]


@pytest.fixture(scope='module')
def t5(tmp_path_factory):
    return str(small_t5(tmp_path_factory.mktemp('t5') / 'student'))


def test_labels_that_a_t5_cannot_write():
    found = unwritable(small_tokenizer(), LOST + KEPT)
    assert list(found) == LOST and found['a²'] == 'a2' and found['<=50K'] == '=50K'


def test_a_lower_casing_tokenizer():
    from tokenizers import normalizers

    lower = small_tokenizer()
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    assert list(unwritable(lower, ['Low', 'low', 'HIGH'])) == ['Low', 'HIGH']


def test_a_byt5_writes_every_character():
    assert list(unwritable(ByT5Tokenizer(), LOST + KEPT)) == ['low</s>', '<pad>', '<unk>'], 'but for its special pieces'


@pytest.mark.parametrize(
    'answer, label, right', [('equation', '(2 + 3)', True), ('equation', '2 ^ 3', False), ('text', '2 ^ 3', False)]
)
def test_what_is_right_is_the_task_s_rule(answer, label, right):
    assert (label not in unwritable(small_tokenizer(), [label], answer)) is right


def test_a_single_target_keeps_its_label_after_the_mark():
    assert list(unwritable(small_tokenizer(), ['low', 'So the answer is low', 'a²'], method='single_task')) == [
        'So the answer is low',
        'a²',
    ]


def test_a_label_before_the_mark_holds_no_mark_and_the_mark_can_be_written():
    labels = ['low', 'low The reason is: low', 'So the answer is low']
    assert list(unwritable(small_tokenizer(), labels, method='answer_first')) == labels[1:2]
    no_mark = make_student('scratch-16x2', ['low or high'])[1]
    assert list(unwritable(no_mark, ['low'], method='answer_first')) == ['low']
    assert not unwritable(no_mark, ['low'])


@pytest.mark.parametrize(
    'labels', [('<=50K', '>50K'), ('a²', 'b²'), ('正面', '负面'), ('low</s>', 'high')], ids=' '.join
)
@pytest.mark.parametrize('method', ['standard', 'single_task', 'answer_first'])
def test_a_run_ends_before_training(labels, method, t5, tmp_path, main):
    rationale_set(tmp_path / 'set', own_task(tmp_path / 'task', labels))
    status, out, err = main(
        'run',
        f'task={tmp_path / "task"}',
        f'teacher={tmp_path / "set"}',
        f'method={method}',
        f'student={t5}',
        'max_steps=1',
    )
    assert status == 2 and not out and len(err.strip().splitlines()) == 1
    assert (
        repr(labels[0]) in err and repr(t5) in err and 'which becomes' in err and 'choose other names for labels' in err
    )


def test_a_label_that_only_the_set_of_labels_has(t5, tmp_path):
    own_task(tmp_path / 'task', ('low', 'high'))
    path = tmp_path / 'task' / 'task.toml'
    path.write_text(path.read_text().replace('["low", "high"]', '["low", "high", "m~d"]'))
    with pytest.raises(UsageError, match="cannot write the label 'm~d'"):
        record_of(make_spec(QUICK | dict(task=str(tmp_path / 'task'), student=t5)))


def test_a_few_free_texts_are_said_and_counted(t5, tmp_path, capsys):
    labels = [f'{i} low' for i in range(59)] + ['a²']
    own_task(tmp_path / 'task', labels, answer='text')
    spec = make_spec(QUICK | dict(task=str(tmp_path / 'task'), student=t5))
    record = record_of(spec)
    said = capsys.readouterr().err
    assert record['metrics']['labels_not_written'] == 1 and said.count('\n') == 1 and "'a²', which becomes 'a2'" in said
    own_task(tmp_path / 'more', ['1 low'] * 55 + [f'{i}²' for i in range(5)], answer='text')
    with pytest.raises(UsageError, match='nor 4 other labels'):
        record_of(make_spec(QUICK | dict(task=str(tmp_path / 'more'), student=t5)))


@pytest.mark.parametrize('only', ['validation', 'test', 'the teacher', 'the set'])
def test_a_student_from_random_weights_can_write_labels_that_stand_elsewhere(only, tmp_path):
    rows = own_task(tmp_path / 'task', ('low', 'high'), n=60)
    folder = tmp_path / 'task'
    path = folder / 'task.toml'
    path.write_text(path.read_text().replace('["low", "high"]', '["low", "high", "≈ñ"]'))
    other = dict(id='x', input='some other', label='≈ñ')
    if only in ('validation', 'test'):
        (folder / f'{only}.jsonl').write_text(json.dumps(other) + '\n')
        rows.append(other)
    rationale_set(
        tmp_path / 'set',
        rows,
        label=lambda r: 'low' if r is other else '≈ñ' if only == 'the teacher' and r['id'] == 'r4' else r['label'],
    )
    spec = make_spec(QUICK | dict(task=str(folder), teacher=str(tmp_path / 'set'), label_source='teacher'))
    assert not unwritable(trained(spec).tokenizer, ['low', 'high', '≈ñ'])


@pytest.mark.parametrize('task', ['same_kind', 'heavier_than', 'weight_untold'])
@pytest.mark.parametrize(
    'method, mark', [('standard', []), ('single_task', [ANSWER_MARK]), ('answer_first', [REASON_MARK])]
)
def test_where_the_teacher_has_no_other_labels_the_text_is_what_it_was(task, method, mark):
    data = prepare(make_spec(dict(task=task, method=method)))
    made = list(runs.tokenizer_texts(data))
    was = []
    for row in data.task['train'].to_list():
        was += [
            *mark,
            f'[label] {row["input"]}',
            f'[rationale] {row["input"]}',
            row['label'],
            data.readings[row['id']].rationale,
        ]
    assert made == was


def test_the_recorded_stand_in_is_read_as_it_was(recorded):
    "Premise and hypothesis are parted by the end piece itself."
    data = prepare(make_spec(dict(task='esnli', stand_in=True)))
    special = special_pieces(small_tokenizer())
    for split in data.task.splits:
        for text in data.task[split]['input']:
            assert as_text(text, special, '</s>') == text and text.count('</s>') == 1
    assert not any(
        as_text(t, special) != t for r in data.readings.values() for t in (r.rationale, r.label)
    ) and not runs.unseen_labels(data)


def test_recipes_of_recorded_tasks_stay_and_those_of_others_are_new():
    assert [
        recipe(make_spec(dict(task=t, dropout=0.0)))
        for t in ('same_kind', 'esnli', 'anli1', 'cqa', 'svamp', 'asdiv', './mine/')
    ] == [2, 2, 2, 5, 5, 5, 5]
    assert (
        recipe(make_spec(dict(task='same_kind', extra='asdiv', dropout=0.0))) == 5
        and recipe(make_spec(dict(task='svamp', student='t5-base'))) == 7
    )


# ---- special pieces in texts


@pytest.mark.parametrize('piece', [*SPECIAL, '<extra_id_0>'])
@pytest.mark.parametrize('how', ['{}', 'a {} b', 'a{}b', '{} b', 'a {}', 'a {}{} b'])
def test_a_special_piece_in_a_text_is_text(piece, how):
    from transformers import T5Tokenizer

    for tokenizer in (
        small_tokenizer(),
        T5Tokenizer(vocab=[(p, -1.0) for p in ('<pad>', '</s>', '<unk>', '▁', 'a', 'b')], extra_ids=100),
        ByT5Tokenizer(),
    ):
        ids = tokenizer(as_text(how.format(piece, piece), special_pieces(tokenizer))).input_ids
        assert ids[-1] == 1 and not {
            0,
            1,
            *(tokenizer.convert_tokens_to_ids(p) for p in special_pieces(tokenizer) if 'extra' in p),
        } & set(ids[:-1])


def test_the_words_after_a_piece_are_read(t5, tmp_path, capsys):
    rows = own_task(tmp_path / 'task', text='a card <pad> of order {i} </s> {word}')
    record = record_of(make_spec(QUICK | dict(task=str(tmp_path / 'task'), student=t5, max_steps=60, eval_every=60)))
    assert record['metrics']['special_pieces'] == len(rows) and 'texts hold a special piece' in capsys.readouterr().err
    assert record['metrics']['validation_accuracy'] == 100.0


# ---- cut, and unknown


@pytest.mark.parametrize('limit', range(1, 9))
def test_cut_as_the_library_cuts(limit):
    for tokenizer in (small_tokenizer(), train_tokenizer(['low high income of order'] * 3)):
        for text in ('low', 'low income of order', 'low </s> high income of order'):
            assert (
                cut_ids(tokenizer(text).input_ids, limit)
                == tokenizer(text, truncation=True, max_length=limit).input_ids
            )


def test_nothing_of_nothing_is_lost():
    assert lost([], 5) == dict(n=0, cut=0, unknown_share=0.0)


CUT = ('cut_train_inputs', 'cut_validation_inputs', 'cut_test_inputs', 'cut_label_targets', 'cut_rationale_targets')


def test_inputs_and_rationales_that_are_cut_are_counted(tmp_path, capsys):
    rows = own_task(tmp_path / 'task', text='of order {i} it is {word}', n=60)
    rationale_set(tmp_path / 'set', rows, rationale=lambda r: 'it says so' * (1 + 20 * (int(r['id'][1:]) < 10)))
    record = record_of(
        make_spec(
            QUICK
            | dict(
                task=str(tmp_path / 'task'),
                teacher=str(tmp_path / 'set'),
                method='step_by_step',
                max_input=4,
                max_target=6,
            )
        )
    )
    m, said = record['metrics'], capsys.readouterr().err
    assert (
        m['cut_train_inputs'] == m['n_train']
        and m['cut_validation_inputs'] == m['n_validation']
        and m['cut_test_inputs'] == m['n_test']
    )
    assert m['cut_label_targets'] == 0 < m['cut_rationale_targets'] <= 10 and record['generation']['max_input'] == 4
    assert (
        said.count('\n') == 1
        and f'{m["n_train"]} of {m["n_train"]} train inputs (max_input=4)' in said
        and 'rationale targets (max_target=6)' in said
    )


def test_nothing_cut_nothing_said(tmp_path, capsys):
    own_task(tmp_path / 'task')
    record = record_of(make_spec(QUICK | dict(task=str(tmp_path / 'task'))))
    assert (
        [record['metrics'][name] for name in CUT] == [0] * 5
        and record['generation']['max_input'] is None
        and not capsys.readouterr().err
    )


@pytest.mark.parametrize('n', [1, 60])
def test_a_single_target_that_loses_its_label_is_an_error(n, tmp_path, main):
    rows = own_task(tmp_path / 'task')
    rationale_set(tmp_path / 'set', rows, rationale=lambda r: 'so it is ' * (100 if int(r['id'][1:]) < n else 1))
    status, out, err = main(
        'run',
        f'task={tmp_path / "task"}',
        f'teacher={tmp_path / "set"}',
        'method=single_task',
        'student=scratch-32x1',
        'max_steps=1',
        'max_target=64',
    )
    assert (
        (status, out) == (2, '')
        and len(err.strip().splitlines()) == 1
        and 'lose their label' in err
        and 'set max_target=' in err
    )
    longest = int(err.split('set max_target=')[1].split(',')[0])
    assert (
        main(
            'run',
            f'task={tmp_path / "task"}',
            f'teacher={tmp_path / "set"}',
            'method=single_task',
            'student=scratch-32x1',
            'max_steps=1',
            f'max_target={longest}',
        )[0]
        == 0
    )


def test_a_rationale_behind_a_label_may_be_cut(tmp_path, capsys):
    rows = own_task(tmp_path / 'task', ('low income of the parcel', 'high'))
    rationale_set(tmp_path / 'set', rows, rationale=lambda r: 'so it is ' * 30)
    files = dict(task=str(tmp_path / 'task'), teacher=str(tmp_path / 'set'))
    spec = make_spec(QUICK | files | dict(method='answer_first', max_target=20))
    record = record_of(spec)
    assert record['metrics']['cut_label_targets'] == record['metrics']['n_train']
    assert record['generation']['max_new_tokens'] < 20 and 'label targets (max_target=20)' in capsys.readouterr().err
    with pytest.raises(UsageError, match='max_target=5 cuts a label or the mark behind it: set [0-9]+ or more'):
        record_of(replace(spec, max_target=5))


def test_a_label_that_is_cut_is_an_error(tmp_path):
    own_task(tmp_path / 'task', ('low income of the parcel', 'high'))
    with pytest.raises(UsageError, match='labels are cut'):
        record_of(make_spec(QUICK | dict(task=str(tmp_path / 'task'), max_target=2)))


def test_a_rationale_in_the_input_counts_with_it(tmp_path):
    rows = own_task(tmp_path / 'task')
    rationale_set(tmp_path / 'set', rows, rationale=lambda r: 'it is so ' * 20)
    shape = dict(task=str(tmp_path / 'task'), teacher=str(tmp_path / 'set'), max_input=30)
    alone, with_it = (
        record_of(make_spec(QUICK | shape | dict(method=m)))['metrics'] for m in ('standard', 'rationale_as_input')
    )
    assert (
        alone['cut_train_inputs'] == alone['cut_test_inputs'] == 0
        and with_it['cut_train_inputs'] == with_it['n_train']
        and with_it['cut_test_inputs'] == with_it['n_test']
    )


def test_unknown_pieces_are_counted_and_said(t5, tmp_path, capsys):
    own_task(tmp_path / 'task', text='{word} 正 面 {i}')
    record = record_of(make_spec(QUICK | dict(task=str(tmp_path / 'task'), student=t5)))
    m = record['metrics']
    assert (
        0.1 < m['unknown_share_train_inputs'] < 0.5
        and m['unknown_share_label_targets'] == 0
        and 'has no piece for' in capsys.readouterr().err
    )


def test_counts_are_those_of_a_table_on_the_disk(tmp_path, monkeypatch):
    from dsbs.runs import tokens

    rows = own_task(tmp_path / 'task', text='of order {i} it is {word}')
    rationale_set(tmp_path / 'set', rows)
    spec = make_spec(
        QUICK
        | dict(
            task=str(tmp_path / 'task'), teacher=str(tmp_path / 'set'), method='step_by_step', max_input=4, max_target=3
        )
    )
    plain = record_of(spec)
    monkeypatch.setattr(tokens, 'MANY', 4)
    data = prepare(spec, find_folders(runs=tmp_path / 'runs'))
    kept = [runs.train_runs([data], resume=True)[0].record for _ in range(2)]
    assert (
        [k['metrics'] for k in kept] == [plain['metrics']] * 2
        and plain['metrics']['cut_train_inputs']
        and list((tmp_path / 'runs' / 'tokens').iterdir())
    )


def test_two_tasks_that_look_the_same(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(
        models.WordLevel({p: i for i, p in enumerate(['<pad>', '</s>', '<unk>', 'low', 'high'])}, unk_token='<unk>')
    )
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.post_processor = processors.TemplateProcessing(single='$A </s>', special_tokens=[('</s>', 1)])
    student = small_t5(
        tmp_path / 'student',
        PreTrainedTokenizerFast(tokenizer_object=raw, pad_token='<pad>', eos_token='</s>', unk_token='<unk>'),
    )
    rows = own_task(tmp_path / 'task')
    rationale_set(tmp_path / 'set', rows)
    spec = QUICK | dict(
        task=str(tmp_path / 'task'), teacher=str(tmp_path / 'set'), method='step_by_step', student=str(student)
    )
    with pytest.raises(UsageError, match='as the same'):
        record_of(make_spec(spec))
    assert record_of(make_spec(spec | dict(task_prefix='decoder')))
