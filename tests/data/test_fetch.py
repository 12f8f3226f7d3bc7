"Fetching data: hostile archives, servers that fail, and doing without a network."

import hashlib, http.server, io, json, os, re, shutil, socket, stat, struct, subprocess, sys, threading, zipfile
from pathlib import Path

import pytest

from dsbs.data import fetch as fetching
from dsbs.data.fetch import FILES, SOURCES, FetchError, Source, blob_id, download, fetch, read_asdiv, unpack

ROOT = Path(__file__).resolve().parents[2]
DATA = bytes(range(256)) * 2000
SHA = hashlib.sha256(DATA).hexdigest()


# hostile archives


def zipped(*members, stored=False):
    "A zip of (name or ZipInfo, content)."
    raw = io.BytesIO()
    with (
        pytest.warns(UserWarning)
        if len({getattr(n, 'filename', n) for n, _ in members}) < len(members)
        else zipfile.ZipFile(io.BytesIO(), 'w'),
        zipfile.ZipFile(raw, 'w', zipfile.ZIP_STORED if stored else zipfile.ZIP_DEFLATED) as z,
    ):
        for name, content in members:
            z.writestr(name, content)
    return raw.getvalue()


def of_kind(kind, content=b'/etc/passwd'):
    info = zipfile.ZipInfo('data/thing')
    info.create_system = 3
    info.external_attr = (kind | 0o777) << 16
    return zipped((info, content))


def claiming(raw, size, packed):  # another size in both headers of the only member
    at = raw.index(b'PK\1\2')
    return (
        raw[:18]
        + struct.pack('<II', packed, size)
        + raw[26 : at + 20]
        + struct.pack('<II', packed, size)
        + raw[at + 28 :]
    )


def many(n):  # of empty members: written by hand, as zipfile takes seconds
    local, central = io.BytesIO(), io.BytesIO()
    for i in range(n):
        name = b'%06d' % i
        central.write(
            b'PK\1\2'
            + struct.pack('<4B4HL2L5H2L', 20, 3, 20, 0, 0, 0, 0, 0, 0, 0, 0, 6, 0, 0, 0, 0, 0, local.tell())
            + name
        )
        local.write(b'PK\3\4' + struct.pack('<2B4H3L2H', 20, 0, 0, 0, 0, 0, 0, 0, 0, 6, 0) + name)
    start, size = local.tell(), central.tell()
    end64 = b'PK\6\6' + struct.pack('<Q2H2L4Q', 44, 45, 45, 0, 0, n, n, size, start)
    return (
        local.getvalue()
        + central.getvalue()
        + end64
        + b'PK\6\7'
        + struct.pack('<LQL', 0, start + size, 1)
        + b'PK\5\6'
        + struct.pack('<4H2LH', 0, 0, 65535, 65535, 2**32 - 1, 2**32 - 1, 0)
    )


