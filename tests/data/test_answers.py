"The answer check and the reader of completions, on what untrusted text may hold."

import contextlib
import random
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsbs.data.answers import EquationError, equation_value, is_correct
from dsbs.data.paper import PAPER
from dsbs.data.tasks import load_task
from dsbs.records import hash_json
from dsbs.teacher.extraction import read_completion, teacher_accuracy
from dsbs.teacher.formats import FORMATS, answer_format
from dsbs.teacher.recorded import recorded_completions

HOSTILE = [
    '9**9**9',
    '2^100',
    '(' * 10_000 + '1' + ')' * 10_000,
    '(' * 90 + '1' + ')' * 90,
    '-' * 150 + '1',
    '1' * 100_000,
    '__import__("os").system("true")',
    'x',
    'x + 1',
    '(some - 8)',
    '(14, 21)',
    '1, 2',
    '[1]',
    'nan',
    'NaN',
    'inf',
    '1e400',
    '1/0',
    '1/(2-2)',
    '0/0',
    '',
    '   ',
    '()',
    '(',
    ')',
    '1 +',
    '+',
    '1 2',
    '3 (4)',
    '1_000',
    '0x10',
    '1j',
    'True',
    'None',
    '1 if 1 else 2',
    'lambda: 1',
    '1; 2',
    '1 # 2',
    '"1"',
    '5%',
    '$5',
    '٣',
    '½',
    '1 and',
    'and 1',
    'or 1',
    '1\x00',
    '1//2',
    '1 << 3',
    '~1',
    '1 == 1',
    '@',
    '9' * 10**6,
    '1/' + '9' * 10**6,
    '-' * 10**6 + '1',
    '(' * 10**6,
    ' ' * 10**6 + '1+',
    '\n\t' * 10**6,
    '1' + ' ' * 150 + '1',
    '1 +' * 60,
    '\x00' * 100,
    '(x := 1)',
    '(1).real',
    '(1).__class__.__mro__',
    'f"{1}"',
    'f\'{__import__("os")}\'',
    '().__class__.__bases__[0].__subclasses__()',
    'eval("1")',
    'exec("1")',
    'print(1)',
    'open("/etc/passwd").read()',
    '{1: 2}[1]',
    '[1 for _ in (1,)][0]',
    '(lambda: 1)()',
    '(yield 1)',
    '*1',
    '..5',
    '1.2.3',
    '1e3',
    '1E400',
    '-inf',
    '+nan',
    '0b1',
    '0o7',
    '1L',
    '②',
    '௧',
    '1 + 1;',
    '\\x31',
    '${7*7}',
    '{{7*7}}',
    '1 and __import__("os")',
    '1 and (2)(3)',
]


EVENTS, WATCHING = [], []
sys.addaudithook(
    lambda event, args: (
        EVENTS.append(event)
        if WATCHING
        and event.split('.')[0] in ('exec', 'compile', 'import', 'open', 'os', 'subprocess', 'socket', 'ctypes')
        else None
    )
)


@contextlib.contextmanager
def no_code():
    "Nothing is compiled, run, imported, opened or called in between, as Python itself tells."
    EVENTS.clear()
    WATCHING.append(True)
    try:
        yield
    finally:
        WATCHING.clear()
    assert not EVENTS


def seconds(work):
    "Of the CPU, so that what else the machine does is not counted; the fastest of three."

    def once():
        start = time.thread_time()
        work()
        return time.thread_time() - start

    return min(once() for _ in range(3))


def test_what_watches_for_code_sees_it():
    with pytest.raises(AssertionError), no_code():
        eval('1')


@pytest.mark.parametrize('text', HOSTILE, ids=lambda t: repr(t[:20]))
def test_hostile_equations_are_refused_fast_with_a_reason(text):
    said = []

    def ask():
        try:
            equation_value(text)
        except EquationError as e:
            said.append(str(e))

    with no_code():
        took = seconds(ask)
    assert took < 0.5 and len(said) == 3 and 3 < len(said[0]) < 120
    assert not is_correct(text, '( 1.0 + 1.0 )', 'equation')


