"""Exercises that grade themselves, and recognise a known mistake by its value.

One file a notebook: ``diffusion_edu/exercises/n04.py`` holds ``EXERCISES = {"04.1": Exercise(...), ...}``
and is imported when its first exercise is asked for.
"""

import copy
import importlib
import pkgutil
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from diffusion_edu.checks import fail

__all__ = ["Exercise", "Result", "exercises_of", "find", "grade", "numbers"]


@dataclass(frozen=True)
class Exercise:
    """What an exercise accepts, and the mistakes that it knows.

    Parameters
    ----------
    answer : callable, number, array or str
        The right answer: a function (graded by its values on ``inputs``), a number or an array (graded by
        value), or the letter of a choice.
    inputs : tuple of tuples
        The argument tuples on which functions are compared. Every call gets its own copy.
    mistakes : mapping from hint to wrong answer
        An answer that equals a wrong one in value on all inputs gets its hint, and no other sentence.
    tol : float
        Largest accepted difference, relative to max(1, \\|value\\|).
    points : int
        What a right answer is worth.
    """

    answer: Callable | float | str
    inputs: tuple[tuple, ...] = ()
    mistakes: Mapping[str, Any] = field(default_factory=dict)
    tol: float = 1e-9
    points: int = 1

    def __post_init__(self):
        if callable(self.answer) and not self.inputs:
            fail("inputs", "hold at least one tuple of arguments for a function", self.inputs)
        if not all(isinstance(args, tuple) for args in self.inputs):
            fail("inputs", "be a tuple of argument tuples, such as ((x0, t),)", self.inputs, TypeError)


@dataclass(frozen=True)
class Result:
    """A grade; true when the answer is right. Its one line is printed by ``teach.exercise``."""

    id: str
    status: str  # "correct", "todo" or "not yet"
    hint: str = ""
    points: int = 0

    def __bool__(self):
        return self.status == "correct"

    def __str__(self):
        if self.status == "not yet":
            return f"{self.id} not yet: {self.hint}"
        return f"todo {self.id}" if self.status == "todo" else f"{self.id} correct"

    def _ipython_display_(self):
        """Show nothing as the last line of a cell: the line is printed already."""


def exercises_of(number):
    """All exercises of a notebook by id; {} where it has none. ``number`` is 4 or "04"."""
    name = f"{__name__}.n{int(number):02d}"
    known = {f"{__name__}.{m.name}" for m in pkgutil.iter_modules(__path__)}
    return dict(importlib.import_module(name).EXERCISES) if name in known else {}


def find(id):
    """The exercise of that id, such as "04.1".

    Raises
    ------
    ValueError
        If there is none; the message names those of the same notebook.
    """
    if not re.fullmatch(r"\d\d\.\d+", str(id)):
        fail("id", "read NN.k, such as 04.1", repr(id))
    exercises = exercises_of(id[:2])
    if id not in exercises:
        fail("id", f"be an exercise of notebook {id[:2]} ({', '.join(exercises) or 'it has none'})", repr(id))
    return exercises[id]


def grade(id, answer):
    """Grade an answer: a function, a number, an array or a letter. Never raises for a wrong answer.

    Returns
    -------
    Result
        ``todo`` for an empty stub (None, Ellipsis or NotImplementedError), else ``correct`` or ``not yet``
        with a hint: the hint of the known mistake that has the same values, or what differs.
    """
    exercise = find(id)
    if _is_empty(answer):
        return Result(id, "todo")
    if callable(exercise.answer) != callable(answer):
        kind = "function" if callable(exercise.answer) else "value, not a function"
        return Result(id, "not yet", f"the answer is a {kind}")
    try:
        got = _values(answer, exercise.inputs)
    except NotImplementedError:
        return Result(id, "todo")
    except Exception as error:  # a student's function may raise anything
        return Result(id, "not yet", f"it raises {type(error).__name__}: {error}")
    if any(_is_empty(value) for value in got):
        return Result(id, "todo")
    problem = _problem(got, _values(exercise.answer, exercise.inputs), exercise.tol)
    if problem is None:
        return Result(id, "correct", points=exercise.points)
    for hint, wrong in exercise.mistakes.items():
        if _problem(got, _values(wrong, exercise.inputs), exercise.tol) is None:
            return Result(id, "not yet", hint)
    return Result(id, "not yet", problem)


def _is_empty(value):
    return value is None or value is Ellipsis


def _values(answer, inputs):
    """A function's value on every input, or the value itself, as a list."""
    return [answer(*copy.deepcopy(args)) for args in inputs] if callable(answer) else [answer]


def _problem(got, want, tol):
    """None where all values agree, else a sentence on the first that does not."""
    for i, (g, w) in enumerate(zip(got, want, strict=True), 1):
        where = f" on input {i} of {len(want)}" if len(want) > 1 else ""
        problem = _difference(g, w, tol)
        if problem:
            return problem + where
    return None


def _difference(got, want, tol):
    if isinstance(want, str):
        return None if _letters(got) == _letters(want) else "that is not the right choice"
    if isinstance(want, tuple | list):
        if not isinstance(got, tuple | list) or len(got) != len(want):
            return f"the answer has {len(want)} parts"
        parts = enumerate(zip(got, want, strict=True), 1)
        found = ((i, _difference(g, w, tol)) for i, (g, w) in parts)
        return next((f"part {i} of {len(want)}: {problem}" for i, problem in found if problem), None)
    try:
        g, w = numbers(got), numbers(want)
    except (TypeError, ValueError):
        return f"the answer is a number or an array, not {type(got).__name__}"
    if g.shape != w.shape:
        return f"its shape is {g.shape}, the answer's is {w.shape}"
    if not np.array_equal(np.isnan(g), np.isnan(w)):
        return "it gives nan"
    there = ~np.isnan(w)
    return None if spread(g[there], w[there]) <= tol else "its values differ from the right ones"


def _letters(choice):
    """A choice without spaces, commas and capitals."""
    return "".join(c for c in str(choice).lower() if c.isalnum())


def numbers(value):
    """A float64 array of a tensor, a number or nested lists of numbers (None is refused)."""
    if hasattr(value, "detach"):
        value = value.detach().cpu().double().resolve_neg().numpy()
    array = np.asarray(value)
    if array.dtype.kind not in "biuf":
        raise TypeError(f"no numbers: {type(value).__name__}")
    return array.astype(np.float64)


def spread(*arrays):
    """Largest difference of arrays of one shape, relative to max(1, |value|); equal infinities differ by 0."""
    stack = np.stack(arrays)
    if stack.size == 0:
        return 0.0
    low, high = stack.min(0), stack.max(0)  # nan stays nan, and is far from everything
    with np.errstate(invalid="ignore"):
        gap = np.where(low == high, 0.0, (high - low) / np.maximum(1.0, np.abs(stack).max(0)))
    return float(np.nan_to_num(gap, nan=np.inf).max())
