"The answer check and the reader of completions, on what untrusted text may hold."
import time

import pytest
from hypothesis import given, settings, strategies as st

from dsbs.extraction import read_completion, teacher_accuracy
from dsbs.prompts import FORMATS, answer_format
from dsbs.records import hash_json
from dsbs.tasks import PAPER, EquationError, equation_value, is_correct
from dsbs.teacher import recorded_completions

HOSTILE = ['9**9**9', '2^100', '(' * 10_000 + '1' + ')' * 10_000, '(' * 90 + '1' + ')' * 90, '-' * 150 + '1', '1' * 100_000, '__import__("os").system("true")',
           'x', 'x + 1', '(some - 8)', '(14, 21)', '1, 2', '[1]', 'nan', 'NaN', 'inf', '1e400', '1/0', '1/(2-2)', '0/0', '', '   ', '()', '(', ')', '1 +', '+',
           '1 2', '3 (4)', '1_000', '0x10', '1j', 'True', 'None', '1 if 1 else 2', 'lambda: 1', '1; 2', '1 # 2', '"1"', '5%', '$5', '１', '٣', '½', '1 and', 'and 1',
           'or 1', '1\x00', '\N{MINUS SIGN}5', '1//2', '1 << 3', '~1', '1 == 1', '@']


@pytest.mark.parametrize('text', HOSTILE, ids=lambda t: repr(t[:20]))
def test_hostile_equations_are_refused_fast_with_a_reason(text):
    start = time.perf_counter()
    with pytest.raises(EquationError) as refused: equation_value(text)
    assert time.perf_counter()-start < .05
    assert 3 < len(str(refused.value)) < 100
    assert not is_correct(text, '( 1.0 + 1.0 )', 'equation')


@pytest.mark.parametrize('text, value', [('( 10.0 * 45.0 )', 450), ('10*45', 450), ('-(3-5)', 2), ('1/3*3', 1), ('.5 + 0.5', 1), ('2 - 3 - 4', -5),
                                         ('8 / 4 / 2', 1), ('((8 / 4) and (6 / 4))', 1.5), ('(34 + 40) and (62 - 17)', 45), ('+5', 5), ('1 - -1', 2)])
def test_equations(text, value): assert equation_value(text) == value


arithmetic = st.recursive(st.integers(0, 99).map(str), lambda inner: st.tuples(inner, st.sampled_from('+-*/'), inner).map(lambda t: f'({t[0]} {t[1]} {t[2]})'), max_leaves=6)


@given(arithmetic)
def test_agrees_with_python_on_arithmetic(text):
    from fractions import Fraction
    import re
    exact = re.sub(r'\d+', lambda m: f'Fraction({m[0]})', text)
    try: expected = eval(exact, {'Fraction':Fraction})
    except ZeroDivisionError:
        with pytest.raises(EquationError): equation_value(text)
    else: assert equation_value(text) == expected


@given(st.text(max_size=300))
@settings(max_examples=200)
def test_any_text_is_read_or_refused(text):
    try: equation_value(text)
    except EquationError: pass
    for form in FORMATS.values():
        read = read_completion(text, form)
        assert read.ok == bool(read.rationale and read.label) and (read.ok or read.reason)


@given(st.text(max_size=80), st.sampled_from(sorted(FORMATS)), st.text(max_size=40))
def test_any_completion_around_a_marker_is_read_or_refused(before, name, after):
    read = read_completion(f'{before}{FORMATS[name].marker}{after}', FORMATS[name])
    assert read.ok or read.reason


MOOD, YES_NO = ('Happy', 'Not happy', 'happy and sad'), ('yes', 'no')


@pytest.mark.parametrize('text, label', [
    ('So the answer is **yes**.', 'yes'), ('So the answer is: yes.', 'yes'), ('So the answer is "yes".', 'yes'), ('So the answer is (yes).', 'yes'), ('So the answer is "yes."', 'yes'),
    ('So the answer is [yes]', 'yes'), ('So the answer is \'yes\'.', 'yes'), ('So the answer is “Yes”.', 'yes'), ('So the answer is *yes*!', 'yes'), ('So the answer is __yes__.', 'yes'), ('So the answer is `no`', 'no'),
    ('**So the answer is yes.**', 'yes'), ('**So the answer is: yes**', 'yes'), ('**So the answer is:** yes.', 'yes'), ('**So the answer is** **yes**', 'yes'), ('So the answer is:\n\n**no**', 'no'),
    ('So the answer is: **"yes"**.\n\nI hope this helps.', 'yes'), ('So the answer is **yes**, as both are birds.', 'yes'), ('So the answer is **no**. No, they differ.', 'no'),
    ('So the answer is **yes** or **no**.', None), ('So the answer is (yes or no).', None), ('So the answer is yes or no.', None), ('So the answer is yes/no.', None), ('So the answer is "yes", "no".', None),
    ('So the answer is **yes** and no.', None), ('So the answer is **yes**, or perhaps no.', None), ('So the answer is **not yes**.', None), ('So the answer is **yesterday**.', None),
    ('So the answer is **yes-ish**.', None), ('So the answer is "maybe".', None), ('So the answer is ** **.', None), ('So the answer is **.', None), ('So the answer is (yes', 'yes')])