@pytest.mark.parametrize(
    'text, value',
    [
        ('( 10.0 * 45.0 )', 450),
        ('10*45', 450),
        ('-(3-5)', 2),
        ('1/3*3', 1),
        ('.5 + 0.5', 1),
        ('2 - 3 - 4', -5),
        ('8 / 4 / 2', 1),
        ('((8 / 4) and (6 / 4))', 1.5),
        ('(34 + 40) and (62 - 17)', 45),
        ('+5', 5),
        ('1 - -1', 2),
        ('5 × 3', 15),
        ('10 ÷ 2', 5),
        ('9 − 4', 5),
        ('\N{MINUS SIGN}5', -5),
        ('2 ∗ 3 · 4', 24),
        ('1,200', 1200),
        ('1,200,000.5 – 1', 1199999.5),
        ('12\u202f000 + 1', 12001),
        ('１２＋（３）', 15),
        ('5 x 3', 15),
        ('2 X (1 + 1)', 4),
        ('1\u00a0\u200b+ 1', 2),
    ],
)
def test_equations(text, value):
    assert equation_value(text) == value


arithmetic = st.recursive(
    st.integers(0, 99).map(str),
    lambda inner: st.tuples(inner, st.sampled_from('+-*/'), inner).map(lambda t: f'({t[0]} {t[1]} {t[2]})'),
    max_leaves=6,
)


@given(arithmetic)
def test_agrees_with_python_on_arithmetic(text):
    import re
    from fractions import Fraction

    exact = re.sub(r'\d+', lambda m: f'Fraction({m[0]})', text)
    try:
        expected = eval(exact, {'Fraction': Fraction})
    except ZeroDivisionError:
        with pytest.raises(EquationError):
            equation_value(text)
    else:
        assert equation_value(text) == expected


@given(st.text(max_size=300))
@settings(max_examples=200)
def test_any_text_is_read_or_refused(text):
    try:
        equation_value(text)
    except EquationError:
        pass
    for form in FORMATS.values():
        read = read_completion(text, form)
        assert read.ok == bool(read.rationale and read.label) and (read.ok or read.reason)


@given(st.text(max_size=80), st.sampled_from(sorted(FORMATS)), st.text(max_size=40))
def test_any_completion_around_a_marker_is_read_or_refused(before, name, after):
    read = read_completion(f'{before}{FORMATS[name].marker}{after}', FORMATS[name])
    assert read.ok or read.reason


MOOD, YES_NO = ('Happy', 'Not happy', 'happy and sad'), ('yes', 'no')


@pytest.mark.parametrize(
    'text, label',
    [
        ('So the answer is **yes**.', 'yes'),
        ('So the answer is: yes.', 'yes'),
        ('So the answer is "yes".', 'yes'),
        ('So the answer is (yes).', 'yes'),
        ('So the answer is "yes."', 'yes'),
        ('So the answer is [yes]', 'yes'),
        ("So the answer is 'yes'.", 'yes'),
        ('So the answer is “Yes”.', 'yes'),
        ('So the answer is *yes*!', 'yes'),
        ('So the answer is __yes__.', 'yes'),
        ('So the answer is `no`', 'no'),
        ('**So the answer is yes.**', 'yes'),
        ('**So the answer is: yes**', 'yes'),
        ('**So the answer is:** yes.', 'yes'),
        ('**So the answer is** **yes**', 'yes'),
        ('So the answer is:\n\n**no**', 'no'),
        ('So the answer is: **"yes"**.\n\nI hope this helps.', 'yes'),
        ('So the answer is **yes**, as both are birds.', 'yes'),
        ('So the answer is **no**. No, they differ.', 'no'),
        ('So the answer is **yes** or **no**.', None),
        ('So the answer is (yes or no).', None),
        ('So the answer is yes or no.', None),
        ('So the answer is yes/no.', None),
        ('So the answer is "yes", "no".', None),
        ('So the answer is **yes** and no.', None),
        ('So the answer is **yes**, or perhaps no.', None),
        ('So the answer is **not yes**.', None),
        ('So the answer is **yesterday**.', None),
        ('So the answer is **yes-ish**.', None),
        ('So the answer is "maybe".', None),
        ('So the answer is ** **.', None),
        ('So the answer is **.', None),
        ('So the answer is (yes', 'yes'),
    ],
)
def test_how_chat_models_dress_up_a_label(text, label):
    read = read_completion(f'Both are birds. {text}', FORMATS['same_kind'], YES_NO)
    assert (read.label or None, read.rationale) == (label, 'Both are birds.' if label else ''), read


@pytest.mark.parametrize(
    'text, label',
    [
        ('**Not happy**.', 'Not happy'),
        (': "happy"', 'Happy'),
        ('**Happy** and sad.', None),
        ('happy and sad.', 'happy and sad'),
        ('**happy**, not happy', None),
        ('Happy or not happy.', None),
        ('(not happy)', 'Not happy'),
        ('unhappy', None),
        ('**un**happy', None),
    ],
)
def test_labels_within_labels(text, label):
    assert read_completion(f'So. So the answer is {text}', answer_format('label'), MOOD).label == (label or '')


