"""Argument checks, and the one form of message they give.

Every check raises before any work is done and reads ``<argument> must <rule>; got <value>``. A wrong kind of
thing is a ``TypeError``, a wrong value a ``ValueError``. Values on an accelerator are never read back for a check.
"""

import difflib
import math
from numbers import Integral, Real

import torch
from torch import Tensor


def fail(name, rule, got, kind=ValueError):
    """Raise ``kind`` with the message ``name must rule; got got``."""
    raise kind(f"{name} must {rule}; got {got}")


def shown(value):
    """A value as a message may show it: tensors and networks by their kind, not by their numbers."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return type(value).__name__ if isinstance(value, torch.nn.Module) else repr(value)


def integer(name, value, low=None, high=None):
    """An int in [low, high]; bool and float are refused."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        fail(name, "be an integer", shown(value), TypeError)
    return int(_in_range(name, int(value), low, high))


def real(name, value, low=None, high=None, open_low=False):
    """A finite real number in [low, high], or (low, high] with ``open_low``."""
    if isinstance(value, bool) or not isinstance(value, Real):
        fail(name, "be a real number", shown(value), TypeError)
    if not math.isfinite(value):
        fail(name, "be finite", value)
    if open_low and not value > low:
        fail(name, f"be greater than {low}", value)
    return float(_in_range(name, float(value), low, high))


def _in_range(name, value, low, high):
    if (low is not None and value < low) or (high is not None and value > high):
        fail(name, _range_rule(low, high), value)
    return value


def _range_rule(low, high):
    if high is None:
        return f"be at least {low}"
    return f"be at most {high}" if low is None else f"be in [{low}, {high}]"


def one_of(name, value, allowed):
    """One of the allowed names; a near miss gets a suggestion."""
    if value not in allowed:
        near = difflib.get_close_matches(str(value), [str(a) for a in allowed], n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        fail(name, f"be one of {', '.join(map(repr, allowed))}", f"{value!r}{hint}")
    return value


def function(name, value, example):
    """Something callable; ``example`` says what would do."""
    if not callable(value):
        fail(name, f"be a function such as {example}", shown(value), TypeError)
    return value


def floating(name, value):
    """A tensor of real floating-point numbers."""
    if not isinstance(value, Tensor):
        fail(name, "be a torch.Tensor", type(value).__name__, TypeError)
    if not value.is_floating_point():
        fail(name, "be a floating-point tensor (scale images to [-1, 1] first)", value.dtype, TypeError)
    return value


def same_shape(name, value, other_name, other):
    """``value`` has exactly the shape of ``other``: nothing is broadcast."""
    floating(name, value)
    if value.shape != other.shape:
        fail(name, f"have the shape of {other_name}, {tuple(other.shape)}", tuple(value.shape))
    return value


def broadcasts(name, value, other_name, other):
    """``value``, a tensor or a number, broadcasts to exactly the shape of ``other``."""
    shape = getattr(value, "shape", ())
    sizes = zip(reversed(shape), reversed(other.shape), strict=False)
    if len(shape) > other.ndim or any(a not in (1, b) for a, b in sizes):
        fail(name, f"broadcast to the shape of {other_name}, {tuple(other.shape)}", f"shape {tuple(shape)}")
    return value


def positive(name, value):
    """A tensor or a number, finite and greater than 0. Values are read on the CPU only."""
    if not isinstance(value, Tensor):
        return real(name, value, 0, open_low=True)
    if value.device.type == "cpu":
        bad = ~((value > 0) & value.isfinite())
        if bad.any():
            fail(name, "be finite and greater than 0", f"{value[bad].flatten()[0].item():g}")
    return value


def labels(name, value, batch, n_classes):
    """Class labels: int64, shape (B,), values 0..n_classes-1."""
    if not isinstance(value, Tensor) or value.dtype != torch.int64:
        fail(name, "be an int64 tensor", getattr(value, "dtype", type(value).__name__), TypeError)
    if value.shape != (batch,):
        fail(name, f"have shape ({batch},), one label an example", tuple(value.shape))
    if value.device.type == "cpu" and value.numel() and not (0 <= value.min() and value.max() < n_classes):
        fail(name, f"be in [0, {n_classes - 1}]", f"{value.min().item()}..{value.max().item()}")
    return value


def batch_of_times(name, t, batch):
    """A time for every example: 0-d (the same for all) or shape (B,)."""
    if not isinstance(t, Tensor):
        fail(name, "be a torch.Tensor", type(t).__name__, TypeError)
    if t.ndim and t.shape != (batch,):
        fail(name, f"be 0-d or of shape ({batch},), the batch size", f"shape {tuple(t.shape)}")
    return t


def times_in(name, t, low, high, discrete):
    """Times of the right kind, low <= t <= high. Values are read on the CPU only."""
    if not isinstance(t, Tensor):
        fail(name, "be a torch.Tensor", type(t).__name__, TypeError)
    if discrete and (t.dtype.is_floating_point or t.dtype.is_complex or t.dtype in (torch.bool, torch.uint8)):
        fail(name, "be an integer tensor on a discrete schedule", t.dtype, TypeError)
    if not discrete and not t.dtype.is_floating_point:
        fail(name, "be a floating-point tensor on a continuous process", t.dtype, TypeError)
    if t.device.type == "cpu" and t.numel():
        least, most = t.aminmax()
        if not low <= least.item() <= most.item() <= high:  # also when one of them is nan
            bad = ~((t >= low) & (t <= high))
            where = f" at index {int(bad.nonzero()[0, 0])}" if t.ndim else ""
            fail(name, f"be in [{low:g}, {high:g}]", f"{t[bad].flatten()[0].item():g}{where}")
    return t
