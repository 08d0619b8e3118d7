"""teach and exercises: checks that fail when they should, lines that are the same everywhere, graders with hints."""

import math
import pkgutil

import numpy as np
import pytest
import torch

from diffusion_edu import exercises, teach
from diffusion_edu.exercises import Exercise

INF, NAN = math.inf, math.nan


def test_setup_may_be_called_twice_and_leaves_one_thread(monkeypatch):
    monkeypatch.setenv("DIFFUSION_EDU_PROFILE", "smoke")
    teach.setup()
    teach.setup()
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize("name, value", [("smoke", 1), ("lecture", 2), ("full", 3), ("", 2)])
def test_profile_reads_the_environment(monkeypatch, name, value):
    monkeypatch.setenv("DIFFUSION_EDU_PROFILE", name)
    assert teach.profile(smoke=1, lecture=2, full=3) == value


def test_an_unknown_profile_is_named(monkeypatch):
    monkeypatch.setenv("DIFFUSION_EDU_PROFILE", "fast")
    with pytest.raises(ValueError, match="DIFFUSION_EDU_PROFILE must be one of smoke.*got 'fast'"):
        teach.setup()


def test_agree_prints_names_and_tolerance_and_no_difference(capsys):
    teach.agree("post.mean", mine=torch.ones(2), package=np.ones(2) + 3e-12, exact=[1.0, 1.0], tol=1e-11)
    assert capsys.readouterr().out == "ok  post.mean            mine = package = exact  (to 1e-11)\n"


@pytest.mark.parametrize(
    "values",
    [
        {"a": 1.0, "b": 1.0 + 2e-10},
        {"a": 1e6, "b": 1e6 + 2e-4},
        {"a": 1.0, "b": 1.0, "c": 1.1},
        {"a": torch.ones(2), "b": torch.ones(1)},
        {"a": torch.ones(2), "b": 1.0},
        {"a": torch.empty(0), "b": torch.empty(0)},
        {"a": NAN, "b": NAN},
        {"a": INF, "b": -INF},
        {"a": INF, "b": 1.0},
        {"a": None, "b": None},
        {"a": "1", "b": "1"},
    ],
)
def test_agree_refuses(values):
    with pytest.raises(AssertionError, match="x: "):
        teach.agree("x", **values)


def test_agree_is_relative_above_one_and_knows_infinity():
    teach.agree("x", a=1e6, b=1e6 + 9e-5)
    teach.agree("x", a=[INF, 1.0], b=torch.tensor([INF, 1.0], dtype=torch.float64))
    with pytest.raises(TypeError, match="values must hold at least two"):
        teach.agree("x", a=1.0)


def test_near_counts_standard_errors_in_every_entry(capsys):
    teach.near("fwd.marginal", [1.0, 2.0], [1.03, 2.0], 0.01)
    assert capsys.readouterr().out == ("ok  fwd.marginal         Monte Carlo = exact  (within 4 standard errors)\n")
    for bad in [([1.0, 2.0], [1.0, 2.05], 0.01), (1.0, 1.0, 0.0), (1.0, [1.0], 0.1), (NAN, 1.0, 0.1)]:
        with pytest.raises(AssertionError, match="x: "):
            teach.near("x", *bad)


def test_below_and_above_hold_for_every_entry(capsys):
    teach.below("swiss.train", torch.tensor([0.01, 0.02]), 0.03)
    teach.above("metric", [0.93, 0.99], 0.9, digits=1)
    assert capsys.readouterr().out == (
        "ok  swiss.train          below 0.03\nok  metric               above 0.9  (about 0.9)\n"
    )
    for check, value in [(teach.below, [0.0, 1.0]), (teach.above, [2.0, 1.0]), (teach.below, NAN)]:
        with pytest.raises(AssertionError, match="x: "):
            check("x", value, 1.0)


def test_misprint_shows_wrong_right_and_exact(capsys):
    teach.misprint("E000-06", wrong=-0.15304, right=-0.3951912, exact=-0.3951912 + 1e-13)
    assert capsys.readouterr().out == (
        "misprint E000-06\n  as printed -0.153\n  right      -0.3952\n  exact      -0.3952\n"
    )
    teach.misprint("E", wrong=[INF, 1.0], right=[2.0, 1e-17], exact=[2.0, 0.0])
    assert capsys.readouterr().out == ("misprint E\n  as printed inf  1\n  right      2  0\n  exact      2  0\n")
    teach.misprint("E", wrong=math.nan, right=2.0, exact=2.0)
    assert "as printed nan" in capsys.readouterr().out


@pytest.mark.parametrize(
    "values", [(1.0, 1.0, 1.0), (2.0, 1.1, 1.0), (2.0, NAN, NAN), ([2.0], 1.0, 1.0), (1.0 + 1e-12, 1.0, 1.0)]
)
def test_misprint_needs_a_wrong_form_that_is_wrong_and_a_right_one_that_is_right(values):
    with pytest.raises(AssertionError, match="E: "):
        teach.misprint("E", **dict(zip(("wrong", "right", "exact"), values, strict=True)))


