"""Multiply-adds and exponentials of a forward pass, counted operator by operator, the scan included.

What is counted (per image voxel or token, unless said otherwise):

- A **multiply-add** is one product and the addition of its result: of matrix products, convolutions (taps that fall
  outside of the image included, as is usual), attention and linear interpolation (one an output and axis).
- The **scan** has per token, channel and state one exponential and 3 multiply-adds: the update of the state and the
  sum over states are one each; the two lone products dt A and (dt u) B count half each. `d_skip` adds one per token
  and channel. Softplus and the gate's SiLU add one exponential per token and channel each.
- The **scan of Mamba-2** is counted by the same rule. What belongs to a head is computed once for its channels and
  states: per token and head one exponential, half a multiply-add (dt A) and softplus's exponential, per token, channel
  and state 2.5 multiply-adds. More than 16 states run in blocks of 16, each of which computes the former again.
- SPM's products have one matrix a part and no zeros, but for fewer than 64 tokens, where `ops.linear` runs one product
  with a block-diagonal matrix; what runs is counted.
- **Exponentials** are those of the scan and one for each element that passes SiLU, sigmoid, softplus, softmax, tanh,
  GELU or exp. Logarithms, roots and divisions are not counted.
- **Not counted**: additions alone, products element by element, normalisations, poolings, comparisons. The elements
  that all these operators write are given as `other_elements`, so that their share can be judged.
- What depends on weights alone, such as A = -exp(A_log), is no work of an image and is not counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightm import ops  # noqa: F401  (registers the operators)
from lightm.errors import LightMError
from lightm.lab.complexity.shapes import meta_forward
from lightm.nets.execution import observed

SCAN, ATTENTION = "scan", "attention"
_aten = torch.ops.aten


@dataclass
class Tally:
    """Operations of one layer or of a network, by kind."""

    multiply_adds: Counter[str] = field(default_factory=Counter)
    exponentials: Counter[str] = field(default_factory=Counter)
    other_elements: int = 0

    def add(self, other: Tally) -> None:
        self.multiply_adds += other.multiply_adds
        self.exponentials += other.exponentials
        self.other_elements += other.other_elements

    @property
    def without_scan(self) -> int:
        """Multiply-adds as counters give them that have no rule for the scan."""
        return self.multiply_adds.total() - self.multiply_adds[SCAN]


@dataclass(frozen=True)
class Operations:
    """Operations of one forward pass, for every module that runs operators itself, in the order of first use."""

    spatial: tuple[int, ...]
    layers: dict[str, Tally]

    @property
    def total(self) -> Tally:
        return self.below("")

    def below(self, path: str) -> Tally:
        """Return the operations of a module and of all modules inside it; of the whole network for ""."""
        sums = Tally()
        for name, tally in self.layers.items():
            if not path or name == path or name.startswith(f"{path}."):
                sums.add(tally)
        return sums


def count_operations(network: nn.Module, in_channels: int, spatial: Sequence[int]) -> Operations:
    """Count the operations of the forward pass of one image, on the `meta` device: nothing is computed.

    Arguments: `network` on the `meta` device, see `build_network`; `spatial` the sizes of the image.
    Raises InputError for sizes that the network refuses, LightMError for an operator without a rule.
    """
    with meta_forward(network, in_channels, spatial) as image, torch.no_grad():
        counter = _Counter(network)
        with counter, observed():
            network(image)
    return Operations(tuple(spatial), counter.layers)


class _Counter(TorchDispatchMode):
    """Adds every operator that runs to the tally of the module that called it."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.layers: dict[str, Tally] = {}
        self._names = {module: name for name, module in network.named_modules()}
        self._stack: list[nn.Module] = [network]
        self._handles: list[Any] = []
        # storages that depend on weights alone, with a tensor of each, so that no address is used twice
        self._fixed: dict[int, Tensor] = {_storage(x): x for x in (*network.parameters(), *network.buffers())}

    def __enter__(self) -> _Counter:
        for module in self._names:
            self._handles.append(module.register_forward_pre_hook(lambda m, _: self._stack.append(m)))
            self._handles.append(module.register_forward_hook(self._leave, always_call=True))
        super().__enter__()
        return self

    def __exit__(self, *details: Any) -> None:
        super().__exit__(*details)
        for handle in self._handles:
            handle.remove()

    def _leave(self, *_: Any) -> None:
        self._stack.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given, made = ([x for x in tree_leaves(y) if isinstance(x, Tensor)] for y in ((args, kwargs), result))
        if all(_storage(x) in self._fixed for x in given):
            self._fixed |= {_storage(x): x for x in made}
            return result
        for x in made:
            self._fixed.pop(_storage(x), None)
        tally = self.layers.setdefault(self._names[self._stack[-1]], Tally())
        packet = func.overloadpacket
        if (rule := _PRODUCTS.get(packet)) is not None:
            kind, number = rule(args, result)
            tally.multiply_adds[kind] += number
            if kind == ATTENTION:
                tally.exponentials["activation"] += prod(args[0].shape[:-1]) * args[1].shape[-2]
        elif (own := _OWN.get(func.name())) is not None:
            own(tally, args, result)
        elif packet in _EXPONENTIALS:
            tally.exponentials["activation"] += result.numel()
        elif func.namespace == "lightm" or _has_products(packet):
            raise LightMError(
                f"operator {func.name()} has no rule for its operations; add one to lightm.lab.complexity.operations"
            )
        elif not _is_view(func):
            tally.other_elements += sum(x.numel() for x in made)
        return result


