"""Losses that compare soft overlap over a whole sample or batch: Dice, Tversky and focal Tversky."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from lightm.losses.base import Prepared, SegmentationLoss, number
from lightm.losses.regions import Grid, soft_counts, sum_over_ranks

# The least loss that focal Tversky still tells from none; a float32 ratio near 1 has no finer steps.
FLOOR = 1e-6


@dataclass(kw_only=True, eq=False, repr=False)
class Tversky(SegmentationLoss):
    """Tversky loss, 1 - (TP+eps) / (TP + alpha*FP + beta*FN + eps), averaged over classes (and samples).

    Salehi et al., "Tversky loss function for image segmentation using 3D fully convolutional deep networks",
    2017. `batch=True` sums TP, FP, FN over the samples of the batch before the ratio, over those of all ranks in
    distributed training (which must then call the loss equally often); `batch=False` takes the ratio per sample.
    A class absent from both label and prediction gives 0. One that is absent from the label only tends to 1 with a
    small gradient (at most 1/4 summed over its logits), so that it neither diverges nor outweighs the classes that
    are there; `skip_absent=True` leaves those (sample, class) pairs out of the mean. With `label_regions` the same
    of each region, p = sigmoid(logit).
    """

    alpha: float = 0.5
    beta: float = 0.5
    eps: float = 1e-5
    batch: bool = False
    include_background: bool = False
    skip_absent: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.alpha, self.beta = number("alpha", self.alpha), number("beta", self.beta)
        # An eps of zero would divide zero by zero for a class that is nowhere.
        self.eps = number("eps", self.eps, positive=True)

    def compute(self, batch: Prepared) -> Tensor:
        grid = Grid.whole(batch.target.shape[1:])
        counts = soft_counts(batch.probabilities, batch.target, grid, first=self.first, regions=batch.regions)
        tp, fp, fn = (count.flatten(1) for count in counts)
        if self.batch:
            tp, fp, fn = sum_over_ranks(*(count.sum(0, keepdim=True) for count in (tp, fp, fn)))
        loss = self._shaped(1 - (tp + self.eps) / (tp + self.alpha * fp + self.beta * fn + self.eps))
        if not self.skip_absent:
            return loss.mean()
        present = (tp + fn) > 0
        return (loss * present).sum() / present.sum().clamp(min=1)

    def _shaped(self, loss: Tensor) -> Tensor:
        """What becomes of the loss of a (sample, class) pair before the mean."""
        return loss


@dataclass(kw_only=True, eq=False, repr=False)
class Dice(Tversky):
    """Soft Dice loss, 1 - (2*TP+smooth) / (2*TP + FP + FN + smooth), averaged over classes (and samples).

    The defaults follow nnU-Net's 3D full-resolution configuration: ratio per sample (`batch=False`), no
    background, smooth 1e-5, plain probabilities in the denominator (not squared). It is Tversky with alpha =
    beta = 1/2 and eps = smooth/2; options and absent classes as there.
    """

    smooth: float = 1e-5
    alpha: float = field(default=0.5, init=False)
    beta: float = field(default=0.5, init=False)
    eps: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        self.eps = number("smooth", self.smooth, positive=True) / 2
        super().__post_init__()


@dataclass(kw_only=True, eq=False, repr=False)
class FocalTversky(Tversky):
    """Focal Tversky loss, (1 - TverskyIndex)^(1/gamma) per class (and sample), then the mean.

    Abraham & Khan, "A novel focal Tversky loss function with improved attention U-Net for lesion segmentation",
    ISBI 2019: gamma = 4/3, weight 0.7 on missed voxels, here `beta` (their alpha), and 0.3 on false ones, here
    `alpha`. gamma = 1 is Tversky. For gamma above 1 the gradient would grow without bound as the loss goes to 0;
    below 1e-6 the loss is held constant, so that classes that are nowhere give no gradient instead of NaN.
    """

    alpha: float = 0.3
    beta: float = 0.7
    gamma: float = 4 / 3

    def __post_init__(self) -> None:
        super().__post_init__()
        self.gamma = number("gamma", self.gamma, positive=True)

    def _shaped(self, loss: Tensor) -> Tensor:
        return loss.clamp(min=FLOOR) ** (1 / self.gamma)
