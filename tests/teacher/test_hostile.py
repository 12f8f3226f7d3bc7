"Names, weights and code of others: nothing leaves its folder, nothing is run."

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest

from dsbs.data.own import read_task_file
from dsbs.data.tasks import TASKS, load_task
from dsbs.hub import check_model, hub_name
from dsbs.method.settings import check_student, student_hash
from dsbs.method.student import make_student
from dsbs.records import UsageError, file_name
from dsbs.runs.specs import RunSpec, run_key
from dsbs.teacher.questions import Answer, AnswerStore
from dsbs.teacher.servers import LocalModel
from dsbs.teacher.sets import ExtractSettings, extract, read_set

NAMES = [
    '../x',
    '..',
    '.',
    '',
    '/etc',
    '/etc/passwd',
    'a/b',
    'a\\b',
    'C:x',
    '~nobody/x',
    'x' * 300,
    'x/' * 200,
    'x\0y',
    'x\ny',
    'x.',
    'x ',
    ' x',
    '-x',
    'CON',
    '\u202eabc',
    'same_kind',
    'Same_Kind',
    's\u0430me_kind',
    'same_kind.',
    'same_kind ',
    'same-kind',
    'same_k\u0131nd',
    '\uff53ame_kind',
    'cafe\u0301',
    'caf\u00e9',
]


# names


def test_a_file_name_stays_in_its_folder_and_is_nobody_elses(tmp_path):
    made = {name: file_name(name) for name in [*NAMES, *map(file_name, NAMES)]}
    for name in made.values():
        assert (
            len(name) <= 64
            and (tmp_path / name).resolve().parent == tmp_path.resolve()
            and not name.startswith(('.', '-'))
        )
        (tmp_path / name).mkdir()
    assert len({name.casefold() for name in made.values()}) == len(made)
    assert file_name('gpt-neox-20b') == 'gpt-neox-20b'


@pytest.mark.parametrize('name', NAMES)
def test_a_name_of_a_task_is_one_that_we_know_or_a_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if name in TASKS:
        return
    with pytest.raises(UsageError) as e:
        load_task(name)
    assert '\n' not in str(e.value) and len(str(e.value)) < 500


@pytest.mark.parametrize('name', [n for n in NAMES if n != 'same-kind'])
def test_a_task_of_ones_own_is_named_plainly(name, tmp_path):
    if name == 'CON' or name == '-x':
        return
    (tmp_path / 'task.toml').write_text(f'name = {json.dumps(name)}\ninstruction = "Say."\nanswer = "text"\n')
    with pytest.raises(UsageError) as e:
        read_task_file(tmp_path)
    assert '\n' not in str(e.value)


