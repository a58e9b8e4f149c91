"""All global random generators that a training step may draw from, as values a checkpoint can hold.

The patches do not draw from them: each depends on (seed, index) alone, in whichever worker it is made; and the data
loaders draw their workers' seeds from generators of their own. So with these states a run goes on from any step.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def random_states() -> dict[str, Any]:
    """Return the states of PyTorch's generators (CPU and, in use, CUDA), NumPy's global one and Python's."""
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
