"""Multi-head attention on tokens, with relative positions in windows where they are wanted."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """softmax(Q K^T / sqrt(d) + bias) V on tokens: (B, N, C), (B, M, C) -> (B, N, C).

    Source: arXiv 1706.03762; with `window`, a learnt bias for each head and each distance within the window, as in
    arXiv 2103.14030. `project_query=False` takes the query as it is: nnFormer's skip attention.
    Parameters: 4 C^2 + 4 C, less C^2 + C without the query's projection; heads * prod(2 w - 1) for the bias.
    """

    index: Tensor

    def __init__(
        self,
        channels: int,
        heads: int,
        *,
        window: Sequence[int] | None = None,
        project_query: bool = True,
    ) -> None:
        super().__init__()
        if channels % heads:
            raise ValueError(f"{channels} channels are not divisible by {heads} heads")
        self.heads = heads
        self.query = nn.Linear(channels, channels) if project_query else None
        self.key_value = nn.Linear(channels, 2 * channels)
        self.out = nn.Linear(channels, channels)
        self.table: nn.Parameter | None = None
        if window is not None:
            self.table = nn.Parameter(torch.zeros(heads, prod(2 * length - 1 for length in window)))
            nn.init.trunc_normal_(self.table, std=0.02)
            self.register_buffer("index", _distances(window), persistent=False)

    def forward(self, query: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """`mask`: (windows, N, N) of what is added to the scores, B being a multiple of the windows."""
        q = query if self.query is None else self.query(query)
        k, v = self.key_value(context).chunk(2, dim=-1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        added: Tensor | None = None
        if self.table is not None:
            added = self.table[:, self.index].unsqueeze(0)  # (1, heads, N, N)
            if mask is not None:
                added = (added + mask.unsqueeze(1)).repeat(len(query) // len(mask), 1, 1, 1)
            added = added.to(q.dtype)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=added)
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out


class MLP(nn.Sequential):
    """Linear C -> hidden, GELU, linear back, with dropout behind each: 2 C hidden + C + hidden parameters."""

    def __init__(self, channels: int, hidden: int, dropout: float = 0.0) -> None:
        super().__init__(
            nn.Linear(channels, hidden),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, channels),
            nn.Dropout(dropout),
        )


def _distances(window: Sequence[int]) -> Tensor:
    """For each pair of voxels of a window the number of their distance: (N, N), N = prod(window)."""
    grids = torch.meshgrid(*(torch.arange(length) for length in window), indexing="ij")
    places = torch.stack([grid.flatten() for grid in grids])  # (d, N)
    apart = places[:, :, None] - places[:, None, :]
    number = torch.zeros_like(apart[0])
    for axis, length in enumerate(window):
        number = number * (2 * length - 1) + apart[axis] + length - 1
    return number