GOOD = ('data/good.json', '[]')
SMALL = zipped(('data/a.json', 'text ' * 20), stored=True)
HOSTILE = {
    'leads out': (lambda: zipped(GOOD, ('../outside', 'x')), 'leads out of the folder'),
    'leads out below a folder': (lambda: zipped(GOOD, ('data/../../outside', 'x')), 'leads out of the folder'),
    'absolute': (lambda: zipped(GOOD, ('/tmp/outside', 'x')), 'absolute name'),
    'a drive': (lambda: zipped(GOOD, ('C:/outside', 'x')), 'a drive'),
    'backslashes': (lambda: zipped(GOOD, ('..\\outside', 'x')), 'a backslash'),
    'a symbolic link': (lambda: of_kind(stat.S_IFLNK), 'a link'),
    'a device': (lambda: of_kind(stat.S_IFCHR, b''), 'a device'),
    'a pipe': (lambda: of_kind(stat.S_IFIFO, b''), 'a device, a pipe'),
    'a name twice': (lambda: zipped(GOOD, GOOD), 'there twice'),
    'a name in another case': (lambda: zipped(GOOD, ('DATA/good.json', '[]')), 'there twice'),
    'a name written with other code points': (lambda: zipped(('caf\u00e9', '1'), ('cafe\u0301', '2')), 'there twice'),
    'a file that is a folder too': (lambda: zipped(('data', 'x'), ('data/good.json', '[]')), 'there twice'),
    '100,000 members': (lambda: many(100_000), '100000 members'),
    'a ratio over 100': (lambda: zipped(('data/zeros', b'\0' * 10**7)), 'grows more than 100 times'),
    'a ratio over 100 among others': (
        lambda: zipped(('data/zeros', b'\0' * 10**6), ('data/noise', os.urandom(10**6))),
        'grows more than 100 times',
    ),
    'over 2 GiB': (lambda: claiming(SMALL, 3 * 2**30, 2**30), 'bytes are more than 2147483648'),
    'bytes counted twice': (lambda: claiming(SMALL, 2**30, 2**30), 'grows more than 100 times'),
    'more bytes than it claims': (lambda: claiming(SMALL, 50, 50), 'damaged'),
    'fewer bytes than it claims': (lambda: claiming(SMALL, 150, 150), 'damaged'),
    'nested': (lambda: zipped(GOOD, ('data/inner', zipped(GOOD)), stored=True), 'an archive within the archive'),
    'nested tar': (
        lambda: zipped(GOOD, ('data/inner', b'x' * 257 + b'ustar' + b'y' * 500), stored=True),
        'an archive within the archive',
    ),
    'NUL in a name': (lambda: zipped(GOOD, ('data/nulX.json', '[]')).replace(b'nulX', b'nul\0'), 'cannot be seen'),
    'a line break in a name': (lambda: zipped(GOOD, ('data/a\nb', '[]')), 'cannot be seen'),
    'text turned round': (lambda: zipped(GOOD, ('data/\u202enosj.a', '[]')), 'cannot be seen'),
    'ends in a dot': (lambda: zipped(GOOD, ('data/good.json.', '[]')), 'ends in a dot or a space'),
    '300 characters': (lambda: zipped(GOOD, ('data/' + 300 * 'x', '[]')), 'too long'),
    'bad CRC': (lambda: SMALL.replace(b'text text', b'next text', 1), 'damaged'),
    'encrypted': (
        lambda: (r := SMALL)[:6] + b'\1' + r[7 : (at := r.index(b'PK\1\2')) + 8] + b'\1' + r[at + 9 :],
        'encrypted',
    ),
    'names that differ': (lambda: SMALL.replace(b'data/a', b'data/b', 1), 'damaged'),
    'cut': (lambda: SMALL[: len(SMALL) // 2], 'damaged'),
    'no archive': (lambda: b'<html>not found</html>', 'damaged'),
}


def tree(folder):
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob('*'))
    }


@pytest.mark.parametrize('name', HOSTILE)
def test_a_hostile_archive_is_refused_and_leaves_nothing(tmp_path, name):
    make, why = HOSTILE[name]
    inner = tmp_path / 'a' / 'b'
    inner.mkdir(parents=True)
    (inner / 'x.zip').write_bytes(make())
    before, outside = tree(tmp_path), Path('/tmp/outside').exists()
    with pytest.raises(FetchError, match=re.escape(why)) as e:
        unpack(inner / 'x.zip', inner / 'out')
    assert tree(tmp_path) == before and Path('/tmp/outside').exists() == outside and '\n' not in str(e.value)


def test_a_good_archive_is_unpacked_whole_and_only_what_is_wanted(tmp_path):
    (tmp_path / 'x.zip').write_bytes(
        zipped(('top/', ''), ('top/a.json', '[1]'), ('top/b/c.json', '[2]'), ('top/run.py', 'import os'))
    )
    assert unpack(
        tmp_path / 'x.zip', tmp_path / 'out', lambda n: n.removeprefix('top/') if n.endswith('.json') else None
    ) == ['a.json', 'b/c.json']
    assert tree(tmp_path / 'out') == {'a.json': b'[1]', 'b': None, 'b/c.json': b'[2]'}
    with pytest.raises(FetchError, match='there already'):
        unpack(tmp_path / 'x.zip', tmp_path / 'out')


def test_a_full_disk_while_unpacking_leaves_nothing(tmp_path, monkeypatch):
    (tmp_path / 'x.zip').write_bytes(zipped(('a', '1'), ('b', '2')))

    def full(fd):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(fetching.os, 'fsync', full)
    with pytest.raises(OSError, match='No space left'):
        unpack(tmp_path / 'x.zip', tmp_path / 'out')
    assert list(tree(tmp_path)) == ['x.zip']


# servers that fail