def test_how_chat_models_dress_up_a_label(text, label):
    read = read_completion(f'Both are birds. {text}', FORMATS['same_kind'], YES_NO)
    assert (read.label or None, read.rationale) == (label, 'Both are birds.' if label else ''), read


@pytest.mark.parametrize('text, label', [('**Not happy**.', 'Not happy'), (': "happy"', 'Happy'), ('**Happy** and sad.', None), ('happy and sad.', 'happy and sad'), ('**happy**, not happy', None),
                                         ('Happy or not happy.', None), ('(not happy)', 'Not happy'), ('unhappy', None), ('**un**happy', None)])
def test_labels_within_labels(text, label): assert read_completion(f'So. So the answer is {text}', answer_format('label'), MOOD).label == (label or '')


@pytest.mark.parametrize('name, text, label', [
    ('cqa', 'So the answer is **(c) wooded area**.', 'wooded area'), ('cqa', 'So the answer is (c) **wooded area**.', 'wooded area'), ('cqa', '**So the answer is (c) wooded area.**', 'wooded area'),
    ('cqa', '**So the answer is:** (c) wooded area', 'wooded area'), ('svamp', 'The answer is **(10 * 45)**.', '(10 * 45)'), ('svamp', 'The answer is: (10 * 45).', '(10 * 45)'),
    ('svamp', '**The answer is: (10 * 45)**', '(10 * 45)'), ('svamp', 'The answer is (2**3).', '(2**3)'), ('svamp', 'The answer is (2 ** 3) and (3 ** 4).', '(2 ** 3) and (3 ** 4)'),
    ('esnli', '**Answer:** neutral', 'neutral'), ('text', 'So the answer is **blue sky**.', 'blue sky'), ('text', 'So the answer is: blue', 'blue'), ('text', 'So the answer is :)', ':)'),
    ('text', 'So the answer is 2**3**4.', '2**3**4')])
def test_bold_around_a_free_answer(name, text, label):
    read = read_completion(f'It is **clear**. {text}', FORMATS.get(name) or answer_format(name))
    assert (read.label, read.rationale) == (label, 'It is **clear**.')


@pytest.mark.parametrize('text', ['*'*99_000, '**a '*24_000, '**a**'*19_000, 'yes'+', '*48_000, 'yes'+'*'*99_000, 'yes or '*14_000, '('*99_000, 'yes no '*14_000], ids=lambda t: t[:9])
def test_long_decorations_are_read_fast(text):
    for form, labels in ((FORMATS['same_kind'], YES_NO), (answer_format('text'), ())):
        start = time.perf_counter()
        read_completion(f'{text} {form.marker} {text}', form, labels)
        assert time.perf_counter()-start < 2


def test_recorded_completions_read_as_ever(recorded):
    "The counts published with the data, and the sha256 of every single reading."
    counts, read = {}, []
    for name, splits in dict(cqa=('train', 'test'), svamp=('train', 'test'), anli1=('validation',), esnli=('validation',)).items():
        for split in splits:
            seen = teacher_accuracy(name, split, recorded); counts[name, split] = seen['correct'], seen['n'], seen['unreadable']
            said = recorded_completions(name, split, recorded)
            read += [[i, r.rationale, r.label, r.reason] for i, text in said.items() for r in [read_completion(text, FORMATS[name], PAPER[name].label_set)]]
    assert counts == {('cqa', 'train'):(7234, 9741, 3), ('cqa', 'test'):(943, 1221, 0), ('svamp', 'train'):(588, 800, 13), ('svamp', 'test'):(148, 200, 2),
                      ('anli1', 'validation'):(668, 1000, 9), ('esnli', 'validation'):(7201, 9842, 4)}
    assert hash_json(read) == '2e5da3e112deee4ebda7b4d78a468d3525c8c644e6e712d09233190590347226'
