"""Run the notebooks and hold their rules: one runner writes the stored outputs, one lint reads them."""

import os
import re
import time
from pathlib import Path

__all__ = ["execute", "folder", "lint", "paths", "run", "tagged"]

CHECK = re.compile(r"\bteach\.(agree|near|below|above|misprint|exercise)\(")
GRADED = re.compile(r"teach\.exercise\([^,]*, (\w+)\)")
INSTALL = re.compile(r"^\s*[!%]\s*(pip|conda|mamba|uv)\b|\b(pip|conda) install\b", re.M)
ABSOLUTE = re.compile(r"(?<![\w.:/~-])/(home|root|work|tmp|usr|opt|mnt|content|var|Users)/|\bC:\\")
WIDGET = "application/vnd.jupyter.widget-view+json"
SLIDES = {"slide", "subslide", "fragment", "skip", "notes", "-"}


def folder():
    """The folder of the notebooks: $DIFFUSION_EDU_NOTEBOOKS, else ``notebooks`` beside the package.

    Raises
    ------
    ValueError
        If there is no such folder.
    """
    place = Path(os.environ.get("DIFFUSION_EDU_NOTEBOOKS") or Path(__file__).resolve().parent.parent / "notebooks")
    if not place.is_dir():
        raise ValueError(f"DIFFUSION_EDU_NOTEBOOKS must name the folder of the notebooks; got {place}")
    return place


def paths(numbers=()):
    """The notebooks of these numbers (4 or "04"), or all, in order.

    Raises
    ------
    ValueError
        If a number has no notebook; the message names those that exist.
    """
    every = {p.name[:2]: p for p in sorted(folder().glob("[0-9][0-9]_*.ipynb"))}
    for number in numbers:
        if not re.fullmatch(r"\d{1,2}", str(number)) or f"{int(number):02d}" not in every:
            raise ValueError(f"NN must be one of {', '.join(every) or '(no notebooks yet)'}; got {number}")
    return [every[f"{int(n):02d}"] for n in numbers] if numbers else list(every.values())


def execute(nb, cwd, profile="lecture", timeout=900, allow_errors=False, env=None):
    """Execute a notebook in a fresh kernel, in the folder ``cwd``, with one thread and no progress bars.

    Returns the same notebook with outputs, counts 1..n, and neither timing nor widget state.

    Raises
    ------
    nbclient.exceptions.CellExecutionError
        If a cell fails, unless ``allow_errors``.
    """
    from nbclient import NotebookClient

    env = {k: v for k, v in os.environ.items() if k != "MPLBACKEND"} | (env or {})
    env |= {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "DIFFUSION_EDU_PROFILE": profile}
    client = NotebookClient(
        nb,
        kernel_name="python3",
        timeout=timeout,
        allow_errors=allow_errors,
        record_timing=False,
        shutdown_kernel="immediate",
        coalesce_streams=True,
        extra_arguments=["--log-level=ERROR"],
        resources={"metadata": {"path": str(cwd)}},
    )
    client.execute(env=env)
    nb.metadata.pop("widgets", None)
    for output in (o for cell in nb.cells for o in cell.get("outputs", ())):
        output.get("data", {}).pop(WIDGET, None)  # its model id is random, and names nothing outside this kernel
    name = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
    nb.metadata.update(kernelspec=name, language_info={"name": "python"})
    return nb


def run(numbers=(), profile="lecture", report=print):
    """Execute notebooks; the lecture profile writes each in place when all its cells succeeded.

    Returns the seconds of each notebook by number.

    Raises
    ------
    RuntimeError
        If a cell fails: which one, and how. The notebook's file stays as it was.
    """
    chosen = paths(numbers)
    import nbformat
    from nbclient.exceptions import CellExecutionError

    seconds = {}
    for path in chosen:
        nb = nbformat.read(path, as_version=4)
        start = time.perf_counter()
        try:
            execute(nb, path.parent, profile)
        except CellExecutionError as error:
            raise RuntimeError(f"{path.name} cell {_failed(nb)}: {error.ename}: {error.evalue}") from error
        seconds[path.name[:2]] = time.perf_counter() - start
        if profile == "lecture":
            _write(nb, path)
        report(f"{path.name}  {seconds[path.name[:2]]:.1f} s")
    return seconds