@pytest.mark.parametrize(
    'name',
    [
        *NAMES,
        'google/../t5-base',
        '../t5-base',
        't5-../../etc',
        't5-b\u0430se',
        'T5-base',
        't5-base.',
        't5--base',
        'google/t5-' + 'x' * 300,
    ],
)
def test_a_name_of_a_student_stays_in_the_hubs_cache(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hub_name(name) is None
    with pytest.raises(UsageError) as e:
        check_student(name)
    assert '\n' not in str(e.value) and len(str(e.value)) < 500


@pytest.mark.parametrize('revision', ['../x', '/etc', 'a/../b', 'a b', 'x' * 300, 'm\u0430in', 'a//b', 'a\0'])
def test_a_revision_stays_in_the_hubs_cache(revision):
    with pytest.raises(UsageError, match='should be a branch, a tag or a commit'):
        RunSpec(student='t5-base', revision=revision)
    for good in ('', 'main', 'refs/pr/2', 'v1.0', 40 * 'a'):
        RunSpec(student='t5-base', revision=good)


@pytest.mark.parametrize('name', NAMES)
def test_a_rationale_set_by_default_is_one_models_alone(name, main, tmp_path, monkeypatch):
    import dsbs.teacher.sets

    outs = []
    monkeypatch.setattr(dsbs.teacher.sets, 'Server', lambda url, model, *more: model)

    def asked(task, split, backend, store, out, *more):
        outs.append(out)
        raise KeyboardInterrupt

    monkeypatch.setattr(dsbs.teacher.sets, 'extract', asked)
    for model in (name, name.upper(), name + '-b'):
        main('extract', 'same_kind', '--base-url', 'http://localhost:9/v1', f'--model={model}')
    home = (tmp_path / 'runs' / 'rationales' / 'same_kind').resolve()
    assert all(o.resolve().parent == home for o in outs) and len({str(o).casefold() for o in outs}) == len(
        {name, name.upper(), name + '-b'}
    )


class Simulated:
    endpoint = 'simulated'

    def __init__(self, model):
        self.model, self.asked = model, 0

    async def ask(self, question, sampling):
        self.asked += 1
        return Answer('Hm. So the answer is yes.')


def test_two_models_never_share_a_rationale_set(tmp_path):
    task, store = load_task('same_kind'), AnswerStore(tmp_path / 'answers.sqlite')

    def call(model, out=tmp_path / 'set', task=task):
        backend = Simulated(model)
        return extract(task, 'train', backend, store, out, ExtractSettings(limit=2)), backend.asked

    call('a/b')
    before = {p.name: p.read_bytes() for p in (tmp_path / 'set').iterdir()}
    for model, other in (('a-b', task), ('A/b', task), ('a/b', load_task('heavier_than'))):
        with pytest.raises(UsageError, match='name another folder'):
            call(model, task=other)
    assert {p.name: p.read_bytes() for p in (tmp_path / 'set').iterdir()} == before
    assert call('a/b')[0]['sent'] == 0
    for bad in (tmp_path / ('x' * 300), tmp_path / 'set' / 'train.jsonl' / 'x'):
        with pytest.raises(UsageError, match='no folder for a rationale set'):
            call('a/b', bad)
    for bad in ('x' * 300, '~nobody/x', '/etc', '../x'):
        with pytest.raises(UsageError, match='no rationale set'):
            read_set(bad, task, 'train')


@pytest.mark.parametrize(
    'name, why',
    [
        ('x' * 300, 'name too long'),
        ('.', 'something already'),
        ('..', 'something already'),
        ('/etc', 'something already'),
        ('file', 'something already'),
    ],
)
def test_where_a_student_cannot_be_saved_is_said_before_it_is_trained(name, why, main, tmp_path, monkeypatch):
    import dsbs.runs.saved

    monkeypatch.setattr(dsbs.runs.saved, 'train_runs', lambda *any: pytest.fail('it was trained'))
    (tmp_path / 'file').write_text('mine')
    code, out, err = main('run', 'task=same_kind', '--save', tmp_path / name if name not in ('.', '..') else name)
    assert code == 2 and why in err and err.count('\n') == 1 and (tmp_path / 'file').read_text() == 'mine'


def test_runs_are_named_by_their_hash_alone(tmp_path):
    def own(folder, name):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / 'task.toml').write_text(f'name = "{name}"\ninstruction = "Say."\nanswer = "text"\n')
        (tmp_path / folder / 'train.jsonl').write_text(
            ''.join(json.dumps(dict(input=f'{folder} {i}', label='yes')) + '\n' for i in range(20))
        )
        return run_key(RunSpec(task=str(tmp_path / folder), method='standard'))

    keys = [own('a/shop', 'shop'), own('b/shop', 'shop'), own('c', 'Shop'), own('d d. ', 'shop_')]
    assert len(set(keys)) == 4 and all(len(k) == 64 and set(k) <= set('0123456789abcdef') for k in keys)


# weights and code


class Bomb:
    def __reduce__(self):
        return os.mkdir, (os.environ['DSBS_TEST_BOMB'],)


CODE = 'import os; os.mkdir(os.environ["DSBS_TEST_BOMB"])\n'


@pytest.fixture
def model(model_folder, tmp_path, monkeypatch):
    "A folder with a model; whatever code of it ran made another folder, `bomb`."
    monkeypatch.setenv('DSBS_TEST_BOMB', str(tmp_path / 'bomb'))
    monkeypatch.setenv('HF_MODULES_CACHE', str(tmp_path / 'modules'))
    yield Path(shutil.copytree(model_folder, tmp_path / 'model'))
    assert not (tmp_path / 'bomb').exists()


def change(path, **settings):
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def pickled(folder, name='pytorch_model.bin'):
    (folder / name).write_bytes(pickle.dumps({'weight': Bomb()}))


def only_pickled(folder, name):
    (folder / 'model.safetensors').unlink()
    pickled(folder, name)


def own_code(folder, file, **names):
    (folder / 'their_code.py').write_text(CODE + 'class X: pass\n')
    change(folder / file, auto_map=names)


def own_generate(folder):
    (folder / 'custom_generate').mkdir()
    (folder / 'custom_generate' / 'generate.py').write_text(CODE + 'def generate(*a, **k): pass\n')


def pointing(folder, part):
    (folder / 'model.safetensors').rename(folder.parent / 'outside.safetensors')
    (folder / 'model.safetensors.index.json').write_text(
        json.dumps(dict(metadata={}, weight_map={'shared.weight': part}))
    )
    (folder / 'x.safetensors').write_bytes(b'')


