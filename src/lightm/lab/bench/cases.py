"""The cases: what is run, in which sizes, and what it needs at least.

A case is data (`Case`), so that another process can build the same one; `prepare` makes the tensors and the call.
Operators take tensors as the networks have them: channels last, E = 64 channels and N = 16 states in a scan, 32
channels in an image. Variants of an operator: `cpu`, the kernel of this project; `reference`, plain PyTorch; `conv3d`,
PyTorch's own depthwise convolution in its channels-last layout; `bare`, a scan loop without softplus, bias and skip
that writes into memory it already has: about as fast as a scan could be.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lightm.errors import InputError
from lightm.lab.bench.work import FLOAT, Work, count_steps

if TYPE_CHECKING:
    from torch import Tensor, nn

INNER, STATES, TAPS, CHANNELS = 64, 16, 4, 32
REFERENCE_TOKENS = 4096  # the reference scan's backward pass takes time that grows faster than its length
LAYER_WIDTHS = (32, 64)
OPERATORS = {
    "selective_scan": ("cpu", "reference"),
    "selective_scan_long": ("cpu", "bare"),
    "causal_conv1d": ("cpu", "reference"),
    "gated_norm": ("cpu", "reference"),
    "depthwise_conv": ("cpu", "reference", "conv3d"),
    "group_norm_relu": ("cpu", "reference"),
    "max_pool2": ("cpu", "reference"),
    "upsample_linear2": ("cpu", "reference"),
}
LAYERS = tuple(f"{kind}-{width}" for width in LAYER_WIDTHS for kind in ("rvm", "spm"))
FORWARD, BOTH, INFERENCE, TRAINING = "forward", "forward+backward", "inference", "training step"


@dataclass(frozen=True)
class Case:
    """What is measured: level (op, layer, network, scaling), name, variant of an operator, edge of the cube, mode."""

    level: str
    name: str
    size: int
    mode: str
    impl: str = ""

    @property
    def label(self) -> str:
        return " ".join(part for part in (self.name, self.impl, f"{self.size}^3", self.mode) if part)


@dataclass
class Prepared:
    """A case with its tensors: `call` is what is timed, `steps` what it needs at least."""

    call: Callable[[], object]
    shape: str
    count: Callable[[], list[Work]]
    parameters: int = 0


def prepare(case: Case) -> Prepared:
    """Build a case; the tensors are the same for every variant."""
    import torch

    torch.manual_seed(0)
    if case.level == "op":
        return _operator(case)
    if case.level == "layer":
        return _layer(case)
    return _network(case)


def warm_up(case: Case) -> None:
    """Load libraries and compile kernels on a small case of the same kind, so that a first call is like any other."""
    import torch

    from lightm.nets import PRESETS

    x = torch.randn(1, 4, 16, 16, 16, requires_grad=True)
    conv = torch.nn.Conv3d(4, 4, 3, padding=1)
    conv(x).square().mean().backward()
    (torch.randn(64, 64) @ torch.randn(64, 64)).sum().item()
    if case.level in ("op", "layer") or case.name in PRESETS:  # peers may not take a small size
        prepare(replace(case, size=min(case.size, 16))).call()


# Operators ----------------------------------------------------------------------------------------------------


def operator_work(name: str, size: int) -> tuple[Work, Work]:
    """(forward, backward) of an operator on its case of edge `size`, from the formulas in lightm/ops/README.md.

    Per token or voxel: bytes read and written once (group_norm_relu reads its input twice: the sums come first; the
    backward passes read what was kept and write the gradients), multiply-adds, exponentials. The adds of
    normalisations are not counted.
    """
    voxels = size**3
    tokens = scan_tokens(name, size)
    if name.startswith("selective_scan"):
        e, n, s = INNER, STATES, FLOAT
        forward = Work(s * (2 * e + 2 * n), s * e, 6 * e * n, e * n + e)
        backward = Work(s * (3 * e + 2 * n), s * (2 * e + 2 * n), 24 * e * n, e * n + 2 * e)
        if name == "selective_scan_long":  # also what the bare loop does: no softplus
            forward = Work(forward.read, forward.written, forward.flops, e * n)
        return _times(forward, tokens), _times(backward, tokens)
    c, e, s = CHANNELS, INNER, FLOAT
    each = {
        "causal_conv1d": (Work(s * e, s * e, 2 * TAPS * e, e), Work(s * 2 * e, s * e, 6 * TAPS * e, e)),
        "gated_norm": (Work(s * 2 * e, s * e, 0, e), Work(s * 3 * e, s * 2 * e, 0, e)),
        "depthwise_conv": (Work(s * c, s * c, 54 * c), Work(s * 2 * c, s * c, 108 * c)),
        "group_norm_relu": (Work(s * 2 * c, s * c), Work(s * 4 * c, s * c)),
        "max_pool2": (Work(s * c, s * c / 8), Work(s * c * 9 / 8, s * c)),
        "upsample_linear2": (Work(s * c, s * c * 8, 48 * c), Work(s * c * 8, s * c, 48 * c)),
    }
    forward, backward = each[name]
    return _times(forward, voxels), _times(backward, voxels)


def scan_tokens(name: str, size: int) -> int:
    """Tokens of an operator's case: those of the cube, fewer for the scan that the reference runs too."""
    return min(size**3, REFERENCE_TOKENS) if name == "selective_scan" else size**3


