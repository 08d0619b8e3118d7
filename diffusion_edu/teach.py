"""What the notebooks say aloud: checks that print one line, exercises, profiles, the source of a function.

Every check raises ``AssertionError`` when it fails. What it prints when it holds is the same on every CPU:
names, tolerances, and exact numbers to four digits, never a measured difference.
"""

import ast
import inspect
import os
import sys
import textwrap

import numpy as np

from diffusion_edu import exercises
from diffusion_edu.checks import fail, real
from diffusion_edu.exercises import numbers, spread

__all__ = ["above", "agree", "below", "exercise", "misprint", "near", "profile", "setup", "show"]

PROFILES = ("smoke", "lecture", "full")


def setup():
    """One thread, a fixed seed and the course's figure style. May be called again at any time."""
    import torch

    from diffusion_edu import viz

    draft = profile(smoke=True, lecture=False, full=False)  # smoke shows that figures are drawn, and nobody looks
    torch.set_num_threads(1)
    torch.manual_seed(0)
    viz.style(draft)
    if draft and _in_kernel():
        from matplotlib_inline.config import InlineBackend

        InlineBackend.instance().print_figure_kwargs = {"bbox_inches": None}  # "tight" draws every figure twice


def profile(*, smoke, lecture, full):
    """The value for the profile named by the environment variable DIFFUSION_EDU_PROFILE (default: lecture).

    Raises
    ------
    ValueError
        If the variable names no profile.
    """
    name = os.environ.get("DIFFUSION_EDU_PROFILE") or "lecture"
    if name not in PROFILES:
        fail("DIFFUSION_EDU_PROFILE", f"be one of {', '.join(PROFILES)}", repr(name))
    return {"smoke": smoke, "lecture": lecture, "full": full}[name]


def agree(name, /, *, tol=1e-10, **values):
    """Assert that two or more values agree, and say so in one line.

    Parameters
    ----------
    name : str
        What is checked: an equation's id, or a few words.
    tol : float
        Largest difference between any two, relative to max(1, \\|value\\|).
    **values : Tensor, array or number
        All of one shape, under names of your choice: ``mine=``, ``package=``, ``exact=``, ``autograd=``.
    """
    tol = real("tol", tol, low=0)
    if len(values) < 2:
        fail("values", "hold at least two named values to compare", ", ".join(values) or "none", TypeError)
    arrays = [_finite_shape(name, key, value) for key, value in values.items()]
    shapes = {key: a.shape for key, a in zip(values, arrays, strict=True)}
    assert len(set(shapes.values())) == 1, f"{name}: shapes differ: {shapes}"
    gap = spread(*arrays)
    assert gap <= tol, f"{name}: {', '.join(values)} differ by {gap:.3g}, more than {tol:g}"
    _say(name, f"{' = '.join(values)}  (to {tol:g})")


def near(name, /, estimate, exact, stderr, k=4):
    """Assert that a Monte Carlo estimate is within ``k`` standard errors of the exact value, in every entry.

    Parameters
    ----------
    estimate, exact : Tensor, array or number, one shape
    stderr : Tensor, array or number
        Positive; a number, or the shape of the estimate.
    """
    estimate, exact, stderr = (
        _finite_shape(name, key, value) for key, value in (("estimate", estimate), ("exact", exact), ("stderr", stderr))
    )
    assert estimate.shape == exact.shape, f"{name}: shapes differ: {estimate.shape}, {exact.shape}"
    assert stderr.shape in ((), exact.shape), f"{name}: stderr has shape {stderr.shape}, not {exact.shape}"
    assert np.all(stderr > 0), f"{name}: stderr must be positive"
    worst = float(np.max(np.abs(estimate - exact) / stderr))
    assert worst <= k, f"{name}: {worst:.3g} standard errors away, more than {k:g}"
    _say(name, f"Monte Carlo = exact  (within {k:g} standard errors)")


def below(name, /, value, bound, digits=None):
    """Assert that every entry of ``value`` is below ``bound``; ``digits`` also prints the largest, rounded."""
    value = _finite_shape(name, "value", value)
    assert np.all(value < float(bound)), f"{name}: {value.max():.6g} is not below {float(bound):g}"
    _say(name, f"below {float(bound):.4g}{_rounded(value.max(), digits)}")


def above(name, /, value, bound, digits=None):
    """Assert that every entry of ``value`` is above ``bound``; ``digits`` also prints the smallest, rounded."""
    value = _finite_shape(name, "value", value)
    assert np.all(value > float(bound)), f"{name}: {value.min():.6g} is not above {float(bound):g}"
    _say(name, f"above {float(bound):.4g}{_rounded(value.min(), digits)}")


def misprint(errata, /, *, wrong, right, exact, tol=1e-9):
    """Show a misprint of the lectures beside the right form and an independent exact value.

    Asserts that ``right`` equals ``exact`` to ``tol`` and that ``wrong`` does not. All three are numbers, or
    small arrays of one shape; ``wrong`` may be inf or nan.
    """
    tol = real("tol", tol, low=0)
    right, exact = _finite_shape(errata, "right", right), _finite_shape(errata, "exact", exact)
    wrong = numbers(wrong)
    assert wrong.shape == right.shape == exact.shape, f"{errata}: wrong, right and exact differ in shape"
    gap = spread(right, exact)
    assert gap <= tol, f"{errata}: right and exact differ by {gap:.3g}, more than {tol:g}"
    assert spread(wrong, exact) > tol, f"{errata}: the misprint is exact at this point; choose another"
    rows = {"as printed": wrong, "right": right, "exact": exact}
    print(f"misprint {errata}", *(f"  {key:<11}{_digits(row, tol)}" for key, row in rows.items()), sep="\n")


def exercise(id, answer):
    """Grade an answer to an exercise and print one line: ``04.1 correct``, ``todo 04.1`` or a hint.

    Returns
    -------
    exercises.Result
        True when the answer is right; ``.points`` is what it earned.
    """
    result = exercises.grade(id, answer)
    print(result)
    return result


def show(thing):
    """Show the package's source of a function or class, without its docstring."""
    source = textwrap.dedent(inspect.getsource(thing))
    node = ast.parse(source).body[0]
    lines = source.rstrip().split("\n")
    if ast.get_docstring(node) is not None:
        text = node.body[0]
        del lines[text.lineno - 1 : text.end_lineno]
    source = f"# {thing.__module__}\n" + "\n".join(line for i, line in enumerate(lines) if line or i)
    if _in_kernel():
        from IPython.display import Markdown, display

        display(Markdown(f"```python\n{source}\n```"))
    else:
        print(source)


def _in_kernel():
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return hasattr(shell, "kernel")


def _finite_shape(name, key, value):
    """A float64 array that holds numbers: not None, not empty, no nan."""
    try:
        array = numbers(value)
    except (TypeError, ValueError):
        raise AssertionError(f"{name}: {key} must be a tensor, an array or a number; got {value!r}") from None
    assert array.size, f"{name}: {key} is empty"
    assert not np.isnan(array).any(), f"{name}: {key} has nan"
    return array


def _say(name, text):
    print(f"ok  {name:<20} {text}")


def _rounded(value, digits):
    return "" if digits is None else f"  (about {value:.{digits}g})"


def _digits(array, tol):
    """Four significant digits of every entry; what is zero within the tolerance prints as 0."""
    flat = array.reshape(-1)
    shown = ["0" if abs(v) <= min(tol, 1e-9) else f"{v:.4g}" for v in flat[:6]]
    return "  ".join(shown + ["..."] * (flat.size > 6))
