"An answer is read whole: labels, equations, markers, thoughts, scripts."

import json
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsbs.data.answers import is_correct, normalise_answer, plain_equation
from dsbs.data.examples import near_duplicates
from dsbs.data.own import checked_label
from dsbs.data.tasks import load_task
from dsbs.records import UsageError
from dsbs.teacher.extraction import Reading, read_completion, without_thinking
from dsbs.teacher.formats import FORMATS, answer_format, write_answer
from dsbs.teacher.prompts import user_prompt
from dsbs.teacher.questions import Answer
from dsbs.teacher.sets import read_answer

LABEL, TEXT, EQUATION = map(answer_format, ('label', 'text', 'equation'))


def label_of(said, labels, form=LABEL):
    return read_completion(f'It says so. {form.marker} {said}', form, labels).label or None


@pytest.mark.parametrize(
    'labels, said, label',
    [
        (('Node', 'Node.js', 'Deno'), 'Node.js.', 'Node.js'),
        (('Node', 'Node.js', 'Deno'), 'node.JS', 'Node.js'),
        (('Node', 'Node.js', 'Deno'), 'Node. It is old.', 'Node'),
        (('Node', 'Deno'), 'Node.js.', None),
        (('1', '1.5', '2', '2.5'), '1.5.', '1.5'),
        (('1', '1.5', '2', '2.5'), '2.', '2'),
        (('1', '1.5', '2', '2.5'), '1.55', None),
        (('1', '1.5', '2', '2.5'), '1,5', None),
        (('1', '2', '3', '4', '5'), '4.5.', None),
        (('1', '2', '3', '4', '5'), '4-5.', None),
        (('1', '2', '3', '4', '5'), '4–5.', None),
        (('1', '2', '3', '4', '5'), '4/5.', None),
        (('1', '2', '3', '4', '5'), '4 out of 5.', None),
        (('1', '2', '3', '4', '5'), '4, 9', None),
        (('1', '2', '3', '4', '5'), '**4**.', '4'),
        (('1', '2', '3', '4', '5'), '４。', '4'),
        (('1', '2', '3', '4', '5'), '$\\boxed{5}$', '5'),
        (('1', '2', '3', '4', '5'), '45', None),
        (('1', '2', '3', '4', '5'), '-4', None),
        (('1', '2', '3'), '1e3', None),
        (('4/5', '4', '5'), '4/5.', '4/5'),
        (('-1', '0', '1'), '-1.', '-1'),
        (('-1', '0', '1'), '−1', '-1'),
        (('10%', '10'), '10%.', '10%'),
        (('10', '20'), '10%.', None),
        (('1', '2', '3'), '1:30', None),
        (('1', '2', '3'), '2²', None),
        (('U.S.', 'U.K.'), 'U.S.', 'U.S.'),
        (('U.S.', 'U.K.'), 'U.S..', 'U.S.'),
        (('U.S.', 'U.K.'), 'U.S', 'U.S.'),
        (('U.S.', 'U.K.'), 'U.S. It is a country.', 'U.S.'),
        (('U.S.', 'U.S.S.R.'), 'U.S.S.R.', 'U.S.S.R.'),
        (('C', 'C++', 'C#', 'Objective-C'), 'C++.', 'C++'),
        (('C', 'C++', 'C#', 'Objective-C'), 'C#', 'C#'),
        (('C', 'C++', 'C#', 'Objective-C'), 'C.', 'C'),
        (('C', 'C++'), 'C#.', None),
        (('C', 'C++', 'Objective-C'), 'objective‑c.', 'Objective-C'),
        (('.NET', 'ASP.NET'), '.NET.', '.NET'),
        (('.NET', 'ASP.NET'), 'ASP.NET', 'ASP.NET'),
        (('.NET', 'Java'), 'ASP.NET', None),
        (('A/B', 'A', 'B'), 'A/B.', 'A/B'),
        (('A', 'B'), 'A/B.', None),
        (('A', 'A+', 'A-'), 'A+.', 'A+'),
        (('A', 'B'), 'A+.', None),
        (('yes', 'yes, partly', 'no'), 'yes, partly.', 'yes, partly'),
        (('yes', 'yes, partly', 'no'), 'Yes.', 'yes'),
        (('yes', 'yes, partly', 'no'), 'yes, mostly.', None),
        (('yes', 'no'), 'yes, as both fly.', 'yes'),
        (('yes', 'no'), 'yes, or no.', None),
        (('A', 'B', 'C'), 'B, because it is a card.', 'B'),
        (('A', 'B', 'C'), 'B, not A.', None),
        (('(yes)', 'yes', 'no'), '(yes).', '(yes)'),
        (('yes (sure)', 'yes'), 'yes (sure).', 'yes (sure)'),
        (('[x]', '[ ]'), '[x]', '[x]'),
        (("don't know", 'yes'), 'Don’t know.', "don't know"),
        (('e-mail', 'phone'), '"e‑mail"', 'e-mail'),
        (('not  sure', 'sure'), 'not sure.', 'not  sure'),
        (('billing', 'shipping'), '(b) billing.', 'billing'),
        (('billing', 'shipping'), '\\boxed{\\text{billing}}', 'billing'),
        (('billing', 'shipping'), '\n\n\tbilling', 'billing'),
        (('billing', 'shipping'), 'billing_team', None),
        (('billing', 'shipping'), 'billing-shipping', None),
        (('St', "St. John's"), "St. John's.", "St. John's"),
        (('St', "St. John's"), 'St. Mary', None),
        (('<=50K', '>50K'), '<=50K.', '<=50K'),
        (('<=50K', '>50K'), '>50K', '>50K'),
        (('50K', '60K'), '>50K', None),
        (('👍', '👎'), '👍', '👍'),
        (('❤', '💔'), '❤️.', '❤'),
    ],
)
def test_the_longest_label_that_stands_there(labels, said, label):
    assert label_of(said, labels) == label