def _times(work: Work, count: int) -> Work:
    return Work(work.read * count, work.written * count, work.flops * count, work.exps * count)


def _operator(case: Case) -> Prepared:
    import torch

    name, impl, size = case.name, case.impl, case.size
    forward, backward = operator_work(name, size)
    steps = [forward, backward] if case.mode == BOTH else [forward]
    if impl == "bare":
        from lightm.lab.bench.kernels import BareScan

        scan = BareScan(scan_tokens(name, size), INNER)
        return Prepared(scan.run, f"1x{scan.tokens}x{INNER}, N={STATES}", lambda: steps)
    make, leaves, shape = _OPERATOR_CALLS[name](name, size, impl)
    if case.mode == FORWARD:

        def call() -> object:
            with torch.no_grad():
                return make()

        return Prepared(call, shape, lambda: steps)
    for leaf in leaves:
        leaf.requires_grad_()
    with torch.no_grad():
        weight = torch.ones_like(make())
    return Prepared(lambda: torch.autograd.grad(make(), leaves, weight), shape, lambda: steps)


_Made = tuple[Callable[[], "Tensor"], list["Tensor"], str]


def _scan_call(name: str, size: int, impl: str) -> _Made:
    import torch

    from lightm import ops

    tokens = scan_tokens(name, size)
    u, delta = torch.randn(1, tokens, INNER), torch.randn(1, tokens, INNER) - 3
    B, C = torch.randn(1, tokens, STATES), torch.randn(1, tokens, STATES)
    A = -torch.arange(1, STATES + 1, dtype=torch.float32).repeat(INNER, 1)
    skip, bias = torch.ones(INNER), torch.zeros(INNER)
    shape = f"1x{tokens}x{INNER}, N={STATES}"
    if name == "selective_scan_long":  # the same task as the bare loop's: steps already positive
        step = torch.rand(1, tokens, INNER) * 0.1
        return lambda: ops.selective_scan(u, step, A, B, C, impl=impl), [u, step, A, B, C], shape
    return (
        lambda: ops.selective_scan(
            u, delta, A, B, C, d_skip=skip, delta_bias=bias, delta_softplus=True, impl=impl
        ),
        [u, delta, A, B, C, skip, bias],
        shape,
    )  # fmt: skip


def _conv1d_call(name: str, size: int, impl: str) -> _Made:
    import torch

    from lightm import ops

    x, weight, bias = torch.randn(1, size**3, INNER), torch.randn(INNER, TAPS), torch.randn(INNER)
    leaves = [x, weight, bias]
    return lambda: ops.causal_conv1d(x, weight, bias, "silu", impl=impl), leaves, f"1x{size**3}x{INNER}, K={TAPS}"


