"""Matmuls of tall matrices (tokens) with small ones (weights), for use inside kernels and as kernels.

A block of the result, a few rows by a few vectors, stays in registers while the inner index runs; one number of
the left matrix is broadcast against a row of the right one. PyTorch's matmuls of this shape reach 40 % of it or less
where the library behind them does not use the processor's widest vectors; see README.md.

The right matrix comes packed by `pack`: columns in blocks of up to VECTORS vectors, each block with the rows it needs
only, so that block-diagonal matrices (the parts of SPM) cost their own blocks and no more. All addresses are
integers, all sizes in bytes unless named rows or columns.
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

from lightm.ops.bounds import NOTHING, Extent, address
from lightm.ops.bounds import rows as rows_of
from lightm.ops.jit import AVX512, LANES, device_function, kernel
from lightm.ops.vector import BY_LANES, emit_broadcast, emit_fma, emit_load, emit_offset, emit_store, literal
from lightm.ops.vector_parts import get, put

VECTORS = 4 if AVX512 else 2
_ROWS = {4: 6, 3: 8, 2: 12, 1: 12} if AVX512 else {2: 6, 1: 8}
_PLAN = 6  # numbers that describe a block of columns


@intrinsic
def _integer(typing: Any, address: Any) -> Any:
    """The 64-bit integer at an address."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.load(builder.inttoptr(args[0], ir.IntType(64).as_pointer()))

    return types.int64(types.int64), generate


@intrinsic(prefer_literal=True)
def _start(typing: Any, bias: Any, rows: Any, vectors: Any) -> Any:
    """`rows` copies of the `vectors` vectors at `bias`."""
    r, v = literal(rows), literal(vectors)
    if r is None or v is None:
        return None

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        row = [emit_load(builder, emit_offset(builder, args[0], 4 * LANES * i), LANES) for i in range(v)]
        return context.make_tuple(builder, sig.return_type, row * r)

    return types.UniTuple(BY_LANES[LANES], r * v)(types.int64, rows, vectors), generate


@intrinsic(prefer_literal=True)
def _add_outer(typing: Any, block: Any, a: Any, a_row: Any, w: Any, rows: Any) -> Any:
    """block[r][v] + a[r] * w[v] for `rows` numbers at a, `a_row` bytes apart, and the vectors at w."""
    r = literal(rows)
    if r is None:
        return None
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
    if r is None:
        return None
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
def multiply(plan, blocks, a, a_row, w, bias, out, out_row, rows, scratch):  # type: ignore[no-untyped-def]
    """out = a @ w + bias for `rows` rows of a, w and bias as packed; see `pack` for `plan` and `blocks`."""
    for b in range(blocks):
        at = plan + b * (8 * _PLAN)
        first, inner, vectors = _integer(at), _integer(at + 8), _integer(at + 16)
        w_at, column, columns = w + _integer(at + 24), 4 * _integer(at + 32), _integer(at + 40)
        a_at, step = a + 4 * first, 4 * LANES * vectors
        if vectors == 1:
            _one(a_at, a_row, 4, w_at, step, inner, bias + column, out + column, out_row, rows, columns, scratch)
        elif vectors == 2:
            _two(a_at, a_row, 4, w_at, step, inner, bias + column, out + column, out_row, rows, columns, scratch)
        elif vectors == 3:
            _three(a_at, a_row, 4, w_at, step, inner, bias + column, out + column, out_row, rows, columns, scratch)
        else:
            _four(a_at, a_row, 4, w_at, step, inner, bias + column, out + column, out_row, rows, columns, scratch)


def multiply_extents(plan: int, blocks: int, a_row: int, out_row: int, rows: int) -> dict[str, Extent]:
    """The bytes that `multiply` touches; reads the plan."""
    if not blocks or not rows:
        return dict.fromkeys(("plan", "a", "w", "bias", "out", "scratch"), NOTHING)
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


def _matmul_extents(
    plan: int, blocks: int, a: int, a_row: int, w: int, bias: int, out: int, out_row: int, rows: int, scratch: int
) -> dict[str, Extent]:
    return multiply_extents(plan, blocks, a_row, out_row, rows)


@kernel(_matmul_extents)
def matmul_kernel(plan, blocks, a, a_row, w, bias, out, out_row, rows, scratch):  # type: ignore[no-untyped-def]
    """`multiply` as a kernel, a segment of rows at a time so that they stay in the cache."""
    for t in range(0, rows, 240):
        multiply(plan, blocks, a + t * a_row, a_row, w, bias, out + t * out_row, out_row, min(240, rows - t), scratch)


def _gradient_extents(
    a: int, a_row: int, inner: int, d: int, d_row: int, columns: int, rows: int, out: int, zeros: int, scratch: int
) -> dict[str, Extent]:
    left = columns % LANES
    return {
        "a": rows_of(0, rows, a_row, 4 * inner),
        "d": rows_of(0, rows, d_row, 4 * columns),
        "out": (0, 4 * columns * inner),
        "zeros": (0, 4 * LANES * min(VECTORS, -(-columns // LANES))),
        "scratch": (0, 2 * SCRATCH + 4 * LANES * rows) if left else NOTHING,
    }


@kernel(_gradient_extents)
def gradient_kernel(a, a_row, inner, d, d_row, columns, rows, out, zeros, scratch):  # type: ignore[no-untyped-def]
    """out (inner, columns) = transpose(a) @ d, summed over `rows` rows of a (`inner` wide) and d (`columns` wide)."""
    whole = columns - columns % LANES
    step = 4 * LANES * VECTORS
    out_row = 4 * columns
    for c in range(0, whole, LANES * VECTORS):
        vectors = min(VECTORS, (whole - c) // LANES)
        d_at, out_at = d + 4 * c, out + 4 * c
        if vectors == 1:
            _one(a, 4, a_row, d_at, d_row, rows, zeros, out_at, out_row, inner, step, scratch)
        elif vectors == 2:
            _two(a, 4, a_row, d_at, d_row, rows, zeros, out_at, out_row, inner, step, scratch)
        elif vectors == 3:
            _three(a, 4, a_row, d_at, d_row, rows, zeros, out_at, out_row, inner, step, scratch)
        else:
            _four(a, 4, a_row, d_at, d_row, rows, zeros, out_at, out_row, inner, step, scratch)
    if whole < columns:  # columns that fill no vector: copied beside each other, so that nothing beyond d is read
        left = columns - whole
        for t in range(0, rows):
            put(scratch + 2 * SCRATCH + t * (4 * LANES), get(d + t * d_row + 4 * whole, left), LANES)
        _one(
            a, 4, a_row, scratch + 2 * SCRATCH, 4 * LANES, rows, zeros, out + 4 * whole, out_row, inner, left, scratch
        )  # fmt: skip


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
