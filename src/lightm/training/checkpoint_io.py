"""Training checkpoints as one safetensors file: the tensors, and everything else as JSON in its header.

Lightning pickles its checkpoints; a pickle can execute code when it is read. This plug-in for Lightning's Trainer
keeps the same nested state without one, writes it to a temporary file, syncs and renames it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.plugins.io import CheckpointIO
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lightm.errors import InputError, LightMError
from lightm.files import replacing

_STATE = "lightm_checkpoint"
_SUM = "lightm_sha256"
LAST, PREVIOUS = "last.ckpt", "previous.ckpt"


class SafeCheckpointIO(CheckpointIO):
    """Save and load Lightning's checkpoint dictionary without pickles."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write the checkpoint in one step; LightMError names what cannot be written."""
        tensors: dict[str, torch.Tensor] = {}
        tree = _encode(checkpoint, tensors, "checkpoint")
        text = json.dumps(tree)
        try:
            with replacing(path) as temporary:
                save_file(tensors, temporary, metadata={_STATE: text, _SUM: _checksum(text, tensors)})
        except SafetensorError as error:
            raise LightMError(f"{path}: the checkpoint could not be written ({error})") from error

    def load_checkpoint(
        self, path: Any, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint written by `save_checkpoint`; InputError for any other file."""
        try:
            with safe_open(str(path), framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path}: not a readable checkpoint ({error})") from error
        if _STATE not in metadata:
            raise InputError(f"{path}: a safetensors file, but not a LightM checkpoint")
        if metadata.get(_SUM, "") not in ("", _checksum(metadata[_STATE], tensors)):
            raise InputError(f"{path}: the checkpoint is damaged, its content does not fit its checksum")
        decoded: dict[str, Any] = _decode(json.loads(metadata[_STATE]), tensors)
        return decoded

    def remove_checkpoint(self, path: Any) -> None:
        """Remove a checkpoint."""
        Path(path).unlink(missing_ok=True)


def save_rotating(folder: Path, save: Callable[[Path], object]) -> None:
    """Write `last.ckpt` by save(path), and keep the one before it as `previous.ckpt`.

    From the first one on, a whole checkpoint has one of the two names at every moment. Raises LightMError when the disk
    refuses.
    """
    last = Path(folder) / LAST
    with replacing(last) as temporary:
        save(temporary)
        with temporary.open("rb+") as file:  # before the older one gives its name away
            os.fsync(file.fileno())
        if last.exists():
            os.replace(last, last.with_name(PREVIOUS))


def newest_checkpoint(folder: Path, say: Callable[[str], None]) -> Path | None:
    """Return `last.ckpt`, or `previous.ckpt` (saying so) where that is missing or damaged; None without both.

    Raises InputError when there are checkpoints, but no readable one.
    """
    faults = []
    for name in (LAST, PREVIOUS):
        path = Path(folder) / name
        if not path.is_file():
            continue
        try:
            SafeCheckpointIO().load_checkpoint(path)
        except InputError as error:
            faults.append(str(error))
            continue
        if name == PREVIOUS:
            reason = faults[0] if faults else f"{Path(folder) / LAST} is missing"
            say(f"{reason}; the run continues from the checkpoint before it, {path}")
        return path
    if faults:
        raise InputError(f"{'; '.join(faults)}: no checkpoint is left to continue from; start a new run")
    return None


def _checksum(text: str, tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _encode(value: Any, tensors: dict[str, torch.Tensor], where: str) -> Any:
    """Return `value` as JSON values, each container as [type, content]; tensors go into `tensors` by number."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, torch.Tensor | np.ndarray):
        name = str(len(tensors))
        is_tensor = isinstance(value, torch.Tensor)
        tensor = value if isinstance(value, torch.Tensor) else torch.from_numpy(np.ascontiguousarray(value))
        tensors[name] = tensor.detach().cpu().clone().contiguous()  # safetensors refuses shared memory
        return ["tensor" if is_tensor else "array", name]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, dict):
        kind = "odict" if isinstance(value, OrderedDict) else "dict"
        items = [
            [_encode(key, tensors, where), _encode(item, tensors, f"{where}.{key}")] for key, item in value.items()
        ]
        return [kind, items]
    if isinstance(value, list | tuple | set):
        kind = type(value).__name__ if type(value) in (list, set) else "tuple"
        return [kind, [_encode(item, tensors, f"{where}[{i}]") for i, item in enumerate(value)]]
    raise LightMError(f"{where}: a checkpoint cannot hold a value of type {type(value).__name__}")


def _decode(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if not isinstance(value, list):
        return value
    kind, content = value
    if kind == "tensor":
        return tensors[content]
    if kind == "array":
        return tensors[content].numpy()
    if kind in ("dict", "odict"):
        pairs = [(_decode(key, tensors), _decode(item, tensors)) for key, item in content]
        return OrderedDict(pairs) if kind == "odict" else dict(pairs)
    return {"list": list, "tuple": tuple, "set": set}[kind](_decode(item, tensors) for item in content)