class Server:
    "Serves `data` under every name; `faults` says how each request in turn goes wrong."

    def __init__(self, data=DATA, faults=(), etag='"1"', ranges=True):
        self.data, self.faults, self.etag, self.ranges, self.asked = data, list(faults), etag, ranges, []
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
        start = int(asked[6:-1]) if asked and self.ranges and h.headers.get('If-Range', self.etag) == self.etag else 0
        if fault == 'reset':
            h.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
            h.connection.close()
            return
        if isinstance(fault, int):
            h.send_response(fault)
            h.send_header('Content-Length', '0')
            if fault == 302:
                h.send_header('Location', self.to)
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
        if self.etag:
            h.send_header('ETag', self.etag)
        if fault != 'endless':
            h.send_header('Content-Length', str(len(body)))
        if start:
            h.send_header(
                'Content-Range', f'bytes {start + (fault == "shifted")}-{len(self.data) - 1}/{len(self.data)}'
            )
        h.end_headers()
        try:
            if fault == 'endless':
                while True:
                    h.wfile.write(body)
            h.wfile.write(body[: len(body) // 2] if fault == 'cut' else body)
        except OSError:
            pass


@pytest.fixture
def get(tmp_path):
    "Download, with waits noted and not waited for."
    waits = []

    def call(server, **known):
        return download(server.url, tmp_path / 'data', sleep=waits.append, timeout=5, **known)

    call.waits = waits
    return call


FAULTS = {
    'reset': ['reset', 'reset'],
    'cut': ['cut', 'cut', 'cut', 'cut', 'cut', 'cut'],
    'busy': [503, 500, 429],
    'page': ['page'],
    'page called data': ['page as data'],
    'shifted': ['cut', 'shifted'],
}


@pytest.mark.parametrize('name', FAULTS)
def test_what_passes_is_tried_again(tmp_path, get, name):
    with Server(faults=FAULTS[name]) as server:
        assert get(server, sha256=SHA).read_bytes() == DATA
        assert len(server.asked) == len(FAULTS[name]) + 1 and list(tree(tmp_path)) == ['data']
    if name == 'cut':
        assert server.asked[1] == f'bytes={len(DATA) // 2}-'  # it goes on where it was
    if name == 'busy':
        assert get.waits[2] == 7


LASTING = {
    'reset': 'no connection',
    503: 'status 503',
    'page': 'a web page instead of data',
    'page as data': 'a web page instead of data',
}


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


@pytest.mark.parametrize(
    'known, why',
    [
        (dict(sha256=64 * '0'), 'sha256'),
        (dict(blob=40 * '0'), 'git blob id'),
        (dict(size=len(DATA) + 1), 'bytes and not'),
    ],
)
def test_a_wrong_checksum_is_fetched_once_more_and_never_used(tmp_path, get, known, why):
    with Server() as server:
        with pytest.raises(FetchError, match=f'{why}.*twice over; none of it is used'):
            get(server, **known)
    assert server.asked == [None, None] and not tree(tmp_path)


def test_a_spoilt_part_is_healed(tmp_path, get):
    (tmp_path / 'data.part').write_bytes(b'spoilt' * 100)
    with Server() as server:
        assert get(server, sha256=SHA).read_bytes() == DATA and server.asked == ['bytes=600-', None]


def test_a_cut_download_goes_on_in_the_next_call(tmp_path, get):
    with Server(faults=['cut'] + ['reset'] * 5) as server:
        with pytest.raises(FetchError, match='what has come is kept'):
            get(server, sha256=SHA)
        assert not (tmp_path / 'data').exists() and (tmp_path / 'data.part').stat().st_size == len(DATA) // 2
        assert get(server, sha256=SHA).read_bytes() == DATA and server.asked[-1] == f'bytes={len(DATA) // 2}-'


def test_a_file_that_changed_meanwhile_or_a_server_without_ranges_begins_anew(tmp_path, get):
    for change in (dict(etag='"2"', data=DATA[::-1]), dict(ranges=False, data=DATA[::-1])):
        with Server(faults=['cut'] + ['reset'] * 5) as server:
            with pytest.raises(FetchError):
                get(server)
            vars(server).update(change)
            assert get(server).read_bytes() == DATA[::-1]
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()


def test_a_whole_part_only_needs_its_name(tmp_path, get):
    (tmp_path / 'data.part').write_bytes(DATA)
    with Server() as server:
        assert get(server, sha256=SHA).read_bytes() == DATA and server.asked == [f'bytes={len(DATA)}-']


@pytest.mark.parametrize('fault', ['', 'endless'])
def test_more_bytes_than_expected_are_not_taken(tmp_path, get, fault, monkeypatch):
    monkeypatch.setattr(fetching, 'MAX_BYTES', 2 * len(DATA))
    with Server(faults=[fault]) as server:
        with pytest.raises(FetchError, match='more than the 1000 expected|goes on after the 1000'):
            get(server, size=1000)
    with Server(faults=['endless']) as server:
        with pytest.raises(FetchError, match='goes on after all that we take'):
            get(server)
    assert not (tmp_path / 'data').exists() and not (tmp_path / 'data.part').exists()


@pytest.mark.parametrize('to', ['file:///etc/passwd', 'ftp://example.org/x', 'http://example.org/x'])
def test_a_server_may_not_send_us_anywhere(tmp_path, get, to):
    with Server(faults=[302]) as server:
        server.to = to
        with pytest.raises(FetchError, match='only https is'):
            get(server)
    with pytest.raises(FetchError, match='only https is'):
        download(to, tmp_path / 'data')


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
        f'<Problem ID="{i}"><Body>There are {i} {w}s.</Body><Question>How many?</Question><Answer>{i} ({w}s)</Answer><Formula>{i}={i}</Formula></Problem>'
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
                'ASDiv.xml': Source(at + 'ASDiv.xml', blob_id(held / 'ASDiv.xml'), ('asdiv',), 'none', len(xml)),
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


@pytest.mark.parametrize('spoil', ['archive', 'member'])
def test_fetch_places_nothing_of_a_wrong_archive(authors, main, monkeypatch, spoil):
    if spoil == 'archive':
        monkeypatch.setitem(
            fetching.SOURCES,
            'datasets.zip',
            Source(fetching.SOURCES['datasets.zip'].url, 40 * '0', ('svamp', 'cqa'), 'none'),
        )
    else:
        monkeypatch.setitem(fetching.FILES['svamp'], 'svamp/svamp_train.json', 40 * '0')
    code, out, err = main('data', 'fetch', 'svamp', '--data-dir', authors.folder)
    assert (
        code == 1
        and err.strip().split('\n')[-1].startswith('dsbs: FetchError: ')
        and 'git blob id' in err
        and not placed(authors.folder).keys() - {'.fetch/lock', '.fetch/datasets.zip'}
    )


def test_fetch_that_was_killed_goes_on(authors, main, monkeypatch):
    def killed(*some):
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(fetching, '_place', killed)
        assert main('data', 'fetch', 'svamp', '--data-dir', authors.folder)[0] == 1
    assert not (authors.folder / 'svamp').exists()
    assert (
        main('data', 'fetch', 'svamp', '--data-dir', authors.folder)[0] == 0
        and not (authors.folder / '.fetch').exists()
    )


def test_two_fetches_at_once(authors):
    with fetching._alone(authors.folder):
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
        == 'dsbs: changed: svamp/SVAMP.json; missing: svamp/svamp_train.json, svamp/svamp_test.json, svamp/llm/test_CoT_0.json and 2 more\n'
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


@pytest.mark.parametrize(
    'text',
    [
        '<!DOCTYPE c [<!ENTITY a "ha">]><c>&a;</c>',
        '<!DOCTYPE c SYSTEM "file:///etc/passwd"><c/>',
        '<c><Problem>',
        'no xml',
        '',
        '<c></c>',
    ],
)
def test_hostile_xml(tmp_path, text):
    (tmp_path / 'x.xml').write_text(text)
    with pytest.raises(FetchError) as e:
        read_asdiv(tmp_path / 'x.xml')
    assert '\n' not in str(e.value)


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
    "Call the command where every connection is refused: (exit status, standard output, standard error, connections tried)."

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
            Source('https://nowhere.invalid/' + file, source.blob, source.tasks, 'none', source.size),
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
    at = tmp_path / 'cache' / 'models--google--t5-v1_1-base'
    revision = 40 * 'a'
    shutil.copytree(model_folder, at / 'snapshots' / revision)
    (at / 'refs').mkdir()
    (at / 'refs' / 'main').write_text(revision)
    code, out, err, tried = offline(
        *TINY, 'student=t5-v1_1-base', HF_HUB_CACHE=str(tmp_path / 'cache'), HF_HUB_OFFLINE=told
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
        and err.strip().split('\n')[-1].startswith("dsbs: student 't5-v1_1-large' could not be loaded")
    ), err
