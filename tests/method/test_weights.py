"A pretrained student's weights: as they lie on a hub of our own, fetched once, read without running code, named."

import errno
import importlib
import json
import os
import pickle
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import huggingface_hub
import huggingface_hub.constants as constants
import pytest
import torch
from small_t5 import own_task
from stub_hub import NAME, OTHERS, Hub, as_bin, forms, settings, state, tiny
from transformers import T5Config

from dsbs import hub as rooms
from dsbs.evidence.plan import is_made, missing_weights
from dsbs.hub import PINS, are_here, convert_folder, fetch_weights, hub_folder, hub_name, our_folder, weight_files
from dsbs.method.student import make_student
from dsbs.records import UsageError, WorkFailed, find_folders
from dsbs.runs.experiments import records_here, run, run_all
from dsbs.runs.specs import RunSpec, run_key
from dsbs.runs.verifying import verify

ROOT = Path(__file__).resolve().parents[2]
FORMS = ('.bin', '.bin of before torch 1.6', 'safetensors', '.bin in parts', 'safetensors in parts')
TINY = dict(task='same_kind', n_train=8, batch_size=4, max_steps=3, eval_every=3, student='t5-v1_1-small')
CLOSED = 'http://127.0.0.1:9'


@pytest.fixture(scope='session')
def made(tmp_path_factory):
    "Form -> file -> content, and the files beside them."
    return forms(tmp_path_factory.mktemp('forms')), settings()


@pytest.fixture
def at(tmp_path, monkeypatch):
    "Ask a hub at an address, with a cache of its own, in this process."

    def set_up(url):
        monkeypatch.setattr(constants, 'ENDPOINT', url)
        monkeypatch.setattr(constants, 'HUGGINGFACE_CO_URL_TEMPLATE', url + '/{repo_id}/resolve/{revision}/{filename}')
        monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'hub'))
        monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
        monkeypatch.setenv('DSBS_RUNS', str(tmp_path / 'runs'))

    set_up(CLOSED)
    return set_up


@pytest.fixture
def serving(made, at):
    "A hub where main has one form and the open pull request another."
    files, beside = made
    models = {NAME: {'main': beside | files['.bin'] | OTHERS, 'refs/pr/1': beside | files['safetensors']}}
    with Hub(models) as found:
        at(found.url)
        yield found


def files_of(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob('*') if p.is_file() and p.suffix != '.lock')


def one_line(call, kind, *words):
    with pytest.raises(kind) as e:
        call()
    assert '\n' not in str(e.value) and all(word in str(e.value) for word in words), str(e.value)
    return str(e.value)


@pytest.mark.parametrize('form', FORMS)
def test_each_form_is_fetched_alone_and_is_the_same_student(form, made, at, capsys):
    files, beside = made
    with Hub({NAME: {'main': beside | files[form] | OTHERS}}) as server:
        at(server.url)
        student, tokenizer = make_student('t5-v1_1-small', dropout=0.0)
        got = {path.rpartition('/')[2] for command, path in server.asked if command == 'GET' and '/resolve/' in path}
        assert got == {*beside, *files[form]} and server.url in capsys.readouterr().err
        server.asked.clear()
        again, _ = make_student('t5-v1_1-small', dropout=0.0)
        found = fetch_weights(NAME)
        assert not server.asked and found.commit == server.commit(NAME, 'main')
    same = tiny().state_dict()
    assert all(torch.equal(w, same[n]) for n, w in student.state_dict().items()) and len(same) == len(
        student.state_dict()
    )
    assert all(map(torch.equal, student.parameters(), again.parameters()))
    assert tokenizer('low income').input_ids[-1:] == [1] and weight_files(found.files)[0].endswith('.safetensors')


