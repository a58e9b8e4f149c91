"""Multiply-adds, exponentials and activation memory of a forward pass, on PyTorch's `meta` device: nothing is computed.

Operations are counted operator by operator (per image voxel or token, unless said otherwise):

- A **multiply-add** is one product and the addition of its result: of matmuls, convolutions (kernel positions outside
  of the image included, as is usual), attention and linear interpolation (one per output and axis).
- The **scan** has per token, channel and state one exponential and 3 multiply-adds: the update of the state and the
  sum over states are one each; the two lone products dt A and (dt u) B count half each. `d_skip` adds one per token
  and channel. Softplus and the gate's SiLU add one exponential per token and channel each.
- The **scan of Mamba-2** is counted by the same rule. What belongs to a head is computed once for its channels and
  states: per token and head one exponential, half a multiply-add (dt A) and softplus's exponential, per token, channel
  and state 2.5 multiply-adds. More than 16 states run in blocks of 16, each of which computes the former again.
- SPM's matmuls have one matrix per part and no zeros, but for fewer than 64 tokens, where `ops.linear` runs one matmul
  with a block-diagonal matrix; what runs is counted.
- **Exponentials** are those of the scan and one for each element that passes SiLU, sigmoid, softplus, softmax, tanh,
  GELU or exp. Logarithms, roots and divisions are not counted.
- **Not counted**: lone additions, element-wise products, normalisations, poolings, comparisons. `other_elements`, what
  all these operators write, shows their share.
- What depends on weights alone, such as A = -exp(A_log), is no work of an image and is not counted.

Two figures of memory, both without the network's weights:

- **inference**: the peak of the bytes of all tensors alive at once in one forward pass without gradients, the image
  and the logits included. A kernel's private scratch memory is not seen.
- **training**: the bytes that autograd keeps for the backward pass after one forward pass of a batch of one, each
  storage once, weights left out. The optimiser's state, the gradients and the backward pass's own temporaries come on
  top; all but the last depend on the number of parameters alone.

The fused layers of the CPU keep and need less; `lightm bench` measures what they need.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from lightm import ops  # noqa: F401  (registers the operators)
from lightm.errors import InputError, LightMError
from lightm.nets.execution import observed
from lightm.nets.presets import create, names

SCAN, ATTENTION = "scan", "attention"
_aten = torch.ops.aten


def known_names() -> list[str]:
    """Every name that `lightm.nets.create` knows, sorted."""
    return sorted(names())


def build_network(
    name: str,
    in_channels: int,
    out_channels: int,
    spatial: Sequence[int],
    options: Mapping[str, Any] | None = None,
    *,
    device: str = "meta",
) -> nn.Module:
    """Build a network by name, in 2D or 3D after the number of sizes in `spatial`, on the `meta` device or the CPU.

    The global random generator is left as it was. Raises InputError as `create` does, and for sizes that are none.
    """
    check_spatial(spatial)
    extra = {"image_size": tuple(spatial), **(options or {})}
    with torch.random.fork_rng(devices=[]):
        try:
            with torch.device(device):
                return create(name, len(spatial), in_channels, out_channels, **extra)
        except (RuntimeError, NotImplementedError):  # a network that computes numbers while it is built
            return create(name, len(spatial), in_channels, out_channels, **extra).to(device)


def check_spatial(spatial: Sequence[int]) -> None:
    """Raise InputError unless `spatial` is two or three positive sizes."""
    if len(spatial) not in (2, 3) or min(spatial, default=0) < 1:
        raise InputError(
            f"spatial size {' '.join(map(str, spatial)) or '(empty)'}: give two sizes (Y X) for a 2D network or three "
            "(Z Y X) for a 3D one, each at least 1, e.g. 128 128 128"
        )


@contextmanager
def meta_forward(in_channels: int, spatial: Sequence[int]) -> Iterator[Tensor]:
    """Yield an image on `meta` to call a network with inside of the block; sizes that it refuses become InputError."""
    with torch.device("meta"):
        try:
            yield torch.empty(1, in_channels, *spatial)
        except (ValueError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "size" not in str(error):
                raise
            raise InputError(f"spatial size {' '.join(map(str, spatial))}: {' '.join(str(error).split())}") from error


# Operations -----------------------------------------------------------------------------------------------------------


@dataclass
class OperationCount:
    """Operations of one layer or of a network, by kind."""

    multiply_adds: Counter[str] = field(default_factory=Counter)
    exponentials: Counter[str] = field(default_factory=Counter)
    other_elements: int = 0

    def add(self, other: OperationCount) -> None:
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

    layers: dict[str, OperationCount]

    @property
    def total(self) -> OperationCount:
        return self.below("")

    def below(self, path: str) -> OperationCount:
        """Return the operations of a module and of all modules inside it; of the whole network for ""."""
        sums = OperationCount()
        for name, count in self.layers.items():
            if not path or f"{name}.".startswith(f"{path}."):
                sums.add(count)
        return sums


def count_operations(network: nn.Module, in_channels: int, spatial: Sequence[int]) -> Operations:
    """Count the operations of the forward pass of one image.

    Arguments: `network` on the `meta` device, see `build_network`; `spatial` the sizes of the image.
    Raises InputError for sizes that the network refuses, LightMError for an operator without a rule.
    """
    with meta_forward(in_channels, spatial) as image, torch.no_grad():
        counter = _Counter(network)
        with counter, observed():
            network(image)
    return Operations(counter.layers)


class _Counter(TorchDispatchMode):
    """Adds every operator that runs to the count of the module that called it."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.layers: dict[str, OperationCount] = {}
        self._names = {module: name for name, module in network.named_modules()}
        self._stack: list[nn.Module] = [network]
        self._handles: list[Any] = []
        # storages that depend on weights alone, with a tensor of each, so that no address is used twice
        self._fixed = _weights(network)

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
        given, made = _tensors((args, kwargs)), _tensors(result)
        if all(_storage(x) in self._fixed for x in given):
            self._fixed |= {_storage(x): x for x in made}
            return result
        for x in made:
            self._fixed.pop(_storage(x), None)
        count = self.layers.setdefault(self._names[self._stack[-1]], OperationCount())
        packet = func.overloadpacket
        if (rule := _PRODUCTS.get(packet)) is not None:
            kind, number = rule(args, result)
            count.multiply_adds[kind] += number
            if kind == ATTENTION:
                count.exponentials["activation"] += prod(args[0].shape[:-1]) * args[1].shape[-2]
        elif (own := _OWN.get(func.name())) is not None:
            own(count, args, result)
        elif packet in _EXPONENTIALS:
            count.exponentials["activation"] += result.numel()
        elif func.namespace == "lightm" or packet in flop_registry:
            raise LightMError(
                f"operator {func.name()} has no rule for its operations; add one to lightm.lab.complexity.operations"
            )
        elif not _is_view(func):
            count.other_elements += sum(x.numel() for x in made)
        return result