@pytest.mark.parametrize(
    'labels, said, label',
    [
        (('café', 'bar'), unicodedata.normalize('NFD', 'café.'), 'café'),
        (('账单', '物流'), '账单。', '账单'),
        (('账单', '物流'), '：账单', '账单'),
        (('账单', '物流'), '「账单」。', '账单'),
        (('账单', '物流'), '《账单》，因为扣款。', '账单'),
        (('账单', '物流'), '账单问题。', None),
        (('账单', '账单问题'), '账单问题。', '账单问题'),
        (('账单', '物流'), '账单、物流', None),
        (('账单', '物流'), '账单，不是物流。', None),
        (('正面', '负面'), '正面．', '正面'),
        (('請求', '配送'), '請求です。', None),
        (('請求', '配送'), '【請求】', '請求'),
        (('شحن', 'فاتورة'), '\u200fشحن\u200f.', 'شحن'),
        (('شحن', 'فاتورة'), 'فاتورة، لأنها', 'فاتورة'),
        (('शुल्क', 'डाक'), 'शुल्क।', 'शुल्क'),
        (('हिन्द', 'हिन्दी'), 'हिन्दी।', 'हिन्दी'),
        (('हिन्द', 'उर्दू'), 'हिन्दी।', None),
        (('긍정', '부정'), '긍정.', '긍정'),
        (('긍정', '부정'), '긍정입니다.', None),
        (('ใช่', 'ไม่ใช่'), 'ไม่ใช่', 'ไม่ใช่'),
        (('ใช่', 'ไม่ใช่'), '"ใช่"', 'ใช่'),
        (('да', 'нет'), 'Да.', 'да'),
        (('да', 'нет'), 'да, а не нет', None),
        (('да', 'нет'), 'далее', None),
        (('ναι', 'όχι'), 'Ναι·', None),
        (('ναι', 'όχι'), 'ΝΑΙ.', 'ναι'),
        (('İyi', 'Kötü'), 'iyi.', 'İyi'),
        (('hayır', 'evet'), 'HAYIR.', 'hayır'),
        (('kıl', 'kil'), 'kıl.', 'kıl'),
        (('kıl', 'kil'), 'kil.', 'kil'),
        (('Straße', 'Weg'), 'straße.', 'Straße'),
        (('ja', 'nej'), 'ja\u200b.', 'ja'),
        (('bil\u00adling', 'x'), 'billing', 'bil\u00adling'),
        (('አዎ', 'አይ'), 'አዎ።', 'አዎ'),
        (('այո', 'ոչ'), 'այո։', 'այո'),
        (('oui', 'non'), '« oui ».', 'oui'),
        (('ja', 'nein'), '„ja“.', 'ja'),
    ],
)
def test_labels_of_any_script(labels, said, label):
    assert label_of(said, labels) == label


