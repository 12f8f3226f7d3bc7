"What is generated equals what it is generated from."

import ast
import configparser
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
WINGS = ['', 'data', 'teacher', 'method', 'runs', 'evidence', 'tools']


def pins(lines):
    return {line.strip() for line in lines if re.match(r'^\s*[A-Za-z0-9]', line)}


@pytest.fixture
def copy(tmp_path):
    for name in ('nbs', 'dsbs'):
        shutil.copytree(
            ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints')
        )
    for name in ('settings.ini', 'pyproject.toml', 'README.md'):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def same_files(a, b):
    files = lambda top: {
        p.relative_to(top): p.read_bytes() for p in top.rglob('*') if p.is_file() and '__pycache__' not in p.parts
    }
    left, right = files(a), files(b)
    return sorted(str(p) for p in left.keys() | right.keys() if left.get(p) != right.get(p))


EXPORT = (['nbdev_clean', '--fname', 'nbs'], ['nbdev_export'])


def run_tool(command, folder, **env):
    tool = Path(sys.executable).parent / command[0]
    subprocess.run([tool, *command[1:]], cwd=folder, check=True, capture_output=True, env=os.environ | env)


def test_export_is_in_step(copy):
    run_tool(EXPORT[1], copy)
    assert not same_files(copy / 'dsbs', ROOT / 'dsbs')


def test_notebooks_are_clean(copy):
    run_tool(EXPORT[0], copy)
    ignore = lambda names: [n for n in names if '.ipynb_checkpoints' not in n]
    assert not ignore(same_files(copy / 'nbs', ROOT / 'nbs'))


@pytest.mark.slow
def test_cleaning_and_exporting_twice_changes_nothing(copy):
    "What is committed, what comes out once and what comes out of that: the same bytes."
    for turn in range(2):
        for command in EXPORT:
            run_tool(command, copy, PYTHONHASHSEED=str(turn))
        assert not [
            n for name in ('nbs', 'dsbs') for n in same_files(copy / name, ROOT / name) if '.ipynb_checkpoints' not in n
        ]


def test_readme_is_in_step():
    from dsbs.evidence.reporting import readme_text

    assert (ROOT / 'README.md').read_text() == readme_text()


def test_the_front_page_and_the_plan_name_the_rooms_as_they_are():
    from dsbs.tools.readme import rooms_table, wings_table

    assert wings_table() in (ROOT / 'README.md').read_text(), 'run nbs/index.ipynb again, then make export'
    plan = nbformat.read(next((ROOT / 'nbs' / 'tools').glob('*_readme.ipynb')), 4)
    shown = [o.get('data', {}).get('text/markdown') for c in plan.cells for o in c.get('outputs', ())]
    assert rooms_table() in shown, 'run the notebook of tools.readme again'


def test_the_front_page_is_short_and_its_links_lead_somewhere():
    text = (ROOT / 'README.md').read_text()
    assert len(text.split()) <= 900
    links = re.findall(r'\]\((?!https?:)([^)]+)\)', text)
    assert len(links) > 10 and not [link for link in links if not (ROOT / link).is_file()]


def test_conda_pins_equal_pip_pins():
    environment = yaml.safe_load((ROOT / 'environment.yml').read_text())
    python, pip, nested = environment['dependencies']
    assert (python, pip) == ('python=3.11', 'pip')
    conda = {p for p in nested['pip'] if not p.startswith('-c ')}
    assert conda == pins((ROOT / 'requirements.txt').read_text().splitlines())
    assert '-c constraints.txt' in nested['pip']


def test_requirements_are_constrained_and_cover_settings():
    constraints = pins((ROOT / 'constraints.txt').read_text().splitlines())
    required = pins((ROOT / 'requirements.txt').read_text().splitlines())
    assert required <= constraints
    settings = configparser.ConfigParser(delimiters=['='])
    settings.read(ROOT / 'settings.ini')
    names = {
        re.split(r'[<>=!]', r)[0]
        for key in ('requirements', 'llm_requirements', 'dev_requirements')
        for r in settings['DEFAULT'][key].split()
    }
    assert names == {r.split('==')[0] for r in required}
    assert 'torch==2.13.0' in required


def rooms():
    "Name of each module -> its place in the house: wing, number of its notebook."
    found = {}
    for path in (ROOT / 'nbs').glob('**/[0-9][0-9]_*.ipynb'):
        wing = '.'.join(path.parent.relative_to(ROOT / 'nbs').parts)
        number, _, name = path.stem.partition('_')
        found[f'{wing}.{name}'.lstrip('.')] = (WINGS.index(wing), int(number))
    return found


def imports_of(name):
    "Modules that a module imports, wherever in it."
    path = ROOT / 'dsbs' / Path(*name.split('.')).with_suffix('.py')
    package = ['dsbs', *name.split('.')[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            yield '.'.join([*above, *(node.module or '').split('.')]).removeprefix('dsbs.')


def test_imports_go_up_only():
    places = rooms()
    assert len({number for _, number in places.values()}) == len(places), 'two notebooks with one number'
    assert sorted(places, key=places.get) == sorted(places, key=lambda name: places[name][1]), (
        'numbers follow the wings'
    )
    wrong = {
        (name, other)
        for name in places
        for other in imports_of(name)
        if other in places and places[other] >= places[name]
    }
    assert not wrong


def test_modules_are_rooms():
    made = {'.'.join(p.relative_to(ROOT / 'dsbs').with_suffix('').parts) for p in (ROOT / 'dsbs').glob('**/*.py')}
    assert {name for name in made if not name.split('.')[-1].startswith('_')} == set(rooms())


def test_figure_notebooks_define_no_module_and_have_parameters():
    for path in (ROOT / 'nbs' / 'figures').glob('*.ipynb'):
        cells = nbformat.read(path, 4).cells
        assert not any('#| export' in c.source or '#| default_exp' in c.source for c in cells)
        assert sum('parameters' in c.metadata.get('tags', []) for c in cells) == 1


def test_committed_records_can_be_traced():
    "Every committed record names a commit of a clean checkout and the hashes of its data."
    git = lambda *args: subprocess.run(['git', '-C', ROOT, *args], capture_output=True, text=True)
    if git('rev-parse', 'HEAD').returncode:
        pytest.skip('not a git checkout')
    for name in git('ls-files', 'reports/results').stdout.split():
        rows = [json.loads(line) for line in git('show', f'HEAD:{name}').stdout.splitlines()]
        for r in rows:
            assert re.fullmatch('[0-9a-f]{40}', r['provenance']['commit']) and r['provenance']['dirty'] is False, (
                name,
                r['key'],
            )
            assert re.fullmatch('[0-9a-f]{64}', r['key']) and all(
                r['data'][s] for s in ('train', 'validation', 'test', 'teacher')
            )
