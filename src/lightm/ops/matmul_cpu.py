"""Matmuls of tall matrices (tokens) with small ones (weights) on the CPU: inside kernels, as kernels, on all threads.

A block of the result, a few rows by a few vectors, stays in registers while the inner index runs; one number of
the left matrix is broadcast against a row of the right one. The right one comes as `Packed`: columns in blocks of up to
VECTORS vectors, each block with the rows it needs only, so that block-diagonal matrices (the parts of SPM) cost their
own blocks and no more. All addresses are integers, all sizes in bytes unless named rows or columns.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from torch import Tensor

from lightm.ops.bounds import NOTHING, Extent, address, each
from lightm.ops.bounds import rows as rows_of
from lightm.ops.jit import AVX512, LANES, device_function, kernel
from lightm.ops.threads import for_blocks, parallel_for, worker_count
from lightm.ops.vector import BY_LANES, emit_broadcast, emit_fma, emit_load, emit_offset, emit_store, get, literal, put

VECTORS = 4 if AVX512 else 2
_ROWS = {4: 6, 3: 8, 2: 12, 1: 12} if AVX512 else {2: 6, 1: 8}
_PLAN = 6  # numbers that describe a block of columns
_SEGMENT = 1920  # rows of one work item of a matmul
_SUMMED = 2048  # rows of one item of a weight's gradient; fixed: sums do not depend on the number of threads


@intrinsic
def _integer(typing: Any, address: Any) -> Any:
    """The 64-bit integer at an address."""
    kind = ir.IntType(64).as_pointer()
    return types.int64(types.int64), lambda context, builder, sig, args: builder.load(builder.inttoptr(args[0], kind))


@intrinsic(prefer_literal=True)
def _start(typing: Any, bias: Any, rows: Any, vectors: Any) -> Any:
    """`rows` copies of the `vectors` vectors at `bias`."""
    r, v = literal(rows), literal(vectors)

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        row = [emit_load(builder, emit_offset(builder, args[0], 4 * LANES * i), LANES) for i in range(v)]
        return context.make_tuple(builder, sig.return_type, row * r)

    return types.UniTuple(BY_LANES[LANES], r * v)(types.int64, rows, vectors), generate


@intrinsic(prefer_literal=True)
def _add_outer(typing: Any, block: Any, a: Any, a_row: Any, w: Any, rows: Any) -> Any:
    """block[r][v] + a[r] * w[v] for `rows` numbers at a, `a_row` bytes apart, and the vectors at w."""
    r = literal(rows)
    v = block.count // r

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        old, at, step, w_at, _ = args
        row = [emit_load(builder, emit_offset(builder, w_at, 4 * LANES * i), LANES) for i in range(v)]
        new = []
        for i in range(r):
            x = emit_broadcast(builder, at, LANES)
            new += [emit_fma(builder, x, row[j], builder.extract_value(old, i * v + j)) for j in range(v)]
            at = builder.add(at, step)
        return context.make_tuple(builder, block, new)

    address = types.int64
    return block(block, address, address, address, rows), generate


@intrinsic(prefer_literal=True)
def _write(typing: Any, block: Any, out: Any, out_row: Any, rows: Any) -> Any:
    """Write the rows of a block, `out_row` bytes apart."""
    r = literal(rows)
    v = block.count // r

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        values, at, step, _ = args
        for i in range(r):
            for j in range(v):
                emit_store(builder, emit_offset(builder, at, 4 * LANES * j), builder.extract_value(values, i * v + j))
            at = builder.add(at, step)
        return context.get_dummy_value()

    return types.void(block, types.int64, types.int64, rows), generate


def _block(rows: int, vectors: int) -> Any:
    """A function that computes `rows` rows of `vectors` vectors."""
    last = 4 * LANES * (vectors - 1)

    @device_function
    def block(a, a_row, a_inner, w, w_inner, inner, bias, out, out_row, columns, scratch):  # type: ignore[no-untyped-def]
        values = _start(bias, rows, vectors)
        for i in range(inner):
            values = _add_outer(values, a + i * a_inner, a_row, w + i * w_inner, rows)
        if columns >= LANES * vectors:
            _write(values, out, out_row, rows)
        else:
            _write(values, scratch, 4 * LANES * vectors, rows)
            for i in range(rows):
                row = scratch + i * (4 * LANES * vectors)
                for j in range(vectors - 1):
                    put(out + i * out_row + 4 * LANES * j, get(row + 4 * LANES * j, LANES), LANES)
                put(out + i * out_row + last, get(row + last, LANES), columns - LANES * (vectors - 1))

    return block


def _all_rows(vectors: int) -> Any:
    """A function that computes any number of rows of `vectors` vectors, as many at a time as registers hold."""
    many, few = _ROWS[vectors], 4 if _ROWS[vectors] >= 8 else 2
    several, some, single = _block(many, vectors), _block(few, vectors), _block(1, vectors)

    @device_function
    def all_rows(a, a_row, a_inner, w, w_inner, inner, bias, out, out_row, rows, columns, scratch):  # type: ignore[no-untyped-def]
        t = 0
        while t + many <= rows:
            at, to = a + t * a_row, out + t * out_row
            several(at, a_row, a_inner, w, w_inner, inner, bias, to, out_row, columns, scratch)
            t += many
        while t + few <= rows:
            some(a + t * a_row, a_row, a_inner, w, w_inner, inner, bias, out + t * out_row, out_row, columns, scratch)
            t += few
        while t < rows:
            single(a + t * a_row, a_row, a_inner, w, w_inner, inner, bias, out + t * out_row, out_row, columns, scratch)
            t += 1

    return all_rows


_one, _two = _all_rows(1), _all_rows(2)
_three, _four = (_all_rows(3), _all_rows(4)) if VECTORS == 4 else (_two, _two)

SCRATCH = 4 * LANES * 24
"""Bytes of scratch memory that `multiply` needs."""


@device_function
def _column_block(vectors, a, a_row, a_inner, w, w_inner, inner, bias, out, out_row, rows, columns, scratch):  # type: ignore[no-untyped-def]
    if vectors == 1:
        _one(a, a_row, a_inner, w, w_inner, inner, bias, out, out_row, rows, columns, scratch)
    elif vectors == 2:
        _two(a, a_row, a_inner, w, w_inner, inner, bias, out, out_row, rows, columns, scratch)
    elif vectors == 3:
        _three(a, a_row, a_inner, w, w_inner, inner, bias, out, out_row, rows, columns, scratch)
    else:
        _four(a, a_row, a_inner, w, w_inner, inner, bias, out, out_row, rows, columns, scratch)


@device_function
def multiply(plan, blocks, a, a_row, w, bias, out, out_row, rows, scratch):  # type: ignore[no-untyped-def]
    """out = a @ w + bias for `rows` rows of a, w and bias as packed; see `Packed` for `plan` and `blocks`."""
    for b in range(blocks):
        at = plan + b * (8 * _PLAN)
        first, inner, vectors = _integer(at), _integer(at + 8), _integer(at + 16)
        w_at, column, columns = w + _integer(at + 24), 4 * _integer(at + 32), _integer(at + 40)
        _column_block(
            vectors, a + 4 * first, a_row, 4, w_at, 4 * LANES * vectors, inner, bias + column, out + column, out_row,
            rows, columns, scratch,
        )  # fmt: skip


def multiply_extents(plan: int, blocks: int, a_row: int, out_row: int, rows: int) -> dict[str, Extent]:
    """The bytes that `multiply` touches; reads the plan."""
    if not blocks or not rows:
        return each(NOTHING, "plan", "a", "w", "bias", "out", "scratch")
    numbers = np.ctypeslib.as_array((ctypes.c_int64 * (blocks * _PLAN)).from_address(int(plan))).reshape(blocks, _PLAN)
    first, inner, vectors, offset, column, columns = numbers.T
    step = 4 * LANES * vectors
    low, high = rows_of(0, rows, a_row, 4 * int((first + inner).max()))
    return {
        "plan": (0, 8 * _PLAN * blocks),
        "a": (low + 4 * int(first.min()), high),
        "w": (int(offset.min()), int((offset + inner * step).max())),
        "bias": (0, int((4 * column + step).max())),
        "out": rows_of(0, rows, out_row, 4 * int((column + columns).max())),
        "scratch": (0, SCRATCH),
    }


@kernel(multiply_extents)
def matmul_kernel(plan, blocks, a, a_row, w, bias, out, out_row, rows, scratch):  # type: ignore[no-untyped-def]
    """`multiply` as a kernel, a segment of rows at a time so that they stay in the cache."""
    for t in range(0, rows, 240):
        multiply(plan, blocks, a + t * a_row, a_row, w, bias, out + t * out_row, out_row, min(240, rows - t), scratch)


@kernel(
    lambda a_row, inner, d_row, columns, rows: {
        "a": rows_of(0, rows, a_row, 4 * inner),
        "d": rows_of(0, rows, d_row, 4 * columns),
        "out": (0, 4 * columns * inner),
        "zeros": (0, 4 * LANES * min(VECTORS, -(-columns // LANES))),
        "scratch": (0, 2 * SCRATCH + 4 * LANES * rows) if columns % LANES else NOTHING,
    }
)
def gradient_kernel(a, a_row, inner, d, d_row, columns, rows, out, zeros, scratch):  # type: ignore[no-untyped-def]
    """out (inner, columns) = transpose(a) @ d, summed over `rows` rows of a (`inner` wide) and d (`columns` wide)."""
    whole = columns - columns % LANES
    step = 4 * LANES * VECTORS
    out_row = 4 * columns
    for c in range(0, whole, LANES * VECTORS):
        vectors = min(VECTORS, (whole - c) // LANES)
        to = out + 4 * c
        _column_block(vectors, a, 4, a_row, d + 4 * c, d_row, rows, zeros, to, out_row, inner, step, scratch)
    if whole < columns:  # columns that fill no vector: copied beside each other, so that nothing beyond d is read
        left, copy, to = columns - whole, scratch + 2 * SCRATCH, out + 4 * whole
        for t in range(0, rows):
            put(copy + t * (4 * LANES), get(d + t * d_row + 4 * whole, left), LANES)
        _one(a, 4, a_row, copy, 4 * LANES, rows, zeros, to, out_row, inner, left, scratch)


class Packed:
    """A matrix (inner, columns) as `multiply` reads it, kept alive together with its description."""

    def __init__(
        self, matrix: Tensor, bias: Tensor | None = None, groups: int = 1, spans: Sequence[tuple[int, int]] = ()
    ) -> None:
        """Pack a float32 matrix.

        With `groups` it is block diagonal, of that many equal blocks; `spans` (columns, groups) say this of segments
        of columns one after the other, each block diagonal over all of the inner index.
        """
        self.inner, self.columns = matrix.shape
        needs: list[tuple[int, int]] = []  # rows that a column needs
        for columns, count in spans or [(self.columns, groups)]:
            rows, wide = self.inner // count, columns // count
            needs += [(column // wide * rows, (column // wide + 1) * rows) for column in range(columns)]
        count = -(-self.columns // LANES)
        padded = torch.zeros(self.inner, count * LANES)
        padded[:, : self.columns] = matrix
        self.bias = torch.zeros(count * LANES)
        if bias is not None:
            self.bias[: self.columns] = bias
        of_vector = []
        for v in range(count):
            low, high = zip(*needs[v * LANES : (v + 1) * LANES], strict=True)
            of_vector.append((min(low), max(high)))
        plan, parts, offset, v = [], [], 0, 0
        while v < count:
            vectors = 1
            while vectors < VECTORS and v + vectors < count and of_vector[v + vectors] == of_vector[v]:
                vectors += 1
            first, stop = of_vector[v]
            part = padded[first:stop, v * LANES : (v + vectors) * LANES]
            plan += [first, stop - first, vectors, offset, v * LANES, min(vectors * LANES, self.columns - v * LANES)]
            parts.append(part.reshape(-1))
            offset += 4 * part.numel()
            v += vectors
        self.weight = torch.cat(parts)
        self._plan = torch.tensor(plan, dtype=torch.int64)
        self._blocks = len(plan) // _PLAN

    @property
    def arguments(self) -> tuple[int, int, int, int]:
        """(plan, blocks, weight, bias) for a kernel."""
        return address(self._plan), self._blocks, address(self.weight), address(self.bias)


def _rows(x: Tensor) -> Tensor:
    """x as (rows, C) with channels next to each other; a copy only where the layout asks for one."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(-1) == 1 else flat.contiguous()