@pytest.mark.parametrize(
    'said, label',
    [
        ('5 × 3.', '5 * 3'),
        ('1,200.', '1200'),
        ('10 ÷ 2', '10 / 2'),
        ('9 − 4.', '9 - 4'),
        ('9 – 4', '9 - 4'),
        ('2 ∗ 3', '2 * 3'),
        ('2 · 3', '2 * 3'),
        ('5 x 3', '5 * 3'),
        ('１２ ＋ ３', '12 + 3'),
        ('1\u2009200 + 1', '1200 + 1'),
        ('(5 × 3) + 2.', '(5 * 3) + 2'),
        ('5 * 3 = 15.', '5 * 3'),
        ('15 = 5 * 3', '5 * 3'),
        ('3.5 * 2. That is 7.', '3.5 * 2'),
        ('**5 * 3**', '5 * 3'),
        (': `5 * 3`', '5 * 3'),
        ('$5 \\times 3$', '5 * 3'),
        ('\\boxed{5 \\div 2}', '5 / 2'),
        ('\\(5 + 2\\)', '5 + 2'),
        ('\n\n5 * 3', '5 * 3'),
        ('-5', '-5'),
        ('1,200,000 / 3', '1200000 / 3'),
        ('5。', '5'),
        ('10^2', None),
        ('2 ** 3', None),
        ('12 - x', None),
        ('50% of 20', None),
        ('15 apples', None),
        ('5 apples * 3', None),
        ('€5 * 3', None),
        ('5 * 3 = 16', None),
        ('x = 15', None),
        ('1,2', None),
        ('1,20,0', None),
        ('12,00', None),
        ('5 * 3, which is 15', None),
        ('5!', '5'),
        ('5 * 3 and 2 * 2', None),
        ('sqrt(4)', None),
        ('1/0', None),
        ('5 * ', None),
        ('3x4', None),
        ('2½', None),
        ('5 ± 1', None),
        ('≈ 5', None),
        ('1.200,50', None),
        ('5 mod 3', None),
        ('1e3', None),
        ('10 : 2', None),
        ('1 200', None),
    ],
)
def test_an_equation_is_read_whole_or_not_at_all(said, label):
    read = read_completion(f'That is simple. The answer is {said}', EQUATION)
    assert (read.label or None, read.reason) == (label, '' if label else 'not an equation')
    if label:
        plain = said.strip(' .。:`*$\n')
        assert is_correct(plain, label, 'equation') or any(sign in plain for sign in '\\=!T')


@pytest.mark.parametrize(
    'a, b',
    [
        ('5 × 3', '15'),
        ('1,200', '1200'),
        ('10 ÷ 2', '5'),
        ('9 − 4', '9-4'),
        ('（1＋1）', '2'),
    ],
)
def test_the_signs_are_alike_in_a_students_answer_too(a, b):
    assert is_correct(a, b, 'equation') and is_correct(b, a, 'equation') and not is_correct(a, b)


@pytest.mark.parametrize(
    'said, label',
    [
        ("St. John's.", "St. John's"),
        ('3.5 m.', '3.5 m'),
        ('e.g. this', 'e.g. this'),
        ('U.S.', 'U.S'),
        ('**blue sky**.', 'blue sky'),
        ('\n\nblue', 'blue'),
        ('蓝色。', '蓝色'),
        ('\\boxed{blue}', 'blue'),
        ('www.x.org, page 2', 'www.x.org, page 2'),
    ],
)
def test_a_text_is_the_rest_of_the_line(said, label):
    assert label_of(said, (), TEXT) == label


THOUGHTS = 'Hm, shipping? So the answer is shipping. Wait.'
GOOD = 'A card was charged. So the answer is billing.'
HARMONY = f'<|channel|>analysis<|message|>{THOUGHTS}<|end|><|start|>assistant'


