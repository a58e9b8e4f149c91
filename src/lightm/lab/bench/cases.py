"""The cases: what is run, in which sizes, and its minimum of work.

A case is data (`Case`), so that another process can build the same one; `prepare` makes the tensors and the call.
Operators take tensors as the networks have them: channels last, E = 64 channels and N = 16 states in a scan, 32
channels in an image. Variants of an operator: `cpu`, the kernel of this project; `reference`, plain PyTorch, for the
scan a Python loop over tokens; `chunked`, the scan as PyTorch does it best, see `chunked_scan`; `conv3d`, PyTorch's own
depthwise convolution in its channels-last layout; `bare`, a scan loop without softplus, bias and skip that writes into
memory it already has: about as fast as a scan could be. Networks are LightM's presets and the baselines by name.
"""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from lightm.errors import InputError, did_you_mean
from lightm.lab.bench.roofline import FLOAT, Work, count_steps

if TYPE_CHECKING:
    from torch import Tensor, nn

INNER, STATES, KERNEL_SIZE, CHANNELS = 64, 16, 4, 32
REFERENCE_TOKENS = 4096  # the reference scan's backward pass takes time that grows faster than its length
LAYER_WIDTHS = (32, 64)
OPERATORS = {
    "selective_scan": ("cpu", "reference", "chunked"),
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

CLASSES = 3
DEFAULT = ("lightm-unet", "spm-lightm-unet", "dynunet", "unetr")
SIX_STAGES = "dynunet-6"
_SIX_STAGES_MIN = 64  # at 32 the lowest stage keeps a single voxel, which instance norm refuses
_NEEDS = {"unetr": ("einops",), "swinunetr": ("einops",)}  # what MONAI imports only when it builds them


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
    """A case with its tensors: `call` is what is timed, `count` gives its minimum of work."""

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
    if case.level in ("op", "layer") or case.name in PRESETS:  # baselines may not take a small size
        prepare(replace(case, size=min(case.size, 16))).call()


def child() -> None:
    """A process of `measure.peak_in_child`: warm the kernels of the case on standard input up, and measure one call."""
    import torch

    from lightm.memory import peak_of

    request = json.load(sys.stdin)
    torch.set_num_threads(int(request["threads"]))
    case = Case(**request["case"])
    warm_up(case)
    print(json.dumps({"peak": peak_of(prepare(case).call)}))


# Operators ----------------------------------------------------------------------------------------------------


def operator_work(name: str, size: int) -> tuple[Work, Work]:
    """(forward, backward) of an operator on its case of edge `size`, from the formulas in lightm/ops/README.md.

    Per token or voxel: bytes read and written once (group_norm_relu reads its input twice: the sums come first; the
    backward passes read what was kept and write the gradients), multiply-adds, exponentials; no adds of normalisations.
    """
    voxels = size**3
    tokens = scan_tokens(name, size)
    if name.startswith("selective_scan"):
        e, n, s = INNER, STATES, FLOAT
        forward = Work(s * (2 * e + 2 * n), s * e, 6 * e * n, e * n + e)
        backward = Work(s * (3 * e + 2 * n), s * (2 * e + 2 * n), 24 * e * n, e * n + 2 * e)
        if name == "selective_scan_long":  # also what the bare loop does: no softplus
            forward = Work(forward.read, forward.written, forward.flops, e * n)
        return forward * tokens, backward * tokens
    c, e, s = CHANNELS, INNER, FLOAT
    each = {
        "causal_conv1d": (Work(s * e, s * e, 2 * KERNEL_SIZE * e, e), Work(s * 2 * e, s * e, 6 * KERNEL_SIZE * e, e)),
        "gated_norm": (Work(s * 2 * e, s * e, 0, e), Work(s * 3 * e, s * 2 * e, 0, e)),
        "depthwise_conv": (Work(s * c, s * c, 54 * c), Work(s * 2 * c, s * c, 108 * c)),
        "group_norm_relu": (Work(s * 2 * c, s * c), Work(s * 4 * c, s * c)),
        "max_pool2": (Work(s * c, s * c / 8), Work(s * c * 9 / 8, s * c)),
        "upsample_linear2": (Work(s * c, s * c * 8, 48 * c), Work(s * c * 8, s * c, 48 * c)),
    }
    forward, backward = each[name]
    return forward * voxels, backward * voxels


def scan_tokens(name: str, size: int) -> int:
    """Tokens of an operator's case: those of the cube, fewer for the scan that the reference runs too."""
    return min(size**3, REFERENCE_TOKENS) if name == "selective_scan" else size**3


def _operator(case: Case) -> Prepared:
    import torch

    name, impl, size = case.name, case.impl, case.size
    forward, backward = operator_work(name, size)
    steps = [forward, backward] if case.mode == BOTH else [forward]
    if impl == "bare":
        from lightm.lab.bench.kernels import BareScan

        scan = BareScan(scan_tokens(name, size), INNER)
        return Prepared(scan.run, f"1x{scan.tokens}x{INNER}, N={STATES}", lambda: steps)
    make, leaves, shape = _make(name, size, impl)
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


def chunked_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, d_skip: Tensor, delta_bias: Tensor, chunk: int = 64
) -> Tensor:
    """The selective scan in plain PyTorch without a loop over tokens: the baseline that its kernels are held against.

    Chunks of `chunk` tokens run side by side, each from a zero state: a loop over the places in a chunk. A second loop,
    over chunks, carries the states, whose effect is then added: `chunk` + L / `chunk` steps of Python in place of L,
    and decays as exp(A sum dt), which stays finite. Gradients by autograd.

    u, delta (B, L, E); `chunk` shrinks to a divisor of L; A (E, N); B, C (B, L, N); d_skip, delta_bias (E,); returns
    (B, L, E). Memory: about 5 L E N numbers.
    """
    import torch

    batch, tokens, inner = u.shape
    chunk = math.gcd(chunk, tokens)
    dt = torch.nn.functional.softplus(delta + delta_bias).view(batch, -1, chunk, inner)
    x, b, c = (t.view(batch, -1, chunk, t.shape[-1]) for t in (u, B, C))
    decay = torch.exp(dt[..., None] * A)  # (B, L / chunk, chunk, E, N), as all below
    update = (dt * x)[..., None] * b[..., None, :]
    state = torch.zeros_like(update[:, :, 0])
    states = []
    for a, new in zip(decay.unbind(2), update.unbind(2), strict=True):
        state = a * state + new
        states.append(state)
    inside = torch.stack(states, 2)
    since_start = torch.exp(dt.cumsum(2)[..., None] * A)
    state = torch.zeros_like(state[:, 0])
    starts = []
    for a, end in zip(since_start[:, :, -1].unbind(1), inside[:, :, -1].unbind(1), strict=True):
        starts.append(state)
        state = a * state + end
    h = inside + since_start * torch.stack(starts, 1)[:, :, None]
    y = (h * c[..., None, :]).sum(-1)
    return (y + d_skip * x).view(batch, tokens, inner)