def _storage(x: Tensor) -> int:
    return int(x.untyped_storage()._cdata)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _weights(network: nn.Module) -> dict[int, Tensor]:
    return {_storage(x): x for x in (*network.parameters(), *network.buffers())}


def _is_view(func: Any) -> bool:
    """Whether an operator only looks at memory that exists, or only asks for some."""
    views = any(value.alias_info is not None and not value.alias_info.is_write for value in func._schema.returns)
    return views or func.overloadpacket in (_aten.empty, _aten.new_empty, _aten.empty_strided, _aten.empty_like)


def _mm(args: Any, result: Tensor) -> tuple[str, int]:
    return "matmul", result.numel() * args[0].shape[-1]


def _second(args: Any, result: Tensor) -> tuple[str, int]:
    """Of `addmm`, and of `linear`, whose weight may be one matrix per part."""
    return "matmul", result.numel() * args[1].shape[-1]


def _convolution(args: Any, result: Tensor) -> tuple[str, int]:
    image, weight, groups = args[0], args[1], args[8]
    transposed = args[6]
    places = prod((image if transposed else result).shape[2:]) * image.shape[0]
    depthwise = groups > 1 and groups == image.shape[1]
    return "depthwise convolution" if depthwise else "convolution", places * weight.numel()


def _attention(args: Any, result: Any) -> tuple[str, int]:
    query, key, value = args[:3]
    pairs = prod(query.shape[:-1]) * key.shape[-2]
    return ATTENTION, pairs * (query.shape[-1] + value.shape[-1])


def _upsample(args: Any, result: Tensor) -> tuple[str, int]:
    return "interpolation", result.numel() * (result.dim() - 2)


