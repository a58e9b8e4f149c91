"""Training checkpoints as one safetensors file: the tensors, and everything else as JSON in its header.

A pickle, which `torch.save` writes, can execute code when it is read; these files cannot. They are written atomically
and hold a checksum. Those of releases that trained with Lightning's Trainer are read as well.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import random
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lightm.errors import InputError, LightMError
from lightm.files import replacing

_STATE = "lightm_checkpoint"
_SUM = "lightm_sha256"
LAST, PREVIOUS, BEST = "last.ckpt", "previous.ckpt", "best.ckpt"
_log = logging.getLogger(__name__)


def save_checkpoint(checkpoint: dict[str, Any], path: Path) -> None:
    """Write nested containers of tensors, arrays, numbers and texts atomically; LightMError names what it cannot."""
    tensors: dict[str, torch.Tensor] = {}
    text = json.dumps(_encode(checkpoint, tensors, "checkpoint"))
    try:
        with replacing(path) as temporary:
            save_file(tensors, temporary, metadata={_STATE: text, _SUM: _checksum(text, tensors)})
    except SafetensorError as error:
        raise LightMError(f"{path}: the checkpoint could not be written ({error})") from error


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read what `save_checkpoint` wrote, its tensors on the CPU; InputError for any other file and a damaged one."""
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
    checkpoint: dict[str, Any] = _decode(json.loads(metadata[_STATE]), tensors)
    checkpoint = _without_trainer(checkpoint) if "loops" in checkpoint else checkpoint
    if "ema_dice" in checkpoint.get("lightm", {}):
        checkpoint["lightm"] = _without_ema(checkpoint["lightm"])
    return checkpoint


def _without_ema(old: dict[str, Any]) -> dict[str, Any]:
    """Convert the state of a release that chose by an exponential moving average and kept no earlier values.

    The average of the kept epoch stands for all epochs before, so that a later one must be better than it.
    """
    state = {key: value for key, value in old.items() if key not in ("ema_dice", "best_dice", "waited")}
    best = old["best_dice"]
    known = best is not None
    state["dice"] = [best if known else math.nan] * old["epoch"]
    return {**state, "best_epoch": max(0, old["epoch"] - 1 - old["waited"]) if known else None}


def _without_trainer(old: dict[str, Any]) -> dict[str, Any]:
    """Convert a checkpoint of Lightning's Trainer, which counts in loops and keeps the state of callbacks."""
    epochs, state = old["loops"]["fit_loop"]["epoch_progress"]["current"], old["lightm"]
    ended = epochs["processed"] == epochs["ready"]  # written at the end of an epoch, else within it
    losses, coefficients = state.get("losses"), state.get("coefficients")
    return {
        **{key: old[key] for key in ("epoch", "global_step", "state_dict", "optimizer_states")},
        "precision": old.get("MixedPrecision", {}),
        "lightm": {
            "epoch": epochs["processed"],
            "batch": 0 if ended else old["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]["processed"],
            "step": old["global_step"],
            "elapsed_s": state["elapsed_s"],
            "ema_dice": state["moving_dice"],
            "best_dice": state["best_dice"],
            "waited": old["callbacks"]["Stopping"]["waited"],
            "skipped": state.get("skipped", 0),
            "losses": [] if ended or losses is None else losses,
            "coefficients": [] if ended or coefficients is None else coefficients,
            "random": state.get("random"),
        },
    }


def save_rotating(folder: Path, save: Callable[[Path], object]) -> None:
    """Write `last.ckpt` by save(path), keeping the one before as `previous.ckpt`: one of the two is always whole.

    Raises LightMError when the disk refuses.
    """
    last = folder / LAST
    with replacing(last) as temporary:
        save(temporary)
        with temporary.open("rb+") as file:  # before the older one gives its name away
            os.fsync(file.fileno())
        if last.exists():
            os.replace(last, last.with_name(PREVIOUS))


def newest_checkpoint(folder: Path) -> Path | None:
    """Return `last.ckpt`, or `previous.ckpt` with a warning where that is missing or damaged; None without both.

    Raises InputError when there are checkpoints, but no readable one.
    """
    errors = []
    for path in (path for path in (folder / LAST, folder / PREVIOUS) if path.is_file()):
        try:
            load_checkpoint(path)
        except InputError as error:
            errors.append(str(error))
            continue
        if path.name == PREVIOUS:
            reason = errors[0] if errors else f"{folder / LAST} is missing"
            _log.warning("%s; the run resumes from the checkpoint before it, %s", reason, path)
        return path
    if errors:
        raise InputError(f"{'; '.join(errors)}: no checkpoint is left to resume from; start a new run")
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
    if isinstance(value, np.ndarray):
        return ["array", _encode(torch.from_numpy(np.ascontiguousarray(value)), tensors, where)[1]]
    if isinstance(value, torch.Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().clone().contiguous()  # safetensors refuses shared memory
        return ["tensor", name]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, dict):
        items = value.items()
        pairs = [[_encode(key, tensors, where), _encode(item, tensors, f"{where}.{key}")] for key, item in items]
        return ["odict" if isinstance(value, OrderedDict) else "dict", pairs]
    if isinstance(value, list | tuple | set):
        kind = type(value).__name__ if type(value) in (list, set) else "tuple"
        return [kind, [_encode(item, tensors, f"{where}[{i}]") for i, item in enumerate(value)]]
    raise LightMError(f"{where}: a checkpoint cannot hold a value of type {type(value).__name__}")


def _decode(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if not isinstance(value, list):
        return value
    kind, content = value
    if kind in ("tensor", "array"):
        return tensors[content] if kind == "tensor" else tensors[content].numpy()
    if kind in ("dict", "odict"):
        return {"dict": dict, "odict": OrderedDict}[kind](
            (_decode(key, tensors), _decode(item, tensors)) for key, item in content
        )
    return {"list": list, "tuple": tuple, "set": set}[kind](_decode(item, tensors) for item in content)


def random_states() -> dict[str, Any]:
    """Return the states of PyTorch's generators (CPU and, in use, CUDA), NumPy's global one and Python's.

    These are all that a training step may draw from: each patch depends on (seed, index) alone, in whichever worker it
    is made, and the data loaders draw their workers' seeds from generators of their own. So a run resumes at any step.
    """
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)  # noqa: NPY002 (networks may use it)
    version, numbers, next_gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, gauss],
        "python": [version, torch.tensor(numbers), next_gauss],
    }


def set_random_states(states: dict[str, Any]) -> None:
    """Put the generators into states returned by `random_states`."""
    torch.set_rng_state(states["torch"])
    if states["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"])
    name, keys, position, has_gauss, gauss = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, gauss))  # noqa: NPY002
    version, numbers, next_gauss = states["python"]
    random.setstate((version, tuple(numbers.tolist()), next_gauss))
