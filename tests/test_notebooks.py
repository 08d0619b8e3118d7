"""The runner and the lint, and every notebook of the course under hostile conditions."""

import copy
import os

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from diffusion_edu import notebooks

NOTEBOOKS = [pytest.param(p, id=p.stem) for p in notebooks.paths()]

OFFLINE = """\
import socket, time


def offline(*args, **kwargs):
    raise OSError("a notebook needs no network")


socket.socket.connect = socket.socket.connect_ex = socket.create_connection = socket.getaddrinfo = offline
started = time.perf_counter()"""


@pytest.mark.parametrize("path", NOTEBOOKS)
def test_the_rules_hold(path):
    problems = notebooks.lint(path)
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("path", NOTEBOOKS)
def test_a_notebook_survives(path, tmp_path, record_property):
    """Smoke profile, checks on: twice in one kernel, from another folder, without network and GPU, LC_ALL=C."""
    nb = nbformat.read(path, as_version=4)
    once, twice = copy.deepcopy(nb.cells), copy.deepcopy(nb.cells)
    for cell in twice:
        cell.id = f"{cell.id[:57]}-twice"
    timer = new_code_cell("time.perf_counter() - started")
    nb.cells = [new_code_cell(OFFLINE), *once, timer, *twice]
    env = {"LC_ALL": "C", "CUDA_VISIBLE_DEVICES": ""}
    notebooks.execute(nb, tmp_path, "smoke", env=env)
    seconds = float(timer.outputs[0].data["text/plain"])
    record_property("smoke_seconds", seconds)
    print(f"{path.name}: {seconds:.1f} s in the smoke profile")
    assert not [p for p in tmp_path.iterdir() if p.name != ".ipynb_checkpoints"], "it leaves files behind"


# ---- the runner, on a small notebook


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFUSION_EDU_NOTEBOOKS", str(tmp_path))
    monkeypatch.setenv("MPLBACKEND", "agg")
    return tmp_path


def store(folder, *sources, name="04_small.ipynb"):
    nb = new_notebook(cells=[new_code_cell(s) for s in sources], metadata={"widgets": {}})
    nbformat.write(nb, folder / name)
    return folder / name


