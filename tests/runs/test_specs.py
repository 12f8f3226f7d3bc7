"A run's name: it changes with whatever may change the numbers, and with nothing else."

import random
from dataclasses import asdict, fields

import pytest

from dsbs.data.embedded import embedded_task
from dsbs.data.tasks import load_task
from dsbs.method.settings import LOSS_FORMS, SCRATCH
from dsbs.method.views import METHODS, PREFIXES, TASK_PREFIXES
from dsbs.runs import specs
from dsbs.runs.specs import KEEP, LABEL_SOURCES, RATIONALES, RunSpec, key_of, make_spec, prepare, recipe, run_key

FROZEN = [  # made at commit 6a2f33d; those of `heavier_than`, `weight_untold` and `data_seed=1`, later, with those data
    (dict(), '267445b770c596316b511e6094d98ec045b2b714d4032edb4f5231b5c05e14be'),
    (dict(method='standard', dropout=0.0), '43ecb64857f476e89c51c621805b057a5e215ffbf5b8efafcd89fadaa625b859'),
    (
        dict(method='single_task', task='heavier_than', n_train=100),
        'e9d763178f5c648693a5c7451a65bc324dbc510f5af6c7f6ceb8fcde4080aceb',
    ),
    (
        dict(method='rationale_as_input', task='weight_untold', dropout=0.0, seed=3),
        '3f92af929d15068739606a4e751e5c3f1d72d083331a4d56e2451ea15289f974',
    ),
    (
        dict(method='answer_first', dropout=0.0, n_train=50),  # made when the method was added
        'd8fac7e864d7ea718e025cfbd2ecde08cc0c92ea972448c8b9c414b72308a2b8',
    ),
    (
        dict(
            task='heavier_than',
            method='step_by_step',
            dropout=0.0,
            rationale_weight=0.3,
            subset_seed=2,
            train_fraction=0.5,
        ),
        'efcdf2fcd20aad9d76a8d6c4a3bd85cb51efcae072e9e256e44a5b6e80265984',
    ),
    (
        dict(task='weight_untold', label_source='teacher', rationales='shuffled', dropout=0.2),
        '08362c024700cb31b83168dffbcd0d068dadcf4e336bae0d08c8259efbec962e',
    ),
    (
        dict(method='step_by_step', dtype='bfloat16', dropout=0.0, student='scratch-32x1'),
        'fe92c1a061f559033d62b7aa68c3fd2366b21662e1da7d6225381369767846cc',
    ),
    (
        dict(method='standard', prefix_style='authors', loss_form='authors', learning_rate=0.003, max_steps=50),
        'b3a6325ef6174231b21d52233c9f53e656591d1dea112de51a3c72e3726b45b9',
    ),
    (
        dict(task='same_kind', data_seed=1, teacher_error=0.0, keep='agree', task_prefix='decoder', dropout=0.0),
        'dceacd3dcc038e473e1e479a24465d84f3af97d0ef37b875d0fc24af0053e202',
    ),
    (
        dict(task='heavier_than', extra='heavier_than', n_train=60, n_extra=30, label_source='teacher'),
        'fe80dc763263049a20c419ad3edd6c32c9494bc78de79391147c0e3ee023fca9',
    ),
    (
        dict(rationales='human', accumulation=4, batch_size=32, threads=2, schedule='constant', dropout=0.0),
        '860c236d3d8282e4da771f03093c4b3b95fabc98c99ea5ea613d38fefce6560f',
    ),
]


@pytest.mark.parametrize(
    'settings, key', FROZEN, ids=lambda x: ' '.join(map(str, x.values())) if isinstance(x, dict) else ''
)
def test_a_frozen_key_is_as_it_was(settings, key):
    assert run_key(RunSpec(**settings)) == key


def test_frozen_keys_go_over_methods_tasks_and_recipes():
    frozen = [RunSpec(**s) for s, _ in FROZEN]
    assert {s.method for s in frozen} == set(METHODS) and {s.task for s in frozen} == {
        'same_kind',
        'heavier_than',
        'weight_untold',
    }
    assert (
        {recipe(s) for s in frozen} == {2, 3}
        and {bool(s.dropout) for s in frozen} == {False, True}
        and len({k for _, k in FROZEN}) == len(FROZEN) >= 10
    )


CHANGED = dict(
    max_steps=9_999,
    batch_size=63,
    accumulation=2,
    learning_rate=5.000001e-5,
    schedule='constant',
    warmup_ratio=0.000001,
    clip=0.999,
    dtype='bfloat16',
    eval_every=251,
    patience=1,
    seed=1,
    threads=2,
    gradient_checkpointing=True,
    task='heavier_than',
    stand_in=True,
    data_seed=1,
    teacher_error=0.0500001,
    method='standard',
    label_source='teacher',
    rationales='shuffled',
    teacher='some/folder',
    keep='agree',
    rationale_share=0.999999,
    rationale_words=1,
    rationale_weight=1.000001,
    mutual_information=0.000001,
    prefix_style='authors',
    task_prefix='decoder',
    loss_form='authors',
    student='scratch-64x1',
    revision='main',
    engine='plain',
    dropout=0.1000001,
    init_factor=0.999999,
    n_train=1,
    train_fraction=0.999999,
    subset_seed=1,
    extra='same_kind',
    n_extra=1,
    extra_teacher='some/folder',
    max_input=1023,
    max_target=255,
)