def scaled(x, c):
    """A docstring that show leaves out."""
    return c * x


def test_show_prints_the_source_without_its_docstring(capsys):
    teach.show(scaled)
    assert capsys.readouterr().out == f"# {__name__}\ndef scaled(x, c):\n    return c * x\n"


X = torch.tensor([1.0, 2.0], dtype=torch.float64)
EXERCISES = {
    "99.1": Exercise(scaled, ((X, 2.0), (X, 3.0)), {"this is c + x": lambda x, c: c + x}, points=2),
    "99.2": Exercise(0.5, mistakes={"this is the square": 0.25}, tol=1e-3),
    "99.3": Exercise("b", mistakes={"that is the other one": "a"}),
    "99.4": Exercise(lambda x: (x, x.sum()), ((X,),)),
}


@pytest.fixture
def four(monkeypatch):
    monkeypatch.setattr(exercises, "exercises_of", lambda number: EXERCISES if int(number) == 99 else {})


def mutating(x, c):
    return x.mul_(c)


@pytest.mark.parametrize(
    "id, answer, line",
    [
        ("99.1", scaled, "99.1 correct"),
        ("99.1", mutating, "99.1 correct"),
        ("99.1", lambda x, c: None, "todo 99.1"),
        ("99.1", lambda x, c: ..., "todo 99.1"),
        ("99.1", None, "todo 99.1"),
        ("99.1", lambda x, c: c + x, "99.1 not yet: this is c + x"),
        ("99.1", lambda x, c: 2 * x, "99.1 not yet: its values differ from the right ones on input 2 of 2"),
        ("99.1", lambda x, c: x.sum(), "99.1 not yet: its shape is (), the answer's is (2,) on input 1 of 2"),
        ("99.1", lambda x, c: x / 0 - x / 0, "99.1 not yet: it gives nan on input 1 of 2"),
        ("99.1", lambda x, c: "2", "99.1 not yet: the answer is a number or an array, not str on input 1 of 2"),
        ("99.1", lambda x, c: x[5], "99.1 not yet: it raises IndexError: index 5 is out of bounds"),
        ("99.1", 3.0, "99.1 not yet: the answer is a function"),
        ("99.2", 0.5004, "99.2 correct"),
        ("99.2", ..., "todo 99.2"),
        ("99.2", 0.25, "99.2 not yet: this is the square"),
        ("99.2", torch.tensor(0.7), "99.2 not yet: its values differ from the right ones"),
        ("99.2", scaled, "99.2 not yet: the answer is a value, not a function"),
        ("99.3", " B ", "99.3 correct"),
        ("99.3", "a", "99.3 not yet: that is the other one"),
        ("99.3", "c", "99.3 not yet: that is not the right choice"),
        ("99.4", lambda x: (x, x.sum()), "99.4 correct"),
        ("99.4", lambda x: x, "99.4 not yet: the answer has 2 parts"),
        ("99.4", lambda x: (x, x.mean()), "99.4 not yet: part 2 of 2: its values differ from the right ones"),
    ],
)
def test_a_grade_is_one_kind_line(four, capsys, id, answer, line):
    result = teach.exercise(id, answer)
    assert capsys.readouterr().out.startswith(line)
    assert bool(result) == line.endswith("correct")
    assert result.points == (EXERCISES[id].points if result else 0)


def test_a_stub_that_raises_not_implemented_is_a_todo(four, capsys):
    def stub(x, c):
        raise NotImplementedError

    assert not teach.exercise("99.1", stub)
    assert capsys.readouterr().out == "todo 99.1\n"


@pytest.mark.parametrize("id, rule", [("4.1", "read NN.k"), ("99.7", "99.1, 99.2"), ("98.1", "it has none")])
def test_an_unknown_exercise_is_named(four, id, rule):
    with pytest.raises(ValueError, match=f"id must .*{rule}.*; got '{id}'"):
        exercises.find(id)


def test_an_exercise_needs_inputs_for_a_function():
    with pytest.raises(ValueError, match="inputs must"):
        Exercise(scaled)
    with pytest.raises(TypeError, match="inputs must be a tuple of argument tuples"):
        Exercise(scaled, inputs=(X,))


NUMBERS = sorted(m.name[1:] for m in pkgutil.iter_modules(exercises.__path__) if m.name[0] == "n")


@pytest.mark.parametrize("number", NUMBERS)
def test_every_exercise_accepts_its_answer_and_gives_each_mistake_its_own_hint(number):
    known = exercises.exercises_of(number)
    assert known and all(id.startswith(f"{number}.") for id in known)
    for id, e in known.items():
        assert exercises.grade(id, e.answer).points == e.points > 0
        for hint, wrong in e.mistakes.items():
            assert str(exercises.grade(id, wrong)) == f"{id} not yet: {hint}"
        assert exercises.grade(id, (lambda *args: None) if callable(e.answer) else None).status == "todo"
