"""Every wrong argument is refused with a message that names it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightm.ops import selective_scan


def good() -> dict[str, Any]:
    x = torch.ones(2, 5, 6)
    shared = torch.ones(2, 5, 3)
    return {"u": x, "delta": x, "A": -torch.ones(6, 3), "B": shared, "C": shared}


BAD: list[tuple[dict[str, Any], str]] = [
    ({"u": torch.ones(5, 6)}, r"u has shape \(5, 6\), expected \(Bt, L, E\)"),
    ({"delta": torch.ones(2, 5, 7)}, r"delta has shape \(2, 5, 7\), expected \(2, 5, 6\)"),
    ({"A": torch.ones(3, 6)}, r"A has shape \(3, 6\), expected \(6, N\)"),
    ({"B": torch.ones(2, 4, 3)}, r"B has shape \(2, 4, 3\), expected \(2, 5, 3\)"),
    ({"B": torch.ones(2, 5, 4, 3), "C": torch.ones(2, 5, 4, 3)}, "G = 4 groups, which do not divide the E = 6"),
    ({"C": torch.ones(2, 5, 2)}, r"C has shape \(2, 5, 2\), expected \(2, 5, 3\)"),
    ({"d_skip": torch.ones(5)}, r"d_skip has shape \(5,\), expected \(6,\)"),
    ({"delta_bias": torch.ones(1)}, r"delta_bias has shape \(1,\), expected \(6,\)"),
    ({"z": torch.ones(2, 6, 5)}, r"z has shape \(2, 6, 5\), expected \(2, 5, 6\)"),
    ({"initial_state": torch.ones(2, 3, 6)}, r"initial_state has shape \(2, 3, 6\), expected \(2, 6, 3\)"),
    ({"u": torch.ones(2, 5, 6, dtype=torch.int64)}, "u has dtype torch.int64, expected float32"),
    ({"A": -torch.ones(6, 3, dtype=torch.float64)}, "float64 does not mix"),
    ({"C": torch.ones(2, 5, 3, device="meta")}, "C is on meta and u on cpu"),
    ({"impl": "cuda"}, "impl is 'cuda', expected one of 'auto', 'reference', 'cpu'"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        selective_scan(**{**good(), **change})


def test_explicit_cpu_does_not_fall_back() -> None:
    doubles = {name: x.double() for name, x in good().items()}
    with pytest.raises(ValueError, match=r"impl='cpu' is not possible: the tensors are torch\.float64"):
        selective_scan(**doubles, impl="cpu")


def test_not_a_tensor() -> None:
    with pytest.raises(TypeError, match=r"A is list, expected a torch\.Tensor"):
        selective_scan(**{**good(), "A": [[-1.0]]})