def test_every_field_of_a_spec_changes_the_key():
    "Each on its own, data held fixed, so that it is the setting that tells."
    assert set(CHANGED) == {f.name for f in fields(RunSpec)}, 'a new setting needs a line here'
    hashes = prepare(RunSpec()).hashes
    keys = {key_of(RunSpec(), 'same_kind', hashes)}
    for name, value in CHANGED.items():
        needed = dict(extra='heavier_than') if name in ('n_extra', 'extra_teacher') else {}
        spec = RunSpec(**{name: value} | needed)
        assert getattr(spec, name) != getattr(RunSpec(), name)
        keys.add(key_of(spec, spec.task, hashes))
    assert len(keys) == 1 + len(CHANGED)


def test_data_student_and_recipe_change_the_key(monkeypatch):
    spec = RunSpec(dropout=0.0)
    hashes = prepare(spec).hashes
    keys = (
        [key_of(spec, 'same_kind', hashes)]
        + [key_of(spec, 'same_kind', hashes | {part: '0' * 64}) for part in hashes]
        + [key_of(spec, 'same_kinds', hashes)]
    )
    for name, changed in (('student_hash', lambda *_: '0' * 64), ('recipe', lambda spec: 4)):
        with monkeypatch.context() as m:
            m.setattr(specs, name, changed)
            keys.append(key_of(spec, 'same_kind', hashes))
    assert len(set(keys)) == len(keys) == 1 + 4 + 1 + 2


def test_patience_has_another_meaning_since_it_waits_for_the_plateau():
    "On all tasks but those of the paper whose labels are no set."
    tasks = ('same_kind', 'esnli', 'anli1', './mine/', 'cqa', 'svamp', 'asdiv')
    before, since = ([recipe(RunSpec(task=t, patience=p)) for t in tasks] for p in (0, 1))
    assert [b - a for a, b in zip(before, since)] == [6] * 4 + [0] * 3 and not set(before) & set(since[:4])


def test_facts_of_many_seeds_are_loaded_once(monkeypatch):
    "A grid of ten seeds goes round and round, so what it needs is kept."
    loaded, seeds = [], range(100, 112)
    monkeypatch.setattr(specs, 'load_task', lambda *args: loaded.append(args) or load_task(*args))
    first, again = ([prepare(RunSpec(data_seed=s)).task for s in seeds] for _ in range(2))
    assert len(loaded) == len(seeds) and [*map(id, first)] == [*map(id, again)]
    assert all(embedded_task('same_kind', s) is task for s, task in zip(seeds, first))


def random_spec(rng):
    pick, real = rng.choice, lambda low, high: float(f'{rng.uniform(low, high):.3g}')
    size = pick([{}, dict(n_train=rng.randint(1, 720)), dict(train_fraction=real(0.01, 1))])
    extra = pick(
        [
            {},
            {},
            dict(extra=pick(['heavier_than', 'weight_untold'])),
            dict(extra='heavier_than', n_extra=rng.randint(1, 99)),
        ]
    )
    source = pick(LABEL_SOURCES)
    batch = rng.randint(1, 128)
    return RunSpec(
        max_steps=rng.randint(1, 10_000),
        batch_size=batch,
        accumulation=rng.randint(1, batch),
        learning_rate=real(1e-5, 1e-2),
        schedule=pick(['linear', 'constant']),
        warmup_ratio=pick([0.0, 0.1]),
        clip=real(0.1, 2),
        dtype=pick(['float32', 'bfloat16']),
        eval_every=rng.randint(1, 500),
        patience=rng.randint(0, 500),
        seed=rng.randint(0, 9),
        threads=rng.randint(1, 4),
        gradient_checkpointing=pick([False, True]),
        task=pick(['same_kind', 'weight_untold']),
        data_seed=rng.randint(0, 1),
        method=pick(METHODS),
        label_source=source,
        rationales=pick([r for r in RATIONALES if r != 'human' or source == 'human']),
        keep=pick(KEEP),
        rationale_share=pick([1.0, real(0, 1)]),
        rationale_words=pick([None, rng.randint(1, 60)]),
        rationale_weight=real(0, 2),
        mutual_information=pick([0.0, real(0, 1)]),
        prefix_style=pick(list(PREFIXES)),
        task_prefix=pick(TASK_PREFIXES),
        loss_form=pick(LOSS_FORMS),
        student=pick(list(SCRATCH)),
        dropout=pick([0.0, 0.1]),
        init_factor=pick([0.3, 1.0]),
        subset_seed=rng.randint(0, 9),
        max_input=rng.randint(1, 1024),
        max_target=rng.randint(1, 256),
        **size,
        **extra,
    )


def test_ten_thousand_random_specs_have_ten_thousand_keys(monkeypatch):
    rng, data, load = random.Random(6), {}, specs._load

    def loaded(spec, folder):  # once for each task, seed and added rows; `prepare` itself remembers only a few
        what = dict(
            task=spec.task,
            data_seed=spec.data_seed,
            extra=spec.extra,
            rationales='human' if spec.rationales == 'human' else 'teacher',
        )
        if (name := repr(what)) not in data:
            data[name] = load(RunSpec(**what), folder)
        return data[name]

    monkeypatch.setattr(specs, '_load', loaded)
    some = {random_spec(rng) for _ in range(10_000)}
    keys = {run_key(s) for s in some}
    assert len(keys) == len(some) > 9_990 and all(len(k) == 64 for k in keys)
    again = random.Random(1).sample(sorted(some, key=repr), 200)
    assert all(run_key(make_spec(asdict(s))) == run_key(s) for s in again), (
        'a spec made again from its record has the same name'
    )
