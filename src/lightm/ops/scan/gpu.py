"""The selective scan in Triton: when it can run, how a call is cut into programs, launches and memory.

Not timed on hardware yet: checked with Triton's interpreter against the oracle and compiled for NVIDIA and AMD
targets; chunk lengths and tile sizes are estimates.
"""

from __future__ import annotations

import os
from functools import partial
from importlib import metadata, util
from typing import Any

import torch
from torch import Tensor

from lightm.ops.checks import CPU_TYPES
from lightm.ops.scan.inputs import ScanGradients, ScanInputs, ScanResults, gradient_of

_UNROLL = 8  # tokens whose reads are issued together
_UNROLL_BACKWARD = 4  # tokens whose states the backward kernel keeps in registers
_TILE = 512  # states of a program: 16 registers of each of a warp's 32 lanes
_CARRY = 32  # states that one program carries over the chunks
_CARRY_UNROLL = 16
_ENOUGH = 2048  # programs that fill a large GPU: 132 multiprocessors with 16 warps each
_CHUNKS = (256, 128, 64, 32)
_OLDEST = (3, 3)  # kernels keep rows in tuples


def _what_is_missing() -> str | None:
    """Why Triton itself cannot be used, without importing it."""
    if util.find_spec("triton") is None:
        return "Triton is not installed; on Linux install it with pip install 'lightm-unet[gpu]'"
    try:
        found = metadata.version("triton")
    except metadata.PackageNotFoundError:  # a build under another name, such as the one for ROCm
        return None
    if tuple(int(part) for part in found.split(".")[:2]) < _OLDEST:
        return f"Triton {found} is too old, 3.3 is needed; it comes with PyTorch 2.7"
    return None


_MISSING = _what_is_missing()


def triton_limits(lead: Tensor) -> str | None:
    """Why the Triton kernels cannot take tensors like `lead`; None if they can."""
    if _MISSING is not None:
        return _MISSING
    if lead.dtype not in CPU_TYPES:
        return f"the tensors are {lead.dtype}; use float32, bfloat16 or float16"
    if lead.device.type == "cuda":
        return None
    if lead.device.type != "cpu":
        return f"the tensors are on {lead.device}; move them to a GPU with .cuda()"
    if os.environ.get("TRITON_INTERPRET") == "1":
        from lightm.ops.scan.triton_kernels import INTERPRETED

        if INTERPRETED:
            return None
        return "TRITON_INTERPRET=1 was set after Triton was imported; set it before Python starts"
    return (
        "the tensors are on the CPU; move them to a GPU with .cuda(), or, to check the kernels slowly without one, set "
        "TRITON_INTERPRET=1 before Python starts"
    )


