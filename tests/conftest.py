import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
os.environ['TOKENIZERS_PARALLELISM'] = 'false'
# Sums on a GPU are not repeatable: tests compute on CPUs, and those of `tests/runs/test_gpu.py` on the cards set aside
CARDS = os.environ.setdefault('DSBS_TEST_CARDS', os.environ.get('CUDA_VISIBLE_DEVICES', 'all'))
os.environ['CUDA_VISIBLE_DEVICES'] = ''


def pytest_addoption(parser):
    parser.addoption('--slow', action='store_true', help='run slow tests as well')


def pytest_configure(config):
    config.addinivalue_line('markers', 'slow: takes a minute or more; run with --slow')
    config.addinivalue_line(
        'markers',
        'numeric: compares numbers that a CPU computes; `make test-poorer-cpu` runs these with fewer instructions',
    )


def pytest_collection_modifyitems(config, items):
    for item in items:
        if 'slow' in item.keywords and not config.getoption('--slow'):
            item.add_marker(pytest.mark.skip(reason='slow: run with --slow'))


@pytest.fixture
def recorded():
    "Folder of the authors' data, where there is one."
    folder = os.environ.get('DSBS_DATA')
    if not folder or not (Path(folder) / 'cqa' / 'cqa_test.json').is_file():
        pytest.skip('needs the recorded data: set DSBS_DATA')
    return folder


@pytest.fixture(scope='session')
def published(tmp_path_factory):
    """A folder with README.md and reports/ as they are published: what lies here, unless `make reproduce` or a reader
    has made results or figures anew, and then what is committed."""
    git = lambda *args: subprocess.run(['git', '-C', ROOT, *args], capture_output=True)
    if (
        git('diff', '--quiet', 'HEAD', '--', 'reports/results', 'reports/figures', 'reports/datasets.jsonl').returncode
        != 1
    ):
        return ROOT  # or not a git checkout
    folder = tmp_path_factory.mktemp('published')
    subprocess.run(['tar', '-x', '-C', folder], input=git('archive', 'HEAD', 'README.md', 'reports').stdout, check=True)
    return folder


@pytest.fixture
def dsbs(tmp_path):
    "Call the command in a process of its own: (exit status, standard output, standard error)."
    import sys

    def call(*args, runs=tmp_path / 'runs', timeout=1800):
        done = subprocess.run(
            [Path(sys.executable).parent / 'dsbs', *map(str, args)],
            capture_output=True,
            text=True,
            timeout=timeout,
            cwd=ROOT,
            env=os.environ | {'DSBS_RUNS': str(runs)},
        )
        return done.returncode, done.stdout, done.stderr

    return call


@pytest.fixture
def main(tmp_path, monkeypatch, capsys):
    "The same without a new process: (exit status, standard output, standard error)."
    from dsbs.tools.cli import main

    monkeypatch.setenv('DSBS_RUNS', str(tmp_path / 'runs'))
    monkeypatch.chdir(ROOT)

    def call(*args):
        status = main([str(a) for a in args])
        return status, *capsys.readouterr()

    return call


@pytest.fixture
def fetched(tmp_path, monkeypatch):
    "The pinned students, as if their weights were on this machine: what was found out about them, and no file."
    import json

    from dsbs.hub import PINS, our_folder

    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_CACHE', str(tmp_path / 'hub'))
    for name, commit in PINS.items():
        place = our_folder(name, commit)
        place.mkdir(parents=True)
        (place / 'weights.json').write_text(json.dumps(dict(sha256='0' * 64, converted=True, files={})))


@pytest.fixture(scope='session')
def model_folder(tmp_path_factory):
    "A saved student with random weights."
    from dsbs.method.student import make_student

    folder = tmp_path_factory.mktemp('student')
    model, tokenizer = make_student('scratch-32x1', ['Is it true? It is true. So the answer is yes or no.'] * 5)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
