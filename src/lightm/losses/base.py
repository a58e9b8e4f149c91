"""What every loss shares: the checks of its two tensors, the ignore mask, and arithmetic in float32.

A loss is called with raw `logits` (B, K, *spatial), K >= 2, and `target` (B, *spatial) holding class indices;
255 marks voxels that take no part. `SegmentationLoss.forward` checks and prepares both once, whatever the
number of terms; a loss only writes `compute`.

Classes exclude each other, so that a softmax makes their probabilities. Regions of several classes, which may overlap
(`label_regions`; Isensee et al., "nnU-Net for brain tumor segmentation", BrainLes 2020), have one logit and one sigmoid
each instead, K >= 1, and no background among them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lightm.errors import InputError
from lightm.labels import IGNORE_INDEX, MAX_REGIONS


@dataclass(eq=False)
class Prepared:
    """Checked tensors of one call: `logits` at least float32, `target` int64, `valid` (None: all are).

    target: class indices; with `regions` a number whose bit k says whether a voxel lies in region k (0 where ignored).
    """

    logits: Tensor
    target: Tensor
    valid: Tensor | None
    regions: bool = False

    def mask(self, index: int) -> Tensor:
        """Where the target has this class, or lies in this region: (B, *spatial) bool, False on ignored voxels."""
        return target_mask(self.target, index, self.regions)

    @cached_property
    def probabilities(self) -> Tensor:
        """Softmax over classes (B, K, *spatial), or sigmoids of regions; exactly zero on ignored voxels.

        Computed once per call.
        """
        if self.regions:
            found = torch.sigmoid(self.logits)
            return found if self.valid is None else found * self.valid.unsqueeze(1)
        if self.valid is None:
            return torch.softmax(self.logits, dim=1)
        return _MaskedSoftmax.apply(self.logits, self.valid)


def target_mask(target: Tensor, index: int, regions: bool) -> Tensor:
    """Where a target of `Prepared` has a class, or its number has the bit of a region."""
    return target.bitwise_and(1 << index) != 0 if regions else target == index


class _MaskedSoftmax(torch.autograd.Function):
    """Softmax over axis 1, zero where `valid` is not; as is its derivative p * (grad - sum(p * grad)) there."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, valid: Tensor) -> Tensor:
        probabilities = torch.softmax(logits, dim=1)
        probabilities *= valid.unsqueeze(1)
        ctx.save_for_backward(probabilities)
        return probabilities

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (probabilities,) = ctx.saved_tensors
        return torch.ops.aten._softmax_backward_data(grads[0], probabilities, 1, probabilities.dtype), None


