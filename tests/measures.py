"""Measures of the notebooks: how long exported cells are, how soon each is shown in use, how wide lines are.

`python tests/measures.py` prints them for each notebook and for the whole house."""

import ast
import re
import statistics
from dataclasses import dataclass, field
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[1]
WIDTH = 120
LITERALS = (ast.Constant, ast.Dict, ast.List, ast.Tuple, ast.Set, ast.JoinedStr)


@dataclass
class Notebook:
    "What is counted in one notebook."

    path: Path
    cells: list[int] = field(default_factory=list)  # Lines of each exported cell; imports, data and style apart
    used: list[bool] = field(default_factory=list)  # Whether the next code cell shows it in use
    wide: list[str] = field(default_factory=list)  # Lines over `WIDTH`
    several: list[str] = field(default_factory=list)  # Lines that hold several statements
    functions: dict[str, list[str]] = field(default_factory=dict)  # Name -> names of its parameters
    code_lines: int = 0  # Of all code cells


def is_import(tree: ast.Module) -> bool:
    "A cell of imports alone."
    return all(isinstance(node, ast.Import | ast.ImportFrom) for node in tree.body)


def is_literal(node: ast.expr) -> bool:
    "A literal, or a call with literals alone, such as `read(text)`."
    if isinstance(node, ast.Call):
        return bool(node.args) and all(map(is_literal, node.args))
    return isinstance(node, LITERALS)


def is_data(tree: ast.Module) -> bool:
    "A cell of data or style: names that get literals, and nothing else."
    return all(isinstance(node, ast.Assign | ast.AnnAssign) and is_literal(node.value) for node in tree.body)


def parsed(source: str) -> ast.Module:
    "The statements of a cell; a line that is for IPython counts as `pass`."
    return ast.parse(re.sub(r'^[%!].*$', 'pass', source, flags=re.M))


def code_lines(source: str) -> list[str]:
    return [line for line in source.splitlines() if line.strip() and not line.startswith('#|')]


def several_statements(source: str, tree: ast.Module) -> list[str]:
    "Lines on which more than one statement begins."
    starts = [node.lineno for node in ast.walk(tree) if isinstance(node, ast.stmt)]
    return [source.splitlines()[line - 1] for line in sorted({n for n in starts if starts.count(n) > 1})]


def parameters(tree: ast.Module) -> dict[str, list[str]]:
    "The parameters of each function, without self."
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            a = node.args
            names = [arg.arg for arg in (*a.posonlyargs, *a.args, *a.kwonlyargs)]
            found[node.name] = [name for name in names if name not in ('self', 'cls')]
    return found


def measured(path: Path) -> Notebook:
    "Count one notebook."
    found, waiting = Notebook(path), False
    for cell in nbformat.read(path, 4).cells:
        if cell.cell_type != 'code' or not code_lines(cell.source):
            continue
        tree = parsed(cell.source)
        found.code_lines += len(code_lines(cell.source))
        found.wide += [line for line in cell.source.splitlines() if len(line) > WIDTH]
        found.several += several_statements(cell.source, tree)
        if is_import(tree):
            continue
        exported = re.search(r'^#\|\s*export', cell.source, re.M)
        if waiting:
            found.used.append(not exported)
        waiting = bool(exported)
        if exported:
            found.functions |= parameters(tree)
            if not is_data(tree):
                found.cells.append(len(code_lines(cell.source)))
    return found


def notebooks() -> list[Notebook]:
    paths = [p for p in sorted((ROOT / 'nbs').rglob('*.ipynb')) if '.ipynb_checkpoints' not in p.parts]
    return [measured(path) for path in paths]


def table(found: list[Notebook]) -> str:
    lines = [f'{"":42} cells median largest used% wide several']
    for n in found:
        if n.cells:
            share = 100 * statistics.mean(n.used or [1])
            lines.append(
                f'{n.path.relative_to(ROOT / "nbs").as_posix():42} {len(n.cells):5} {statistics.median(n.cells):6g} '
                f'{max(n.cells):7} {share:5.0f} {len(n.wide):4} {len(n.several):7}'
            )
    cells = [c for n in found for c in n.cells]
    used = [u for n in found for u in n.used]
    lines.append(
        f'{"all":42} {len(cells):5} {statistics.median(cells):6g} {max(cells):7} {100 * statistics.mean(used):5.0f} '
        f'{sum(len(n.wide) for n in found):4} {sum(len(n.several) for n in found):7}'
    )
    names = {f'{n.path.stem}.{f}': p for n in found for f, p in n.functions.items()}
    most = max(names, key=lambda name: len(names[name]))
    lines.append(f'most parameters: {len(names[most])} of {most}')
    lines.append(f'functions that take data_dir: {", ".join(f for f, p in names.items() if "data_dir" in p)}')
    return '\n'.join(lines)


if __name__ == '__main__':
    print(table(notebooks()))
