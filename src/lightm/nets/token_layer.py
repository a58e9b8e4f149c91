"""What RVM and SPM share: how a layer runs over its tokens, with little memory, with and without gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightm import ops
from lightm.nets.execution import autocast_state, checkpointed, intact, is_plain, linear, should_checkpoint
from lightm.ops.layer import SCANS, LayerParameters, layer_runs_fused, state_space_layer
from lightm.ops.memory import release_unused

POOLINGS = ("max", "avg", "add")
_CHUNK = 1 << 20  # numbers of inner width that a chunk of recomputed tokens has, about


def pool(x: Tensor, pooling: str | None) -> Tensor:
    """Pool (B, *S, C) by 2: "max", "avg", "add" (the sum of both, the report's Figure 6), or None for no pooling."""
    if pooling is None:
        return x
    if pooling == "max":
        return ops.max_pool2(x)
    average = ops.avg_pool2(x)
    return average if pooling == "avg" else ops.max_pool2(x) + average


class TokenLayer(nn.Module):
    """out = Linear(LayerNorm(VSS(LayerNorm(M)) + s * residual)): the frame of RVM and SPM.

    A subclass gives the VSS and says whether the residual is M or LayerNorm(M). (B, *S, C) -> (B, *S, C_out), or
    (B, *S/2, C_out) when pooled.

    Three ways to run, the same result up to rounding:
    - without gradients, `ops.state_space_layer` where it can (Mamba-1 in float32 on the CPU), else chunks of tokens
      one after the other with the state handed on: nothing of the inner width is ever whole in memory;
    - with gradients and `checkpointing` (None: for large inputs), the same chunks: saved are the layer's input and the
      states between them, the rest is computed again in the backward pass;
    - otherwise, and wherever a module inside is not `intact`, operator by operator on all tokens. Everything is saved
      for the backward pass unless `checkpointing`; scans other than "raster" are then computed again from the input.
    """

    def __init__(
        self,
        vss: Any,
        channels: int,
        out_channels: int,
        *,
        of_norm: bool,
        vector_scale: bool = True,
        one_norm: bool = False,
        scan: str = "raster",
    ) -> None:
        super().__init__()
        if scan not in SCANS:
            raise ValueError(f"scan '{scan}': one of {', '.join(SCANS)}")
        self.norm_in = nn.LayerNorm(channels)
        self.vss: Any = vss
        self.skip_scale = nn.Parameter(torch.ones(channels if vector_scale else 1))
        self.norm_out = None if one_norm else nn.LayerNorm(channels)
        self.proj = nn.Linear(channels, out_channels)
        self.of_norm, self.scan = of_norm, scan
        self.checkpointing: bool | None = None

    def forward(self, x: Tensor, pooling: str | None = None) -> Tensor:
        whole = not intact(*self._modules.values())  # modules that must be called, once, with all tokens
        wanted = torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in self.parameters()))
        if not whole and not wanted:
            parameters = self.layer_parameters()
            if parameters is not None and layer_runs_fused(x, parameters):
                return state_space_layer(x, parameters, self.scan, pooling)[0]
            if self.scan == "raster" and is_plain(x):
                return _in_chunks(self, x, _chunks(x, self.vss.inner_total, pooling), pooling)[0]
        inner = getattr(self.vss, "inner_total", x.shape[-1])
        again = should_checkpoint(self.checkpointing, x[..., 0].numel() * inner)
        if again and not whole and torch.is_grad_enabled() and self.scan == "raster" and is_plain(x):
            return _CheckpointedLayer.apply(self, pooling, x, *self.parameters())
        return checkpointed(lambda x: self._plain(x, pooling), self.parameters(), again, x)

    def _plain(self, x: Tensor, pooling: str | None) -> Tensor:
        tokens = self._tokens(x.flatten(1, -2), tuple(x.shape[1:-1]))[0]
        return pool(tokens.unflatten(1, x.shape[1:-1]), pooling)

    def layer_parameters(self) -> LayerParameters | None:
        """The layer's tensors for `ops.state_space_layer`; None if its VSS is of another kind."""
        tensors = getattr(self.vss, "layer_tensors", None)
        if tensors is None:
            return None
        norm_out = self.norm_in if self.norm_out is None else self.norm_out
        return LayerParameters(
            norm=(self.norm_in.weight, self.norm_in.bias, self.norm_in.eps),
            scale=self.skip_scale,
            of_norm=self.of_norm,
            out_norm=(norm_out.weight, norm_out.bias, norm_out.eps),
            projection=self.proj.weight,
            projection_bias=self.proj.bias,
            **tensors(),
        )

    def _tokens(
        self, tokens: Tensor, sizes: tuple[int, ...], state: Tensor | None = None, halo: int = 0, keep: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """The layer on (B, halo + L, C) with plain operators: (B, L, C_out) and, with `keep`, the last state.

        The first `halo` tokens lie before the chunk: the causal convolution looks at them, the scan has passed them.
        """
        normed = self.norm_in(tokens)
        end: Tensor | None = None
        if self.scan != "raster":
            mixed = sum_of_orders(self.vss, normed, sizes, self.scan)
        elif keep:
            mixed, end = self.vss(normed, state, halo=halo, return_state=True)
        else:
            mixed = self.vss(normed)
        residual = (normed if self.of_norm else tokens)[:, halo:]
        norm_out = self.norm_in if self.norm_out is None else self.norm_out
        mixed = torch.addcmul(mixed, residual, self.skip_scale)
        return linear(self.proj, norm_out(mixed)), end


def sum_of_orders(vss: Callable[[Tensor], Tensor], tokens: Tensor, sizes: tuple[int, ...], scan: str) -> Tensor:
    """The sum of vss(tokens) over the orders of `scan`, tokens (B, L, C) of an image of `sizes` in raster order."""
    total = vss(tokens)
    if scan == "bidirectional":
        return total + vss(tokens.flip(1)).flip(1)
    image = tokens.unflatten(1, sizes)
    for axis in range(len(sizes), 1, -1):
        # the axis before the last, then the one before that, runs fastest; the others keep their order
        moved = image.movedim(axis - 1, -2)
        total = total + vss(moved.flatten(1, -2)).unflatten(1, moved.shape[1:-1]).movedim(-2, axis - 1).flatten(1, -2)
    return total


def _chunks(x: Tensor, inner: int, pooling: str | None) -> list[tuple[int, int]]:
    """(first, last + 1) rows of the first spatial axis that are recomputed together."""
    height = x.shape[1]
    plane = max(1, x[0, 0, ..., 0].numel())
    rows = max(1, _CHUNK // (inner * plane))
    if pooling is not None:
        rows = max(2, rows - rows % 2)
    return [(first, min(first + rows, height)) for first in range(0, height, rows)]


class _CheckpointedLayer(torch.autograd.Function):
    """The layer with its input and the states between chunks saved, and the rest computed again."""

    @staticmethod
    def forward(ctx: Any, layer: TokenLayer, pooling: str | None, x: Tensor, *weights: Tensor) -> Tensor:
        x = x.contiguous()
        chunks = _chunks(x, layer.vss.inner_total, pooling)
        parameters = layer.layer_parameters()
        rows = chunks[0][1]
        with torch.no_grad():
            if parameters is not None and layer_runs_fused(x, parameters):
                out, states = state_space_layer(x, parameters, "raster", pooling, keep_states=rows)
                ctx.states = [None, *(states[1:] if states is not None else ())]
            else:
                out, ctx.states = _in_chunks(layer, x, chunks, pooling)
        release_unused()
        ctx.layer, ctx.pooling, ctx.chunks = layer, pooling, chunks
        ctx.autocast = autocast_state(x)
        ctx.save_for_backward(x, *weights)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        layer, pooling = ctx.layer, ctx.pooling
        wanted = [weight for weight in weights if weight.requires_grad]
        totals = [torch.zeros_like(weight) for weight in wanted]
        dx = torch.zeros_like(x)
        plane = x[0, 0, ..., 0].numel()
        dtokens = dx.view(x.shape[0], -1, x.shape[-1])
        grad_state: Tensor | None = None
        for (first, last), state in zip(reversed(ctx.chunks), reversed(ctx.states), strict=True):
            halo = _halo(layer, first * plane)
            with torch.enable_grad(), torch.autocast(*ctx.autocast):
                start = None if state is None else state.detach().requires_grad_()
                part = x.view(dtokens.shape)[:, first * plane - halo : last * plane].detach().requires_grad_()
                out, end = _of_tokens(layer, part, (last - first, *x.shape[2:-1]), start, halo, pooling)
            step = 1 if pooling is None else 2
            outputs, grads = [out], [grad[:, first // step : last // step]]
            if grad_state is not None:
                outputs.append(end)
                grads.append(grad_state)
            inputs = [part, *([] if start is None else [start]), *wanted]
            found = list(torch.autograd.grad(outputs, inputs, grads))
            dtokens[:, first * plane - halo : last * plane] += found.pop(0)
            grad_state = None if start is None else found.pop(0)
            for total, share in zip(totals, found, strict=True):
                total += share
        release_unused()
        shares = iter(totals)
        return None, None, dx, *(next(shares) if weight.requires_grad else None for weight in weights)


def _halo(layer: TokenLayer, first: int) -> int:
    """Tokens before the chunk that its causal convolution looks at."""
    return min(layer.vss.d_conv - 1, first)


def _in_chunks(
    layer: TokenLayer, x: Tensor, chunks: list[tuple[int, int]], pooling: str | None
) -> tuple[Tensor, list[Tensor | None]]:
    """The layer's result, one chunk after the other, and the states before each (None before the first)."""
    plane = x[0, 0, ..., 0].numel()
    tokens = x.flatten(1, -2)
    states: list[Tensor | None] = [None]
    parts = []
    for first, last in chunks:
        halo = _halo(layer, first * plane)
        part = tokens[:, first * plane - halo : last * plane]
        result, state = _of_tokens(layer, part, (last - first, *x.shape[2:-1]), states[-1], halo, pooling)
        parts.append(result)
        states.append(state)
    return torch.cat(parts, dim=1), states[:-1]


def _of_tokens(
    layer: TokenLayer, tokens: Tensor, sizes: tuple[int, ...], state: Tensor | None, halo: int, pooling: str | None
) -> tuple[Tensor, Tensor]:
    """The layer and the pooling on a chunk of rows, `sizes` without the halo, and the state after them."""
    out, end = layer._tokens(tokens, sizes, state, halo, keep=True)
    assert end is not None
    return pool(out.unflatten(1, sizes), pooling), end
