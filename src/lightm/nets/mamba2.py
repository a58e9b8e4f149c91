"""Mamba-2's state-space module, in the place of VSS and of SPM's parallel VSS: one decay for all states of a head.

Source: Mamba-2, arXiv 2405.21060, section 7 and figure 6. Glossary of `nets/blocks.py`, and

=============  ==========================================  ===================================
code           symbol                                      source
=============  ==========================================  ===================================
head_dim       P, channels of a head                       Mamba-2, section 2
heads          H = E / P, heads of a part                  Mamba-2, section 2
=============  ==========================================  ===================================
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightm import ops
from lightm.errors import InputError
from lightm.nets.intact import fusible
from lightm.nets.state_space import GroupedLinear, decay_rates, init_conv, init_dt_bias

Carry = tuple[Tensor, Tensor]


@fusible
class VSS2(nn.Module):
    """State-space module with Mamba-2's core: z, x, B, C, dt = Linear(W); x, B, C = SiLU(Conv(x, B, C));
    out = Linear(LayerNorm(SSD(x, dt, B, C)) * SiLU(z)).

    Where VSS computes B, C and dt from the convolved x, here one projection of the input gives all. LayerNorm and
    gate are VSS's (LightM-UNet, Eq. 3; Mamba-2 itself gates first and then divides by the root mean square);
    `inner_norm=False` leaves the norm out. A is -exp(A_log), one number a head; A_log starts as the logarithm of
    uniform [1, 16], the bias of dt as in VSS, the skip as 1.

    With `parts` > 1 this is the state-space core of SPM (the report's Figure 3): `parts` such modules of width
    C / parts on the parts of the channels, with their own B and C, in one scan; `shared` gives all the same weights.

    Parameters, with c = C / parts, E = expand * c, H = E / head_dim: c (2E + 2N + H) + (E + 2N)(K + 1) + 3H + E c,
    and 2E with `inner_norm`; times `parts` unless shared.

    (B, L, C) -> (B, L, C). Time and memory grow linearly with L. Raises InputError when `parts` does not divide the
    channels or `head_dim` the inner width.
    """

    no_decay = ("A_log", "conv_weight", "conv_bias", "dt_bias", "d_skip", "norm_weight", "norm_bias")

    def __init__(
        self,
        channels: int,
        *,
        state_size: int = 16,
        expand: int = 2,
        d_conv: int = 4,
        head_dim: int = 16,
        inner_norm: bool = True,
        parts: int = 1,
        shared: bool = False,
    ) -> None:
        super().__init__()
        if parts < 1 or channels % parts:
            raise InputError(f"{channels} channels are not divisible by {parts} parts; use a divisor of {channels}")
        width = channels // parts
        inner, sets = expand * width, 1 if shared else parts
        if head_dim < 1 or inner % head_dim:
            raise InputError(
                f"head_dim {head_dim} does not divide the inner width {inner} ({expand} * {channels} channels"
                f"{f' / {parts} parts' if parts > 1 else ''}); use a divisor of {inner}"
            )
        heads = inner // head_dim
        self.shared = shared
        self.parts, self.inner, self.state_size, self.head_dim = parts, inner, state_size, head_dim
        self.d_conv = d_conv
        self.in_proj = GroupedLinear(parts, width, (inner, inner, state_size, state_size, heads), shared=shared)
        self.conv_weight = nn.Parameter(torch.empty(sets, inner + 2 * state_size, d_conv))
        self.conv_bias = nn.Parameter(torch.empty(sets, inner + 2 * state_size))
        self.A_log = nn.Parameter(torch.empty(sets, heads).uniform_(1, 16).log())
        self.dt_bias = nn.Parameter(torch.empty(sets, heads))
        self.d_skip = nn.Parameter(torch.ones(sets, heads))
        self.norm_weight = nn.Parameter(torch.ones(sets, inner)) if inner_norm else None
        self.norm_bias = nn.Parameter(torch.zeros(sets, inner)) if inner_norm else None
        self.out_proj = GroupedLinear(parts, inner, (width,), shared=shared)
        init_conv(self.conv_weight, self.conv_bias)
        init_dt_bias(self.dt_bias)

    @property
    def inner_total(self) -> int:
        """Channels that the scan runs over, of all parts."""
        return self.parts * self.inner

    def _all(self, parameter: Tensor) -> Tensor:
        """A parameter of (sets, n, ...) as one of (parts * n, ...): repeated when it is shared."""
        return parameter.expand(self.parts, *parameter.shape[1:]).flatten(0, 1)

    def _convolve(self, streams: tuple[Tensor, ...], before: Tensor | None, halo: int) -> tuple[Tensor, ...]:
        """SiLU(Conv) of x, B, C but for their first `halo` tokens; `before` holds the d_conv - 1 tokens before them."""
        sizes = (self.inner, self.state_size, self.state_size)
        weights, biases = self.conv_weight.split(sizes, dim=1), self.conv_bias.split(sizes, dim=1)
        skipped = halo
        if before is not None:
            skipped += before.shape[1]
            earlier = before.split([stream.shape[-1] for stream in streams], dim=-1)
            streams = tuple(torch.cat(pair, dim=1) for pair in zip(earlier, streams, strict=True))
        # three calls, not one on a joined tensor: neither the results nor their gradients need to be joined
        return tuple(
            ops.causal_conv1d(stream, self._all(weight), self._all(bias), activation="silu")[:, skipped:]
            for stream, weight, bias in zip(streams, weights, biases, strict=True)
        )

    def _last_tokens(self, streams: tuple[Tensor, ...], before: Tensor | None) -> Tensor:
        """The last d_conv - 1 tokens of x, B and C before the convolution; zeros before the first token."""
        count = self.d_conv - 1
        length = streams[0].shape[1]
        last = torch.cat([stream[:, max(length - count, 0) :] for stream in streams], dim=-1)
        missing = count - last.shape[1]
        if missing == 0:
            return last
        if before is None:
            return functional.pad(last, (0, 0, missing, 0))
        return torch.cat((before[:, count - missing :], last), dim=1)

    def _check_carry(self, w: Tensor, before: Tensor | None) -> None:
        width = self.parts * (self.inner + 2 * self.state_size)
        expected = (w.shape[0], self.d_conv - 1, width)
        if before is not None and tuple(before.shape) != expected:
            raise InputError(
                f"the carry's tokens have shape {tuple(before.shape)}, expected {expected} = (B, d_conv - 1, parts * "
                "(E + 2N)); hand on the carry that this module returned for the tokens before"
            )

    def forward(
        self,
        w: Tensor,
        carry: Carry | Tensor | None = None,
        *,
        halo: int = 0,
        return_carry: bool = False,
        return_state: bool = False,
    ) -> Tensor | tuple[Tensor, Carry] | tuple[Tensor, Tensor]:
        """Run the module on w (B, halo + L, C); with `return_carry` return (out, carry) for the tokens that follow.

        `carry` is what the tokens before w left: the last d_conv - 1 tokens of x, B and C before the convolution
        (B, d_conv - 1, parts * (E + 2N), all parts' x, then B, then C), and the states (B, parts * H, P, N). A sequence
        cut into pieces with the carry handed on gives what the whole gives.

        Or the pieces overlap, as `VSS` takes them: the first `halo` tokens of w lie before the piece, only the
        convolution sees them, and `carry` is the states alone, which `return_state` gives. With halo = d_conv - 1 this
        is the same result without tokens of the inner width to keep.
        """
        before, state = carry if isinstance(carry, tuple) else (None, carry)
        self._check_carry(w, before)
        z, *streams, delta = self.in_proj(w)  # x, B, C: (B, L, parts * E), twice (B, L, parts * N)
        z, delta = z[:, halo:], delta[:, halo:]
        x, B, C = self._convolve(tuple(streams), before, halo)
        gate = z if self.norm_weight is None else None
        y, state = ops.ssd_scan_with_state(
            x.unflatten(-1, (-1, self.head_dim)),
            delta,
            decay_rates(self._all(self.A_log)),
            B.unflatten(-1, (self.parts, self.state_size)),
            C.unflatten(-1, (self.parts, self.state_size)),
            d_skip=self._all(self.d_skip),
            z=None if gate is None else gate.unflatten(-1, (-1, self.head_dim)),
            delta_bias=self._all(self.dt_bias),
            delta_softplus=True,
            initial_state=state,
        )
        y = y.flatten(2)
        if self.norm_weight is not None and self.norm_bias is not None:
            y = ops.gated_norm(y, z, self._all(self.norm_weight), self._all(self.norm_bias), parts=self.parts)
        (out,) = self.out_proj(y)
        if return_carry:
            return out, (self._last_tokens(tuple(streams), before), state)
        return (out, state) if return_state else out
