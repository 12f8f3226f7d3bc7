"Fetching data: servers that fail, files that are there already, and doing without a network."

import hashlib
import http.server
import io
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest

from dsbs.data import fetch as fetching
from dsbs.data.fetch import FILES, SOURCES, FetchError, Source, blob_id, download, fetch, unpack

ROOT = Path(__file__).resolve().parents[2]
DATA = bytes(range(256)) * 2000
BLOB = hashlib.sha1(b'blob %d\0' % len(DATA) + DATA).hexdigest()


# archives


def zipped(*members):
    "A zip of (name, content)."
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, 'w', zipfile.ZIP_DEFLATED) as z:
        for name, content in members:
            z.writestr(name, content)
    return raw.getvalue()


def tree(folder):
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob('*'))
    }


def test_only_what_is_wanted_and_not_there_is_unpacked(tmp_path):
    (tmp_path / 'x.zip').write_bytes(
        zipped(
            ('top/', ''),
            ('top/svamp/svamp_train.json', '[1]'),
            ('top/svamp/llm/train_CoT_0.json', '[2]'),
            ('top/svamp/run.py', 'import os'),
            ('top/cqa/cqa_train.json', '[3]'),
            ('../svamp/../outside.json', 'x'),
        )
    )
    names = ['svamp/llm/train_CoT_0.json', 'svamp/svamp_train.json']
    placed, inside = unpack(tmp_path / 'x.zip', tmp_path / 'out', ['svamp'])
    assert placed == sorted(inside) == names, 'completions first, so that rows are never there without them'
    assert {n: c for n, c in tree(tmp_path / 'out').items() if c} == dict(zip(names, (b'[2]', b'[1]')))
    (tmp_path / 'out' / names[1]).write_text('mine')
    assert unpack(tmp_path / 'x.zip', tmp_path / 'out', ['svamp', 'cqa'])[0] == ['cqa/cqa_train.json']
    assert (tmp_path / 'out' / names[1]).read_text() == 'mine'


def test_a_full_disk_while_unpacking_leaves_nothing(tmp_path, monkeypatch):
    (tmp_path / 'x.zip').write_bytes(zipped(('svamp/a.json', '1'), ('svamp/b.json', '2')))

    def full(fd):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(fetching.os, 'fsync', full)
    with pytest.raises(OSError, match='No space left'):
        unpack(tmp_path / 'x.zip', tmp_path / 'out', ['svamp'])
    assert not [p for p in (tmp_path / 'out').rglob('*') if p.is_file()]


# servers that fail


