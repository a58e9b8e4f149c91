"""A regular grid of regions over a volume, and soft TP, FP, FN summed per region, and over distributed ranks.

Every voxel belongs to exactly one region. An axis that the grid does not divide gets shorter regions: at most two runs
of equal ones, so that region sums are plain reshape + sum, without differences of running sums, which lose digits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, distributed
from torch.autograd.function import once_differentiable

from lightm.errors import InputError
from lightm.losses.base import target_mask


@dataclass(frozen=True)
class Grid:
    """Region sizes along each spatial axis, in voxels; `sizes[a]` sums to the length of axis a."""

    sizes: tuple[tuple[int, ...], ...]

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Grid:
        """One region that is the whole volume."""
        return cls(tuple((length,) for length in shape))

    @classmethod
    def by_count(cls, shape: Sequence[int], counts: Sequence[int]) -> Grid:
        """`counts[a]` regions along axis a, at most one per voxel, longer ones first, equal up to one voxel."""
        sizes = []
        for length, count in zip(shape, counts, strict=True):
            count = min(count, length)
            short, longer = divmod(length, count)
            sizes.append((short + 1,) * longer + (short,) * (count - longer))
        return cls(tuple(sizes))

    @classmethod
    def by_size(cls, shape: Sequence[int], lengths: Sequence[int]) -> Grid:
        """Regions of `lengths[a]` voxels along axis a; the last one holds what is left."""
        sizes = []
        for length, size in zip(shape, lengths, strict=True):
            full, rest = divmod(length, size)
            sizes.append((size,) * full + ((rest,) if rest else ()))
        return cls(tuple(sizes))

    @property
    def shape(self) -> tuple[int, ...]:
        """Number of regions along each axis."""
        return tuple(len(sizes) for sizes in self.sizes)

    def sum(self, values: Tensor) -> Tensor:
        """Sum `values` (..., *spatial) over every region: (..., *self.shape)."""
        # the first axis first: its sums run over contiguous rows, and leave those over short rows little data
        for position, sizes in enumerate(self.sizes):
            axis = values.ndim - len(self.sizes) + position
            values = _sum_runs(values, axis, sizes)
        return values

    def spread(self, values: Tensor) -> Tensor:
        """Give every voxel its region's value: (..., *self.shape) -> (..., *spatial), the adjoint of `sum`."""
        for position in reversed(range(len(self.sizes))):
            axis = values.ndim - len(self.sizes) + position
            if set(self.sizes[position]) == {1}:
                continue
            sizes, total = torch.tensor(self.sizes[position], device=values.device), sum(self.sizes[position])
            values = torch.repeat_interleave(values, sizes, dim=axis, output_size=total)
        return values

    def select(self, where: Tensor, yes: Tensor, no: Tensor, *, out: Tensor) -> None:
        """Write to every voxel of `out` its region's value of `yes` (..., *self.shape) or `no`, as `where` says.

        Axes of equal regions are spread by a view, but for the last, whose rows must be contiguous to be fast.
        """
        rank = len(self.sizes)
        equal = [len(set(sizes)) == 1 for sizes in self.sizes[:-1]] + [False]
        rest = Grid(tuple((1,) * len(sizes) if same else sizes for sizes, same in zip(self.sizes, equal, strict=True)))
        yes, no = rest.spread(yes), rest.spread(no)
        for position in reversed(range(rank)):
            if equal[position]:
                axis = where.ndim - rank + position
                split = (len(self.sizes[position]), self.sizes[position][0])
                yes, no = yes.unsqueeze(axis + 1), no.unsqueeze(axis + 1)
                where, out = where.unflatten(axis, split), out.unflatten(axis, split)
                rank += 1
        torch.where(where, yes, no, out=out)


def _sum_runs(values: Tensor, axis: int, sizes: tuple[int, ...]) -> Tensor:
    parts, start = [], 0
    for size, run_sizes in groupby(sizes):
        count = len(list(run_sizes))
        run = values.narrow(axis, start, size * count)
        parts.append(run if size == 1 else run.unflatten(axis, (count, size)).sum(axis + 1))
        start += size * count
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=axis)


