"""Imports point downward: the house plan, enforced by reading the import statements."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import diffusion_edu

PACKAGE = Path(diffusion_edu.__file__).parent

FLOORS = [
    "checks machine",
    "schedules gaussian bits data tokenizer",
    "process prediction nets",
    "denoiser oracles kernel_model",
    "losses samplers guidance metrics vae score_matching",
    "training checkpoint trainer runs config zoo commands elbo likelihood distill cascade latent unclip editing",
    "viz widgets teach exercises labs notebooks equations demo cli",
]
FLOOR = {name: i for i, names in enumerate(FLOORS) for name in names.split()}

# The few imports on one floor; a piece made of several files (nets, samplers, exercises) may import itself.
SAME_FLOOR = {
    ("process", "prediction"),
    ("bits", "gaussian"),
    ("samplers", "guidance"),
    ("runs", "checkpoint"),
    ("trainer", "checkpoint"),
    ("trainer", "training"),
    ("config", "runs"),
    ("commands", "checkpoint"),
    ("commands", "config"),
    ("commands", "distill"),
    ("commands", "runs"),
    ("commands", "trainer"),
    ("commands", "training"),
    ("commands", "zoo"),
    ("config", "elbo"),
    ("config", "training"),
    ("distill", "training"),
    ("zoo", "config"),
    ("zoo", "distill"),
    ("zoo", "elbo"),
    ("zoo", "likelihood"),
    ("zoo", "checkpoint"),
    ("zoo", "training"),
    ("training", "checkpoint"),
    ("teach", "exercises"),
    ("teach", "viz"),
    ("widgets", "viz"),
    ("labs", "exercises"),
    ("labs", "notebooks"),
    ("notebooks", "exercises"),
    ("equations", "notebooks"),
    ("exercises", "viz"),
    ("demo", "viz"),
    ("cli", "demo"),
    ("cli", "notebooks"),
    ("cli", "equations"),
    ("cli", "labs"),
}


def piece(path):
    """The name under which a file stands in the plan: ``nets`` for nets/unet.py."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[0]


def imported(path):
    """(line, piece) of every import from the package in a file, at whatever depth it stands."""
    package = ("diffusion_edu", *path.relative_to(PACKAGE).parent.parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            name = ".".join((*base, *([node.module] if node.module else [])))
            names = [f"{name}.{a.name}" for a in node.names] if name == "diffusion_edu" else [name]
        elif isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        else:
            continue
        for name in names:
            if name.startswith("diffusion_edu."):
                yield node.lineno, name.split(".")[1]


FILES = [p for p in sorted(PACKAGE.rglob("*.py")) if p != PACKAGE / "__init__.py"]


@pytest.mark.parametrize("path", [pytest.param(p, id=str(p.relative_to(PACKAGE))) for p in FILES])
def test_imports_point_downward(path):
    me = piece(path)
    assert me in FLOOR, f"{me} has no floor in the plan: give it one here and in CONTRIBUTING"
    for line, other in imported(path):
        assert other in FLOOR, f"{path.name}:{line} imports {other}, which has no floor"
        allowed = FLOOR[other] < FLOOR[me] or other == me or (me, other) in SAME_FLOOR
        assert allowed, f"{path.name}:{line}: {me} (floor {FLOOR[me]}) imports {other} (floor {FLOOR[other]})"


def test_the_reader_of_imports_sees_every_form(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "PACKAGE", tmp_path)
    file = tmp_path / "nets" / "x.py"
    file.parent.mkdir()
    file.write_text(
        "from diffusion_edu import viz, checks\nfrom diffusion_edu.nets.mlp import MLP\nimport diffusion_edu.cli\n"
        "def f():\n    from ..samplers import sample\n    from . import mlp\n    import torch\n"
    )
    assert [name for _, name in imported(file)] == ["viz", "checks", "nets", "cli", "samplers", "nets"]


def modules_after(statement):
    code = f"{statement}\nimport sys\nprint(*sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    return {name.split(".")[0] for name in out.split()}


def test_the_package_imports_no_jupyter_and_no_plotting():
    core = "import diffusion_edu\nfrom diffusion_edu import schedules, process, denoiser, losses, samplers, guidance"
    assert modules_after(core).isdisjoint({"matplotlib", "IPython", "ipywidgets", "nbformat", "nbclient"})


def test_a_function_is_short():
    long = [
        f"{path.name}:{node.lineno} {node.name}"
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and body_lines(node) > 40
    ]
    assert not long, long


def body_lines(node):
    """Lines of a function without its docstring."""
    body = node.body[1:] if ast.get_docstring(node) else node.body
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0