def run_matmul(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (..., C) times the transpose of weight, (C_out, C) or (G, C_out / G, C / G), + bias."""
    rows = _rows(x)
    if weight.dim() == 2:
        packed = Packed(weight.t(), bias)
    else:
        packed = Packed(torch.block_diag(*weight).t(), bias, groups=weight.shape[0])
    y = torch.empty((*x.shape[:-1], packed.columns))
    plan, blocks, matrix, shift = packed.arguments
    scratch = torch.empty((worker_count(-(-rows.shape[0] // _SEGMENT)), SCRATCH // 4))
    row_in, row_out = 4 * rows.stride(0), 4 * packed.columns

    def work(entry: int, first: int, last: int, worker: int) -> None:
        matmul_kernel(
            plan, blocks, address(rows) + first * row_in, row_in, matrix, shift, address(y) + first * row_out,
            row_out, last - first, address(scratch[worker]),
        )  # fmt: skip

    for_blocks(1, rows.shape[0], _SEGMENT, work)
    return y


def run_weight_gradient(left: Tensor, right: Tensor, groups: int = 1) -> Tensor:
    """transpose(left) @ right over all rows, part by part: (groups, A / groups, B / groups)."""
    a, b = _rows(left), _rows(right)
    count, high, wide = a.shape[0], a.shape[1] // groups, b.shape[1] // groups
    items = max(1, -(-count // _SUMMED))
    parts = torch.zeros((items, groups, high, wide))
    zeros = torch.zeros(4 * LANES)
    scratch = torch.empty((worker_count(items), SCRATCH // 2 + _SUMMED * LANES))

    def work(item: int, worker: int) -> None:
        first = item * _SUMMED
        for g in range(groups):
            gradient_kernel(
                address(a) + 4 * (first * a.stride(0) + g * high), 4 * a.stride(0), high,
                address(b) + 4 * (first * b.stride(0) + g * wide), 4 * b.stride(0), wide,
                min(_SUMMED, count - first), address(parts[item, g]), address(zeros), address(scratch[worker]),
            )  # fmt: skip

    parallel_for(work, items)
    return parts.sum(0)
