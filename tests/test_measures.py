"Notebooks stay readable: short cells, each shown in use, one statement a line; tests/measures.py prints the measures."

import statistics

import nbformat
import pytest
from measures import ROOT, WIDTH, notebooks


@pytest.fixture(scope='module')
def found():
    return notebooks()


def test_exported_cells_are_short(found):
    cells = [c for n in found for c in n.cells]
    assert statistics.median(cells) <= 12
    assert not {n.path.name: max(n.cells) for n in found if n.cells and max(n.cells) > 40}


def test_exported_cells_are_shown_in_use(found):
    used = [u for n in found for u in n.used]
    assert statistics.mean(used) >= 0.85


def test_lines_fit_and_hold_one_statement(found):
    assert not {n.path.name: n.wide for n in found if n.wide}
    assert not {n.path.name: n.several for n in found if n.several}


def test_functions_have_few_parameters(found):
    assert not {f: p for n in found for f, p in n.functions.items() if len(p) > 6}
    assert len([f for n in found for f, p in n.functions.items() if 'data_dir' in p]) <= 8


def test_figure_notebooks_are_short(found):
    figures = [n for n in found if n.path.parent.name == 'figures']
    assert len(figures) >= 16 and not {n.path.name: n.code_lines for n in figures if n.code_lines > 60}


def test_prose_is_wrapped():
    for path in sorted((ROOT / 'nbs').rglob('[!.]*.ipynb')):
        for cell in nbformat.read(path, 4).cells:
            if cell.cell_type != 'markdown':
                continue
            lines = [line for line in cell.source.splitlines() if not line.startswith(('|', '<', '!['))]
            wide = [line for line in lines if len(line) > WIDTH and ' ' in line.strip()]
            assert '```' in cell.source or not wide, (path.name, wide)