@pytest.mark.parametrize(
    'name, text, label',
    [
        ('cqa', 'So the answer is **(c) wooded area**.', 'wooded area'),
        ('cqa', 'So the answer is (c) **wooded area**.', 'wooded area'),
        ('cqa', '**So the answer is (c) wooded area.**', 'wooded area'),
        ('cqa', '**So the answer is:** (c) wooded area', 'wooded area'),
        ('svamp', 'The answer is **(10 * 45)**.', '(10 * 45)'),
        ('svamp', 'The answer is: (10 * 45).', '(10 * 45)'),
        ('svamp', '**The answer is: (10 * 45)**', '(10 * 45)'),
        ('svamp', 'The answer is (2**3).', '(2**3)'),
        ('svamp', 'The answer is (2 ** 3) and (3 ** 4).', '(2 ** 3) and (3 ** 4)'),
        ('esnli', '**Answer:** neutral', 'neutral'),
        ('text', 'So the answer is **blue sky**.', 'blue sky'),
        ('text', 'So the answer is: blue', 'blue'),
        ('text', 'So the answer is :)', ':)'),
        ('text', 'So the answer is 2**3**4.', '2**3**4'),
    ],
)
def test_bold_around_a_free_answer(name, text, label):
    read = read_completion(f'It is **clear**. {text}', FORMATS.get(name) or answer_format(name))
    assert (read.label, read.rationale) == (label, 'It is **clear**.')


@pytest.mark.parametrize(
    'text',
    [
        '*' * 99_000,
        '**a ' * 24_000,
        '**a**' * 19_000,
        'yes' + ', ' * 48_000,
        'yes' + '*' * 99_000,
        'yes or ' * 14_000,
        '(' * 99_000,
        'yes no ' * 14_000,
    ],
    ids=lambda t: t[:9],
)
def test_long_decorations_are_read_fast(text):
    for form, labels in ((FORMATS['same_kind'], YES_NO), (answer_format('text'), ())):
        start = time.thread_time()
        read_completion(f'{text} {form.marker} {text}', form, labels)
        assert time.thread_time() - start < 10, 'a pattern that takes exponential time would take years'


NLI = ('entailment', 'neutral', 'contradiction')
ASKED = dict(
    cqa=(FORMATS['cqa'], ()),
    svamp=(FORMATS['svamp'], ()),
    anli1=(FORMATS['anli1'], NLI),
    esnli=(FORMATS['esnli'], NLI),
    same_kind=(FORMATS['same_kind'], YES_NO),
    label=(answer_format('label'), MOOD),
    text=(answer_format('text'), ()),
    equation=(answer_format('equation'), ()),
)
SCRAPS = [
    '**',
    '`',
    '"',
    '\x00',
    '\u202e',
    '\ufeff',
    '\U0001f600',
    '\u0301',
    '$x$',
    '<b>',
    '</s>',
    '{}',
    '%s',
    '\\',
    '\r\n',
    ' ' * 700,
    '\n' * 700,
    '\t' * 500,
    'A' * 5_000,
    '(' * 2_000,
    '*' * 2_000,
    '**a ' * 700,
    '1 ' * 1_000,
    '. ' * 900,
    '<script>alert(1)</script>',
    '__import__("os").system("true")',
    '{{7*7}}',
    'a\u0300' * 600,
    '\ud800',
    '[label]',
    'or and ' * 300,
]
EXPECTED = {
    'only thinking',
    'not an equation',
    'empty',
    'refusal',
    'no marker',
    'two markers',
    'no label',
    'label outside the label set',
    'no rationale',
}