def test_all_forms_have_one_hash(made, at, tmp_path):
    files, beside = made
    hashes = set()
    for i, form in enumerate(FORMS):
        for name, data in (beside | files[form]).items():
            (tmp_path / str(i)).mkdir(exist_ok=True)
            (tmp_path / str(i) / name).write_bytes(data)
        first = rooms.hash_json(rooms.weight_digests(rooms.each_weight(tmp_path / str(i), 'x')))
        hashes |= {first, convert_folder(tmp_path / str(i), 'x').sha256}
    other = {n: w + 1e-3 if n == 'decoder.final_layer_norm.weight' else w for n, w in state().items()}
    assert len(hashes) == 1 and rooms.hash_json(rooms.weight_digests(other.items())) not in hashes


def test_safetensors_are_preferred_and_nothing_is_fetched_twice(made, at):
    files, beside = made
    with Hub({NAME: {'main': beside | files['.bin'] | files['safetensors in parts']}}) as server:
        at(server.url)
        fetch_weights(NAME)
        assert not [path for _, path in server.asked if path.endswith('.bin')]


def test_a_revision_is_a_branch_a_commit_or_a_pull_request(serving):
    main, pull = (serving.commit(NAME, revision) for revision in ('main', 'refs/pr/1'))
    branch, by_commit, by_pull = (fetch_weights(NAME, revision) for revision in ('main', main, 'refs/pr/1'))
    assert branch == by_commit and (branch.commit, by_pull.commit) == (main, pull)
    assert branch.sha256 == by_pull.sha256 and branch.folder != by_pull.folder
    serving.asked.clear()
    serving.models[NAME]['main'] = serving.models[NAME]['refs/pr/1']
    assert fetch_weights(NAME).commit == main and not serving.asked, 'a branch is resolved once'


def test_the_pinned_commit_is_meant_where_none_is_named(made, at):
    files, beside = made
    base, other = 'google/t5-v1_1-base', 'c' * 40
    with Hub({base: {PINS[base]: beside | files['.bin'], other: beside | files['safetensors']}}) as server:
        at(server.url)
        assert fetch_weights(base).commit == fetch_weights(hub_name('t5-v1_1-base')).commit == PINS[base]
        assert fetch_weights(base, other).commit == other


def dsbs(*args, **env):
    program = 'import sys; from dsbs.tools.cli import main; sys.exit(main())'
    env = os.environ | dict(PYTHONPATH=str(ROOT), HF_HUB_OFFLINE='') | env
    done = subprocess.run(
        [sys.executable, '-c', program, *map(str, args)], capture_output=True, text=True, cwd=ROOT, env=env
    )
    return done.returncode, done.stdout, done.stderr


def test_a_run_from_a_clean_cache_then_without_a_network(serving, tmp_path):
    "The command, as a user has it: main holds only .bin."
    settings = ['run', '--json', *(f'{name}={value}' for name, value in TINY.items())]
    where = dict(HF_HOME=str(tmp_path / 'home'), HF_ENDPOINT=serving.url, DSBS_RUNS=str(tmp_path / 'one'))
    code, out, err = dsbs(*settings, **where)
    assert code == 0 and 'dsbs: fetching 5 files' in err, err
    first = json.loads(out)
    named = first['provenance']['weights']
    assert named['commit'] == serving.commit(NAME, 'main') and len(named['sha256']) == 64
    assert first['metrics']['steps'] == 3 and first['spec']['revision'] == ''
    serving.asked.clear()
    for more in (dict(HF_ENDPOINT=CLOSED), dict(HF_HUB_OFFLINE='1')):
        code, out, err = dsbs(*settings, **where | dict(DSBS_RUNS=str(tmp_path / next(iter(more)))) | more)
        again = json.loads(out)
        assert code == 0 and (again['key'], again['metrics']) == (first['key'], first['metrics']), err
        assert again['provenance']['weights'] == named
    shutil.rmtree(tmp_path / 'home')
    code, out, err = dsbs(*settings, **where | dict(HF_ENDPOINT=CLOSED))
    assert code == 0 and json.loads(out) == first and not serving.asked, 'what is recorded is not fetched again'


