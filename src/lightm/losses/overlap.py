"""Cross-entropy, and the losses that compare soft overlap over a whole sample or batch: Dice and Tversky."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from lightm.losses.base import IGNORE_INDEX, Prepared, SegmentationLoss, number, numbers
from lightm.losses.regions import Grid, soft_counts


class CrossEntropy(SegmentationLoss):
    """Cross-entropy of the softmax, averaged over the voxels that are not ignored (0 when none is left).

    `class_weights` (K numbers) turns the mean into a weighted mean, as in PyTorch.
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


class Tversky(SegmentationLoss):
    """Tversky loss, 1 - (TP+eps) / (TP + alpha*FP + beta*FN + eps), averaged over classes (and samples).

    Salehi et al., "Tversky loss function for image segmentation using 3D fully convolutional deep networks",
    2017. `batch=True` sums TP, FP, FN over the samples of the batch before the ratio, and `batch=False` takes
    the ratio per sample. A class absent from both label and prediction gives 0. One that is absent from the
    label only tends to 1 with a small gradient (at most 1/4 summed over its logits), so that it neither
    diverges nor outweighs the classes that are there; `skip_absent=True` leaves those (sample, class) pairs
    out of the mean.
    """

    def __init__(
        self,
        *,
        spatial_dims: int,
        num_classes: int,
        ignore_index: int = IGNORE_INDEX,
        alpha: float = 0.5,
        beta: float = 0.5,
        eps: float = 1e-5,
        batch: bool = False,
        include_background: bool = False,
        skip_absent: bool = False,
    ) -> None:
        super().__init__(spatial_dims=spatial_dims, num_classes=num_classes, ignore_index=ignore_index)
        self.alpha, self.beta = number("alpha", alpha), number("beta", beta)
        # An eps of zero would divide zero by zero for a class that is nowhere.
        self.eps = number("eps", eps, positive=True)
        self.batch, self.include_background, self.skip_absent = batch, include_background, skip_absent

    def compute(self, batch: Prepared) -> Tensor:
        grid = Grid.whole(batch.target.shape[1:])
        counts = soft_counts(batch.probabilities, batch.target, grid, first=0 if self.include_background else 1)
        tp, fp, fn = (count.flatten(1) for count in counts)
        if self.batch:
            tp, fp, fn = (count.sum(0, keepdim=True) for count in (tp, fp, fn))
        loss = 1 - (tp + self.eps) / (tp + self.alpha * fp + self.beta * fn + self.eps)
        if not self.skip_absent:
            return loss.mean()
        present = (tp + fn) > 0
        return (loss * present).sum() / present.sum().clamp(min=1)


class Dice(Tversky):
    """Soft Dice loss, 1 - (2*TP+smooth) / (2*TP + FP + FN + smooth), averaged over classes (and samples).

    The defaults follow nnU-Net's 3D full-resolution configuration: ratio per sample (`batch=False`), no
    background, smooth 1e-5, plain probabilities in the denominator (not squared). It is Tversky with alpha =
    beta = 1/2 and eps = smooth/2; options and absent classes as there.
    """

    def __init__(
        self,
        *,
        spatial_dims: int,
        num_classes: int,
        ignore_index: int = IGNORE_INDEX,
        smooth: float = 1e-5,
        batch: bool = False,
        include_background: bool = False,
        skip_absent: bool = False,
    ) -> None:
        super().__init__(
            spatial_dims=spatial_dims,
            num_classes=num_classes,
            ignore_index=ignore_index,
            eps=number("smooth", smooth, positive=True) / 2,
            batch=batch,
            include_background=include_background,
            skip_absent=skip_absent,
        )
