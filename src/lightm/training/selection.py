"""Which epoch's weights are kept: a rule over the pseudo Dice of the epochs so far, right for 3 and for 1000 of them.

An epoch is judged by the mean of the last epochs up to it, a tenth of all so far, at least one and at most ten. A
short run so takes every value as it is, since each epoch still moves the network, and a long one is not led by a lucky
epoch. The epoch at hand and the kept one are compared under the same width, so that neither has the luckier number.
The rule depends on the values alone: a resumed run decides as one that was never interrupted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

WIDEST = 10


def width(epochs: int) -> int:
    """How many epochs are averaged after so many: a tenth, from 1 to 10."""
    return min(max(epochs // 10, 1), WIDEST)


def smoothed(values: Sequence[float], epoch: int | None) -> float:
    """Return the mean of the values up to that epoch, over the width that all `values` so far give.

    values: pseudo Dice of each epoch so far; one that is not defined (NaN) does not count. NaN where none does, and
    where there is no epoch.

    >>> smoothed([0.77, 0.63, 0.80], 2)
    0.8
    >>> round(smoothed([0.5] * 28 + [0.8, 0.2], 28), 3), width(30)
    (0.6, 3)
    """
    if epoch is None:
        return math.nan
    first = max(0, epoch + 1 - width(len(values)))
    known = [value for value in values[first : epoch + 1] if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def best_epoch(values: Sequence[float], kept: int | None) -> int | None:
    """Return the epoch to keep after the last of `values`: that one where it is better than `kept`, else `kept`.

    An epoch whose own value is not defined is never taken; None while none is.

    >>> kept = None
    >>> for count in range(1, 4):
    ...     kept = best_epoch([0.77, 0.63, 0.80][:count], kept)
    >>> kept
    2
    """
    last = len(values) - 1
    if last < 0 or math.isnan(values[last]):
        return kept
    return kept if kept is not None and not smoothed(values, last) > smoothed(values, kept) else last