def test_get_and_convert_say_what_they_have(serving, main, tmp_path):
    status, out, err = main('weights', 'convert', 't5-v1_1-small')
    assert status == 2 and 'dsbs weights get t5-v1_1-small' in err and not serving.asked
    status, out, err = main('weights', 'get', 't5-v1_1-small', '--json')
    found = json.loads(out)
    commit = serving.commit(NAME, 'main')
    assert status == 0 and set(found) == {'name', 'commit', 'sha256', 'files', 'bytes', 'folder'}
    assert (found['name'], found['commit'], found['folder']) == (NAME, commit, str(our_folder(NAME, commit)))
    assert found['bytes'] == sum((Path(found['folder']) / name).stat().st_size for name in found['files'])
    serving.asked.clear()
    shutil.rmtree(tmp_path / 'dsbs-weights')
    assert json.loads(main('weights', 'convert', 't5-v1_1-small', '--json')[1]) == found and not serving.asked
    shutil.rmtree(tmp_path / 'hub' / f'models--{NAME.replace("/", "--")}' / 'blobs')
    assert json.loads(main('weights', 'get', 't5-v1_1-small', '--revision', commit, '--json')[1]) == found
    assert 'weights of sha256' in main('weights', 'get', 't5-v1_1-small')[1] and not serving.asked


def test_a_key_covers_the_weights_and_nothing_is_fetched_for_it(serving):
    spec = RunSpec(**TINY)
    one_line(lambda: run_key(spec), UsageError, 'its weights are not here: dsbs weights get t5-v1_1-small')
    lacking = list(missing_weights([spec, RunSpec(**TINY | dict(revision='refs/pr/1')), RunSpec()]))
    assert [m['get'].split(' (')[0] for m in lacking] == [
        'dsbs weights get t5-v1_1-small',
        'dsbs weights get t5-v1_1-small --revision refs/pr/1',
    ]
    assert not serving.asked and not is_made(spec, {}, find_folders())
    fetch_weights(NAME)
    first = run_key(spec)
    assert first != run_key(RunSpec(**TINY | dict(student='scratch-32x1'))) and not list(missing_weights([spec]))
    changed = {n: w + 1 if n.endswith('final_layer_norm.weight') else w for n, w in state().items()}
    serving.models[NAME]['main'] = serving.models[NAME]['main'] | {'pytorch_model.bin': as_bin(changed)}
    shutil.rmtree(hub_folder(NAME))
    fetch_weights(NAME)
    assert run_key(spec) != first


def test_a_recorded_run_is_known_without_its_weights(serving, tmp_path):
    spec = RunSpec(**TINY)
    record = run(spec)
    for kept in (hub_folder(NAME), our_folder(NAME, 'x').parent):
        shutil.rmtree(kept)
    serving.asked.clear()
    folders = find_folders()
    assert is_made(spec, records_here(folders.runs), folders) and run(spec) == record and run_all([spec]) == [record]
    assert not serving.asked


def test_a_file_that_changed_is_seen(serving):
    "What was found out counts only for the files that it was found for."
    found = fetch_weights(NAME)
    (found.folder / 'model.safetensors').write_bytes(b'cut')
    assert fetch_weights(NAME) == found and (found.folder / 'model.safetensors').stat().st_size > 3


def test_several_processes_may_fetch_at_once(serving, tmp_path):
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: fetch_weights(NAME), range(4)))
    assert all(one == found[0] for one in found) and files_of(our_folder(NAME, 'x').parent) == sorted(
        f'{found[0].commit}/{name}' for name in (*found[0].files, 'weights.json')
    )


def test_a_record_is_verified_from_the_weights_it_names(serving):
    record = run(RunSpec(**TINY))
    assert verify(record)['holds']
    other = json.loads(json.dumps(record))
    other['provenance']['weights']['sha256'] = '0' * 64
    one_line(lambda: verify(other), UsageError, 'the weights of t5-v1_1-small here are not those of the record')


# what goes wrong


class Bomb:
    def __reduce__(self):
        return os.mkdir, (os.environ['DSBS_TEST_BOMB'],)


