"""Which device a computation runs on, resolved once and before any other work."""

from __future__ import annotations

import logging
import os

import torch

from lightm.errors import InputError
from lightm.memory import total_bytes

_log = logging.getLogger(__name__)
_KNOWN = "cpu, cuda, cuda:N, mps, gpu or auto"


def resolve_device(name: str | torch.device) -> torch.device:
    """Return the device of that name; PyTorch can use it on this machine.

    name: "cpu"; "cuda" or "cuda:1", an NVIDIA or ROCm GPU; "mps", an Apple GPU; "gpu", whichever of the two there is;
    "auto", a CUDA device if there is one, else the CPU. Raises InputError for an unknown name, and for a device that
    this machine or this build of PyTorch does not have.

    >>> resolve_device("cpu")
    device(type='cpu')
    """
    text = str(name).strip().lower()
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    apple = torch.backends.mps.is_available()
    if text == "auto":
        text = "cuda" if count else "cpu"
        if count:
            _log.info("device: a GPU, cuda; --device cpu takes the processor")
    elif text == "gpu":
        text = "mps" if apple and not count else "cuda"
    try:
        device = torch.device(text)
    except RuntimeError:
        raise InputError(f"device '{name}': unknown; give {_KNOWN}") from None
    if device.type == "cpu" or (device.type == "mps" and apple):
        return torch.device(device.type)
    if device.type == "cuda" and (device.index or 0) < count:
        return device
    if device.type == "cuda" and count:
        raise InputError(f"device '{name}': this machine has {count} CUDA device(s), numbered from cuda:0")
    if device.type in ("cuda", "mps"):
        raise InputError(f"device '{name}': PyTorch {torch.__version__} finds none on this machine; use cpu or auto")
    raise InputError(f"device '{name}': not supported; give {_KNOWN}")


def default_precision(device: torch.device) -> str:
    """The precision of a training where none is asked for: bfloat16 under autocast on a GPU that has it, else float32.

    >>> default_precision(torch.device("cpu"))
    '32-true'
    """
    return "bf16-mixed" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "32-true"


def default_workers(device: torch.device) -> int:
    """How many processes prepare patches where no number is given: up to 4 beside a GPU, which would wait for them.

    None on the CPU, whose cores the training itself uses.
    """
    return 0 if device.type == "cpu" else min(4, max(0, (os.cpu_count() or 1) - 1))


def memory_bytes(device: torch.device) -> int | None:
    """The memory of a device: the GPU's own, else the machine's; None where the system does not say."""
    return int(torch.cuda.get_device_properties(device).total_memory) if device.type == "cuda" else total_bytes()