class Server:
    "Serves `data` under every name; `faults` says how each request in turn goes wrong."

    def __init__(self, data=DATA, faults=(), ranges=True):
        self.data, self.faults, self.ranges, self.asked = data, list(faults), ranges, []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = 'HTTP/1.1'

            def log_message(self, *said):
                pass

            def do_GET(self):
                outer.answer(self)

        self.http = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        self.http.daemon_threads = True
        self.url = f'http://127.0.0.1:{self.http.server_port}/data'

    def __enter__(self):
        threading.Thread(target=self.http.serve_forever, kwargs=dict(poll_interval=0.01), daemon=True).start()
        return self

    def __exit__(self, *error):
        self.http.shutdown()
        self.http.server_close()

    def answer(self, h):
        asked, fault = h.headers.get('Range'), self.faults.pop(0) if self.faults else ''
        self.asked.append(asked)
        h.close_connection = True
        start = int(asked[6:-1]) if asked and self.ranges else 0
        if fault == 'reset':
            h.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
            h.connection.close()
            return
        if isinstance(fault, int):
            h.send_response(fault)
            h.send_header('Content-Length', '0')
            if fault == 429:
                h.send_header('Retry-After', '7')
            return h.end_headers()
        if start and start >= len(self.data):
            h.send_response(416)
            h.send_header('Content-Range', f'bytes */{len(self.data)}')
            h.send_header('Content-Length', '0')
            return h.end_headers()
        body = {'page': b'Please log in', 'page as data': b'<!DOCTYPE html><html>Please log in</html>'}.get(
            fault, self.data[start:]
        )
        h.send_response(206 if start else 200)
        if fault == 'page':
            h.send_header('Content-Type', 'text/html; charset=utf-8')
        h.send_header('Content-Length', str(len(body)))
        if start:
            h.send_header('Content-Range', f'bytes {start}-{len(self.data) - 1}/{len(self.data)}')
        h.end_headers()
        try:
            h.wfile.write(body[: len(body) // 2] if fault == 'cut' else body)
        except OSError:
            pass


@pytest.fixture
def get(tmp_path):
    "Download, with waits noted and not waited for."
    waits = []

    def call(server, blob=BLOB):
        return download(Source(server.url, blob, (), 'none'), tmp_path / 'data', waits.append)

    call.waits = waits
    return call


FAULTS = {
    'reset': ['reset', 'reset'],
    'cut': ['cut', 'cut', 'cut', 'cut', 'cut', 'cut'],
    'busy': [503, 500, 429],
    'page': ['page'],
    'page called data': ['page as data'],
}


@pytest.mark.parametrize('name', FAULTS)
def test_what_passes_is_tried_again(tmp_path, get, name):
    with Server(faults=FAULTS[name]) as server:
        assert get(server).read_bytes() == DATA
        assert len(server.asked) == len(FAULTS[name]) + 1 and list(tree(tmp_path)) == ['data']
    if name == 'cut':
        assert server.asked[1] == f'bytes={len(DATA) // 2}-'  # it goes on where it was
    if name == 'busy':
        assert get.waits[2] == 7


LASTING = {'reset': 'no connection', 503: 'status 503'}


@pytest.mark.parametrize('fault', LASTING)
def test_what_lasts_ends_after_a_few_tries_with_one_line(tmp_path, get, fault):
    with Server(faults=[fault] * 100) as server:
        with pytest.raises(FetchError, match=LASTING[fault]) as e:
            get(server)
    assert (
        len(server.asked) == 5
        and get.waits == [1, 2, 4, 8]
        and not (tmp_path / 'data').exists()
        and '\n' not in str(e.value)
    )


def test_what_will_not_pass_is_not_tried_again(tmp_path, get):
    with Server(faults=[404]) as server:
        with pytest.raises(FetchError, match='status 404'):
            get(server)
    assert len(server.asked) == 1 and not tree(tmp_path)


@pytest.mark.parametrize('fault', ['', 'page', 'page as data'])
def test_a_wrong_file_is_fetched_once_more_and_never_used(tmp_path, get, fault):
    with Server(faults=[fault] * 2) as server:
        with pytest.raises(FetchError, match='git blob id.*twice over; none of it is used'):
            get(server, BLOB if fault else 40 * '0')
    assert server.asked == [None, None] and not tree(tmp_path)


def test_a_spoilt_part_is_healed(tmp_path, get):
    (tmp_path / 'data.part').write_bytes(b'spoilt' * 100)
    with Server() as server:
        assert get(server).read_bytes() == DATA and server.asked == ['bytes=600-', None]


def test_a_cut_download_goes_on_in_the_next_call(tmp_path, get):
    with Server(faults=['cut'] + ['reset'] * 5) as server:
        with pytest.raises(FetchError, match='what has come is kept'):
            get(server)
        assert not (tmp_path / 'data').exists() and (tmp_path / 'data.part').stat().st_size == len(DATA) // 2
        assert get(server).read_bytes() == DATA and server.asked[-1] == f'bytes={len(DATA) // 2}-'


def test_a_server_without_ranges_begins_anew(tmp_path, get):
    with Server(faults=['cut'] + ['reset'] * 5, ranges=False) as server:
        with pytest.raises(FetchError):
            get(server)
        assert get(server).read_bytes() == DATA and list(tree(tmp_path)) == ['data']


def test_a_full_disk_ends_it_and_keeps_what_has_come(tmp_path, get, monkeypatch):
    (tmp_path / 'data.part').write_bytes(DATA[:100])

    def full(*some):
        raise OSError(28, 'No space left on device')

    with Server() as server:
        with monkeypatch.context() as m:
            m.setattr(fetching, 'open', full, raising=False)
            with pytest.raises(OSError, match='No space left'):
                get(server)
        assert len(server.asked) == 1 and get(server).read_bytes() == DATA and server.asked[1] == 'bytes=100-'


def test_a_whole_part_only_needs_its_name(tmp_path, get):
    (tmp_path / 'data.part').write_bytes(DATA)
    with Server() as server:
        assert get(server).read_bytes() == DATA and server.asked == [f'bytes={len(DATA)}-']


# fetch and verify


@pytest.fixture
def authors(tmp_path, monkeypatch):
    "An archive and an ASDiv of our own, with their blob ids, behind a server."
    rows = {
        'svamp/svamp_train.json': b'{"input":"1 and 2?","label":"( 1.0 + 2.0 )"}\n' * 3,
        'svamp/llm/train_CoT_0.json': b'["a", "b", "c"]',
        'cqa/cqa_test.json': b'{"id":"q"}\n',
        'cqa/llm/test_CoT_0.json': b'["x"]',
    }
    archive = zipped(
        *((f'datasets/{n}', c) for n, c in rows.items()),
        ('datasets/.DS_Store', 'x'),
        ('__MACOSX/datasets/cqa/._cqa_test.json', 'x'),
        ('datasets/gpt-neox/cqa/test.json', '[]'),
    )
    problems = ''.join(
        f'<Problem ID="{i}"><Body>There are {i} {w}s.</Body><Question>How many?</Question>'
        f'<Answer>{i} ({w}s)</Answer><Formula>{i}={i}</Formula></Problem>'
        for i, w in enumerate(('ant', 'bee', 'cat', 'dog', 'elk'), 1)
    )
    xml = f'<?xml version="1.0" encoding="UTF-8" ?><C><ProblemSet>{problems}</ProblemSet></C>'.encode()
    held = tmp_path / 'held'
    held.mkdir()
    (held / 'datasets.zip').write_bytes(archive)
    (held / 'ASDiv.xml').write_bytes(xml)

    class Both(Server):
        def answer(self, h):
            self.data = xml if h.path.endswith('.xml') else archive
            super().answer(h)

    with Both() as server:
        at = server.url.removesuffix('data')
        monkeypatch.setattr(
            fetching,
            'SOURCES',
            {
                'datasets.zip': Source(at + 'datasets.zip', blob_id(held / 'datasets.zip'), ('svamp', 'cqa'), 'none'),
                'ASDiv.xml': Source(at + 'ASDiv.xml', blob_id(held / 'ASDiv.xml'), ('asdiv',), 'none'),
            },
        )
        files = {
            t: {n: hashlib.sha1(b'blob %d\0' % len(c) + c).hexdigest() for n, c in rows.items() if n.startswith(t)}
            for t in ('svamp', 'cqa')
        }
        files['cqa']['cqa/cqa_test.json'] = ''  # as is the case of e-SNLI's training rows
        monkeypatch.setattr(
            fetching, 'FILES', files | dict(asdiv={'asdiv/asdiv_train.json': '', 'asdiv/asdiv_test.json': ''})
        )
        server.held, server.rows, server.folder = held, rows, tmp_path / 'data'
        yield server


def placed(folder):
    return {n: c for n, c in tree(folder).items() if c is not None and n != 'fetched.json'}


def test_fetch_gets_what_is_missing_and_nothing_twice(authors, main):
    code, out, err = main('data', 'fetch', '--data-dir', authors.folder, '--json')
    found = json.loads(out)
    assert (
        code == 0
        and 'dsbs:' not in err
        and len(authors.asked) == 2
        and set(found['placed']) == {*authors.rows, 'asdiv/asdiv_train.json', 'asdiv/asdiv_test.json'}
    )
    there = placed(authors.folder)
    assert (
        {n: there[n] for n in authors.rows} == authors.rows
        and len(there) == 6
        and all(len(s['right']) == 2 for s in found['tasks'].values())
    )
    assert (
        main('data', 'fetch', '--data-dir', authors.folder)[0] == 0
        and len(authors.asked) == 2
        and main('data', 'verify', 'asdiv', 'cqa', '--data-dir', authors.folder)[0] == 0
    )
    (authors.folder / 'cqa/cqa_test.json').unlink()
    assert main('data', 'fetch', 'svamp', '--data-dir', authors.folder)[0] == 0 and len(authors.asked) == 2
    assert (
        main('data', 'fetch', 'cqa', '--data-dir', authors.folder)[0] == 0
        and len(authors.asked) == 3
        and placed(authors.folder) == there
    )
    assert not (authors.folder / '.fetch').exists()


def test_fetch_never_overwrites(authors, main):
    mine = authors.folder / 'svamp' / 'svamp_train.json'
    mine.parent.mkdir(parents=True)
    mine.write_text('{"input":"mine"}\n')
    code, out, err = main('data', 'fetch', 'svamp', '--data-dir', authors.folder)
    assert (
        code == 1
        and 'svamp/svamp_train.json: changed since, and not overwritten' in err
        and mine.read_text() == '{"input":"mine"}\n'
    )
    assert (authors.folder / 'svamp/llm/train_CoT_0.json').is_file()
    code, out, err = main('data', 'verify', '--data-dir', authors.folder)
    assert code == 1 and err.strip() == 'dsbs: changed: svamp/svamp_train.json'


def test_fetch_places_nothing_of_a_wrong_archive(authors, main, monkeypatch):
    url = fetching.SOURCES['datasets.zip'].url
    monkeypatch.setitem(fetching.SOURCES, 'datasets.zip', Source(url, 40 * '0', ('svamp', 'cqa'), 'none'))
    code, out, err = main('data', 'fetch', 'svamp', '--data-dir', authors.folder)
    assert code == 1 and err.strip().split('\n')[-1].startswith('dsbs: FetchError: ') and 'git blob id' in err
    assert not placed(authors.folder).keys() - {'.fetch/lock'}


def test_fetch_that_was_killed_goes_on(authors, main, monkeypatch):
    def killed(*some):
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(fetching.shutil, 'copyfileobj', killed)
        assert main('data', 'fetch', 'svamp', '--data-dir', authors.folder)[0] == 1
    assert not [p for p in (authors.folder / 'svamp').rglob('*') if p.is_file()]
    assert (
        main('data', 'fetch', 'svamp', '--data-dir', authors.folder)[0] == 0
        and not (authors.folder / '.fetch').exists()
    )


def test_two_fetches_at_once(authors):
    with fetching.fetching_alone(authors.folder):
        with pytest.raises(FetchError, match='another dsbs data fetch'):
            fetch(['svamp'], authors.folder)


def test_a_source_that_lacks_a_file_is_not_asked_again(authors, main, monkeypatch):
    monkeypatch.setitem(fetching.FILES['cqa'], 'cqa/cqa_train.json', '')
    for n in (1, 1):
        code, out, err = main('data', 'fetch', 'cqa', '--data-dir', authors.folder)
        assert code == 1 and 'cqa/cqa_train.json: not in what was fetched' in err and len(authors.asked) == n


def test_verify_tells_what_is_wrong(main, tmp_path):
    assert main('data', 'verify', '--data-dir', tmp_path)[:2] == (
        0,
        f'{tmp_path}: no dataset there; dsbs data fetch gets them\n',
    )
    (tmp_path / 'svamp').mkdir()
    (tmp_path / 'svamp' / 'SVAMP.json').write_text('[]')
    (tmp_path / 'svamp' / 'mine.json').write_text('[]')
    code, out, err = main('data', 'verify', 'svamp', '--data-dir', tmp_path, '--json')
    states = json.loads(out)['tasks']['svamp']
    assert (
        code == 1
        and err
        == 'dsbs: changed: svamp/SVAMP.json; missing: svamp/svamp_train.json, svamp/svamp_test.json, '
        'svamp/llm/test_CoT_0.json and 2 more\n'
    )
    assert {s: len(n) for s, n in states.items()} == dict(right=0, changed=1, missing=5, unchecked=0, extra=1)
    assert main('data', 'verify', '../svamp')[0] == 2


def test_the_recorded_data_are_the_authors(main, recorded):
    code, out, err = main('data', 'verify', '--data-dir', recorded, '--json')
    states = json.loads(out)['tasks']
    assert (code, err) == (0, '') and not any(s['changed'] or s['unchecked'] for s in states.values())
    assert {n for s in states.values() for n in s['extra']} <= {'asdiv/ASDiv.xml'}, (
        'what the rows of asdiv are made from may lie beside them'
    )
    assert {t: len(s['right']) for t, s in states.items() if not s['missing']} == dict(cqa=14, svamp=6)
    manifest = Path(recorded) / 'MANIFEST.json'
    if not manifest.is_file():
        return
    known = json.loads(manifest.read_text())
    ids = {n: v['git_blob'] for part in ('present', 'absent_here') for n, v in known[part].items()}
    assert {n: b for files in FILES.values() for n, b in files.items() if b} == ids and SOURCES[
        'datasets.zip'
    ].blob == known['archive']['git_blob']
    assert known['commit'] in SOURCES['datasets.zip'].url and sum(len(s['right']) for s in states.values()) == len(
        known['present']
    )


# without a network

REFUSED = """import socket, sys
def refused(self, address, *more):
    if self.family == socket.AF_UNIX: return real(self, address)
    open(LOG, 'a').write(f'{address}\\n'); raise OSError(101, 'Network is unreachable (refused by a test)')
real, socket.socket.connect, socket.socket.connect_ex = socket.socket.connect, refused, refused
def unresolved(host, *more, **others):
    open(LOG, 'a').write(f'{host}\\n'); raise socket.gaierror(-2, 'Name or service not known (refused by a test)')
socket.getaddrinfo = unresolved
"""


@pytest.fixture
def offline(tmp_path):
    "Call the command where every connection is refused: (exit status, output, errors, connections tried)."

    def call(*args, code='import sys; from dsbs.tools.cli import main; sys.exit(main())', **settings):
        log = tmp_path / 'connections'
        log.unlink(missing_ok=True)
        (tmp_path / 'site').mkdir(exist_ok=True)
        (tmp_path / 'site' / 'sitecustomize.py').write_text(f'LOG = {str(log)!r}\n{REFUSED}')
        path = os.pathsep.join([str(tmp_path / 'site'), str(ROOT)])
        done = subprocess.run(
            [sys.executable, '-c', code, *map(str, args)],
            capture_output=True,
            text=True,
            timeout=200,
            cwd=ROOT,
            env=os.environ
            | dict(PYTHONPATH=path, DSBS_RUNS=str(tmp_path / 'runs'), HF_HOME=str(tmp_path / 'hf'))
            | settings,
        )
        return done.returncode, done.stdout, done.stderr, log.read_text().split('\n')[:-1] if log.exists() else []

    return call


TINY = (
    'run',
    '--json',
    'task=same_kind',
    'method=standard',
    'n_train=8',
    'max_steps=2',
    'batch_size=4',
    'eval_every=2',
    'max_target=32',
)


def test_the_network_is_refused(offline):
    "That the other tests would see a connection."
    for address, seen in (('http://127.0.0.1:9/x', ['127.0.0.1']), ('https://example.org/x', ['example.org'])):
        code, out, err, tried = offline(code=f'import urllib.request as u; u.urlopen({address!r})')
        assert code == 1 and 'refused by a test' in err and tried == seen


def test_a_data_folder_without_a_network(offline, authors, tmp_path, monkeypatch):
    "An archive that was brought along, unpacked and checked; with the addresses out of reach."
    for file, source in list(fetching.SOURCES.items()):
        monkeypatch.setitem(
            fetching.SOURCES,
            file,
            Source('https://nowhere.invalid/' + file, source.blob, source.tasks, 'none'),
        )

    def refused(*any):
        raise AssertionError('a connection')

    with monkeypatch.context() as m:
        m.setattr(socket.socket, 'connect', refused)
        m.setattr(socket, 'getaddrinfo', refused)
        found = fetch([], authors.folder, authors.held)
    assert len(found['placed']) == 6 and {p.name for p in authors.held.iterdir()} == {'datasets.zip', 'ASDiv.xml'}
    code, out, err, tried = offline('data', 'verify', 'asdiv', '--data-dir', authors.folder)
    assert code == 0 and not tried, err


@pytest.mark.slow
def test_recorded_data_train_without_a_network(offline, recorded):
    settings = [s for s in TINY if not s.startswith('task=')]
    code, out, err, tried = offline(*settings, 'task=svamp', '--data-dir', recorded)
    assert code == 0 and json.loads(out)['metrics']['steps'] == 2 and not tried, err


def test_a_model_folder_without_a_network(offline, model_folder):
    code, out, err, tried = offline(*TINY, f'student={model_folder}')
    assert code == 0 and json.loads(out)['metrics']['steps'] == 2 and not tried, err


@pytest.mark.slow
@pytest.mark.parametrize('told', ['', '1'])
def test_a_hub_cache_without_a_network(offline, model_folder, tmp_path, told):
    at = tmp_path / 'cache' / 'models--google--t5-v1_1-small'
    revision = 40 * 'a'
    shutil.copytree(model_folder, at / 'snapshots' / revision)
    (at / 'refs').mkdir()
    (at / 'refs' / 'main').write_text(revision)
    code, out, err, tried = offline(
        *TINY, 'student=t5-v1_1-small', HF_HUB_CACHE=str(tmp_path / 'cache'), HF_HUB_OFFLINE=told
    )
    assert code == 0 and json.loads(out)['metrics']['steps'] == 2 and not tried, (err, tried)
    if not told:
        return
    code, out, err, tried = offline(
        *TINY, 'student=t5-v1_1-large', HF_HUB_CACHE=str(tmp_path / 'cache'), HF_HUB_OFFLINE='1'
    )
    assert (
        code == 2
        and not tried
        and err.strip().split('\n')[-1].startswith("dsbs: student 't5-v1_1-large': google/t5-v1_1-large is not here")
    ), err