@pytest.mark.parametrize('zipped', [True, False, None], ids=['torch', 'torch before 1.6', 'a plain pickle'])
def test_a_bin_that_would_run_code_is_refused_and_nothing_runs(zipped, serving, tmp_path, monkeypatch, main):
    monkeypatch.setenv('DSBS_TEST_BOMB', str(tmp_path / 'bomb'))
    held = state() | {'shared.weight': Bomb()}
    plain = pickle.dumps(held['shared.weight'])
    said = 'cannot be read' if zipped is None else 'wants to run code of its own (posix.mkdir)'
    data = plain if zipped is None else as_bin(held, _use_new_zipfile_serialization=zipped)
    serving.models[NAME]['main'] |= {'pytorch_model.bin': data}
    folder = tmp_path / 'folder'
    folder.mkdir()
    for name, content in serving.models[NAME]['main'].items():
        (folder / name).write_bytes(content)
    for student in ('t5-v1_1-small', str(folder)):
        for call in (
            lambda student=student: make_student(student),
            lambda student=student: run(RunSpec(**TINY | dict(student=student))),
        ):
            one_line(call, UsageError, 'pytorch_model.bin', said)
        for word in ('get', 'convert') if student == 't5-v1_1-small' else ('convert',):
            status, out, err = main('weights', word, student)
            last = err.strip().split('\n')[-1]
            assert status == 2 and not out and said in last
    assert not (tmp_path / 'bomb').exists() and not list((tmp_path / 'dsbs-weights').rglob('*.safetensors'))
    pickle.loads(plain)
    assert (tmp_path / 'bomb').exists(), 'else this would see nothing'


@pytest.mark.parametrize(
    'data', [b'', b'cut', b'version https://git-lfs.github.com/spec/v1\noid sha256:1\n', as_bin([1]), as_bin({'a': 1})]
)
def test_a_bin_that_is_none_is_said_so(data, serving):
    serving.models[NAME]['main'] |= {'pytorch_model.bin': data}
    one_line(lambda: fetch_weights(NAME), UsageError, 'pytorch_model.bin')


REFUSED = {  # what is wrong: the hub's answer, the error, the words
    'gated': ((403, 'GatedRepo'), UsageError, ['is gated', 'accept its terms at', 'hf auth login']),
    'missing': ((404, 'RepoNotFound'), UsageError, ['the hub has no google/t5-v1_1-small', 'hf auth login']),
    'not signed in': ((401, 'RepoNotFound'), UsageError, ['the hub has no google/t5-v1_1-small', 'hf auth login']),
    'no such revision': ((404, 'RevisionNotFound'), UsageError, ['has no revision main']),
    'broken': ((500, 'InternalError'), WorkFailed, ['cannot be read now', 'dsbs weights get']),
    'too many': ((429, 'TooMany'), WorkFailed, ['cannot be read now']),
}


@pytest.mark.parametrize('name', REFUSED)
def test_a_hub_that_refuses(name, serving):
    answer, kind, words = REFUSED[name]
    serving.fault = lambda path: answer if path.startswith('/api/models') else None
    one_line(lambda: make_student('t5-v1_1-small'), kind, "student 't5-v1_1-small'", *words)


def test_gated_files_of_a_model_that_is_shown(serving):
    serving.fault = lambda path: (403, 'GatedRepo') if '/resolve/' in path else None
    one_line(lambda: make_student('t5-v1_1-small'), UsageError, 'is gated')


def test_no_network_no_proxy_and_offline(at, monkeypatch, main):
    one_line(lambda: make_student('t5-v1_1-small'), WorkFailed, f'no connection to {CLOSED}', 'dsbs weights get')
    status, out, err = main('run', 'student=t5-v1_1-small')
    assert status == 1 and not out and err.count('\n') == 1
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    one_line(lambda: make_student('t5-v1_1-small'), UsageError, 'HF_HUB_OFFLINE is set', 'dsbs weights get')


def test_a_proxy_that_refuses(tmp_path, made):
    "A proxy of our own that lets nothing pass."
    with Hub({}, fault=lambda path: (407, 'ProxyAuthenticationRequired')) as proxy:
        where = dict(HF_HOME=str(tmp_path), HTTPS_PROXY=proxy.url, https_proxy=proxy.url, NO_PROXY='', no_proxy='')
        code, out, err = dsbs('weights', 'get', 't5-v1_1-small', HF_ENDPOINT='https://hub.invalid', **where)
    assert (
        code == 1
        and not out
        and err.count('\n') == 1
        and 'the proxy lets nothing through' in err
        and 'HTTPS_PROXY' in err
    ), err