def tagged(nb, kind):
    """Position of the cell of each tag ``kind:id`` of a notebook, by id."""
    return {
        tag.split(":", 1)[1]: i
        for i, cell in enumerate(nb.cells)
        for tag in cell.metadata.get("tags", ())
        if tag.startswith(f"{kind}:")
    }


def lint(path):
    """Every rule that a notebook breaks, as sentences; empty when it is in order.

    The rules: a whole notebook of 35 to 60 short cells, a fifth of the code cells checks, outputs stored with
    counts 1..n and without warnings, paths of a machine or widget state; slide metadata; an opening, a close, and
    exercises with collapsed solutions.
    """
    import nbformat

    nb = nbformat.read(path, as_version=4)
    nbformat.validate(nb)
    found = [*_lint_whole(nb, path), *_lint_opening(nb), *_lint_close(nb), *_lint_exercises(nb, path)]
    for i, cell in enumerate(nb.cells, 1):
        rules = _lint_code(cell) if cell.cell_type == "code" else _lint_prose(cell)
        found += [f"cell {i}: {problem}" for problem in (*_lint_cell(cell), *rules)]
    return [f"{Path(path).name} {problem}" for problem in found]


def _lint_whole(nb, path):
    code = [c for c in nb.cells if c.cell_type == "code"]
    size = Path(path).stat().st_size / 1024
    checks = sum("check" in _tags(c) or bool(CHECK.search(c.source)) for c in code)
    ignored = sum("nbval-ignore-output" in _tags(c) or "nbval-skip" in _tags(c) for c in code)
    counts = [c.execution_count for c in code]
    if not 35 <= len(nb.cells) <= 60:
        yield f"has {len(nb.cells)} cells, not 35 to 60"
    if counts != list(range(1, len(code) + 1)):
        yield "is not freshly run: the counts are not 1..n (diffusion-edu notebooks run)"
    if 5 * checks < len(code):
        yield f"checks in {checks} of {len(code)} code cells, less than a fifth"
    if 5 * ignored > len(code):
        yield f"has the output of {ignored} of {len(code)} code cells unchecked, more than a fifth"
    data = [o.get("data", {}) for c in code for o in c.outputs]
    if "widgets" in nb.metadata or any(WIDGET in d for d in data):
        yield "stores widget state"
    if size > 600:
        yield f"has {size:.0f} KiB, more than 600"
    if not any(d.get("text/plain", "").startswith("SliderFigure(") and "image/png" in d for d in data):
        yield "shows no widget"


def _lint_opening(nb):
    first = next((i for i, c in enumerate(nb.cells) if c.cell_type == "code"), 0)
    opening = "\n".join(c.source for c in nb.cells[:first])
    lines = [line for line in opening.splitlines() if line.strip()]
    if not lines or not lines[0].startswith("# ") or len(lines) < 2 or lines[1].startswith("#"):
        yield "does not open with a title and its promise"
    for word in ("goals", "prerequisites", "minutes"):
        if word not in opening.lower():
            yield f"does not name its {word} before the first code cell"


def _lint_close(nb):
    prose = [c.source for c in nb.cells if c.cell_type == "markdown"]
    heads = re.findall(r"^#+ (.*)$", "\n".join(prose), re.M)
    wanted = ["exercise", "equation", "reference"]
    last = [max((i for i, h in enumerate(heads) if w in h.lower()), default=-1) for w in wanted]
    if -1 in last or last != sorted(last) or last[-1] != len(heads) - 1:
        yield "does not end with headings for exercises, equations (a table to functions) and references"
    elif not re.search(r"^\|.*`.*\|\s*$", "\n".join(prose).split(heads[last[1]])[-1], re.M):
        yield "has no table from equations to functions under its heading"