def test_run_stores_outputs_counts_and_nothing_of_the_machine(folder):
    source = "import os, sys\nprint(os.path.basename(os.getcwd()), os.environ.get('MPLBACKEND', 'inline')[-6:])"
    threads = "print(*(os.environ[k] for k in ('OMP_NUM_THREADS', 'TQDM_DISABLE', 'DIFFUSION_EDU_PROFILE')))"
    path = store(folder, source, threads)
    said = []
    assert list(notebooks.run(["4"], report=said.append)) == ["04"] and said[0].startswith("04_small.ipynb  ")
    nb = nbformat.read(path, as_version=4)
    assert [c.execution_count for c in nb.cells] == [1, 2]
    assert [c.outputs[0].text for c in nb.cells] == [f"{folder.name} inline\n", "1 1 lecture\n"]
    assert nb.metadata == {
        "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    assert all("execution" not in c.metadata for c in nb.cells)
    assert os.listdir(folder) == [path.name]


def test_the_smoke_profile_and_a_failing_cell_store_nothing(folder):
    path = store(folder, "x = 1", "import os\nassert os.environ['DIFFUSION_EDU_PROFILE'] == 'smoke', 'no smoke'")
    before = path.read_bytes()
    notebooks.run(profile="smoke", report=str)
    with pytest.raises(RuntimeError, match="04_small.ipynb cell 2: AssertionError: no smoke"):
        notebooks.run(report=str)
    assert path.read_bytes() == before


def test_an_unknown_number_or_folder_is_named(folder, monkeypatch):
    store(folder, "")
    for number in ("05", "x", "004"):
        with pytest.raises(ValueError, match=f"NN must be one of 04; got {number}"):
            notebooks.paths([number])
    monkeypatch.setenv("DIFFUSION_EDU_NOTEBOOKS", str(folder / "none"))
    with pytest.raises(ValueError, match="DIFFUSION_EDU_NOTEBOOKS must name"):
        notebooks.paths()


# ---- the lint: a whole notebook passes, and each broken rule is found


def code(source, *tags, output=None, **metadata):
    outputs = [output] if output else []
    return new_code_cell(source, metadata={"tags": list(tags), **metadata}, outputs=outputs)


def printed(text):
    return new_output("stream", name="stdout", text=text)


WIDGET = {"text/plain": "SliderFigure(t)", "image/png": "iVBORw0KGgo="}


def whole():
    """A notebook in order: 36 cells with one graded exercise of each kind."""
    cells = [
        new_markdown_cell("# 97 Title\n\nThe promise.\n\n**Goals** a. **Prerequisites** b. **Minutes** 5."),
        code("widgets.SliderFigure(draw)", output=new_output("execute_result", data=dict(WIDGET))),
    ]
    cells += [new_markdown_cell("Some words.") for _ in range(14)]
    cells += [code("teach.agree('a', a=1, b=1)", output=printed("ok")) for _ in range(14)]
    cells += [new_markdown_cell("## Exercises\n\n$$x$$")]
    for id in ("97.1", "97.2"):
        call = f'teach.exercise("{id}", f)'
        cells.append(code(call, f"exercise:{id}", output=printed(f"todo {id}\n")))
        hidden = {"jupyter": {"source_hidden": True}}
        cells.append(code(call, f"solution:{id}", "hide-input", output=printed(f"{id} correct\n"), **hidden))
    cells.append(
        new_markdown_cell("## Equations\n\n| id | function |\n|---|---|\n| `a` | `f` |\n\n## References\n\nA.")
    )
    nb = new_notebook(cells=cells)
    for i, cell in enumerate(c for c in cells if c.cell_type == "code"):
        cell.execution_count = i + 1
    for cell in cells:
        cell.metadata.slideshow = {"slide_type": "slide"}
    return nb


@pytest.fixture
def lint(tmp_path, monkeypatch):
    monkeypatch.setattr("diffusion_edu.exercises.exercises_of", lambda number: {"97.1": None, "97.2": None})

    def run(nb):
        nbformat.write(nb, tmp_path / "97_x.ipynb")
        return notebooks.lint(tmp_path / "97_x.ipynb")

    return run


def test_a_whole_notebook_passes(lint):
    assert lint(whole()) == []


def figure(text="<Figure size 10x10 with 1 Axes>"):
    return new_output("display_data", data={"text/plain": text, "image/png": "aa"})


def edit(i, **changes):
    return lambda nb: nb.cells[i].update(changes)


BREAK = {
    "cells, not 35 to 60": lambda nb: nb.cells.__delitem__(slice(2, 10)),
    "counts are not 1..n": edit(17, execution_count=None),
    "less than a fifth": lambda nb: [c.update(source="x") for c in nb.cells[16:30]] + [edit(32, source="x")(nb)],
    "more than a fifth": lambda nb: [c.metadata.tags.append("nbval-ignore-output") for c in nb.cells[16:20]],
    "stores widget state": lambda nb: nb.metadata.update(widgets={}),
    "KiB, more than 600": edit(17, outputs=[printed("x" * 700_000)]),
    "shows no widget": edit(1, outputs=[]),
    "title and its promise": edit(0, source="# T\n\n## Goals prerequisites minutes"),
    "does not name its minutes": edit(0, source="# T\n\nGoals, prerequisites."),
    "does not end with headings": edit(-1, source="## References\n\n## Equations\n\n| `a` |"),
    "no table from equations": edit(-1, source="## Equations\n\n## References"),
    "at least 2 are due": lambda nb: nb.cells[31].metadata.update(tags=[]),
    "exercise 97.1 needs": lambda nb: nb.cells[32].metadata.update(tags=[]),
    'and print "97.1 correct"': edit(32, outputs=[]),
    "97.1 must grade the same name": edit(32, source='teach.exercise("97.1", g)'),
    "cell 33: a solution is collapsed": lambda nb: nb.cells[32].metadata.pop("jupyter"),
    "cell 5: has no slideshow": lambda nb: nb.cells[4].metadata.pop("slideshow"),
    "cell 5: names a path": edit(4, source="see /home/me/x"),
    "cell 5: has 121 words": edit(4, source="word " * 121),
    "cell 18: has 21 lines": edit(17, source="x\n" * 20 + "x"),
    "cell 18: ends a line with a semicolon": edit(17, source="x;"),
    "cell 18: installs packages": edit(17, source="%pip install torch"),
    "cell 18: draws a figure": edit(17, outputs=[figure()]),
    "cell 18: shows the name of a plot": edit(17, outputs=[figure("<Axes: >")]),
    "cell 18: stores an error or a warning": edit(17, outputs=[new_output("stream", name="stderr", text="w")]),
    "cell 18: prints a path": edit(17, outputs=[printed("at /tmp/x.py")]),
}


@pytest.mark.parametrize("rule", BREAK)
def test_a_broken_rule_is_found(lint, rule):
    nb = whole()
    BREAK[rule](nb)
    assert any(rule in problem for problem in lint(nb)), lint(nb)


def test_what_looks_like_a_break_is_none(lint):
    nb = whole()
    edit(4, source="$$\n" + "x " * 300 + "\n$$\n$a b c$ https://example.org/work/a and either/or/usr")(nb)
    edit(17, source="teach.x()\nplt.show()", outputs=[figure()])(nb)
    assert lint(nb) == []
