"A figure's notebook that goes wrong: the command fails, and what was good before stays as it was."

import json

import nbformat
import psutil
import pytest

from dsbs.evidence import reporting
from dsbs.evidence.reporting import check_parameters, run_notebook
from dsbs.records import UsageError

PARAMETERS = '\n'.join(
    f'{name} = {default!r}'
    for name, default in dict(preset='recorded', workers=0, data_dir='', reports='', stage='').items()
)
DRAW = """from pathlib import Path
figure = Path(stage)/"figures"/"fig4_data_size_human_x.svg"
figure.parent.mkdir(parents=True)
figure.write_text("<svg>half</svg>")"""
BAD = {
    'kernel killed': ('import os, signal; os.kill(os.getpid(), signal.SIGKILL)', 'died'),
    'sys.exit(0)': ('import sys; sys.exit(0)', 'SystemExit'),
    'os._exit(0)': ('import os; os._exit(0)', 'died'),
    'endless cell': ('while True: pass', 'longer than 4 s'),
    'endless cell that will not be interrupted': (
        'while True:\n  try:\n    while True: pass\n  except BaseException: pass',
        'longer than 4 s',
    ),
    'error': ('raise ValueError("bad")', 'ValueError: bad'),
}


def notebook(path, *sources, tag='parameters'):
    cells = [nbformat.v4.new_code_cell(s, id=f'cell-{i}') for i, s in enumerate(sources)]
    cells[0].metadata['tags'] = [tag] if tag else []
    nbformat.write(
        nbformat.v4.new_notebook(
            cells=cells, metadata=dict(kernelspec=dict(name='python3', display_name='python3', language='python'))
        ),
        path,
    )
    return path


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob('*')) if p.is_file()}


def kernels():
    return [
        p
        for p in psutil.Process().children(recursive=True)
        if p.is_running() and p.status() != psutil.STATUS_ZOMBIE and 'ipykernel' in ' '.join(p.cmdline())
    ]


@pytest.mark.parametrize('fault', BAD)
def test_a_notebook_that_fails_leaves_the_good_one(fault, main, tmp_path, monkeypatch):
    source, words = BAD[fault]
    path = notebook(tmp_path / 'fig4_data_size_human.ipynb', PARAMETERS, DRAW, source, 'print("after")')
    monkeypatch.setattr(reporting, 'figure_notebooks', lambda names=(): [path])
    monkeypatch.setattr(reporting, 'check_preset', lambda path, preset: None)
    reports = tmp_path / 'reports'
    for name in ('figures/fig4_data_size_human_x.svg', 'notebooks/fig4_data_size_human.recorded.ipynb', 'index.html'):
        (reports / name).parent.mkdir(parents=True, exist_ok=True)
        (reports / name).write_text('good')
    before = files(reports)
    status, out, err = main(
        'reproduce',
        'fig4',
        '--preset',
        'recorded',
        '--cell-timeout',
        4 if 'endless' in fault else 600,
        '--reports',
        reports,
    )
    assert (
        status == 1
        and not out
        and words in err.splitlines()[-1]
        and err.splitlines()[-1].startswith('dsbs: RuntimeError: 1 of 1 figures failed')
    ), err[-2000:]
    assert files(reports) == before and not list(reports.glob('.*'))
    assert not kernels()


def test_the_same_notebook_without_the_fault_takes_its_place(main, tmp_path, monkeypatch):
    "So that it is the fault which keeps the others out."
    path = notebook(tmp_path / 'fig4_data_size_human.ipynb', PARAMETERS, DRAW, 'print("after")')
    monkeypatch.setattr(reporting, 'figure_notebooks', lambda names=(): [path])
    monkeypatch.setattr(reporting, 'check_preset', lambda path, preset: None)
    status, out, err = main('reproduce', 'fig4', '--preset', 'recorded', '--reports', tmp_path / 'reports')
    made = files(tmp_path / 'reports')
    assert (
        status == 0
        and made['figures/fig4_data_size_human_x.svg'] == b'<svg>half</svg>'
        and b'after' in made['notebooks/fig4_data_size_human.recorded.ipynb']
    ), err


@pytest.fixture
def no_kernel(monkeypatch):
    monkeypatch.setattr(
        reporting.papermill, 'execute_notebook', lambda *args, **kw: pytest.fail('a kernel was started')
    )


TYPED = """name: str = "x"  # a name
size: int = 1
rate: float = .5
fast: bool = False
seeds: list = []
settings: dict = {}
plain = 3
words = "a\""""


