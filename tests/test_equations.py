"""The index: one id from the function to its test to its notebook cell, and nothing that dangles."""

import json
import re

import pytest

from diffusion_edu import equations
from diffusion_edu.equations import Place


@pytest.fixture
def root(tmp_path):
    """A small project with one whole equation, post.mean of notebook 04; notebook 04 alone exists."""
    for folder in ("diffusion_edu", "tests", "notebooks"):
        (tmp_path / folder).mkdir()
    write(
        tmp_path,
        "diffusion_edu/a.py",
        'class A:\n    def mean(self):\n        """M.\n\n        Equations: post.mean\n        """\n',
    )
    write(
        tmp_path,
        "tests/test_a.py",
        "import pytest\n\n\n@pytest.mark.equation('post.mean')\ndef test_mean():\n    pass\n",
    )
    notebook(tmp_path, "04_a", ["eq:post.mean", "check"])
    return tmp_path


def write(root, path, text):
    (root / path).write_text(text, encoding="utf-8")


def notebook(root, name, *tags):
    cells = [{"cell_type": "markdown", "source": ["# T"], "metadata": {}}]
    cells += [{"cell_type": "code", "source": ["x = 1\n", "y = 2"], "metadata": {"tags": t}} for t in tags]
    write(root, f"notebooks/{name}.ipynb", json.dumps({"cells": cells}))


def problems_of(root, ids):
    """The problems of some ids; the others of notebook 04 have no cell in the small project."""
    return [p for p in equations.problems(root) if re.search(rf"\b({'|'.join(map(re.escape, ids))})(?![\w.])", p)]


def test_every_id_has_one_home_and_a_title():
    rows, _ = equations.index()
    assert len(rows) >= 265 and len({r.id for r in rows.values()}) == len(rows)
    assert all(re.fullmatch(r"\d\d", r.home) and int(r.home) < 24 and r.title.isascii() for r in rows.values())
    lines = (equations.PACKAGE / "equation_ids.txt").read_text(encoding="utf-8").splitlines()
    assert len(lines) == len(rows), "an id stands twice"
    homes = {"gt.gmm": "04", "sched.swiss": "03", "elbo.L_simple": "04", "elbo.L_T": "07", "ddpm.ema": "06"}
    assert {id: rows[id].home for id in homes} == homes


def test_the_docstring_of_a_step_is_read_too(root):
    text = 'STEP = 1\nSTEP.__doc__ = """S.\n\n    Equations: post.var\n    """\n'
    write(root, "diffusion_edu/b.py", text)
    assert equations.row("post.var", root).functions == [Place("diffusion_edu/b.py", 2, "STEP")]


def test_an_id_leads_to_function_test_and_cell(root):
    row = equations.row("post.mean", root)
    assert row.functions == [Place("diffusion_edu/a.py", 2, "A.mean")]
    assert row.tests == [Place("tests/test_a.py", 5, "test_mean")]
    assert row.cells == [Place("notebooks/04_a.ipynb", 2, "x = 1")]
    assert problems_of(root, ["post.mean"]) == []
    assert "diffusion_edu/a.py:2  A.mean" in equations.detail(row)
    assert equations.line(row).endswith("| a.A.mean | test_a.py::test_mean | 04 cell 2")


def test_lists_of_ids_run_over_lines_and_marks_of_cases_count(root):
    write(
        root,
        "diffusion_edu/b.py",
        'def f():\n    """F.\n\n    Equations: post.var,\n        fwd.step\n\n    References\n    """\n',
    )
    case = "pytest.param(1, marks=pytest.mark.equation('post.var', 'fwd.step'))"
    write(root, "tests/test_b.py", f"@pytest.mark.parametrize('x', [{case}])\ndef test_f(x):\n    pass\n")
    rows, unknown = equations.index(root)
    assert unknown == []
    assert [rows[id].functions[0].name for id in ("post.var", "fwd.step")] == ["f", "f"]
    assert [rows[id].tests[0].name for id in ("post.var", "fwd.step")] == ["test_f", "test_f"]


def test_an_unknown_id_is_a_problem_in_each_place(root):
    write(root, "diffusion_edu/b.py", 'def f():\n    """F.\n\n    Equations: post.men\n    """\n')
    write(root, "tests/test_b.py", "@pytest.mark.equation('post.men')\ndef test_f():\n    pass\n")
    notebook(root, "05_b", ["eq:post.men"])
    assert problems_of(root, ["post.men"]) == [
        "diffusion_edu/b.py:1: unknown id post.men (not in equation_ids.txt)",
        "tests/test_b.py:2: unknown id post.men (not in equation_ids.txt)",
        "notebooks/05_b.ipynb cell 2: unknown id post.men (not in equation_ids.txt)",
    ]


def test_a_function_or_a_cell_needs_a_test(root):
    write(root, "tests/test_a.py", "")
    assert problems_of(root, ["post.mean"]) == [
        'diffusion_edu/a.py:2: post.mean has no test (pytest.mark.equation("post.mean"))'
    ]
    write(root, "diffusion_edu/a.py", "")
    assert problems_of(root, ["post.mean"])[0].startswith("notebooks/04_a.ipynb cell 2: post.mean has no test")


def test_a_home_notebook_that_exists_must_carry_its_ids(root):
    notebook(root, "04_a")
    assert problems_of(root, ["post.mean"]) == [
        "notebook 04: no cell carries the tag eq:post.mean (Posterior mean in (x_t, x_0))"
    ]
    assert not problems_of(root, ["sched.cosine"]), "notebook 05 does not exist"


def test_an_id_is_built_in_its_home_only(root):
    notebook(root, "05_b", ["eq:post.mean"])
    assert problems_of(root, ["post.mean"]) == ["notebooks/05_b.ipynb cell 2: eq:post.mean belongs to notebook 04"]


def test_missing_lists_what_lacks_a_test_or_its_home_cell(root):
    lacking = [row.id for row in equations.missing(root)]
    assert "post.mean" not in lacking and {"post.var", "sched.cosine"} <= set(lacking)
    homes = [row.home for row in equations.missing(root)]
    assert homes == sorted(homes)


def test_an_unknown_id_is_refused_with_a_suggestion():
    with pytest.raises(ValueError, match="ID must be an equation of the index; got post.men .did you mean post.mean"):
        equations.row("post.men")


def test_the_index_of_this_project_is_whole():
    problems = equations.problems()
    assert not problems, "\n".join(problems)
