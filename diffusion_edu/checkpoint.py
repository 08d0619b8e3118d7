"""Weights and whole training states on disk: safetensors beside JSON that holds their SHA-256. No pickle anywhere.

A stored model is a folder with two files, ``weights.safetensors`` and ``card.json``. Both are written beside their
final place, flushed to disk and moved over it, the card last; a folder caught in between is refused by the checksum.
`Snapshots` are folders that appear under their name only when all in them is on disk.
"""

import errno
import hashlib
import json
import os
import shutil
from pathlib import Path

import torch

WEIGHTS, CARD = "weights.safetensors", "card.json"
MANIFEST, FORMAT = "manifest.jsonl", 1


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
        _write(part, blob)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    _flush_folder(path.parent)  # the move itself


def _write(path, blob):
    with open(path, "wb") as file:
        file.write(blob)
        file.flush()
        os.fsync(file.fileno())


def _flush_folder(path):
    if os.name == "posix":
        folder = os.open(path, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


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
    check_names(folder / WEIGHTS, tensors, module.state_dict())
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


class Snapshots:
    """The checkpoints of a run: folders ``step_00001000/`` with a safetensors file for each part of the state.

    ``manifest.jsonl`` in each names the step, the run and the SHA-256 of every file, and carries its own. A folder is
    written under another name and moved into place when all of it is on disk: killed at any moment, the newest complete
    checkpoint stays whole.

    Parameters
    ----------
    folder : path
    keep : int
        How many of the newest are kept.
    run : dict
        What the run is, JSON; a checkpoint of another run is refused.
    """

    def __init__(self, folder, keep, run):
        self.folder, self.keep, self.run = Path(folder), keep, json.loads(json.dumps(run))

    def save(self, step, files, device="cpu"):
        """Store ``files``, {name: {tensor name: tensor}}, as the state after ``step`` steps; returns the folder.

        ``device`` is the kind of device that the state comes from: on another one, rounding differs.
        """
        from safetensors.torch import save

        final = self.folder / f"step_{step:08d}"
        if final.exists():  # the run that is resumed stored it already, bit for bit
            return final
        part = self.folder / f".{final.name}.{os.getpid()}.tmp"
        blobs = {f"{name}.safetensors": save({n: t.contiguous() for n, t in files[name].items()}) for name in files}
        sums = {name: hashlib.sha256(blob).hexdigest() for name, blob in blobs.items()}
        manifest = {"format": FORMAT, "step": step, "device": device, "run": self.run, "sha256": sums}
        text = json.dumps(manifest, allow_nan=False).encode()
        blobs[MANIFEST] = text + b"\n" + hashlib.sha256(text).hexdigest().encode() + b"\n"
        try:
            part.mkdir(parents=True)
            for name, blob in blobs.items():
                _write(part / name, blob)
            _flush_folder(part)
            os.replace(part, final)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
                raise
            need, free = sum(map(len, blobs.values())) / 1e6, shutil.disk_usage(self.folder).free / 1e6
            sizes = f"need {need:.1f} MB, free {free:.1f} MB"
            raise OSError(f"no space left writing {final} ({sizes}); the checkpoints before it are whole") from None
        finally:
            shutil.rmtree(part, ignore_errors=True)  # after a failure; else it has moved
        _flush_folder(self.folder)
        for old in self.steps()[: -self.keep]:
            shutil.rmtree(old)
        return final

    def steps(self):
        """The folders, oldest first."""
        folders = [path for path in self.folder.glob("step_*") if path.name[5:].isdigit()]
        return sorted(folders, key=lambda path: int(path.name[5:]))

    def newest(self):
        """(step, files, device) of the newest checkpoint, or None if there is none.

        Raises
        ------
        ValueError
            In one line: it is damaged, of another format or another run; the newest whole one before it is named.
        """
        folders = self.steps()
        if not folders:
            return None
        try:
            return self._read(folders[-1])
        except (ValueError, FileNotFoundError) as error:
            whole = next((folder.name for folder in reversed(folders[:-1]) if self._is_whole(folder)), None)
            hint = f"; remove {folders[-1]} to go on from {whole}, which is whole" if whole else ""
            raise ValueError(f"{error}{hint}") from None

    def _is_whole(self, folder):
        try:
            return bool(self._read(folder))
        except (ValueError, FileNotFoundError):
            return False

    def _read(self, folder):
        text, _, rest = _read(folder / MANIFEST).partition(b"\n")
        if rest != hashlib.sha256(text).hexdigest().encode() + b"\n":
            raise ValueError(f"checkpoint {folder / MANIFEST} is truncated or corrupt: it does not match its SHA-256")
        manifest = json.loads(text)
        if manifest["format"] != FORMAT:
            raise ValueError(f"checkpoint {folder} has format {manifest['format']}; this version reads {FORMAT}")
        _check_config(folder, manifest["run"], self.run)
        sums = manifest["sha256"]
        for name in sums:
            if Path(name).name != name:
                raise ValueError(f"checkpoint {folder} names a file that is not in it: {name}")
        files = {name.split(".")[0]: _read_tensors(folder / name, sums[name]) for name in sums}
        return manifest["step"], files, manifest["device"]

    def sweep(self):
        """Remove what a killed run left half written."""
        for stale in self.folder.glob(".*.tmp"):
            shutil.rmtree(stale) if stale.is_dir() else stale.unlink()


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


def check_names(path, tensors, wanted):
    """Tensors of a file that have the names and the shapes of those wanted."""
    missing = [name for name in wanted if name not in tensors]
    extra = sorted(name for name in tensors if name not in wanted)  # a file has no order
    reshaped = [name for name in wanted if name in tensors and wanted[name].shape != tensors[name].shape]
    for kind, names in (("missing", missing), ("extra", extra), ("of another shape", reshaped)):
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            rule = f"hold this model's tensors; {kind}: {', '.join(names[:5])}{more}"
            raise ValueError(f"checkpoint {path} must {rule}")