@pytest.mark.parametrize(
    'text',
    [
        f'<think>\n{THOUGHTS}\n</think>\n\n{GOOD}',
        f'<think></think>{GOOD}',
        f'{THOUGHTS}\n</think>\n{GOOD}',
        f'[THINK]{THOUGHTS}[/THINK]{GOOD}',
        f'<thinking>{THOUGHTS}</thinking>{GOOD}',
        f'<reasoning effort="low">{THOUGHTS}</reasoning> {GOOD}',
        f'<thought>{THOUGHTS}</thought>{GOOD}',
        f'<THINK>{THOUGHTS}</Think >{GOOD}',
        f'◁think▷{THOUGHTS}◁/think▷{GOOD}',
        f'<think>{THOUGHTS}</think><think>{THOUGHTS}</think>{GOOD}',
        f'<think>{THOUGHTS} <think> {THOUGHTS}</think> {THOUGHTS}</think>{GOOD}',
        f'{HARMONY}<|channel|>final<|message|>{GOOD}',
        f'{HARMONY}<|channel|>final <|constrain|>text<|message|>{GOOD}<|return|>',
        f'analysis{THOUGHTS}assistantfinal{GOOD}',
        f'{GOOD}<|im_end|>',
        f'{GOOD}</s>',
        f'{GOOD}\n<think>{THOUGHTS}',
        f'A card was charged. <think>{THOUGHTS}</think> So the answer is billing.',
        f'<|begin_of_thought|>{THOUGHTS}<|end_of_thought|>{GOOD}',
    ],
    ids=lambda t: ascii(t)[:40],
)
def test_thoughts_are_cut_off_first(text):
    for form in (LABEL, FORMATS['same_kind']):
        assert read_completion(text, form, ('billing', 'shipping')) == Reading('A card was charged.', 'billing')


@pytest.mark.parametrize(
    'text',
    [
        f'<think>{THOUGHTS}',
        f'<think>{THOUGHTS}</think>',
        f'[think]{THOUGHTS}',
        f'{THOUGHTS}</think>\n',
        f'<|channel|>analysis<|message|>{THOUGHTS}',
        f'<|channel|>analysis<|message|>{THOUGHTS}<|end|>',
        '<think>',
    ],
)
def test_thoughts_alone_are_no_answer(text):
    assert read_completion(text, LABEL, ('billing', 'shipping')).reason == 'only thinking'


@given(
    st.lists(
        st.sampled_from(
            [
                '<think>',
                '</think>',
                '[THINK]',
                '[/THINK]',
                'a',
                ' ',
                '\n',
                '<|channel|>',
                'final',
                '<|message|>',
                '<',
                '</s>',
                'So the answer is yes.',
            ]
        ),
        max_size=12,
    ).map(''.join)
)
@settings(max_examples=200)
def test_any_blocks_are_cut_without_a_trace(text):
    left, _ = without_thinking(text)
    assert not any(tag in left for tag in ('<think>', '</think>', '[THINK]', '[/THINK]'))
    read = read_completion(text, LABEL, ('yes', 'no'))
    assert read.ok == bool(read.rationale and read.label) and (read.ok or read.reason)


@pytest.mark.parametrize(
    'text',
    [
        'It is money. so the answer is billing.',
        'It is money. So, the answer is billing.',
        'It is money. Therefore, the answer is billing.',
        'It is money. Thus the correct answer is: billing',
        'It is money.\nThe answer is billing.',
        'It is money.\n\nAnswer: billing',
        'It is money.\n\n**Answer:** billing',
        'It is money.\n\n**Answer: billing**',
        'It is money.\n\nFinal answer: billing',
        'It is money.\n\n**Final Answer:**\n\nbilling',
        'It is money.\n\n### Final Answer\n\n**billing**',
        'It is money.\n---\nAnswer: billing',
        'It is money. So the answer is\n\nbilling',
        'It is money. So the answer is \\boxed{billing}.',
        'It is money. $\\boxed{\\text{billing}}$',
        'It is money.\n\\[\\boxed{billing}\\]',
        'It is money. **So the answer is billing.**',
        'It is money. **Therefore, the answer is billing.**',
        'It is money. <answer>billing</answer>',
        'It is money. SO THE ANSWER IS BILLING.',
        'It is money. So the answer is billing. Answer: billing.',
        'It is money. So the answer is billing. I hope the answer is helpful.',
        'It is money. In conclusion, the answer is "billing".',
        'It is money. Answer: (b) billing',
        'It is money. My answer is billing.',
        'It is money. So the answer is：billing。',
    ],
    ids=lambda t: ascii(t)[13:50],
)
def test_how_an_answer_is_marked(text):
    assert read_completion(text, LABEL, ('billing', 'shipping')) == Reading('It is money.', 'billing')


