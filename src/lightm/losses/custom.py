"""A loss that is not LightM's: any callable of logits and target, with the checks and the precision of the others."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightm.errors import InputError
from lightm.losses.base import IGNORE_INDEX, Prepared, SegmentationLoss


class CustomLoss(SegmentationLoss):
    """Call `function(logits, target)` -> scalar as a loss of LightM: alone, or as a part of a `WeightedSum`.

    logits (B, K, *S), float32 at least and outside of autocast; target (B, *S) int64, where 255 (`IGNORE_INDEX`) marks
    voxels that must not count. Losses that do not know such labels, among them MONAI's, work for data without them.
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
    ) -> None:
        super().__init__(spatial_dims=spatial_dims, num_classes=num_classes, ignore_index=ignore_index)
        if not callable(function):
            raise InputError(f"loss {function!r}: expected a callable of logits and target")
        self.function = function

    def compute(self, batch: Prepared) -> Tensor:
        result = self.function(batch.logits, batch.target)
        if not isinstance(result, torch.Tensor) or result.numel() != 1:
            raise InputError(
                f"loss {type(self.function).__name__}: returned {_described(result)}; expected a tensor of one number"
            )
        return result.reshape(())


def _described(value: object) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
