"""The equation index: one id from the function to its test to the notebook cell that builds it by hand.

Three places are read, none is imported: docstring lines ``Equations: post.mean, post.var`` in the package, marks
``@pytest.mark.equation("post.mean")`` in ``tests``, and cell tags ``eq:post.mean`` in the notebooks. The ids, the
number of the home notebook of each and its title stand in ``equation_ids.txt``.
"""

import ast
import difflib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

__all__ = ["Place", "Row", "index", "missing", "problems", "row"]

PACKAGE = Path(__file__).resolve().parent
UNPROVABLE = ("ar.models", "task.catalogue", "metric.human")  # lists of names: nothing to execute, no test


class Place(NamedTuple):
    """Where an id stands: a path beside the package, a line (in a notebook: the cell), and a name."""

    path: str
    line: int
    name: str


@dataclass
class Row:
    """One equation: its title, its home notebook ("04"), and the places that carry its id."""

    id: str
    home: str
    title: str
    functions: list[Place] = field(default_factory=list)
    tests: list[Place] = field(default_factory=list)
    cells: list[Place] = field(default_factory=list)

    def at_home(self):
        """The cells in the home notebook."""
        return [c for c in self.cells if _number(c) == self.home]


def index(root=None):
    """All rows by id, in the order of the inventory, and the ids that it does not know.

    Parameters
    ----------
    root : Path, optional
        The folder that holds ``diffusion_edu``, ``tests`` and ``notebooks``; by default the one of this package.

    Returns
    -------
    rows : dict of str to Row
    unknown : list of (id, Place)
    """
    root = Path(root or PACKAGE.parent)
    table = (PACKAGE / "equation_ids.txt").read_text(encoding="utf-8").splitlines()
    rows = {line.split("\t")[0]: Row(*line.split("\t")) for line in table}
    unknown = []
    for kind, places in (("functions", _functions(root)), ("tests", _tests(root)), ("cells", _cells(root))):
        for id, place in places:
            getattr(rows[id], kind).append(place) if id in rows else unknown.append((id, place))
    return rows, unknown


def row(id, root=None):
    """The row of one id.

    Raises
    ------
    ValueError
        If there is none; the message suggests the nearest.
    """
    rows, _ = index(root)
    if id not in rows:
        near = difflib.get_close_matches(str(id), rows, n=3, cutoff=0.4)
        hint = f" (did you mean {', '.join(near)}?)" if near else ""
        raise ValueError(f"ID must be an equation of the index; got {id}{hint}")
    return rows[id]


def problems(root=None):
    """Everything that dangles, as sentences; empty when the index is whole."""
    rows, unknown = index(root)
    found = [f"{_at(place)}: unknown id {id} (not in equation_ids.txt)" for id, place in unknown]
    homes = _numbers(Path(root or PACKAGE.parent))
    for r in rows.values():
        used = r.functions + r.cells
        if used and not r.tests and r.id not in UNPROVABLE:
            found.append(f'{_at(used[0])}: {r.id} has no test (pytest.mark.equation("{r.id}"))')
        if r.home in homes and not r.at_home():
            found.append(f"notebook {r.home}: no cell carries the tag eq:{r.id} ({r.title})")
        found += [f"{_at(c)}: eq:{r.id} belongs to notebook {r.home}" for c in r.cells if _number(c) != r.home]
    return found


def missing(root=None):
    """Rows that lack a test or a cell in their home notebook, by home."""
    rows, _ = index(root)
    lacking = [r for r in rows.values() if not (r.tests or r.id in UNPROVABLE) or not r.at_home()]
    return sorted(lacking, key=lambda r: r.home)


def line(r):
    """One line on a row: id, title, function, test, notebook cell (the home in brackets where it has none yet)."""
    functions = [f"{f.path.removeprefix('diffusion_edu/').removesuffix('.py')}.{f.name}" for f in r.functions]
    tests = [f"{Path(t.path).name}::{t.name}" for t in r.tests]
    cells = [f"{_number(c)} cell {c.line}" for c in r.cells] or [f"({r.home})"]
    return f"{r.id:<27} {r.title} | {' | '.join(_first(places) for places in (functions, tests, cells))}"


def _first(places):
    more = f" +{len(places) - 1}" if len(places) > 1 else ""
    return places[0] + more if places else "-"


def detail(r):
    """All places of a row, one a line."""
    lines = [f"{r.id}  {r.title}", f"home      notebook {r.home}"]
    for kind, places in (("function", r.functions), ("test", r.tests), ("notebook", r.cells)):
        lines += [f"{kind:<9} {_at(p)}  {p.name}" for p in places] or [f"{kind:<9} -"]
    return "\n".join(lines)


def _functions(root):
    """(id, place) of every ``Equations:`` line in a docstring of the package."""
    for path in sorted((root / "diffusion_edu").rglob("*.py")):
        for name, line, docstring in _docstrings(ast.parse(path.read_text(encoding="utf-8"))):
            text = re.search(r"^\s*Equations:((?:.*,\s*\n)*.*)$", docstring, re.M)
            for id in re.split(r"[,\s]+", text[1].strip()) if text else ():
                yield id, Place(path.relative_to(root).as_posix(), line, name)


def _docstrings(tree):
    """(name, line, docstring) of functions and classes, and of steps: ``ddim_step.__doc__ = ...``."""
    for name, node in _named(tree, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        yield name, node.lineno, ast.get_docstring(node) or ""
    for node in tree.body:
        match node:
            case ast.Assign([ast.Attribute(ast.Name(name), "__doc__")], ast.Constant(docstring)):
                yield name, node.lineno, docstring


def _tests(root):
    """(id, place) of every equation mark in ``tests``; a mark on a case of a parametrised test counts too."""
    for path in sorted((root / "tests").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for name, node in _named(tree, (ast.FunctionDef, ast.ClassDef)):
            for decorator in node.decorator_list:
                for call in ast.walk(decorator):
                    if isinstance(call, ast.Call) and getattr(call.func, "attr", "") == "equation":
                        for arg in call.args:
                            id = ast.literal_eval(arg)
                            yield id, Place(path.relative_to(root).as_posix(), node.lineno, name)


def _cells(root):
    """(id, place) of every ``eq:`` tag; the line of a place is the number of the cell, from 1."""
    for path in _notebooks(root):
        for i, cell in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"], 1):
            first = next(iter("".join(cell["source"]).splitlines()), "")
            for tag in cell["metadata"].get("tags", ()):
                if tag.startswith("eq:"):
                    yield tag[3:], Place(f"notebooks/{path.name}", i, first)


def _named(tree, kinds, prefix=""):
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, kinds):
            yield prefix + node.name, node
            yield from _named(node, kinds, f"{prefix}{node.name}.")


def _notebooks(root):
    from diffusion_edu.notebooks import paths

    beside = root / "notebooks"
    return paths() if root == PACKAGE.parent else sorted(beside.glob("[0-9][0-9]_*.ipynb"))


def _numbers(root):
    return {path.name[:2] for path in _notebooks(root)}


def _number(place):
    return Path(place.path).name[:2]


def _at(place):
    return f"{place.path} cell {place.line}" if place.path.endswith(".ipynb") else f"{place.path}:{place.line}"