def test_a_cut_download_is_said_and_the_next_call_goes_on(serving, monkeypatch):
    monkeypatch.setattr('huggingface_hub.file_download.time.sleep', lambda seconds: None)
    serving.fault = lambda path: 'cut' if path.endswith('.bin') else None
    one_line(lambda: fetch_weights(NAME), WorkFailed, 'cut', 'the same call')
    assert not are_here(NAME) and not (our_folder(NAME, 'x').parent).exists()
    serving.fault, serving.asked[:] = lambda path: None, []
    assert fetch_weights(NAME).commit == serving.commit(NAME, 'main')
    got = [path.rpartition('/')[2] for command, path in serving.asked if command == 'GET' and '/resolve/' in path]
    assert got == ['pytorch_model.bin']


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, 'No space left on device', 'model.safetensors')


def test_a_full_disk(serving, monkeypatch, tmp_path):
    with monkeypatch.context() as m:
        m.setattr(shutil, 'disk_usage', lambda path: shutil._ntuple_diskusage(10, 10, 10))
        one_line(lambda: fetch_weights(NAME), WorkFailed, '0.0 GB free', 'HF_HOME')
    with monkeypatch.context() as m:
        m.setattr(huggingface_hub, 'hf_hub_download', full)
        one_line(lambda: fetch_weights(NAME), WorkFailed, 'the disk is full', 'HF_HOME')
    commit = serving.commit(NAME, 'main')
    for writer in ('safetensors.torch.save_file', 'dsbs.hub.shutil.copyfile'):
        with monkeypatch.context() as m:
            m.setattr(writer, full)
            one_line(lambda: fetch_weights(NAME), WorkFailed, 'student' if False else 'the disk is full')
        assert not our_folder(NAME, commit).exists() and not files_of(tmp_path / 'dsbs-weights')
    serving.asked.clear()
    assert fetch_weights(NAME).commit == commit and not serving.asked


def test_a_revision_without_weights(serving):
    serving.models[NAME] = {'main': {'config.json': b'{}', 'tf_model.h5': b'tf'}, 'empty': {'README.md': b''}}
    one_line(lambda: fetch_weights(NAME), UsageError, 'holds no weights as model.safetensors or pytorch_model.bin')
    one_line(lambda: fetch_weights(NAME, 'empty'), UsageError, 'holds no config.json')


def test_errors_of_the_library_have_words():
    "Whichever HTTP library it stands on: the the errors have the same names."
    from huggingface_hub.errors import HFValidationError, HTTPError

    http = importlib.import_module(HTTPError.__module__.partition('.')[0])
    for error in (http.ConnectError('x'), http.ReadTimeout('x'), http.RemoteProtocolError('x')):
        assert 'no connection to' in str(rooms.what_would_help(error, NAME, 'main'))
    cut = OSError('Consistency check failed: file should be of size 9')
    assert 'it was cut' in str(rooms.what_would_help(cut, NAME, 'main'))
    assert 'is no name of a model' in str(rooms.what_would_help(HFValidationError('x'), 'a/b/c', ''))
    assert rooms.what_would_help(KeyError('x'), NAME, 'main') is None


# a folder


def as_downloaded(folder, files):
    "As `hf download NAME --local-dir FOLDER` leaves it."
    (folder / '.cache' / 'huggingface' / 'download').mkdir(parents=True)
    (folder / '.cache' / 'huggingface' / 'download' / 'config.json.metadata').write_text('commit\netag\n1.0\n')
    for name, data in (files | OTHERS).items():
        (folder / name).write_bytes(data)
    return folder