def _make(name: str, size: int, impl: str) -> tuple[Callable[[], Tensor], list[Tensor], str]:
    """The forward call of an operator's variant, the tensors that gradients are taken of, and its shape as text."""
    import torch

    from lightm import ops

    tokens = scan_tokens(name, size)
    shape = f"1x{tokens}x{INNER}"
    if name.startswith("selective_scan"):
        u, delta = torch.randn(1, tokens, INNER), torch.randn(1, tokens, INNER) - 3
        B, C = torch.randn(1, tokens, STATES), torch.randn(1, tokens, STATES)
        A = -torch.arange(1, STATES + 1, dtype=torch.float32).repeat(INNER, 1)
        skip, bias = torch.ones(INNER), torch.zeros(INNER)
        shape += f", N={STATES}"
        if name == "selective_scan_long":  # the same task as the bare loop's: steps already positive
            step = torch.rand(1, tokens, INNER) * 0.1
            return lambda: ops.selective_scan(u, step, A, B, C, impl=impl), [u, step, A, B, C], shape
        leaves = [u, delta, A, B, C, skip, bias]
        if impl == "chunked":
            return lambda: chunked_scan(u, delta, A, B, C, skip, bias), leaves, shape
        scan = partial(ops.selective_scan, d_skip=skip, delta_bias=bias, delta_softplus=True, impl=impl)
        return lambda: scan(u, delta, A, B, C), leaves, shape
    if name == "causal_conv1d":
        x, weight, bias = torch.randn(1, tokens, INNER), torch.randn(INNER, KERNEL_SIZE), torch.randn(INNER)
        shape += f", K={KERNEL_SIZE}"
        return lambda: ops.causal_conv1d(x, weight, bias, "silu", impl=impl), [x, weight, bias], shape
    if name == "gated_norm":
        y, z = torch.randn(1, tokens, INNER), torch.randn(1, tokens, INNER)
        scale, shift = torch.ones(INNER), torch.zeros(INNER)
        return lambda: ops.gated_norm(y, z, scale, shift, impl=impl), [y, z, scale, shift], shape
    x = torch.randn(1, size, size, size, CHANNELS)
    shape = f"1x{size}x{size}x{size}x{CHANNELS}"
    scale, shift = torch.ones(CHANNELS), torch.zeros(CHANNELS)
    weight = torch.randn(3, 3, 3, CHANNELS)
    if impl == "conv3d":
        first = x.movedim(-1, 1)
        kernel = weight.movedim(-1, 0).unsqueeze(1).contiguous()
        return lambda: torch.nn.functional.conv3d(first, kernel, padding=1, groups=CHANNELS), [first, kernel], shape
    if name == "depthwise_conv":
        return lambda: ops.depthwise_conv(x, weight, impl=impl), [x, weight], shape
    if name == "group_norm_relu":
        return lambda: ops.group_norm_relu(x, 8, scale, shift, impl=impl), [x, scale, shift], shape
    function = ops.max_pool2 if name == "max_pool2" else ops.upsample_linear2
    return lambda: function(x, impl=impl), [x], shape


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
        return Prepared(*_forward(layer, x, shape), count_parameters(layer))
    x.requires_grad_()
    weight = torch.ones_like(x)
    leaves = [x, *layer.parameters()]
    return Prepared(
        lambda: torch.autograd.grad(layer(x), leaves, weight), shape, _both(layer, x), count_parameters(layer)
    )