_PRODUCTS: dict[Any, Callable[[Any, Any], tuple[str, int]]] = {
    torch.ops.lightm.linear: _second,
    torch.ops.lightm.upsample_linear2: _upsample,
    _aten.mm: _mm,
    _aten.bmm: _mm,
    _aten.addmm: _second,
    _aten.baddbmm: _second,
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
    for name in (
        *("exp", "exp_", "exp2", "expm1", "sigmoid", "sigmoid_", "silu", "silu_", "softplus", "gelu", "tanh", "tanh_"),
        *("_softmax", "_safe_softmax", "_log_softmax", "elu", "elu_", "erf"),
    )
}


def _scan(count: OperationCount, args: Any, result: Any) -> None:
    u, _, rates, _, _, d_skip, gate, _, softplus = args[:9]
    tokens, states = u.numel(), rates.shape[1]
    count.multiply_adds[SCAN] += tokens * (3 * states + (d_skip is not None))
    count.exponentials[SCAN] += tokens * states
    count.exponentials["activation"] += tokens * (bool(softplus) + (gate is not None))


def _ssd(count: OperationCount, args: Any, result: Any) -> None:
    u, delta, _, groups, _, d_skip, gate, _, softplus = args[:9]
    halves = 5 * u.numel() * groups.shape[-1] + delta.numel()
    count.multiply_adds[SCAN] += halves // 2 + u.numel() * (d_skip is not None)
    count.exponentials[SCAN] += delta.numel()
    count.exponentials["activation"] += delta.numel() * bool(softplus) + u.numel() * (gate is not None)


def _causal_conv1d(count: OperationCount, args: Any, result: Tensor) -> None:
    count.multiply_adds["causal convolution"] += result.numel() * args[1].shape[1]
    count.exponentials["activation"] += result.numel() * bool(args[3])


def _depthwise(count: OperationCount, args: Any, result: Tensor) -> None:
    count.multiply_adds["depthwise convolution"] += result.numel() * prod(args[1].shape[:-1])


def _gated_norm(count: OperationCount, args: Any, result: Tensor) -> None:
    count.exponentials["activation"] += result.numel()
    count.other_elements += result.numel()


def _elements(count: OperationCount, args: Any, result: Any) -> None:
    count.other_elements += (result if isinstance(result, Tensor) else result[0]).numel()


_OWN: dict[str, Callable[[OperationCount, Any, Any], None]] = {
    "lightm::selective_scan": _scan,
    "lightm::ssd_scan": _ssd,
    "lightm::causal_conv1d": _causal_conv1d,
    "lightm::depthwise_conv": _depthwise,
    "lightm::gated_norm": _gated_norm,
    "lightm::group_norm_relu": _elements,
    "lightm::pool2": _elements,
}


# Activation memory ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Memory:
    """Bytes of activations of one image in float32."""

    inference_bytes: int
    training_bytes: int


def activation_memory(network: nn.Module, in_channels: int, spatial: Sequence[int]) -> Memory:
    """Return the activation memory of a network on the `meta` device; InputError for sizes that it refuses."""
    return Memory(_inference_peak(network, in_channels, spatial), _saved_for_backward(network, in_channels, spatial))


class _Live(TorchDispatchMode):
    """Follows the storages of all tensors that operators make, from their birth to their end."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.live = self.peak = 0

    def see(self, tensor: Tensor) -> None:
        storage, key = tensor.untyped_storage(), _storage(tensor)
        if key not in self.sizes:
            self.sizes[key] = storage.nbytes()
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._gone, key).atexit = False

    def _gone(self, key: int) -> None:
        self.live -= self.sizes.pop(key, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            self.see(tensor)
        return result


def _inference_peak(network: nn.Module, in_channels: int, spatial: Sequence[int]) -> int:
    live = _Live()
    live.sizes = dict.fromkeys(_weights(network), 0)  # known beforehand, so that views of them count nothing
    with meta_forward(in_channels, spatial) as image, torch.no_grad(), live:
        live.see(image)
        network(image)
    return live.peak


def _saved_for_backward(network: nn.Module, in_channels: int, spatial: Sequence[int]) -> int:
    weights = _weights(network)
    kept: dict[int, Tensor] = {}  # the tensors, so that no address is used twice

    def keep(tensor: Tensor) -> Tensor:
        if _storage(tensor) not in weights:
            kept.setdefault(_storage(tensor), tensor)
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with meta_forward(in_channels, spatial) as image, torch.enable_grad(), hooks:
        logits = network(image)
        total = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
        del logits
    return total