@pytest.mark.parametrize(
    'given, words',
    [
        (dict(sise=2), "no parameter 'sise': choose from name, size"),
        (dict(Size=2), "no parameter 'Size'"),
        ({'size ': 2}, "no parameter 'size '"),
        ({'': 1}, "no parameter ''"),
        ({'size=1;import os': 1}, 'no parameter'),
        (dict(size='2'), 'of type int'),
        (dict(size=2.5), 'of type int'),
        (dict(size=True), 'of type int'),
        (dict(size=None), 'of type int'),
        (dict(name=3), 'of type str'),
        (dict(rate='fast'), 'of type float'),
        (dict(fast=1), 'of type bool'),
        (dict(fast='true'), 'of type bool'),
        (dict(seeds='[1]'), 'of type list'),
        (dict(seeds=(1,)), 'of type list'),
        (dict(settings=[]), 'of type dict'),
        (dict(plain='4'), 'of type int'),
        (dict(words=4), 'of type str'),
    ],
    ids=str,
)
def test_an_unknown_or_mistyped_parameter_is_refused_before_a_kernel_starts(given, words, tmp_path, no_kernel):
    out = tmp_path / 'out.ipynb'
    out.write_text('good')
    with pytest.raises(UsageError, match=words):
        run_notebook(notebook(tmp_path / 'example.ipynb', TYPED), out, given)
    assert out.read_text() == 'good'


def test_parameters_of_their_kind_are_taken(tmp_path):
    check_parameters(
        notebook(tmp_path / 'example.ipynb', TYPED),
        dict(name='', size=0, rate=1, fast=True, seeds=[1], settings=dict(max_target=4), plain=4, words='b'),
    )


@pytest.mark.parametrize('tag', [None, 'parameter', 'Parameters'])
def test_a_notebook_without_a_parameters_cell_is_refused(tag, tmp_path, no_kernel):
    with pytest.raises(UsageError, match='expected one cell tagged'):
        run_notebook(notebook(tmp_path / 'example.ipynb', TYPED, tag=tag), tmp_path / 'out.ipynb', dict(size=2))


FAKE = '0123456789abcdefABCDEF0123456789'
SECRETS = [
    dict(api_key=''),
    dict(API_KEY='x'),
    dict(openai_api_key='x'),
    dict(token='x'),
    dict(hf_token='x'),
    dict(secret='x'),
    dict(client_secret='x'),
    dict(password='x'),
    dict(passwd='x'),
    dict(auth='x'),
    dict(credentials='x'),
    dict(apikey='x'),
    dict(access_key='x'),
    dict(name=f'sk-{FAKE}'),
    dict(name=f'sk-proj-{FAKE}'),
    dict(name=f'hf_{FAKE}'),
    dict(name=f'ghp_{FAKE}'),
    dict(name=f'github_pat_{FAKE}'),
    dict(name=f'AKIA{FAKE[:16].upper()}'),
    dict(name=f'Bearer {FAKE}'),
    dict(name='https://someone:password@example.org/v1'),
    dict(name=f'xoxb-{FAKE}'),
    dict(name=f'see hf_{FAKE} there'),
    dict(settings=dict(api_key='x')),
    dict(settings=dict(student=f'hf_{FAKE}')),
    dict(seeds=[f'sk-{FAKE}']),
    dict(settings=dict(inner=[dict(token='x')])),
    dict(name='-----BEGIN PRIVATE KEY-----'),
]


@pytest.mark.parametrize('given', SECRETS, ids=lambda g: json.dumps(g)[:30])
def test_a_parameter_that_looks_like_a_secret_is_refused_and_not_repeated(given, tmp_path, no_kernel):
    path, out = (
        notebook(tmp_path / 'example.ipynb', TYPED + ''.join(f'\n{name} = ""' for name in given if name not in TYPED)),
        tmp_path / 'out.ipynb',
    )
    with pytest.raises(UsageError, match='looks like a secret') as refused:
        run_notebook(path, out, given)
    assert FAKE not in str(refused.value) and 'password@' not in str(refused.value) and not out.exists()


@pytest.mark.parametrize(
    'given',
    [
        dict(name='task-heavier'),
        dict(name='data/sk'),
        dict(settings=dict(max_target=4, student='t5-v1_1-base')),
        dict(name='https://example.org:8000/v1'),
        dict(name='flan-t5-small'),
        dict(name='a token of thanks'),
        dict(name='hf_hub'),
    ],
    ids=str,
)
def test_what_is_no_secret_is_taken(given, tmp_path):
    check_parameters(notebook(tmp_path / 'example.ipynb', TYPED), given)


@pytest.mark.parametrize(
    'name', ['t', 'a-long-name-for-a-temporary-folder-' * 3], ids=['a short temporary folder', 'a long one']
)
def test_a_kernel_listens_at_no_port(tmp_path, monkeypatch, capfd, name):
    """A port that was free when it was chosen may be taken when the kernel comes to it; and nothing of the kernel's
    own is on stderr: its threads may close a socket while another still writes to it when the kernel ends."""
    (tmp_path / name).mkdir()
    monkeypatch.setattr('tempfile.tempdir', str(tmp_path / name))
    ask = """from ipykernel import get_connection_info
from zmq.eventloop.zmqstream import gen_log
gen_log.error('Uncaught exception in ZMQStream callback')
info = get_connection_info(unpack=True)
print(info['transport'], len(info['ip']))"""
    out = run_notebook(notebook(tmp_path / 'example.ipynb', TYPED, ask), tmp_path / 'out.ipynb', {})
    said = [o.text.split() for cell in nbformat.read(out, 4).cells for o in cell.get('outputs', [])]
    assert (
        said[0][0] == 'ipc'
        and int(said[0][1]) < 100
        and not capfd.readouterr().err
        and not list((tmp_path / name).iterdir())
    )