def _network(case: Case) -> Prepared:
    import torch
    from torch.nn import functional

    from lightm.nets import count_parameters

    size = case.size
    network = create_network(case.name, size)
    image = torch.randn(1, 1, size, size, size)
    shape = f"1x1x{size}x{size}x{size}"
    if case.mode == INFERENCE:
        return Prepared(*_forward(network, image, shape), count_parameters(network))
    if case.mode != TRAINING:
        raise InputError(f"mode '{case.mode}': a network is measured in {INFERENCE} or {TRAINING}")
    network.train()
    labels = torch.randint(0, CLASSES, (1, size, size, size))
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-4)

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)  # first, so that a step's gradients live as long as in any training
        loss = functional.cross_entropy(network(image), labels)
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return Prepared(step, shape, _both(network, image), count_parameters(network))


def _forward(module: nn.Module, x: Tensor, shape: str) -> tuple[Callable[[], object], str, Callable[[], list[Work]]]:
    import torch

    module.eval()

    def forward() -> object:
        with torch.inference_mode():
            return module(x)

    return forward, shape, lambda: count_steps(module, lambda: module(x))


def _both(module: nn.Module, x: Tensor) -> Callable[[], list[Work]]:
    return lambda: [work.with_backward() for work in count_steps(module, lambda: module(x))]


def known_networks() -> list[str]:
    """Every name that `create_network` takes."""
    from lightm.nets.baselines import BASELINES
    from lightm.nets.presets import PRESETS

    of_3d = [name for name, (_, _, dimensionalities) in BASELINES.items() if 3 in dimensionalities]
    return sorted([*PRESETS, *of_3d, SIX_STAGES])


def create_network(name: str, size: int) -> nn.Module:
    """A 3D network of one image channel and three classes for a cube of `size` voxels per edge, weights fresh.

    Names are those of `lightm.nets.create`; there `dynunet` has as many stages as nnU-Net's rules give a patch of that
    size. `dynunet-6` is MONAI's DynUNet with the six stages of a 128^3 patch at any size: kernels of 3, strides
    1, 2, 2, 2, 2, 2, 32 to 320 channels, instance norm, no deep supervision, no residual blocks.
    Raises InputError for an unknown name and for a size that a network cannot be built for.
    """
    if name == SIX_STAGES:
        from monai.networks.nets import DynUNet

        channels, strides = [32, 64, 128, 256, 320, 320], [1, 2, 2, 2, 2, 2]
        return DynUNet(3, 1, CLASSES, [3] * 6, strides, strides[1:], channels, norm_name="instance")
    from lightm.nets import create

    return create(name, 3, 1, CLASSES, image_size=(size,) * 3)


def check_networks(names: Sequence[str], sizes: Sequence[int]) -> None:
    """Raise InputError for an unknown name, a size that a network cannot take, or a module that it lacks.

    For all networks at once, before anything is measured. Builds every network once for every size.
    """
    if not names:
        raise InputError(f"no network given; known: {', '.join(known_networks())}")
    for name in names:
        if name not in known_networks():
            raise InputError(
                f"unknown network '{name}'{did_you_mean(name, known_networks())} Known: {', '.join(known_networks())}."
            )
        missing = [module for module in _NEEDS.get(name, ()) if importlib.util.find_spec(module) is None]
        if missing:
            raise InputError(
                f"network '{name}' needs {', '.join(missing)}, which is not installed; `pip install "
                f"{' '.join(missing)}`, or name other networks with --networks"
            )
    if len(set(names)) < len(names):
        raise InputError(f"networks {', '.join(names)}: a name is given twice; give each once")
    for size in sizes:
        wrong = [text for name in names if (text := _complaint(name, size))]
        if wrong:
            low = size // 32 * 32
            near = [edge for edge in (low, low + 32, low + 64) if edge and not any(_complaint(n, edge) for n in names)]
            hint = f". Use {' or '.join(map(str, near[:2]))} for the networks named" if near else ""
            raise InputError(f"size {size}: {'; '.join(wrong)}{hint}")


def _complaint(name: str, size: int) -> str:
    """What is wrong with a cube of this size for a network, or nothing."""
    divisor, least = 32, _SIX_STAGES_MIN
    if name != SIX_STAGES:
        try:
            network = create_network(name, size)
        except InputError as error:
            return str(error)
        given = getattr(network, "divisor", 1)
        divisor = max(given) if isinstance(given, tuple) else int(given)
        least = divisor
    if size % divisor == 0 and size >= least:
        return ""
    return f"network '{name}' takes multiples of {divisor}{f' from {least} on' if least > divisor else ''}"
