"The answer check and the reader of completions, on what untrusted text may hold."
import time

import pytest
from hypothesis import given, settings, strategies as st

from dsbs.extraction import read_completion
from dsbs.prompts import FORMATS
from dsbs.tasks import EquationError, equation_value, is_correct

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