UNFIT = {
    'pickled weights, .pt': (lambda f: only_pickled(f, 'model.pt'), 'model.pt is'),
    'pickled weights, .pkl': (lambda f: only_pickled(f, 'model.pkl'), 'model.pkl is'),
    'own configuration': (
        lambda f: own_code(f, 'config.json', AutoConfig='their_code.X', AutoModelForSeq2SeqLM='their_code.X'),
        'auto_map in config.json',
    ),
    'own tokenizer': (
        lambda f: own_code(f, 'tokenizer_config.json', AutoTokenizer=['their_code.X', None]),
        'auto_map in tokenizer_config.json',
    ),
    'own tokenizer from the hub': (
        lambda f: change(
            f / 'tokenizer_config.json', auto_map=dict(AutoTokenizer=['someone/else--their_code.X', None])
        ),
        'auto_map in tokenizer_config.json',
    ),
    'own generation': (own_generate, 'custom_generate'),
    'weights outside': (lambda f: pointing(f, '../outside.safetensors'), 'do not lie in the folder'),
    'weights elsewhere': (lambda f: pointing(f, str(f.parent / 'outside.safetensors')), 'do not lie in the folder'),
    'no settings': (lambda f: (f / 'config.json').unlink(), 'no config.json'),
    'broken settings': (lambda f: (f / 'config.json').write_text('{"model_type":'), 'config.json is not JSON'),
}


@pytest.mark.parametrize('name', UNFIT)
def test_a_model_that_could_run_code_is_refused_with_the_reason(name, model):
    spoil, why = UNFIT[name]
    spoil(model)
    for call in (
        lambda: RunSpec(student=str(model)),
        lambda: student_hash(str(model)),
        lambda: make_student(str(model)),
        lambda: LocalModel(str(model)),
    ):
        with pytest.raises(UsageError) as e:
            call()
        assert why in str(e.value) and '\n' not in str(e.value)


@pytest.mark.parametrize('zipped', [True, False])
def test_a_bin_that_holds_code_is_not_run(zipped, model):
    "Torch's restricted unpickler stops at it: when the weights are read, and before a key is made of them."
    import torch

    (model / 'model.safetensors').unlink()
    torch.save({'weight': Bomb()}, model / 'pytorch_model.bin', _use_new_zipfile_serialization=zipped)
    RunSpec(student=str(model))
    for call in (lambda: make_student(str(model)), lambda: LocalModel(str(model))):
        with pytest.raises(UsageError) as e:
            call()
        assert 'pytorch_model.bin wants to run code of its own (posix.mkdir)' in str(e.value) and '\n' not in str(
            e.value
        )


def test_beside_safetensors_pickled_weights_are_not_touched(model):
    for name in ('pytorch_model.bin', 'training_args.bin', 'optimizer.pt', 'rng_state.pth', 'scheduler.pkl'):
        pickled(model, name)
    check_model(model, 'student')
    student, _ = make_student(str(model))
    assert student.num_parameters() and LocalModel(str(model)).llm.num_parameters() == student.num_parameters()


@pytest.mark.parametrize('name', ['pickled weights', 'own configuration', 'own tokenizer', 'own generation'])
def test_nothing_in_the_hubs_cache_is_run_either(name, model, tmp_path, monkeypatch):
    import huggingface_hub.constants
    import huggingface_hub.file_download

    spoil, why = (lambda f: only_pickled(f, 'pytorch_model.bin'), '') if name == 'pickled weights' else UNFIT[name]
    spoil(model)
    at = tmp_path / 'cache' / 'models--google--t5-v1_1-small'
    shutil.copytree(model, at / 'snapshots' / (40 * 'a'))
    (at / 'refs').mkdir()
    (at / 'refs' / 'main').write_text(40 * 'a')
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)
    for call in (lambda: make_student('t5-v1_1-small'), lambda: LocalModel('google/t5-v1_1-small')):
        with pytest.raises(UsageError) as e:
            call()
        assert why in str(e.value) and '\n' not in str(e.value)


def test_a_dataset_script_is_not_run(tmp_path, monkeypatch):
    monkeypatch.setenv('DSBS_TEST_BOMB', str(tmp_path / 'bomb'))
    folder = tmp_path / 'shop'
    folder.mkdir()
    (folder / 'shop.py').write_text(CODE)

    def refused(name, why):
        with pytest.raises(UsageError) as e:
            load_task(name)
        assert why in str(e.value) and '\n' not in str(e.value)

    refused(str(folder / 'shop.py'), 'a dataset script, which is not run')
    refused(str(folder), 'no task.toml (shop.py, like any dataset script, is not run)')
    (folder / 'task.toml').write_text('name = "shop"\ninstruction = "Say."\nanswer = "text"\n')
    refused(str(folder), 'train.jsonl is missing (shop.py, like any dataset script, is not run)')
    refused('someone/dataset', 'datasets of a hub are not loaded')
    (folder / 'train.jsonl').write_text(
        ''.join(json.dumps(dict(input=f'm {i}', label='yes')) + '\n' for i in range(20))
    )
    assert len(load_task(str(folder))['train']) and not (tmp_path / 'bomb').exists()