@pytest.mark.parametrize(
    'text, reason',
    [
        ('It is money. So the answer is billing. No: so the answer is shipping.', 'two markers'),
        ('It is money. So the answer is billing.\nFinal answer: shipping', 'two markers'),
        ('It is money. The answer is billing. So, the answer is shipping.', 'two markers'),
        ('It is money. The answer is clear.', 'label outside the label set'),
        ('It is money. The answer is not billing.', 'no marker'),
        ('It is money, in answer to your question.', 'no marker'),
        ('No answer: billing', 'no marker'),
        ('Answer: billing', 'no rationale'),
        ('**Answer:** billing', 'no rationale'),
        ('$\\boxed{billing}$', 'no rationale'),
        ('It is money. So the answer is', 'no label'),
        ('It is money. So the answer is **', 'no label'),
        ('I’m sorry, I can’t.', 'refusal'),
    ],
)
def test_what_is_no_answer_has_a_name(text, reason):
    assert read_completion(text, LABEL, ('billing', 'shipping')).reason == reason


def test_palms_answers_are_read_with_their_own_marker_alone():
    said = 'It is so, so the answer is neutral.'
    assert read_completion(said, FORMATS['anli1'], ('neutral', 'entailment')).reason == 'no marker'
    assert read_answer(Answer(said), FORMATS['anli1'], ('neutral', 'entailment')) == Reading('It is so', 'neutral')
    assert read_answer(Answer('10 each. The answer is (10 × 45) + 2.'), FORMATS['svamp']).label == '(10 * 45) + 2'
    helpful = Answer('Wood. So the answer is (c) wooded area.\n\nI hope this helps.')
    assert read_answer(helpful, FORMATS['cqa']).label == 'wooded area'


@pytest.mark.parametrize(
    'text, rationale',
    [
        ('The FAQ: pay first. So the answer is yes.', 'The FAQ: pay first.'),
        ('See Q: it is there. So the answer is yes.', 'See Q: it is there.'),
        ('Paid.\nFAQ: pay. So the answer is yes.', 'Paid. FAQ: pay.'),
        ('Paid. So the answer is yes.\n\nQ: Next?\nA: No. So the answer is no.', 'Paid.'),
        ('Paid. So the answer is yes.\n  Q: Next? So the answer is no.', 'Paid.'),
    ],
)
def test_a_stop_begins_a_line(text, rationale):
    assert read_completion(text, LABEL, ('yes', 'no')) == Reading(rationale, 'yes')


@pytest.mark.parametrize(
    'text',
    [
        '消息提到扣款。',
        'हिन्दी में कारण है।',
        'لأن البطاقة خُصمت مرتين.',
        unicodedata.normalize('NFD', 'Ça coûte 5 €, voilà.'),
        '👨‍👩‍👧 are a family.',
        'ไม่มีพัสดุ',
        'Так как карту списали.',
    ],
)
def test_rationales_of_any_language_are_kept(text):
    assert read_completion(f'{text} So the answer is yes.', LABEL, ('yes', 'no')) == Reading(text, 'yes')


@pytest.mark.parametrize(
    'kind, labels, label',
    [
        ('label', ('1', '1.5', '2'), '1.5'),
        ('label', ('Node', 'Node.js'), 'Node.js'),
        ('label', ('U.S.', 'U.K.'), 'U.S.'),
        ('label', ('yes', 'yes, partly'), 'yes, partly'),
        ('label', ('A/B', 'A'), 'A/B'),
        ('label', ('账单', '账单问题'), '账单问题'),
        ('label', ('C', 'C++'), 'C++'),
        ('label', ('.NET', 'Java'), '.NET'),
        ('text', (), "St. John's"),
        ('text', (), 'U.S.'),
        ('text', (), '3.5 m'),
        ('equation', (), '(1.5 * 2)'),
        ('equation', (), '3'),
    ],
)
def test_exemplars_with_any_label_are_written_and_read(kind, labels, label):
    shown = dict(input='x', rationale='The FAQ: says so.', label=label)
    prompt = user_prompt('mine', 'Say which.', [shown], kind, labels)
    written = prompt.messages('y')[2]['content']
    assert read_completion(f'{written}\n\nQ: Next?', prompt.form, labels) == Reading('The FAQ: says so.', label)


