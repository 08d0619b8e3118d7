"""Weights on disk: a safetensors file beside a JSON card that holds its SHA-256. No pickle anywhere.

A stored model is a folder with two files, ``weights.safetensors`` and ``card.json``. Both are written beside their
final place, flushed to disk and moved over it, the card last; a folder caught in between is refused by the checksum.
"""

import hashlib
import json
import os
from pathlib import Path

import torch

WEIGHTS, CARD = "weights.safetensors", "card.json"


def save_weights(folder, module, card):
    """Store a module's weights and its card.

    Parameters
    ----------
    folder : path
        Made if it is missing.
    module : nn.Module
    card : dict
        What a reader should know: config, seed, steps, hardware, minutes, metrics. ``sha256`` is added.

    Returns
    -------
    Path
        The folder.
    """
    from safetensors.torch import save

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    blob = save({name: tensor.contiguous() for name, tensor in module.state_dict().items()})
    card = card | {"sha256": hashlib.sha256(blob).hexdigest()}
    text = (json.dumps(card, indent=2, allow_nan=False) + "\n").encode()  # a bad card fails before anything is written
    write_atomically(folder / WEIGHTS, blob)
    write_atomically(folder / CARD, text)
    return folder


def write_atomically(path, blob):
    """Write bytes so that a crash leaves the old file or the new one, never a part."""
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(part, "wb") as file:
            file.write(blob)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    if os.name == "posix":
        directory = os.open(path.parent, os.O_RDONLY)
        os.fsync(directory)  # the move itself
        os.close(directory)


def load_weights(folder, module, config=None):
    """Load stored weights into a module, after checking that they are whole and belong to it.

    Parameters
    ----------
    folder : path
    module : nn.Module
        Of the architecture that was stored; its tensors are overwritten.
    config : dict or None
        If given, it must equal the card's ``config``.

    Returns
    -------
    dict
        The card.

    Raises
    ------
    FileNotFoundError
        If one of the two files is missing.
    ValueError
        In one line: the file is empty, damaged or of another model.
    """
    folder = Path(folder)
    card = read_card(folder)
    if config is not None:
        _check_config(folder, card.get("config", {}), config)
    tensors = _read_tensors(folder / WEIGHTS, card["sha256"])
    _check_names(folder / WEIGHTS, tensors, module.state_dict())
    module.load_state_dict(tensors)
    return card


def read_card(folder):
    """The card of a stored model, as a dict."""
    path = Path(folder) / CARD
    try:
        card = json.loads(_read(path))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"card {path} is not valid JSON: {error}") from None
    if not isinstance(card, dict) or not isinstance(card.get("sha256"), str):
        raise ValueError(f"card {path} has no sha256")
    return card


def _read(path):
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint file {path} does not exist")
    blob = path.read_bytes()
    if not blob:
        raise ValueError(f"checkpoint file {path} is empty (0 bytes)")
    return blob


def _read_tensors(path, sha256):
    """The tensors of a safetensors file with this checksum, all finite."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    blob = _read(path)
    if (found := hashlib.sha256(blob).hexdigest()) != sha256:
        raise ValueError(
            f"checkpoint {path} is truncated or corrupt: SHA-256 {found[:12]}, its card says {sha256[:12]}"
        )
    try:
        tensors = load(blob)
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"checkpoint {path} is not a safetensors file: {error}") from None
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(f"checkpoint {path} holds NaN or Inf in {name!r}")
    return {name.removeprefix("_orig_mod.").removeprefix("module."): t for name, t in tensors.items()}


def _check_config(folder, stored, wanted):
    stored, wanted = _flat(stored), _flat(wanted)
    keys = [key for key in sorted(stored.keys() | wanted.keys()) if stored.get(key) != wanted.get(key)]
    if keys:
        rows = "; ".join(f"{key}: stored {stored.get(key)!r}, asked {wanted.get(key)!r}" for key in keys)
        raise ValueError(f"checkpoint {folder} is of another configuration: {rows}")


def _flat(config, prefix=""):
    """{"net": {"width": 32}} as {"net.width": 32}."""
    flat = {}
    for key, value in config.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _check_names(path, tensors, wanted):
    """The same names with the same shapes."""
    missing = [name for name in wanted if name not in tensors]
    extra = sorted(name for name in tensors if name not in wanted)  # a file has no order
    reshaped = [name for name in wanted if name in tensors and wanted[name].shape != tensors[name].shape]
    for kind, names in (("missing", missing), ("extra", extra), ("of another shape", reshaped)):
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            rule = f"hold this model's tensors; {kind}: {', '.join(names[:5])}{more}"
            raise ValueError(f"checkpoint {path} must {rule}")