@pytest.mark.parametrize('form', ['.bin', '.bin in parts'])
def test_a_folder_with_only_bin_loads_trains_and_is_converted(form, made, tmp_path, at, main):
    files, beside = made
    folder = as_downloaded(tmp_path / 'model', beside | files[form])
    spec = RunSpec(**TINY | dict(student=str(folder)))
    before, record = run_key(spec), run(spec)
    assert record['key'] == before and record['metrics']['steps'] == 3
    status, out, err = main('weights', 'convert', folder, '--json')
    found = json.loads(out)
    assert status == 0 and found['commit'] == '' and found['sha256'] == record['provenance']['weights']['sha256'], err
    assert (folder / 'model.safetensors').is_file() and set(files[form]) <= {p.name for p in folder.iterdir()}
    again, _ = make_student(str(folder), dropout=0.0)
    assert all(torch.equal(w, tiny().state_dict()[n]) for n, w in again.state_dict().items())


def test_a_folder_that_cannot_be_written_to_stays_whole(made, tmp_path, at, monkeypatch):
    files, beside = made
    folder = as_downloaded(tmp_path / 'model', beside | files['.bin'])
    before = files_of(folder)
    monkeypatch.setattr('safetensors.torch.save_file', full)
    one_line(lambda: convert_folder(folder, 'student'), WorkFailed, 'the disk is full')
    assert files_of(folder) == before


BASE = dict(vocab_size=32128, d_model=768, d_kv=64, d_ff=2048, num_layers=12, num_heads=12)
WRITE = """import sys, torch
from transformers import T5Config, T5ForConditionalGeneration
sizes, path, zipped = eval(sys.argv[1]), sys.argv[2], sys.argv[3] == 'True'
weights = T5ForConditionalGeneration(T5Config(**sizes)).state_dict()
weights['lm_head.weight'] = torch.randn(sizes['vocab_size'], sizes['d_model'])  # T5 v1.1 has one of its own
torch.save(weights, path, _use_new_zipfile_serialization=zipped)
"""
MEASURE = """import json, sys
from dsbs.method.student import make_student
from dsbs.runs.experiments import run
from dsbs.runs.specs import make_spec

def peak():  # GB
    line = next(x for x in open('/proc/self/status') if x.startswith('VmHWM'))
    return int(line.split()[1]) * 1024 / 1e9

student, _ = make_student(sys.argv[1])
n, loading = student.num_parameters(), peak()
del student
record = run(make_spec(dict(x.split('=', 1) for x in sys.argv[2:])))
print(json.dumps(dict(n=n, loading=loading, training=peak(), steps=record['metrics']['steps'])))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path('/proc/self/status').exists(), reason='reads the peak of memory from /proc')
@pytest.mark.parametrize('zipped', [True, False], ids=['torch', 'torch before 1.6'])
def test_a_bin_of_the_size_of_t5_base_loads_within_3_gb_and_trains(zipped, made, tmp_path):
    "Real names and sizes, random weights, a vocabulary of which few pieces are used."
    beside = made[1]
    folder = as_downloaded(tmp_path / 'model', beside)
    config = T5Config(**BASE, feed_forward_proj='gated-gelu', decoder_start_token_id=0, tie_word_embeddings=False)
    (folder / 'config.json').write_text(config.to_json_string())
    asked = [
        sys.executable,
        '-c',
        WRITE,
        repr(BASE | dict(feed_forward_proj='gated-gelu')),
        folder / 'pytorch_model.bin',
    ]
    env = os.environ | dict(PYTHONPATH=str(ROOT), DSBS_RUNS=str(tmp_path / 'runs'), HF_HOME=str(tmp_path / 'hf'))
    subprocess.run([*map(str, asked), str(zipped)], check=True, env=env)
    own_task(tmp_path / 'task', n=24)
    settings = (
        TINY | dict(task=tmp_path / 'task', student=folder, max_steps=2, eval_every=2, batch_size=2, method='standard')
    ).items()
    call = [sys.executable, '-c', MEASURE, str(folder), *(f'{name}={value}' for name, value in settings)]
    done = subprocess.run(call, capture_output=True, text=True, env=env, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.strip().split('\n')[-1])
    print(found)
    assert 245e6 < found['n'] < 250e6 and found['loading'] < 3.0 and found['steps'] == 2, found