def _lint_exercises(nb, path):
    from diffusion_edu.exercises import exercises_of

    stubs, solutions = tagged(nb, "exercise"), tagged(nb, "solution")
    known = exercises_of(Path(path).name[:2])
    if len(stubs) < 2:
        yield f"has {len(stubs)} exercises, at least 2 are due"
    for id in sorted({*stubs, *solutions, *known}):
        if id not in known or id not in stubs or id not in solutions or stubs[id] > solutions[id]:
            yield f"exercise {id} needs a grader, a stub cell and then a solution cell"
            continue
        for i, said in ((stubs[id], f"todo {id}"), (solutions[id], f"{id} correct")):
            cell = nb.cells[i]
            if f'teach.exercise("{id}"' not in cell.source or said not in _stdout(cell):
                yield f'cell {i + 1}: must call teach.exercise("{id}", ...) and print "{said}"'
        calls = {"".join(GRADED.findall(nb.cells[i].source)) for i in (stubs[id], solutions[id])}
        if len(calls) > 1:
            yield f"exercise {id} must grade the same name in its stub and its solution; got {', '.join(sorted(calls))}"
        cell = nb.cells[solutions[id]]
        if not cell.metadata.get("jupyter", {}).get("source_hidden") or "hide-input" not in _tags(cell):
            yield f"cell {solutions[id] + 1}: a solution is collapsed (jupyter.source_hidden, tag hide-input)"


def _lint_cell(cell):
    if cell.metadata.get("slideshow", {}).get("slide_type") not in SLIDES:
        yield "has no slideshow metadata"
    if ABSOLUTE.search(cell.source):
        yield "names a path of one machine"


def _lint_prose(cell):
    text = re.sub(r"\$\$.*?\$\$", " ", cell.source, flags=re.S)
    text = re.sub(r"\$[^$]*\$", "x", text)
    words = sum(len(line.split()) for line in text.splitlines() if not line.startswith(("|", "#")))
    if words > 120:
        yield f"has {words} words, more than 120"


def _lint_code(cell):
    lines = cell.source.rstrip().split("\n")
    if len(lines) > 20:
        yield f"has {len(lines)} lines, more than 20"
    if any(line.rstrip().endswith(";") for line in lines):
        yield "ends a line with a semicolon"
    if INSTALL.search(cell.source):
        yield "installs packages"
    plain = ["".join(o.get("data", {}).get("text/plain", "")) for o in cell.outputs]
    if any(p.startswith("<Figure") for p in plain) and lines[-1].strip() != "plt.show()":
        yield "draws a figure and does not end in plt.show()"
    if any(re.match(r"\[?<(matplotlib|Axes)", p) for p in plain):
        yield "shows the name of a plot object"
    if any(o.output_type == "error" or o.get("name") == "stderr" for o in cell.outputs):
        yield "stores an error or a warning"
    if any(ABSOLUTE.search(text) for text in (_stdout(cell), *plain)):
        yield "prints a path of one machine"


def _tags(cell):
    return cell.metadata.get("tags", ())


def _stdout(cell):
    return "".join(o.text for o in cell.outputs if o.output_type == "stream" and o.name == "stdout")


def _failed(nb):
    """Number of the first cell with an error, from 1."""
    bad = (i for i, c in enumerate(nb.cells, 1) for o in c.get("outputs", ()) if o.output_type == "error")
    return next(bad, "?")


def _write(nb, path):
    """Write beside the notebook, then rename: a killed run leaves the old file."""
    import nbformat

    temporary = path.with_suffix(".tmp")
    nbformat.write(nb, temporary)
    os.replace(temporary, path)
