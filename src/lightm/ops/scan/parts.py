"""Cutting the tokens of a scan into parts that threads take side by side, where there are more threads than tiles.

What a part of the tokens does to the states before it is h -> exp2(a * sum of dt) * h + h0, with h0 the states it
leaves when it begins with zeros. First the first part is scanned and every other one but the last is summed up so;
then all states between the parts are known, and the other parts are scanned. All parts but two are read twice, so w
threads a tile are about (w + 1) / 2 times as fast as one: two or more pay, one does not.

The carried states are rounded otherwise than token by token: results differ from the uncut scan's in the last bits.
They are the same every run for one number of threads, and for all numbers below twice that of tiles and batch entries.
"""

from __future__ import annotations

import torch
from torch import Tensor

SHORTEST = 2048
"""Tokens of a part that are worth handing to a thread."""


def part_count(items: int, threads: int, tokens: int) -> int:
    """Parts to cut the tokens of each of `items` tiles into; 1 where it would not pay."""
    for_one = min(threads // max(items, 1), tokens // SHORTEST - 1)
    return for_one + 1 if for_one >= 2 else 1


def cut(tokens: int, parts: int, chunk: int) -> list[int]:
    """parts + 1 borders from 0 to `tokens`, multiples of `chunk` but for the last."""
    chunks = -(-tokens // chunk)
    return [min(chunks * part // parts * chunk, tokens) for part in range(parts)] + [tokens]


def carry_states(first: Tensor, alone: Tensor, steps: Tensor, decay: Tensor) -> Tensor:
    """States before every part but the first.

    Args:
        first: (Bt, tiles, N, LANES), the states that the first part leaves.
        alone: (parts - 2, Bt, tiles, N, LANES), what the second to last but one leave when they begin with zeros.
        steps: (parts - 2, Bt, tiles, 1, LANES), their sums of dt.
        decay: (tiles, N, LANES), A times log2(e).
    """
    states = [first]
    for left, total in zip(alone, steps, strict=True):
        states.append(left + torch.exp2(decay * total) * states[-1])
    return torch.stack(states)
