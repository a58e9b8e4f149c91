"""A whole state-space layer without gradients: `state_space_layer`, its checks and what it needs to run."""

from __future__ import annotations

import torch
from torch import Tensor

from lightm.ops.checks import note_use
from lightm.ops.layer.parameters import LayerParameters

__all__ = ["SCANS", "LayerParameters", "layer_runs_fused", "state_space_layer"]

SCANS = ("raster", "bidirectional", "axes")


def layer_runs_fused(x: Tensor, parameters: LayerParameters) -> bool:
    """Whether `state_space_layer` can take x (B, *S, C): float32 on the CPU, whole vectors of channels, not traced."""
    if type(x) is not Tensor or x.device.type != "cpu" or x.dtype != torch.float32 or x.numel() == 0:
        return False
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.is_autocast_enabled("cpu"):
        return False
    if parameters.projection.dtype != torch.float32:
        return False
    from lightm.ops.layer.cpu import can_run

    return can_run(parameters)


def state_space_layer(
    x: Tensor, parameters: LayerParameters, scan: str = "raster", pooling: str | None = None, keep_states: int = 0
) -> tuple[Tensor, Tensor | None]:
    """Run a state-space layer without whole inner tensors: out = Linear(LayerNorm(VSS(LayerNorm(x)) + r)).

    The VSS is the paper's (LightM-UNet, arXiv 2403.05246, Eq. 1-3); r = scale * x, or scale * LayerNorm(x) with
    `of_norm`. No gradient is recorded.

    Arguments:
        x: (B, *S, C) with two or three spatial axes, any strides, float32 on the CPU.
        parameters: the layer's tensors.
        scan: "raster"; "bidirectional": the sum of the VSS over the raster order and its reverse; "axes": the sum
            over raster orders in which x, y (and z) in turn run fastest. Orders are index arithmetic, not copies.
        pooling: None, "max", "avg" or "add": pool the result by 2 before it is ever whole; even sizes are needed.
        keep_states: rows of the first spatial axis between kept states of the scan ("raster" only); 0 keeps none.

    Returns: ((B, *S, C_out), or (B, *S/2, C_out) when pooled; the states (rows / keep_states, B, E, N) or None).
    Raises ValueError when `layer_runs_fused` would say no, for an unknown scan, and for states of other scans.
    Cost: linear in the tokens; memory beside the result: two chunks of about 2^20 numbers of inner width, each times
    three, and with pooling two planes of the result.
    """
    if scan not in SCANS:
        raise ValueError(f"scan '{scan}': one of {', '.join(SCANS)}")
    if x.dim() not in (4, 5) or x.shape[-1] != parameters.channels:
        raise ValueError(
            f"state_space_layer: x has shape {tuple(x.shape)}, expected (B, *S, {parameters.channels}) with two or "
            "three spatial axes"
        )
    if pooling not in (None, "max", "avg", "add"):
        raise ValueError(f"pooling '{pooling}': one of max, avg, add, or None")
    if pooling is not None and (keep_states % 2 or any(size % 2 for size in x.shape[1:-1])):
        raise ValueError(
            f"pooling '{pooling}' of sizes {tuple(x.shape[1:-1])} with keep_states={keep_states}: even numbers are "
            "needed"
        )
    if keep_states < 0:
        raise ValueError(f"keep_states={keep_states}: 0 or more")
    if keep_states and scan != "raster":
        raise ValueError(f"keep_states={keep_states} with scan '{scan}': states are kept for 'raster' only")
    if not layer_runs_fused(x, parameters):
        raise ValueError(
            f"state_space_layer: x {tuple(x.shape)} {x.dtype} on {x.device} with E = {parameters.inner}, "
            f"G = {parameters.groups}, N = {parameters.states}: float32 on the CPU, E / G a multiple of the vector's "
            "lanes or half of them, and N of 4, 8 or 16 are needed; run the layer's operators one by one"
        )
    from lightm.ops.layer.cpu import run_layer

    note_use("state_space_layer", "cpu, fused")
    with torch.no_grad():
        return run_layer(x.contiguous(), parameters, scan, pooling, keep_states)