def odd_completions(name, many):
    "(completion, why it is refused): what a model might write, spoilt in one of the ways that there are."
    (form, labels), rng = ASKED[name], random.Random(f'odd {name}')
    mark, stop, good = (
        form.marker,
        form.stop,
        dict(cqa='(c) wooded area.', svamp='(10 * 45).', equation='10 * 45.', text='blue.').get(name)
        or f'{(labels or YES_NO)[0]}.',
    )
    bad, why_bad = (
        dict(cqa='wooded area.', svamp='10 * 45.', equation='ten.', text='.').get(name, '.'),
        'not an equation' if name == 'equation' else 'no label',
    )
    other = dict(equation='3.', text='red.', label='Not happy.').get(name, good)
    elsewhere = f'So what? {mark.lower()}s' if form.live else mark.swapcase()
    scraps = lambda n=3: ''.join(
        s for _ in range(rng.randint(1, n)) for s in (rng.choice(SCRAPS), ' ') if stop not in s
    )

    def spoil():
        noise = f'Hm. {scraps()}'
        outside = (
            rng.choice(
                [
                    'maybe',
                    'x' * 3_000,
                    '\x00',
                    '１',
                    ' or '.join(labels),
                    'not ' * 400 + labels[0],
                    'un' + labels[0],
                    ''.join(labels),
                ]
            )
            if labels
            else ''
        )
        return rng.choice(
            [
                (f'{noise}', 'no marker'),
                (f"I'm sorry, but {noise}", 'refusal'),
                (f'As an AI {noise}', 'refusal'),
                (f'{noise} {mark[:-1]}', 'no marker'),
                (f'{noise} {elsewhere} {good}', 'no marker'),
                (f'<think>{noise} {mark} {good}', 'only thinking'),
                (f'{noise} {mark} {good} {scraps()} {mark} {other}', 'two markers'),
                (f'{noise} {mark}', 'no label'),
                (f'{noise} {mark} {bad}', why_bad),
                (f'{noise} {mark}{" " * rng.randint(1, 900)}', 'no label'),
                (f'{" " * rng.randint(0, 99)}{mark} {good}', 'no rationale'),
                (f'{noise}\n{stop} {mark} {good}', 'no marker'),
                (f'{stop} {noise} {mark} {good}', 'empty'),
                (rng.choice(['', ' ', '\n', '\u2003']) * rng.randint(1, 9_000), 'empty'),
                *[(f'{noise} {mark} {outside}.', 'label outside the label set')] * bool(labels),
            ]
        )

    return [spoil() for _ in range(many)]


BY_HAND = [
    ('cqa', 'Why. So the answer is (c)', 'no label'),
    ('cqa', 'Why. So the answer is ()', 'no label'),
    ('cqa', 'So the answer is (c) x', 'no rationale'),
    ('svamp', 'Why. The answer is )10(', 'no label'),
    ('svamp', 'Why. The answer is 450.', 'no label'),
    ('svamp', 'Why. The answer is (10 * 45', 'no label'),
    ('equation', 'Why. The answer is lambda: 1', 'not an equation'),
    ('equation', 'Why. The answer is __import__("os")', 'not an equation'),
    ('esnli', 'Why. Answer neutral', 'no marker'),
    ('esnli', 'Why.\nAnswer: neutral contradiction entailment or so', 'label outside the label set'),
    ('anli1', 'Why. So the answer is entailment/neutral.', 'label outside the label set'),
    ('same_kind', 'Why. So the answer is yes no.', 'label outside the label set'),
    ('label', 'Why. So the answer is happy happy, not happy', 'label outside the label set'),
    ('text', 'Why. So the answer is\n\n', 'no label'),
    ('text', '\x00', 'no marker'),
    ('same_kind', 'I cannot answer that.', 'refusal'),
]


def test_three_hundred_odd_completions_are_refused_fast_with_the_reason():
    cases = [(name, *c) for name in ASKED for c in odd_completions(name, 40)]
    for name, text, why in [*cases, *BY_HAND]:
        form, labels = ASKED[name]
        with no_code():
            took, read = seconds(lambda: read_completion(text, form, labels)), read_completion(text, form, labels)
        assert (read.reason, read.label, read.rationale) == (why, '', ''), (name, text[:200], read)
        assert took < 0.05, (name, text[:200], took)
    assert len({(n, t) for n, t, _ in cases}) > 300 and {why for *_, why in cases} == EXPECTED


def test_recorded_completions_read_as_ever(recorded):
    "The counts published with the data, and the sha256 of every single reading."
    counts, read = {}, []
    for name, splits in dict(
        cqa=('train', 'test'), svamp=('train', 'test'), anli1=('validation',), esnli=('validation',)
    ).items():
        for split in splits:
            task = load_task(name, recorded)
            seen = teacher_accuracy(task, split)
            counts[name, split] = seen['correct'], seen['n'], seen['unreadable']
            for i, text in recorded_completions(task, split).items():
                reading = read_completion(text, FORMATS[name], PAPER[name].label_set)
                read.append([i, reading.rationale, reading.label, reading.reason])
    assert counts == {
        ('cqa', 'train'): (7234, 9741, 3),
        ('cqa', 'test'): (943, 1221, 0),
        ('svamp', 'train'): (588, 800, 13),
        ('svamp', 'test'): (148, 200, 2),
        ('anli1', 'validation'): (668, 1000, 9),
        ('esnli', 'validation'): (7201, 9842, 4),
    }
    assert hash_json(read) == '2e5da3e112deee4ebda7b4d78a468d3525c8c644e6e712d09233190590347226'