def _storage(x: Tensor) -> int:
    return int(x.untyped_storage()._cdata)


def _is_view(func: Any) -> bool:
    """Whether an operator only looks at memory that exists, or only asks for some."""
    views = any(value.alias_info is not None and not value.alias_info.is_write for value in func._schema.returns)
    return views or func.overloadpacket in (_aten.empty, _aten.new_empty, _aten.empty_strided, _aten.empty_like)


def _has_products(packet: Any) -> bool:
    from torch.utils.flop_counter import flop_registry

    return packet in flop_registry


def _numel(result: Any) -> int:
    return int((result if isinstance(result, Tensor) else result[0]).numel())


def _mm(args: Any, result: Tensor) -> tuple[str, int]:
    return "matrix product", result.numel() * args[0].shape[-1]


def _addmm(args: Any, result: Tensor) -> tuple[str, int]:
    return "matrix product", result.numel() * args[1].shape[-1]


def _convolution(args: Any, result: Tensor) -> tuple[str, int]:
    image, weight, groups = args[0], args[1], args[8]
    transposed = args[6]
    places = prod((image if transposed else result).shape[2:]) * image.shape[0]
    depthwise = groups > 1 and groups == image.shape[1]
    return "depthwise convolution" if depthwise else "convolution", places * weight.numel()


def _linear(args: Any, result: Tensor) -> tuple[str, int]:
    return "matrix product", result.numel() * args[1].shape[-1]  # the weight may be one matrix a part


def _attention(args: Any, result: Any) -> tuple[str, int]:
    query, key, value = args[:3]
    pairs = prod(query.shape[:-1]) * key.shape[-2]
    return ATTENTION, pairs * (query.shape[-1] + value.shape[-1])


def _upsample(args: Any, result: Tensor) -> tuple[str, int]:
    return "interpolation", result.numel() * (result.dim() - 2)


_PRODUCTS: dict[Any, Callable[[Any, Any], tuple[str, int]]] = {
    torch.ops.lightm.linear: _linear,
    _aten.mm: _mm,
    _aten.bmm: _mm,
    _aten.addmm: _addmm,
    _aten.baddbmm: _addmm,
    _aten.convolution: _convolution,
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    _aten._scaled_dot_product_flash_attention: _attention,
    _aten._scaled_dot_product_efficient_attention: _attention,
    _aten.upsample_linear1d: _upsample,
    _aten.upsample_bilinear2d: _upsample,
    _aten.upsample_trilinear3d: _upsample,
}

_EXPONENTIALS = {
    getattr(_aten, name)
    for name in [
        "exp",
        "exp_",
        "exp2",
        "expm1",
        "sigmoid",
        "sigmoid_",
        "silu",
        "silu_",
        "softplus",
        "gelu",
        "tanh",
        "tanh_",
        "_softmax",
        "_safe_softmax",
        "_log_softmax",
        "elu",
        "elu_",
        "erf",
    ]
}


def _scan(tally: Tally, args: Any, result: Any) -> None:
    u, _, rates, _, _, d_skip, gate, _, softplus = args[:9]
    tokens, states = u.numel(), rates.shape[1]
    tally.multiply_adds[SCAN] += tokens * (3 * states + (d_skip is not None))
    tally.exponentials[SCAN] += tokens * states
    tally.exponentials["activation"] += tokens * (bool(softplus) + (gate is not None))


def _ssd(tally: Tally, args: Any, result: Any) -> None:
    u, delta, _, groups, _, d_skip, gate, _, softplus = args[:9]
    halves = 5 * u.numel() * groups.shape[-1] + delta.numel()
    tally.multiply_adds[SCAN] += halves // 2 + u.numel() * (d_skip is not None)
    tally.exponentials[SCAN] += delta.numel()
    tally.exponentials["activation"] += delta.numel() * bool(softplus) + u.numel() * (gate is not None)


def _causal_conv1d(tally: Tally, args: Any, result: Tensor) -> None:
    tally.multiply_adds["causal convolution"] += result.numel() * args[1].shape[1]
    tally.exponentials["activation"] += result.numel() * bool(args[3])


def _depthwise(tally: Tally, args: Any, result: Tensor) -> None:
    tally.multiply_adds["depthwise convolution"] += result.numel() * prod(args[1].shape[:-1])


def _interpolate(tally: Tally, args: Any, result: Tensor) -> None:
    tally.multiply_adds["interpolation"] += result.numel() * (result.dim() - 2)


def _gated_norm(tally: Tally, args: Any, result: Tensor) -> None:
    tally.exponentials["activation"] += result.numel()
    tally.other_elements += result.numel()


def _elements(tally: Tally, args: Any, result: Any) -> None:
    tally.other_elements += _numel(result)


_OWN: dict[str, Callable[[Tally, Any, Any], None]] = {
    "lightm::selective_scan": _scan,
    "lightm::ssd_scan": _ssd,
    "lightm::causal_conv1d": _causal_conv1d,
    "lightm::depthwise_conv": _depthwise,
    "lightm::upsample_linear2": _interpolate,
    "lightm::gated_norm": _gated_norm,
    "lightm::group_norm_relu": _elements,
    "lightm::pool2": _elements,
}
