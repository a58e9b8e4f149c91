"""Losses voxel by voxel: cross-entropy, its hardest part (TopK), and binary cross-entropy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from lightm.errors import InputError
from lightm.losses.base import IGNORE_INDEX, Prepared, SegmentationLoss, number, numbers


class CrossEntropy(SegmentationLoss):
    """Cross-entropy of the softmax, averaged over the voxels that are not ignored (0 when none is left).

    `class_weights` (K numbers) turns the mean into a weighted mean, as in PyTorch. In distributed training every rank
    averages over its own voxels, and the ranks' gradients are averaged.
    """

    class_weights: Tensor | None

    def __init__(
        self,
        *,
        spatial_dims: int,
        num_classes: int,
        ignore_index: int = IGNORE_INDEX,
        class_weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__(spatial_dims=spatial_dims, num_classes=num_classes, ignore_index=ignore_index)
        weights = None
        if class_weights is not None:
            weights = torch.tensor(numbers("class_weights", class_weights, num_classes))
        self.register_buffer("class_weights", weights, persistent=False)

    def compute(self, batch: Prepared) -> Tensor:
        weights = self.class_weights
        if weights is not None:
            weights = weights.to(batch.logits.dtype)
        if batch.valid is None and weights is None:
            return functional.cross_entropy(batch.logits, batch.target)
        total = functional.cross_entropy(
            batch.logits, batch.target, weights, ignore_index=self.ignore_index, reduction="sum"
        )
        valid = torch.ones_like(batch.target, dtype=torch.bool) if batch.valid is None else batch.valid
        if weights is None:
            return total / valid.sum().clamp(min=1)
        weight = weights[batch.target[valid]].sum()
        return total / torch.where(weight > 0, weight, 1.0)


@dataclass(kw_only=True, eq=False, repr=False)
class TopK(SegmentationLoss):
    """Cross-entropy averaged over the `k` per cent of the batch's voxels where it is highest (nnU-Net: k = 10).

    With `label_regions` the binary cross-entropies of all voxels and regions take the place of the voxels'.

    Wu et al., "Bridging category-level and instance-level semantic image segmentation", 2016. Ignored voxels do not
    count; the number of voxels is rounded up, and voxels that tie for the last places share them. k = 100 is
    cross-entropy. In distributed training every rank takes its own highest. Cost: linear in the voxels.
    """

    k: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        given, self.k = self.k, number("k", self.k, positive=True)
        if self.k > 100:
            raise InputError(f"loss: k={given!r}; expected per cent of the voxels, above 0 and at most 100")

    def compute(self, batch: Prepared) -> Tensor:
        if batch.regions:
            inside = torch.stack([batch.mask(k) for k in range(self.num_classes)], dim=1).to(batch.logits.dtype)
            losses = functional.binary_cross_entropy_with_logits(batch.logits, inside, reduction="none").movedim(1, -1)
        else:
            losses = functional.cross_entropy(
                batch.logits, batch.target, ignore_index=self.ignore_index, reduction="none"
            )
        kept = losses.flatten() if batch.valid is None else losses[batch.valid].flatten()
        if not kept.numel():
            return kept.sum()  # zero, with a gradient of zero
        # Rounded first: 10 per cent of 30 is 3, not the 4 that 3.0000000000000004 would be rounded up to.
        count = max(1, math.ceil(round(kept.numel() * self.k / 100, 6)))
        with torch.no_grad():
            least = _count_highest(kept, count)
            weight = (kept > least).to(kept.dtype)
            # Voxels exactly at the limit share what is left of the count, so that their order does not matter.
            equal = kept == least
            weight[equal] = (count - weight.sum(dtype=torch.float64)).to(weight.dtype) / equal.sum()
        return torch.dot(weight, kept) / count


def _count_highest(values: Tensor, count: int) -> Tensor:
    """Return the lowest of the `count` highest of `values` (N,), a scalar tensor. NaN counts as highest.

    On a CPU NumPy's selection, which is linear and vectorized, takes a tenth of the time of torch.topk.
    """
    if values.device.type != "cpu":
        return torch.topk(values, count, sorted=False).values.min()
    found = values.detach().numpy()
    return values.new_tensor(np.partition(found, found.size - count)[found.size - count])


@dataclass(kw_only=True, eq=False, repr=False)
class BinaryCrossEntropy(SegmentationLoss):
    """Binary cross-entropy of each class against the others, by a sigmoid of its logit; mean of classes and voxels.

        loss = mean over k, voxels of  softplus(x_k) - x_k * [target = k]

    The background is a class as well: a prediction is the class of the highest logit, which must be trained. With
    `label_regions` [target in region k] stands for [target = k], and there is no background.
    Ignored voxels do not count (0 when none is left). `class_weights` (K numbers) weigh the classes' means.
    """

    class_weights: Sequence[float] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        given = (1.0,) * self.num_classes if self.class_weights is None else self.class_weights
        self.class_weights = self._weights = numbers("class_weights", given, self.num_classes)
        if not sum(self._weights):
            raise InputError(f"loss: class_weights={given!r}; expected one above zero at least")

    def compute(self, batch: Prepared) -> Tensor:
        weight = None if batch.valid is None else batch.valid.to(batch.logits.dtype)
        total = batch.logits.new_zeros(())
        for index, share in enumerate(self._weights):
            if share:
                found = batch.mask(index).to(batch.logits.dtype)
                total = total + share * functional.binary_cross_entropy_with_logits(
                    batch.logits[:, index], found, weight, reduction="sum"
                )
        voxels = batch.target.numel() if batch.valid is None else batch.valid.sum().clamp(min=1)
        return total / (voxels * sum(self._weights))
