"""Adaptive region-specific loss (ARSL): a Tversky loss per region, weighted by the region's own errors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

from lightm.errors import InputError
from lightm.losses.base import Prepared, SegmentationLoss, number
from lightm.losses.regions import Grid, per_axis, soft_counts, sum_over_ranks

DEFAULT_REGIONS = 16
EMPTY_VOXELS = 0.5


@dataclass(kw_only=True, eq=False, repr=False)
class AdaptiveRegion(SegmentationLoss):
    """ARSL (Chen et al., "Adaptive region-specific loss", IEEE TPAMI 45(11):13408, 2023).

    Per class and region,

        alpha = A + B * (FP+eps)/(FP+FN+eps)        beta = A + B * (FN+eps)/(FP+FN+eps)
        loss  = 1 - (TP+eps) / (TP + alpha*FP + beta*FN + eps)          (A = 0.3, B = 0.4)

    with soft TP, FP, FN summed over the region's voxels. Sums, not the means that some implementations pool: with
    means, eps would weigh as much as eps * (voxels of a region) does here.

    - `regions` (default 16): regions along each axis, one number or one per axis, lengths differing by at most one
      voxel. `region_size`: their size in voxels instead, the last one of an axis holding what is left.
    - `reduction`: "mean" over samples, classes and regions; "sum" over regions, mean over samples and classes.
    - `detach`: alpha and beta carry no gradient. By default they do.
    - `eps` (default 1e-5 voxels): a region holding half a voxel of error is counted in full. It also sets when the loss
      falls off a cliff: a region without foreground has the loss (A+B)*FP / ((A+B)*FP + eps), near 1 and without useful
      gradient as long as it holds more than a trace of prediction, so that it dilutes the mean; then 0, in all such
      regions within a few epochs. The fall says nothing about the segmentation (docs/results/arsl-cliff.md).
    - `skip_empty`: leaves out regions that hold no foreground and less than half a voxel of predicted probability, and
      with them the cliff. With all of them empty the loss is 0. By default they are kept, as published.
    - `batch`: TP, FP, FN summed over the samples before the ratios, over those of all ranks in distributed training
      (which must then call the loss equally often); `include_background`: class 0 as well.

    With `label_regions` (of classes, not of space) the same equations hold for each of them, p = sigmoid(logit): they
    ask for TP, FP and FN alone, and not that the classes exclude each other.

    After a call `last_coefficients` holds its alpha and beta per class, as `coefficients` gives them. Regions that lie
    wholly under the ignore mask never count. Cost: as Dice, plus the region table.
    """

    regions: int | Sequence[int] | None = None
    region_size: int | Sequence[int] | None = None
    a: float = 0.3
    b: float = 0.4
    eps: float = 1e-5
    reduction: str = "mean"
    detach: bool = False
    batch: bool = False
    include_background: bool = False
    skip_empty: bool = False
    last_coefficients: tuple[Tensor, Tensor] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.regions is not None and self.region_size is not None:
            raise InputError("loss: give regions (how many along an axis) or region_size (in voxels), not both")
        if self.reduction not in ("mean", "sum"):
            raise InputError(f"loss: reduction={self.reduction!r}; expected 'mean' or 'sum'")
        regions = DEFAULT_REGIONS if self.regions is None else self.regions
        self.regions = per_axis("regions", regions, self.spatial_dims)
        if self.region_size is not None:
            self.region_size = per_axis("region_size", self.region_size, self.spatial_dims)
        self.a, self.b = number("a", self.a), number("b", self.b)
        self.eps = number("eps", self.eps, positive=True)

    def grid(self, shape: Sequence[int]) -> Grid:
        """Return the grid of regions over a volume of `shape` voxels."""
        if self.region_size is not None:
            return Grid.by_size(shape, cast(Sequence[int], self.region_size))
        return Grid.by_count(shape, cast(Sequence[int], self.regions))

    def coefficients(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Return alpha and beta averaged over samples and regions, one value per class, no gradient.

        Regions that the loss leaves out are left out here; a class without a region gives NaN.
        """
        with torch.no_grad(), torch.autocast(device_type=logits.device.type, enabled=False):
            _, fp, fn, kept = self._counts(self._prepare(logits, target))
            return _means(*self._weights(fp, fn), kept)

    def compute(self, batch: Prepared) -> Tensor:
        tp, fp, fn, kept = self._counts(batch)
        alpha, beta = self._weights(fp, fn)
        self.last_coefficients = _means(alpha.detach(), beta.detach(), kept)
        loss = 1 - (tp + self.eps) / (tp + alpha * fp + beta * fn + self.eps)
        if kept is not None:
            loss = loss * kept
        if self.reduction == "sum":
            return loss.flatten(2).sum(2).mean()
        return loss.mean() if kept is None else loss.sum() / kept.sum().clamp(min=1)

    def _weights(self, fp: Tensor, fn: Tensor) -> tuple[Tensor, Tensor]:
        if self.detach:
            fp, fn = fp.detach(), fn.detach()
        errors = fp + fn + self.eps
        return self.a + self.b * (fp + self.eps) / errors, self.a + self.b * (fn + self.eps) / errors

    def _counts(self, batch: Prepared) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Return TP, FP, FN (B or 1, classes, *grid) and which of these regions count (None: all)."""
        grid = self.grid(batch.target.shape[1:])
        tp, fp, fn = soft_counts(batch.probabilities, batch.target, grid, first=self.first, regions=batch.regions)
        voxels = None if batch.valid is None else grid.sum(batch.valid.to(tp.dtype)).unsqueeze(1)
        if self.batch:
            if voxels is None:  # another rank may have ignored voxels, and all must send the same
                voxels = tp.new_ones(tp.shape[0], 1, *tp.shape[2:])
            tp, fp, fn, voxels = sum_over_ranks(*(count.sum(0, keepdim=True) for count in (tp, fp, fn, voxels)))
        kept = None if voxels is None else (voxels > 0).expand_as(tp)
        if self.skip_empty:
            with torch.no_grad():
                filled = ((tp + fn) >= EMPTY_VOXELS) | ((tp + fp) >= EMPTY_VOXELS)
            kept = filled if kept is None else kept & filled
        return tp, fp, fn, kept


def _means(alpha: Tensor, beta: Tensor, kept: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean of both over samples and the regions that count, per class."""
    axes = (0, *range(2, alpha.ndim))
    if kept is None:
        return alpha.mean(axes), beta.mean(axes)
    weight = kept.to(alpha.dtype)
    count = weight.sum(axes)
    return (alpha * weight).sum(axes) / count, (beta * weight).sum(axes) / count