class _SoftCounts(torch.autograd.Function):
    """TP, FP, FN per class and region; keeps no one-hot target, neither forward nor for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, probabilities: Tensor, target: Tensor, grid: Grid, first: int, regions: bool
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(target)
        ctx.grid, ctx.first, ctx.regions, ctx.shape = grid, first, regions, probabilities.shape
        counts: tuple[list[Tensor], ...] = ([], [], [])
        # The same memory for every class: fresh pages cost as much as the arithmetic.
        g, hit, rest = (probabilities.new_empty(target.shape) for _ in range(3))
        for index in range(first, probabilities.shape[1]):
            p = probabilities[:, index]
            g.copy_(target_mask(target, index, regions))
            torch.mul(p, g, out=hit)
            counts[0].append(grid.sum(hit))
            # Differences voxel by voxel, which are exact; those of two large sums could turn negative.
            counts[1].append(grid.sum(torch.sub(p, hit, out=rest)))
            counts[2].append(grid.sum(g.sub_(hit)))
        return tuple(torch.stack(parts, dim=1) for parts in counts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (target,) = ctx.saved_tensors
        grad_tp, grad_fp, grad_fn = grads
        grad = torch.empty(ctx.shape, dtype=grad_tp.dtype, device=grad_tp.device)
        grad[:, : ctx.first] = 0
        for index in range(ctx.first, ctx.shape[1]):
            at = index - ctx.first
            inside, outside = grad_tp[:, at] - grad_fn[:, at], grad_fp[:, at]
            ctx.grid.select(target_mask(target, index, ctx.regions), inside, outside, out=grad[:, index])
        return grad, None, None, None, None


def soft_counts(
    probabilities: Tensor, target: Tensor, grid: Grid, *, first: int, regions: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Return soft TP, FP, FN per sample, class and region, summed (not averaged) over the region's voxels.

        TP = sum p*g      FP = sum p*(1-g)      FN = sum (1-p)*g

    `probabilities` (B, K, *spatial) floating, zero on ignored voxels; `target` (B, *spatial) int64; classes from
    `first` on. regions: the target holds the bits of label regions (`Prepared`), and g is 1 inside of each. Each result
    is (B, K - first, *grid.shape), differentiable once with respect to `probabilities`.
    Cost: one pass per class and a few temporaries of one class's size.
    """
    # A byte per voxel is kept for the backward pass, not eight.
    compact = target.to(torch.uint8) if probabilities.shape[1] < (9 if regions else 256) else target
    tp, fp, fn = _SoftCounts.apply(probabilities, compact, grid, first, regions)
    return tp, fp, fn


def per_axis(name: str, value: int | Sequence[int], spatial_dims: int) -> tuple[int, ...]:
    """Return `value` once per spatial axis; InputError unless it is one positive integer or one per axis."""
    values: tuple[Any, ...] = tuple(value) if isinstance(value, (list, tuple)) else (value,) * spatial_dims
    if len(values) != spatial_dims or not all(
        isinstance(v, int) and not isinstance(v, bool) and v >= 1 for v in values
    ):
        raise InputError(
            f"loss: {name}={value!r}; expected one positive integer, or {spatial_dims} of them (one per axis)"
        )
    return values


class _RankSum(torch.autograd.Function):
    """Sum over ranks, forward and backward.

    Every rank computes the same loss L from the same sum s = sum_r c_r, and DistributedDataParallel averages the
    gradients of W ranks. With W * dL/ds for each c_r, which the sum of equal gradients is, that average is the
    gradient of L: that of the whole batch in one process.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone()
        distributed.all_reduce(total)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor]:
        total = grads[0].clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total)
        return (total,)


def sum_over_ranks(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the tensors, each summed over all ranks; as they are outside of distributed training.

    Every rank must call this with tensors of the same shapes and dtypes. Cost: one all_reduce, and one in backward.
    """
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return tensors
    total = _RankSum.apply(torch.cat([tensor.flatten() for tensor in tensors]))
    parts = total.split([tensor.numel() for tensor in tensors])
    return tuple(part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True))
