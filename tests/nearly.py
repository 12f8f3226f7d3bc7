"What `records` promises of a run that is made in other shapes: beside others, or by other threads or processes."

from dsbs.records import DRIFT, EARLY, accuracy_tolerance, is_near

COUNTED = ('parameters', 'tokens', 'steps')


def nearly_the_same(a, b):
    """Whether two records say the same, but for the last digits of losses and what may follow from them; of runs of
    some ten updates."""
    assert a['metrics']['steps'] <= EARLY, 'more updates than the promise is for'
    for name in ('key', 'spec', 'data', 'teacher', 'teacher_quality', 'stand_in'):
        assert a[name] == b[name], name
    for one, other in zip(a['history'], b['history'], strict=True):
        assert one.keys() == other.keys() and all(is_near(one[name], other[name], DRIFT) for name in one), (one, other)
    assert a['metrics'].keys() == b['metrics'].keys()
    for name, value in a['metrics'].items():
        if name.startswith('n_') or name in COUNTED:
            assert b['metrics'][name] == value, name
        elif 'accuracy' in name and value is not None:
            n = a['metrics']['n_validation' if 'validation' in name else 'n_test']
            assert abs(b['metrics'][name] - value) <= accuracy_tolerance(n), name
    return True
