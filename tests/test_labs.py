"""Labs: the student version runs to its todos, stored solutions earn full marks, and wrong answers earn nothing."""

import copy
import os
import sys

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from diffusion_edu import exercises, labs, notebooks
from diffusion_edu.notebooks import execute

GRADERS = """\
from diffusion_edu.exercises import Exercise

EXERCISES = {
    "98.1": Exercise(lambda x: 2 * x, ((1.0,), (3.0,)), {"this is x + 2": lambda x: x + 2}, points=3),
    "98.2": Exercise("b"),
}
"""
STUB = """\
def double(x):
    return None  # todo


teach.exercise("98.1", double)"""
COLLAPSED = {"jupyter": {"source_hidden": True}}


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A notebook with a function and a choice as exercises, and its graders in a file of their own."""
    (tmp_path / "n98.py").write_text(GRADERS)
    monkeypatch.setattr(exercises, "__path__", [*exercises.__path__, str(tmp_path)])
    first = f"from diffusion_edu import exercises, teach\nexercises.__path__.append({str(tmp_path)!r})"
    solution = STUB.replace("None  # todo", "x + x")
    nb = new_notebook(
        cells=[
            new_code_cell(first),
            new_markdown_cell("## Exercises\nDouble it."),
            new_code_cell(STUB, metadata={"tags": ["exercise:98.1"]}),
            new_code_cell(solution, metadata={"tags": ["solution:98.1", "hide-input"], **COLLAPSED}),
            new_code_cell('c = None  # todo\nteach.exercise("98.2", c)', metadata={"tags": ["exercise:98.2"]}),
            new_code_cell('c = "b"\nteach.exercise("98.2", c)', metadata={"tags": ["solution:98.2"]}),
            new_code_cell("print('after')"),
        ]
    )
    yield nb
    sys.modules.pop("diffusion_edu.exercises.n98", None)


def real():
    paths = notebooks.paths()
    return [pytest.param(p, id=p.stem) for p in paths if "exercise:" in p.read_text(encoding="utf-8")]


def points(number):
    return {id: float(e.points) for id, e in exercises.exercises_of(number).items()}


def test_the_student_version_runs_to_its_todos_without_an_error(small, tmp_path):
    ran = execute(labs.student_version(small), tmp_path)
    out = "".join(o.get("text", "") for c in ran.cells if c.cell_type == "code" for o in c.outputs)
    assert out == "todo 98.1\ntodo 98.2\nafter\n"
    assert all("x + x" not in c.source and '"b"' not in c.source for c in ran.cells)


def test_stored_solutions_earn_full_marks_and_todos_none(small):
    student = labs.student_version(small)
    assert labs.grade(student) == {"98.1": 0.0, "98.2": 0.0}
    assert labs.grade(labs.filled(student, labs.source_version(small))) == {"98.1": 3.0, "98.2": 1.0}


def test_a_wrong_answer_earns_nothing_and_the_others_count(small):
    student = labs.student_version(small)
    nb = labs.filled(student, labs.source_version(small))
    nb.cells[2].source = "def double(x):\n    return x + 2"
    nb.cells.insert(3, new_code_cell("1 / 0  # a cell of the student's that fails"))
    assert labs.grade(nb) == {"98.1": 0.0, "98.2": 1.0}


def test_cells_carry_the_metadata_of_nbgrader(small):
    for nb in (labs.student_version(small), labs.source_version(small)):
        nbformat.validate(nb)
        marked = [c for c in nb.cells if "nbgrader" in c.metadata]
        assert [c.metadata.nbgrader.grade_id for c in marked] == [
            "answer-98-1", "test-98-1", "answer-98-2", "test-98-2"
        ]  # fmt: skip
        assert {c.metadata.nbgrader.schema_version for c in marked} == {3}
        tests = [c.metadata.nbgrader for c in marked if c.metadata.nbgrader.grade]
        assert [t.points for t in tests] == [3, 1] and all(t.locked and not t.solution for t in tests)
        assert all(c.outputs == [] and c.execution_count is None for c in marked)


def test_the_notebook_itself_is_left_alone(small):
    before = copy.deepcopy(small)
    labs.filled(labs.student_version(small), labs.source_version(small))
    assert small == before


def test_a_stub_needs_its_solution_and_its_grader(small):
    short = copy.deepcopy(small)
    del short.cells[3]
    with pytest.raises(ValueError, match="solution:98.1"):
        labs.student_version(short)
    small.cells[2].source = "double = None"
    with pytest.raises(ValueError, match="'98.1'"):
        labs.student_version(small)


def test_a_source_without_an_exercise_is_refused(small):
    source = labs.source_version(small)
    del source.cells[2]
    with pytest.raises(ValueError, match="nb_source must hold every exercise"):
        labs.filled(labs.student_version(small), source)


@pytest.fixture
def nbgrader(monkeypatch):
    """nbgrader calls a program that stands beside Python."""
    monkeypatch.setenv("PATH", os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"])
    monkeypatch.setenv("DIFFUSION_EDU_PROFILE", "smoke")
    return pytest.importorskip("nbgrader")


@pytest.fixture
def written(small, tmp_path, monkeypatch):
    """The lab of the small notebook, written to a folder as the command does."""
    folder = tmp_path / "notebooks"
    folder.mkdir()
    nbformat.write(small, folder / "98_small.ipynb")
    nbformat.write(new_notebook(), folder / "97_none.ipynb")
    monkeypatch.setenv("DIFFUSION_EDU_NOTEBOOKS", str(folder))
    labs.write("98", tmp_path / "lab")
    return tmp_path / "lab"


def test_write_makes_a_course_folder_and_never_overwrites(written):
    files = sorted(p.relative_to(written).as_posix() for p in written.rglob("*") if p.is_file())
    assert files == ["98_small.ipynb", "nbgrader_config.py", "source/98/98_small.ipynb"]
    with pytest.raises(ValueError, match="OUT must hold no lab"):
        labs.write("98", written)
    for number, rule in (("97", "notebook with exercises"), ("12", "one of 97, 98")):
        with pytest.raises(ValueError, match=f"NN must be .*{rule}.*; got {number}"):
            labs.write(number, written / "other")


def autograded(course, number, submissions):
    """Scores of submitted notebooks by nbgrader itself: released from the source, then autograded."""
    from nbgrader.apps import NbGraderAPI
    from traitlets.config import Config

    config = Config()
    config.CourseDirectory.root = str(course)
    config.CourseDirectory.course_id = "diffusion_edu"
    config.Application.log_level = 50
    exec((course / "nbgrader_config.py").read_text(), {"get_config": lambda: config})
    api = NbGraderAPI(config=config)
    assert api.generate_assignment(number)["success"]
    scores = {}
    for student, nb in submissions.items():
        (name,) = (p.name for p in (course / "source" / number).glob("*.ipynb"))
        place = course / "submitted" / student / number
        place.mkdir(parents=True)
        nbformat.write(nb, place / name)
        assert api.autograde(number, student)["success"]
        with api.gradebook as book:
            scores[student] = book.find_submission(number, student).score
    return scores


def check_autograder(course, number):
    student = nbformat.read(next(course.glob("*.ipynb")), 4)
    source = nbformat.read(next((course / "source").rglob("*.ipynb")), 4)
    scores = autograded(course, number, {"full": labs.filled(student, source), "empty": student})
    assert scores == {"full": sum(points(number).values()), "empty": 0.0}


@pytest.mark.filterwarnings("ignore")  # of nbgrader's own use of its database
def test_nbgrader_gives_the_same_marks(written, nbgrader):
    check_autograder(written, "98")
    release = nbformat.read(next((written / "release").rglob("*.ipynb")), 4)
    assert "BEGIN SOLUTION" not in "".join(c.source for c in release.cells)
    assert labs.grade(release) == {"98.1": 0.0, "98.2": 0.0}


@pytest.mark.parametrize("path", real())
def test_every_notebook_makes_a_lab(path, tmp_path):
    """In one run: the student version to its todos, then the stored solutions for full marks."""
    nb = nbformat.read(path, 4)
    student = labs.student_version(nb)
    assert not any(tag.startswith("solution:") for c in student.cells for tag in c.metadata.get("tags", ()))
    full = labs.filled(student, labs.source_version(nb))
    for cell in full.cells:
        cell.id = f"{cell.id[:58]}-full"
    both = copy.deepcopy(student)
    both.cells += [c for c in full.cells if "nbgrader" in c.metadata]
    tests = [c for c in execute(both, tmp_path, "smoke").cells if is_test(c)]
    marks = [(c.metadata.nbgrader.points, float(c.outputs[-1].data["text/plain"])) for c in tests]
    todos, done = marks[: len(marks) // 2], marks[len(marks) // 2 :]
    assert sum(worth for worth, _ in done) == sum(points(path.name[:2]).values()) > 0
    assert all(mark == 0 for _, mark in todos) and all(mark == worth for worth, mark in done)


def is_test(cell):
    return cell.metadata.get("nbgrader", {}).get("grade", False)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("path", [p for p in real() if p.id.startswith("04")])
def test_nbgrader_grades_the_lab_of_notebook_04(path, tmp_path, nbgrader):
    labs.write("04", tmp_path)
    check_autograder(tmp_path, "04")


def test_one_folder_holds_a_whole_course(tmp_path):
    numbers = [path.values[0].name[:2] for path in real()][:2]
    for number in numbers:
        labs.write(number, tmp_path)
    assert sorted(p.name for p in (tmp_path / "source").iterdir()) == numbers
    with pytest.raises(ValueError, match="OUT must hold no lab of this notebook yet; got .*ipynb"):
        labs.write(numbers[0], tmp_path)
    prose = [c.source for p in tmp_path.glob("*.ipynb") for c in nbformat.read(p, 4).cells if c.cell_type == "markdown"]
    assert any("course edition" in text for text in prose)  # where solutions are, and not in this copy