def _gated_call(name: str, size: int, impl: str) -> _Made:
    import torch

    from lightm import ops

    y, z = torch.randn(1, size**3, INNER), torch.randn(1, size**3, INNER)
    weight, bias = torch.ones(INNER), torch.zeros(INNER)
    return lambda: ops.gated_norm(y, z, weight, bias, impl=impl), [y, z, weight, bias], f"1x{size**3}x{INNER}"


def _image_call(name: str, size: int, impl: str) -> _Made:
    import torch

    from lightm import ops

    x = torch.randn(1, size, size, size, CHANNELS)
    shape = f"1x{size}x{size}x{size}x{CHANNELS}"
    scale, shift = torch.ones(CHANNELS), torch.zeros(CHANNELS)
    taps = torch.randn(3, 3, 3, CHANNELS)
    if impl == "conv3d":
        first = x.movedim(-1, 1)
        kernel = taps.movedim(-1, 0).unsqueeze(1).contiguous()
        return lambda: torch.nn.functional.conv3d(first, kernel, padding=1, groups=CHANNELS), [first, kernel], shape
    if name == "depthwise_conv":
        return lambda: ops.depthwise_conv(x, taps, impl=impl), [x, taps], shape
    if name == "group_norm_relu":
        return lambda: ops.group_norm_relu(x, 8, scale, shift, impl=impl), [x, scale, shift], shape
    function = ops.max_pool2 if name == "max_pool2" else ops.upsample_linear2
    return lambda: function(x, impl=impl), [x], shape


_OPERATOR_CALLS: dict[str, Callable[[str, int, str], _Made]] = {
    "selective_scan": _scan_call,
    "selective_scan_long": _scan_call,
    "causal_conv1d": _conv1d_call,
    "gated_norm": _gated_call,
    "depthwise_conv": _image_call,
    "group_norm_relu": _image_call,
    "max_pool2": _image_call,
    "upsample_linear2": _image_call,
}


# Layers and networks ------------------------------------------------------------------------------------------


def _layer(case: Case) -> Prepared:
    import torch

    from lightm.nets import count_parameters
    from lightm.nets.blocks import RVM, SPM

    kind, width = case.name.split("-")
    channels, size = int(width), case.size
    layer = (RVM if kind == "rvm" else SPM)(channels, channels)
    x = torch.randn(1, size, size, size, channels)
    shape = f"1x{size}x{size}x{size}x{channels}"
    if case.mode == FORWARD:
        layer.eval()

        def forward() -> object:
            with torch.inference_mode():
                return layer(x)

        return Prepared(forward, shape, lambda: count_steps(layer, lambda: layer(x)), count_parameters(layer))
    x.requires_grad_()
    weight = torch.ones_like(x)
    leaves = [x, *layer.parameters()]
    return Prepared(
        lambda: torch.autograd.grad(layer(x), leaves, weight),
        shape,
        lambda: [step.with_backward() for step in count_steps(layer, lambda: layer(x))],
        count_parameters(layer),
    )


def _network(case: Case) -> Prepared:
    import torch
    from torch.nn import functional

    from lightm.lab.bench import peers
    from lightm.nets import count_parameters

    size = case.size
    network: nn.Module = peers.create(case.name, size)
    image = torch.randn(1, 1, size, size, size)
    shape = f"1x1x{size}x{size}x{size}"
    if case.mode == INFERENCE:
        network.eval()

        def infer() -> object:
            with torch.inference_mode():
                return network(image)

        steps = lambda: count_steps(network, lambda: network(image))  # noqa: E731
        return Prepared(infer, shape, steps, count_parameters(network))
    if case.mode != TRAINING:
        raise InputError(f"mode '{case.mode}': a network is measured in {INFERENCE} or {TRAINING}")
    network.train()
    labels = torch.randint(0, peers.CLASSES, (1, size, size, size))
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-4)

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)  # first, so that a step's gradients live as long as in any training
        loss = functional.cross_entropy(network(image), labels)
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return Prepared(
        step,
        shape,
        lambda: [work.with_backward() for work in count_steps(network, lambda: network(image))],
        count_parameters(network),
    )
