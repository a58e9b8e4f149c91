"""The tensors of one state-space layer, and how the kernels read them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class LayerParameters:
    """Tensors of a layer: out = Linear(LayerNorm(VSS(LayerNorm(x)) + scale * residual)).

    C `channels`, E `inner` channels in G equal `groups` with matrices and B, C of their own (1 for RVM, the parts of
    SPM), N `states`, R = rank of dt, K = kernel size of the convolution (d_conv). Matrices are (G, out / G, in / G) as
    in `torch.nn.Linear`.
    """

    norm: tuple[Tensor, Tensor, float]  # weight (C), bias (C), eps
    in_x: Tensor  # (G, E/G, C/G): to the branch with the convolution and the scan
    in_z: Tensor  # (G, E/G, C/G): to the gate
    conv_weight: Tensor  # (E, K)
    conv_bias: Tensor  # (E)
    to_low: Tensor  # (G, R, E/G): the three outputs of x_proj
    to_B: Tensor  # (G, N, E/G)
    to_C: Tensor  # (G, N, E/G)
    to_dt: Tensor  # (G, E/G, R)
    dt_bias: Tensor  # (E)
    A: Tensor  # (E, N), negative
    d_skip: Tensor  # (E)
    gate_norm: tuple[Tensor, Tensor, float] | None  # weight (E), bias (E), eps: of each group; None without
    out: Tensor  # (G, C/G, E/G)
    scale: Tensor  # (C) or (1)
    of_norm: bool  # the residual is LayerNorm(x) instead of x
    out_norm: tuple[Tensor, Tensor, float]  # weight (C), bias (C), eps
    projection: Tensor  # (out channels, C)
    projection_bias: Tensor  # (out channels)

    @property
    def groups(self) -> int:
        return self.in_x.shape[0]

    @property
    def channels(self) -> int:
        return self.projection.shape[1]

    @property
    def inner(self) -> int:
        return self.A.shape[0]

    @property
    def states(self) -> int:
        return self.A.shape[1]

    @property
    def out_channels(self) -> int:
        return self.projection.shape[0]

    @cached_property
    def packed(self) -> dict[str, Any]:
        """The matrices packed for the kernels; kept for the life of this object."""
        from lightm.ops.matmul_cpu import Packed

        def diagonal(*weights: Tensor) -> Tensor:
            """(in, out) with the groups along the diagonal, one weight after the other in the columns."""
            return torch.cat([torch.block_diag(*weight.transpose(1, 2).unbind(0)) for weight in weights], dim=1)

        numbers = (self.to_B, self.to_C, self.to_low)
        return {
            "x": Packed(diagonal(self.in_x), groups=self.groups),
            "z": Packed(diagonal(self.in_z), groups=self.groups),
            # the columns of B, C and low one after the other: what each needs follows from its own groups
            "numbers": Packed(diagonal(*numbers), spans=[(w.shape[1] * w.shape[0], self.groups) for w in numbers]),
            "dt": Packed(diagonal(self.to_dt), self.dt_bias, groups=self.groups),
            "out": Packed(diagonal(self.out), groups=self.groups),
            "projection": Packed(self.projection.t(), self.projection_bias),
        }
