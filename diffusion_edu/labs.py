"""Course labs: a student version, an instructor's source for nbgrader, and a grader that needs only Jupyter.

In a notebook an exercise is a stub cell tagged ``exercise:04.1``, later a cell tagged ``solution:04.1`` that defines
the same names again. In a lab the stub becomes the student's cell and is followed by a locked cell that grades it;
the solution leaves the student version, and stands between nbgrader's markers in the source version.
"""

import ast
import copy
import tempfile
from pathlib import Path

import nbformat

from diffusion_edu import exercises
from diffusion_edu.notebooks import execute, paths

__all__ = ["filled", "grade", "source_version", "student_version", "write"]

BEGIN, END = "### BEGIN SOLUTION", "### END SOLUTION"
CONFIG = """\
# A course folder: run "nbgrader generate_assignment NN" here for each notebook under source/.
c = get_config()
c.CourseDirectory.course_id = "diffusion_edu"
c.ClearSolutions.code_stub = {"python": "# your answer: replace the ... above"}
c.ExecutePreprocessor.timeout = 900
"""


def student_version(nb):
    """A copy without solutions: stubs to fill in, each followed by a locked cell that grades it.

    Stored outputs stay (the lecture's figures), but for the cells of the exercises.
    """
    return _lab(nb, lambda stub, solution: stub)


def source_version(nb):
    """The instructor's copy: like the student version, with each solution between nbgrader's markers."""
    return _lab(nb, lambda stub, solution: f"{stub}\n\n{BEGIN}\n{solution}\n{END}")


def filled(nb_student, nb_source):
    """A copy of a student version with the solutions of the source version (or of any filled-in copy) in its stubs.

    Raises
    ------
    ValueError
        If the source lacks an exercise of the student version.
    """
    answers = {_grade_id(c): c.source for c in nb_source.cells if _grade_id(c).startswith("answer-")}
    nb = copy.deepcopy(nb_student)
    for cell in nb.cells:
        if _grade_id(cell).startswith("answer-"):
            if _grade_id(cell) not in answers:
                raise ValueError(f"nb_source must hold every exercise of nb_student; got none of {_grade_id(cell)}")
            text = answers[_grade_id(cell)]
            cell.source = "\n".join(line for line in text.split("\n") if line.strip() not in (BEGIN, END))
    return nb


def grade(nb, profile="smoke"):
    """Run a lab in a fresh kernel and read what each exercise earned.

    Parameters
    ----------
    nb : NotebookNode
        A student version, filled in or not; it is left as it is. Cells that fail earn nothing and stop nothing.

    Returns
    -------
    dict of str to float
        Points by exercise, such as {"04.1": 1.0}.
    """
    with tempfile.TemporaryDirectory() as folder:
        nb = execute(copy.deepcopy(nb), folder, profile, allow_errors=True)
    tests = (c for c in nb.cells if _grade_id(c).startswith("test-"))
    return {_exercise(c): sum(float(o.data["text/plain"]) for o in c.outputs if o.output_type == "execute_result")
            for c in tests}  # fmt: skip


def write(number, out):
    """Write the lab of a notebook: ``NN_slug.ipynb`` for students, ``source/NN/`` and a config for nbgrader.

    Parameters
    ----------
    number : int or str
    out : path
        A folder; made where it does not exist. Files in the way are refused, never overwritten.

    Returns
    -------
    list of Path
        The files written.
    """
    (path,), out = paths([number]), Path(out)
    name = path.name[:2]
    nb = nbformat.read(path, as_version=4)
    if not any(_tag_id(cell, "exercise") for cell in nb.cells):
        raise ValueError(f"NN must be a notebook with exercises; got {number}")
    files = {out / path.name: student_version(nb), out / "source" / name / path.name: source_version(nb)}
    config = out / "nbgrader_config.py"
    for file in files:
        if file.exists():
            raise ValueError(f"OUT must hold no lab of this notebook yet; got {file}")
    for file, lab in files.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(lab, file)
    config.write_text(CONFIG, encoding="utf-8")  # the same for every lab: one folder holds a whole course
    return [*files, config]


def _lab(nb, answer):
    """Replace each stub by the student's cell and its grading cell, and drop the solution cells."""
    nb = copy.deepcopy(nb)
    solutions = {_tag_id(c, "solution"): _without_grading(c.source)[0] for c in nb.cells}
    cells = []
    for cell in nb.cells:
        id = _tag_id(cell, "exercise")
        if _tag_id(cell, "solution"):
            continue
        cells.append(cell)
        if id is None:
            continue
        if id not in solutions:
            raise ValueError(f"nb must hold a cell tagged solution:{id}; got none")
        stub, call = _without_grading(cell.source)
        if call is None:
            raise ValueError(f"nb must grade its stub by teach.exercise({id!r}, ...); got none")
        cell.source, cell.outputs, cell.execution_count = answer(stub, solutions[id]), [], None
        cell.metadata["nbgrader"] = _nbgrader("answer", id, solution=True)
        cells.append(_grading_cell(cell, id, call))
    nb.cells = cells
    return nb


def _grading_cell(stub, id, call):
    points = exercises.find(id).points
    cell = nbformat.v4.new_code_cell(f"from diffusion_edu import teach\n\n{call}.points")
    cell.id = f"{stub.id[:55]}-test"
    cell.metadata.nbgrader = _nbgrader("test", id, grade=True, locked=True, points=points)
    cell.metadata.update(slideshow=stub.metadata.get("slideshow", {}), deletable=False, editable=False)
    return cell


def _nbgrader(kind, id, **flags):
    """Cell metadata of nbgrader, schema version 3; grade ids read answer-04-1 and test-04-1."""
    base = {"grade": False, "locked": False, "solution": False, "task": False, "schema_version": 3}
    return nbformat.from_dict(base | flags | {"grade_id": f"{kind}-{id.replace('.', '-')}"})


def _without_grading(source):
    """A cell's source without its call of ``teach.exercise``, and that call."""
    lines = source.split("\n")
    for node in ast.parse(source).body if "teach.exercise(" in source else ():
        if isinstance(node, ast.Expr) and ast.unparse(node).startswith("teach.exercise("):
            call = "\n".join(lines[node.lineno - 1 : node.end_lineno])
            del lines[node.lineno - 1 : node.end_lineno]
            return "\n".join(lines).strip(), call
    return source, None


def _tag_id(cell, kind):
    return next((t.split(":")[1] for t in cell.metadata.get("tags", ()) if t.startswith(f"{kind}:")), None)


def _grade_id(cell):
    return cell.metadata.get("nbgrader", {}).get("grade_id", "")


def _exercise(cell):
    return _grade_id(cell).removeprefix("test-").replace("-", ".")