class Plan:
    """How one call is cut into programs; a function of its shapes alone, so that every GPU adds in the same order."""

    def __init__(self, batch: int, length: int, channels: int, groups: int, states: int) -> None:
        self.batch, self.length, self.channels, self.groups, self.states = batch, length, channels, groups, states
        self.of_group = channels // groups
        self.block_n = _power_of_two(states)  # states of a tile
        # channels of a tile: at most a warp's 32 lanes, and fewer where they have many states or a group is small
        self.block_e = max(4, min(32, _TILE // self.block_n, _power_of_two(self.of_group)))
        self.group_blocks = -(-self.of_group // self.block_e)  # tiles of a group; the last one may be part padding
        self.blocks = groups * self.group_blocks
        # tokens of a chunk: as many as leave enough programs to fill a large GPU
        rows = batch * self.blocks * length
        self.chunk = next((size for size in _CHUNKS if rows >= size * _ENOUGH), _CHUNKS[-1])
        self.chunks = -(-length // self.chunk)
        self.items = batch * self.chunks * self.blocks  # programs: one for every batch entry, chunk and tile
        self.empty = batch * length * channels == 0
        self.starts_shape = (batch, self.chunks, states, channels)  # of the states before every chunk
        # what every kernel over chunks gets after `chunks`, and last
        self.sizes, self.tail = (channels, self.blocks, self.group_blocks), (self.of_group, states)

    def meta(self, softplus: bool, unroll: int) -> dict[str, Any]:
        """Compile-time arguments of the kernels over chunks; one warp per program."""
        tile = {"BLOCK_E": self.block_e, "BLOCK_N": self.block_n}
        return {"SOFTPLUS": softplus, **tile, "UNROLL": unroll, "num_warps": 1}


def _power_of_two(number: int) -> int:
    return 1 << max(number - 1, 0).bit_length()


def _strided(x: Tensor | None, axes: int) -> tuple[Any, ...]:
    """The tensor and its strides, as the kernels take them."""
    return (None, *[0] * axes) if x is None else (x, *x.stride())


def plan_for(inputs: ScanInputs) -> Plan:
    """The plan of a call. ValueError beyond 2^31 - 1 programs, which a GPU cannot number."""
    u, B = inputs.u, inputs.B
    plan = Plan(u.shape[0], u.shape[1], u.shape[2], B.shape[2], B.shape[3])
    if plan.items >= 2**31:
        raise ValueError(
            f"selective_scan: {plan.items} programs for u of shape {tuple(u.shape)}, at most {2**31 - 1} can be "
            "launched; split the batch, or cut the tokens and carry the state"
        )
    return plan


def _by_channel(A: Tensor) -> Tensor:
    """A (E, N) with the channels side by side in memory, as the lanes of a warp read it; N E numbers are copied."""
    return A.t().contiguous().t()


def _carry(plan: Plan, ends: Tensor, sums: Tensor, A: Tensor, begin: Tensor | None, reverse: bool) -> None:
    """Turn the chunks' ends into what arrives at them, in place."""
    from lightm.ops.scan.triton_kernels import carry_kernel

    size = plan.channels * plan.states
    programs = -(-size // _CARRY)
    carry_kernel[(plan.batch * programs,)](
        ends, sums, *_strided(A, 2), *_strided(begin, 3), plan.chunks, plan.channels, size, programs,
        REVERSE=reverse, BLOCK=_CARRY, UNROLL=_CARRY_UNROLL, num_warps=1,
    )  # fmt: skip


def run_forward(inputs: ScanInputs) -> ScanResults:
    """Run the scan; the states before every chunk (Bt, chunks, N, E) are kept."""
    from lightm.ops.scan.triton_kernels import end_kernel, forward_kernel

    u, delta, A, B, C, d_skip, z, delta_bias, delta_softplus, initial_state = inputs
    plan = plan_for(inputs)
    floats = partial(u.new_empty, dtype=torch.float32)
    y = u.new_empty(u.shape)
    starts = floats(plan.starts_shape)
    if plan.empty:
        last = floats((plan.batch, plan.channels, plan.states))
        return y, last.zero_() if initial_state is None else last.copy_(initial_state), starts
    last = floats((plan.batch, plan.states, plan.channels))
    sums = floats((plan.batch, plan.chunks, plan.channels))
    meta = plan.meta(delta_softplus, _UNROLL)
    A = _by_channel(A)
    one = (*_strided(u, 3), *_strided(delta, 3), *_strided(A, 2), *_strided(B, 4))
    bias = _strided(delta_bias, 1)
    tail = (*plan.sizes, *plan.tail)
    count = plan.chunks - 1
    with torch.cuda.device_of(u):
        if count:
            end_kernel[(plan.batch * count * plan.blocks,)](
                *one, *bias, starts, sums, plan.length, plan.chunk, count, plan.chunks, *tail, **meta
            )
        _carry(plan, starts, sums, A, initial_state, reverse=False)
        forward_kernel[(plan.items,)](
            *one, *_strided(C, 4), *_strided(d_skip, 1), *_strided(z, 3), *bias,
            starts, y, last, plan.length, plan.chunk, plan.chunks, *tail, **meta,
        )  # fmt: skip
    return y, last.transpose(1, 2).contiguous(), starts


def run_backward(grad_y: Tensor, grad_state: Tensor, inputs: ScanInputs, starts: Tensor) -> ScanGradients:
    """Return the gradients of all inputs."""
    from lightm.ops.scan.triton_kernels import backward_kernel, grad_end_kernel

    u, delta, A, B, C, d_skip, z, delta_bias, delta_softplus, initial_state = inputs
    plan = plan_for(inputs)
    floats = partial(u.new_empty, dtype=torch.float32)
    du, ddelta = u.new_empty(u.shape), delta.new_empty(delta.shape)
    dz = floats(0) if z is None else z.new_empty(z.shape)
    dbegin = floats((plan.batch, plan.states, plan.channels))
    parts_b, parts_c = (floats((plan.group_blocks, *B.shape)) for _ in range(2))
    parts_a = floats(plan.starts_shape)
    parts_skip, parts_bias = (floats((plan.batch, plan.chunks, plan.channels)) for _ in range(2))
    if plan.empty:
        dbegin.copy_(grad_state.transpose(1, 2))
    else:
        sums = floats((plan.batch, plan.chunks, plan.channels))
        arriving = torch.empty_like(starts)
        # programs, each with its own scratch: as many as run at once, at 255 registers a lane
        cuda = u.device.type == "cuda"
        most = 8 * torch.cuda.get_device_properties(u.device).multi_processor_count if cuda else 4
        slots = min(plan.items, most)
        scratch = floats((slots, plan.chunk // _UNROLL_BACKWARD, plan.block_e * plan.block_n))
        count = plan.chunks - 1
        bias, gate = _strided(delta_bias, 1), _strided(z, 3)
        rates = _by_channel(A)
        with torch.cuda.device_of(u):
            if count:
                grad_end_kernel[(plan.batch * count * plan.blocks,)](
                    *_strided(grad_y, 3), *_strided(delta, 3), *_strided(rates, 2), *_strided(C, 4), *gate, *bias,
                    arriving, sums, plan.length, plan.chunk, count, plan.chunks, *plan.sizes, *plan.tail,
                    **plan.meta(delta_softplus, _UNROLL),
                )  # fmt: skip
            _carry(plan, arriving, sums, rates, grad_state, reverse=True)
            backward_kernel[(slots,)](
                *_strided(grad_y, 3), *_strided(u, 3), *_strided(delta, 3), *_strided(rates, 2),
                *_strided(B, 4), *_strided(C, 4), *_strided(d_skip, 1), *gate, *bias, starts, arriving, scratch,
                du, ddelta, dz, parts_b, parts_c, parts_a, parts_skip, parts_bias, dbegin,
                plan.items, plan.length, plan.chunk, plan.chunks, *plan.sizes, plan.groups, *plan.tail,
                **plan.meta(delta_softplus, _UNROLL_BACKWARD),
            )  # fmt: skip
    dA = parts_a.sum((0, 1)).t().to(A.dtype, memory_format=torch.contiguous_format)
    dB, dC = parts_b.sum(0).to(B.dtype), parts_c.sum(0).to(C.dtype)
    dskip, dbias = (
        gradient_of(given, parts.sum((0, 1))) for given, parts in ((d_skip, parts_skip), (delta_bias, parts_bias))
    )
    begin = gradient_of(initial_state, dbegin.transpose(1, 2).contiguous())
    return du, ddelta, dA, dB, dC, dskip, dz, dbias, begin