@dataclass(kw_only=True, eq=False, repr=False)
class SegmentationLoss(nn.Module):
    """Base of the losses: `forward(logits, target)` -> scalar (float32; float64 when the logits are float64).

    Half precision and bfloat16 are cast to float32 and autocast is switched off inside: sums over a million voxels and
    terms like eps = 1e-5 do not fit in 16 bits. Ignored voxels get a gradient of exactly zero, whatever their logits.

    label_regions: for region-based labels the class indices of each region, ((1, 2), (2,)); `num_classes` is their
    number then. Losses whose equations take no regions refuse them.
    """

    spatial_dims: int
    num_classes: int
    ignore_index: int = IGNORE_INDEX
    label_regions: Sequence[Sequence[int]] | None = None

    def __post_init__(self) -> None:
        super().__init__()
        if self.spatial_dims not in (2, 3):
            raise InputError(f"loss: spatial_dims={self.spatial_dims!r}; expected 2 or 3")
        if self.label_regions is not None:
            self._check_regions(self.label_regions)
        elif self.num_classes < 2:
            raise InputError(f"loss: num_classes={self.num_classes!r}; expected at least 2, background included")
        if 0 <= self.ignore_index < self.num_classes:
            raise InputError(f"loss: ignore_index={self.ignore_index} is one of the {self.num_classes} classes")

    def _check_regions(self, given: Sequence[Sequence[int]]) -> None:
        """Keep a table from class index to the bits of its regions."""
        self.label_regions = regions = tuple(tuple(int(index) for index in region) for region in given)
        if len(regions) != self.num_classes or not 1 <= len(regions) <= MAX_REGIONS:
            raise InputError(
                f"loss: {len(regions)} label_regions for num_classes={self.num_classes}; expected as many, 1 to "
                f"{MAX_REGIONS}"
            )
        if any(not region or min(region) < 1 or max(region) >= IGNORE_INDEX for region in regions):
            raise InputError(f"loss: label_regions={regions}; expected class indices from 1 to 254 for each region")
        if getattr(self, "include_background", False):
            raise InputError("loss: include_background=True, but regions have no background; leave it out")
        bits = [0] * (1 + max(index for region in regions for index in region))
        for k, region in enumerate(regions):
            for index in region:
                bits[index] |= 1 << k
        self.register_buffer("_bits", torch.tensor(bits), persistent=False)

    @property
    def first(self) -> int:
        """The first channel that overlap is counted for: 1 leaves out the background, which regions have not."""
        return 0 if self.label_regions is not None or getattr(self, "include_background", False) else 1

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the loss of `logits` (B, K, *spatial) against class indices `target` (B, *spatial).

        Raises InputError for shapes, types or class indices that do not fit.
        """
        with torch.autocast(device_type=logits.device.type, enabled=False):
            return self.compute(self._prepare(logits, target))

    def compute(self, batch: Prepared) -> Tensor:
        """Return the scalar loss of checked tensors."""
        raise NotImplementedError

    def _prepare(self, logits: Tensor, target: Tensor) -> Prepared:
        if logits.ndim != self.spatial_dims + 2 or logits.shape[1] != self.num_classes:
            raise InputError(
                f"loss: logits have shape {tuple(logits.shape)}; expected (batch, "
                f"{self.num_classes} classes, {self.spatial_dims} spatial axes)"
            )
        if target.shape != (logits.shape[0], *logits.shape[2:]):
            raise InputError(
                f"loss: target has shape {tuple(target.shape)}; expected "
                f"{(logits.shape[0], *logits.shape[2:])}, class indices without a channel axis"
            )
        if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
            raise InputError(f"loss: target has dtype {target.dtype}; expected integer class indices")
        if not target.numel():
            raise InputError(f"loss: logits of shape {tuple(logits.shape)} hold no voxel")
        if logits.dtype in (torch.float16, torch.bfloat16):
            logits = logits.float()
        target = target.long()
        classes = self.num_classes if self.label_regions is None else int(cast(Tensor, self._bits).numel())
        low, high = (int(value) for value in torch.aminmax(target))
        valid: Tensor | None = None
        if not 0 <= low <= high < classes:
            valid = target != self.ignore_index
            low, high = (int(value) for value in torch.aminmax(target.masked_fill(~valid, 0)))
            if not 0 <= low <= high < classes:
                raise InputError(
                    f"loss: target holds class index {low if low < 0 else high}; expected "
                    f"0..{classes - 1}, or {self.ignore_index} for voxels to ignore"
                )
            # Zeroed here rather than masked later: NaN times zero would still be NaN in the gradient. The sum
            # reads the tensor once, where zeroing copies it, forward and backward.
            if not torch.isfinite(logits.detach().sum()):
                logits = logits.masked_fill(~valid.unsqueeze(1), 0.0)
        if self.label_regions is None:
            return Prepared(logits, target, valid)
        # Class 0, the background, lies in no region.
        table = cast(Tensor, self._bits).to(target.device)
        bits = table[target if valid is None else target.masked_fill(~valid, 0)]
        return Prepared(logits, bits, valid, regions=True)


def number(name: str, value: float, *, positive: bool = False) -> float:
    """Return `value` as a float; InputError unless it is finite and not negative (with `positive`: above 0)."""
    try:
        result = -1.0 if isinstance(value, str) else float(value)
    except (TypeError, ValueError):
        result = -1.0
    if not 0 <= result < float("inf") or (positive and result == 0):
        expected = "a positive number, such as 1e-5" if positive else "a finite number that is not negative"
        raise InputError(f"loss: {name}={value!r}; expected {expected}")
    return result


def numbers(name: str, values: Sequence[float], count: int) -> tuple[float, ...]:
    """Return `values` as floats; InputError unless they are `count` finite numbers that are not negative."""
    if isinstance(values, str) or not isinstance(values, Sequence) or len(values) != count:
        raise InputError(f"loss: {name}={values!r}; expected a list of {count} numbers")
    return tuple(number(name, value) for value in values)


class WeightedSum(SegmentationLoss):
    """Weighted sum of losses, `sum_i weights[i] * losses[i]`, over tensors that are checked once."""

    def __init__(self, losses: Sequence[SegmentationLoss], weights: Sequence[float] | None = None) -> None:
        if not losses:
            raise InputError("loss: a weighted sum needs at least one loss")
        names = ("spatial_dims", "num_classes", "ignore_index", "label_regions")
        first = {name: getattr(losses[0], name) for name in names}
        super().__init__(**first)
        if any(getattr(loss, name) != value for loss in losses for name, value in first.items()):
            raise InputError(f"loss: the parts of a sum differ in {', '.join(names[:-1])} or {names[-1]}")
        self.losses = nn.ModuleList(losses)
        self.weights = numbers("weights", (1.0,) * len(losses) if weights is None else weights, len(losses))

    def compute(self, batch: Prepared) -> Tensor:
        total = batch.logits.new_zeros(())
        for weight, loss in zip(self.weights, self.losses, strict=True):
            if weight:
                total = total + weight * loss.compute(batch)  # type: ignore[operator]
        return total


class CustomLoss(SegmentationLoss):
    """Call `function(logits, target)` -> scalar as a loss of LightM: alone, or as a part of a `WeightedSum`.

    logits (B, K, *S), float32 at least and outside of autocast; target (B, *S) int64, where 255 (`IGNORE_INDEX`) marks
    voxels that must not count. Losses that do not know such labels, among them MONAI's, work for data without them.
    With `label_regions` the target is (B, K, *S) int64: 1 inside of a region, 0 outside, 255 as above.
    If the function is a module its parameters and buffers are this module's. Raises InputError, when called, for
    a result that is not a scalar tensor.

    >>> import torch
    >>> half = CustomLoss(lambda logits, target: logits.mean() / 2, spatial_dims=2, num_classes=2)
    >>> half(torch.ones(1, 2, 4, 4), torch.zeros(1, 4, 4, dtype=torch.long))
    tensor(0.5000)
    """

    def __init__(
        self,
        function: Callable[[Tensor, Tensor], Tensor],
        *,
        spatial_dims: int,
        num_classes: int,
        ignore_index: int = IGNORE_INDEX,
        label_regions: Sequence[Sequence[int]] | None = None,
    ) -> None:
        super().__init__(
            spatial_dims=spatial_dims, num_classes=num_classes, ignore_index=ignore_index, label_regions=label_regions
        )
        if not callable(function):
            raise InputError(f"loss {function!r}: expected a callable of logits and target")
        self.function = function

    def compute(self, batch: Prepared) -> Tensor:
        target = batch.target
        if batch.regions:
            target = torch.stack([batch.mask(k).long() for k in range(self.num_classes)], dim=1)
            target = target if batch.valid is None else target.masked_fill(~batch.valid.unsqueeze(1), self.ignore_index)
        result = self.function(batch.logits, target)
        if not isinstance(result, Tensor) or result.numel() != 1:
            got = f"a tensor of shape {tuple(result.shape)}" if isinstance(result, Tensor) else type(result).__name__
            raise InputError(f"loss {type(self.function).__name__}: returned {got}; expected a tensor of one number")
        return result.reshape(())