def test_exemplars_are_shown_as_answers_are_read():
    threes = dict(input='x', rationale='Five threes.', label='5 × 3')
    assert '5 * 3' in user_prompt('mine', 'Count.', [threes], 'equation').text('y')
    coffee = dict(input='x', rationale='Coffee.', label='cafe\u0301')
    assert 'caf\u00e9' in user_prompt('mine', 'Which?', [coffee], 'label', ('caf\u00e9', 'bar')).text('y')
    with pytest.raises(UsageError, match='not an equation'):
        user_prompt('mine', 'Count.', [dict(input='x', rationale='Some.', label='15 apples')], 'equation')
    with pytest.raises(UsageError, match='stand beside it'):
        write_answer(LABEL, '', 'Q: is it?', 'yes')


MIXED = (
    '1',
    '1.5',
    'Node',
    'Node.js',
    'U.S.',
    'yes',
    'yes, partly',
    'A/B',
    'C',
    'C++',
    '.NET',
    '账单',
    '账单问题',
    'café',
    '(x)',
    "don't",
    '-1',
    'İyi',
)


@given(st.sampled_from(MIXED), st.integers(0, 3))
def test_a_label_written_is_the_label_read(label, dress):
    said = ('{}.', '**{}**.', '「{}」', '"{}".')[dress].format(label)
    assert label_of(said, MIXED) == label and label_of(unicodedata.normalize('NFD', said), MIXED) == label


def test_answers_are_compared_in_one_form():
    assert is_correct('cafe\u0301', 'caf\u00e9')
    assert is_correct('账单。', '账单')
    assert is_correct('\ufeffyes\u200b', 'yes')
    assert is_correct('शुल्क।', 'शुल्क')
    assert is_correct('a\u00a0b', 'a b')
    assert not is_correct('Yes', 'yes')
    assert not is_correct('账单问题', '账单')
    assert not is_correct('yes?', 'yes')
    assert not is_correct('हिन्द', 'हिन्दी')
    assert normalise_answer('a..') == 'a.'
    assert normalise_answer(' a . ') == 'a'
    assert plain_equation('a × 1,2') == 'a * 1,2'
    assert near_duplicates(['कुत्ता काला'], ['कुत्ते काली']) == 0
    assert near_duplicates(['काला कुत्ता'], ['कुत्ता काला']) == 1


def test_a_task_folder_compares_in_one_form(tmp_path):
    def write(toml, rows):
        (tmp_path / 'task.toml').write_text(toml, encoding='utf-8')
        lines = [json.dumps(r, ensure_ascii=False) + '\n' for r in rows]
        (tmp_path / 'train.jsonl').write_text(''.join(lines), encoding='utf-8')
        return load_task(str(tmp_path))

    toml = 'name = "cafe"\ninstruction = "Which?"\nanswer = "label"\nlabels = ["café", "bar"]\n'
    rows = [dict(input=f'Table {i}', label=unicodedata.normalize('NFD', 'café')) for i in range(20)]
    for written in (toml, unicodedata.normalize('NFD', toml)):
        task = write(written, rows)
        assert task.label_set == ('caf\u00e9', 'bar') and set(task['train']['label']) == {'caf\u00e9'}
    with pytest.raises(UsageError, match='one and the same'):
        write(toml.replace('"bar"', '"cafe\u0301"'), rows)
    with pytest.raises(UsageError, match='one and the same'):
        write(toml.replace('"bar"', '"caf\u00e9。"'), rows)
    with pytest.raises(UsageError, match='stands on train.jsonl:1 already'):
        write(toml, [r | dict(id='caf\u00e9' if i else 'cafe\u0301') for i, r in enumerate(rows)])
    equation = toml.replace('"label"', '"equation"').partition('labels')[0]
    assert write(equation, [r | dict(label='1,200 × 2') for r in rows])['train']['label'][0] == '1,200 × 2'
    assert checked_label('ca\u200bf\u00e9', ('caf\u00e9', 'bar')) == 'caf\u00e9'
