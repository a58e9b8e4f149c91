"""Everything that a network costs: parameters by source beside their closed forms, operations, memory and time."""

from __future__ import annotations

import re
import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

import torch
from torch import nn

from lightm.errors import LightMError
from lightm.lab.bench.measure import seconds
from lightm.lab.complexity import operations as ops
from lightm.lab.complexity.formulas import CONVOLUTION, MATRIX, NORM, SCALE, STATE, Term, has_closed_form, network_terms
from lightm.lab.complexity.operations import OperationCount, Operations, build_network
from lightm.nets.blocks import PositionConv

OTHER = "other"
BETWEEN = "between layers"

# what a parameter is, by the end of its name
_SOURCES: list[tuple[str, str, str]] = [
    (r"in_proj\.weight", "in_proj", MATRIX),
    (r"out_proj\.weight", "out_proj", MATRIX),
    (r"x_proj\.weight", "x_proj", MATRIX),
    (r"dt_proj\.(weight|bias)|dt_bias", "dt_proj", MATRIX),
    (r"A_log", "A_log", STATE),
    (r"d_skip", "d_skip", STATE),
    (r"conv_(weight|bias)", "conv1d", CONVOLUTION),
    (r"vss\.norm(\.|_)(weight|bias)", "inner norm", NORM),
    (r"norm_(in|out)\.(weight|bias)", "layer norms", NORM),
    (r"norm\d?\.norm\.(weight|bias)|head_norm\.norm\.(weight|bias)", "group norms", NORM),
    (r"skip_scale", "skip scale", SCALE),
    (r"proj\.(weight|bias)", "projection", MATRIX),
    (r"reduce\.weight", "reduction", MATRIX),
    (r"depthwise(_bias)?", "depthwise", CONVOLUTION),
    (r"pointwise\.(weight|bias)", "pointwise", MATRIX),
    (r"stem\.conv\.(weight|bias)", "full convolution", CONVOLUTION),
]


@dataclass(frozen=True)
class Part:
    """The parameters of one source in one layer; `expected` is the closed form's value, None where there is none."""

    stage: str
    layer: str
    source: str
    kind: str
    formula: str | None
    expected: int | None
    counted: int


@dataclass(frozen=True)
class ParameterTable:
    """All parameters of a network, part by part, in the order of computation."""

    parts: tuple[Part, ...]
    closed_form: bool
    """Whether every part has a closed form, which its count equals; otherwise some have none."""

    @property
    def total(self) -> int:
        return sum(part.counted for part in self.parts)

    def by(self, what: str) -> dict[str, int]:
        """Return the counts summed by `source`, `stage`, `layer` or `kind`."""
        sums: dict[str, int] = defaultdict(int)
        for part in self.parts:
            sums[getattr(part, what)] += part.counted
        return dict(sums)

    def formulas(self) -> dict[str, list[str]]:
        """Return the different closed forms of every source."""
        found: dict[str, dict[str | None, None]] = defaultdict(dict)
        for part in self.parts:
            found[part.source][part.formula] = None
        return {source: [text for text in texts if text is not None] for source, texts in found.items()}

    def expected_by_source(self) -> dict[str, int | None]:
        """Return the closed forms' values summed by source; None where a part of the source has none."""
        sums: dict[str, int | None] = {}
        for part in self.parts:
            before = sums.get(part.source, 0)
            sums[part.source] = None if before is None or part.expected is None else before + part.expected
        return sums


def count_parts(
    network: nn.Module,
    name: str,
    spatial_dims: int,
    in_channels: int,
    out_channels: int,
    options: Mapping[str, Any] | None = None,
) -> ParameterTable:
    """Count the parameters of a network by source and hold the counts against closed forms.

    Arguments: `network`, on any device, as `lightm.nets.create` made it with the other arguments. Presets of the
    LightM-UNet family are compared layer by layer with closed forms of their settings; in other networks every
    convolution, linear layer and norm is compared with the form of its own settings, and free parameters have none.

    Raises LightMError that names every part whose count is not its closed form's value.
    """
    if has_closed_form(name):
        parts = _family_parts(network, network_terms(name, spatial_dims, in_channels, out_channels, options or {}))
    else:
        parts = list(_module_parts(network))
    wrong = [part for part in parts if part.expected not in (None, part.counted)]
    if wrong:
        listed = "; ".join(
            f"{p.stage} {p.layer} {p.source}: {p.formula or 'no formula'} = {p.expected:,}, counted {p.counted:,}"
            for p in wrong[:5]
        )
        raise LightMError(
            f"network '{name}': {len(wrong)} closed form(s) differ from the count of the tensors ({listed}); the "
            "formulas and the network do not describe the same layers"
        )
    return ParameterTable(tuple(parts), closed_form=all(part.expected is not None for part in parts))


def _family_parts(network: nn.Module, terms: list[Term]) -> list[Part]:
    counts: dict[tuple[str, str, str], int] = defaultdict(int)
    kinds: dict[str, str] = {}
    position = {id(p) for m in network.modules() if isinstance(m, PositionConv) for p in m.parameters()}
    for path, parameter in network.named_parameters():
        source, kind = ("position conv", CONVOLUTION) if id(parameter) in position else _source(path)
        counts[(*place(path), source)] += parameter.numel()
        kinds[source] = kind
    parts = []
    for term in terms:
        key = (term.stage, term.layer, term.source)
        parts.append(Part(*key, term.kind, term.formula, term.value, counts.pop(key, 0)))
    # tensors that no formula speaks of
    return parts + [Part(*key, kinds[key[2]], None, 0, counted) for key, counted in counts.items()]


def _source(path: str) -> tuple[str, str]:
    for pattern, source, kind in _SOURCES:
        if re.search(rf"(^|\.)({pattern})$", path):
            return source, kind
    return path.rsplit(".", 1)[-1], OTHER


def place(path: str) -> tuple[str, str]:
    """The stage and layer that a parameter or module of the LightM-UNet family belongs to, by its name."""
    head, *rest = path.split(".")
    first, second = (int(part) + 1 if part.isdigit() else 0 for part in (*rest[:2], "", "")[:2])
    match head:
        case "encoder":
            return f"encoder {first}", f"layer {second}"
        case "bottleneck":
            return "bottleneck", f"layer {first}"
        case "decoder":
            return f"decoder {first}", ""
        case "widen":
            return f"stage {first}", "widening layer"
        case "stages":
            number = re.search(r"(?:norm|layer)([12])", path)
            return (f"stage {first - 1}", f"block {second}, layer {number[1]}") if number else (BETWEEN, "")
    return head.removesuffix("_norm"), ""


def _module_parts(network: nn.Module) -> Iterator[Part]:
    """Parts of any network, module by module: torch's own layers have closed forms of their settings."""
    seen: set[int] = set()
    for path, module in network.named_modules():
        own = {key: p for key, p in module.named_parameters(recurse=False) if id(p) not in seen}
        if not own:
            continue
        seen |= {id(p) for p in own.values()}
        stage, _, layer = path.partition(".")
        kind, formula, value = _module_form(module)
        if value is not None:
            counted = sum(p.numel() for p in own.values())
            yield Part(stage, layer, type(module).__name__, kind, formula, value, counted)
            continue
        for key, parameter in own.items():
            source, kind = _source(f"{path}.{key}")
            yield Part(stage, layer, source, kind, None, None, parameter.numel())


def _module_form(module: nn.Module) -> tuple[str, str, int | None]:
    """Kind, closed form and value of a layer of torch's; (…, "", None) for other modules."""
    bias = getattr(module, "bias", None) is not None
    if isinstance(module, nn.Linear):
        formula = "I O + O" if bias else "I O"
        return MATRIX, formula, module.in_features * module.out_features + bias * module.out_features
    if isinstance(module, nn.modules.conv._ConvNd):
        value = module.in_channels * module.out_channels // module.groups * prod(module.kernel_size)
        formula = "I O K" + (" / groups" if module.groups > 1 else "") + (" + O" if bias else "")
        return CONVOLUTION, formula, value + bias * module.out_channels
    if isinstance(module, nn.LayerNorm):
        width = prod(module.normalized_shape)
        return NORM, "2 C" if bias else "C", width * (module.elementwise_affine + bias)
    if isinstance(module, nn.GroupNorm):
        return NORM, "2 C", 2 * module.num_channels * module.affine
    if isinstance(module, nn.modules.batchnorm._NormBase):
        return NORM, "2 C", 2 * module.num_features * module.affine
    return OTHER, "", None


# Accounts -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Latency:
    """Seconds of one forward pass without gradients on the CPU: the median of `repeats` after one that warms up."""

    seconds: float
    fastest: float
    slowest: float
    repeats: int
    threads: int


@dataclass(frozen=True)
class Layer:
    """What one layer costs."""

    stage: str
    layer: str
    parameters: int
    operations: OperationCount


@dataclass(frozen=True)
class Account:
    """What one network costs for one image; made by `account`."""

    name: str
    spatial: tuple[int, ...]
    in_channels: int
    out_channels: int
    options: dict[str, Any]
    parameters: ParameterTable
    operations: Operations
    memory: ops.Memory
    latency: Latency | None

    @property
    def layers(self) -> list[Layer]:
        """The layers in the order of computation; what runs between them, as poolings do, comes last."""
        counts: dict[tuple[str, str], int] = defaultdict(int)
        for part in self.parameters.parts:
            counts[_shown(self.name, part.stage, part.layer)] += part.counted
        counts_of = {key: OperationCount() for key in counts}
        for path, count in self.operations.layers.items():
            counts_of.setdefault(_layer_of(self.name, path), OperationCount()).add(count)
        if (rest := counts_of.pop((BETWEEN, ""), None)) is not None:
            counts_of[BETWEEN, ""] = rest
        return [Layer(*key, counts[key], count) for key, count in counts_of.items()]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values for JSON."""
        table = self.parameters
        expected, texts = table.expected_by_source(), table.formulas()
        return {
            "network": self.name,
            "spatial": list(self.spatial),
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "options": self.options,
            "parameters": {
                "total": table.total,
                "closed_form": table.closed_form,
                "by_source": {
                    source: {"formulas": texts[source], "expected": expected[source], "counted": number}
                    for source, number in table.by("source").items()
                },
                "by_stage": table.by("stage"),
                "by_kind": table.by("kind"),
                "parts": [asdict(part) for part in table.parts],
            },
            "operations": _numbers(self.operations.total),
            "layers": [
                {"stage": x.stage, "layer": x.layer, "parameters": x.parameters, **_numbers(x.operations)}
                for x in self.layers
            ],
            "memory": asdict(self.memory),
            "latency": self.latency and asdict(self.latency),
        }


def account(
    name: str,
    *,
    spatial: Sequence[int] = (128, 128, 128),
    in_channels: int = 1,
    out_channels: int = 3,
    options: Mapping[str, Any] | None = None,
    latency: bool = False,
) -> Account:
    """Return what a network costs for one image: parameters, operations, activation memory, on request time.

    Arguments: `name` and `options` as `lightm.nets.create` takes them; `spatial` sizes of the image, (Z, Y, X) for a
    3D network or (Y, X) for a 2D one; `latency`: run it on the CPU, a warm-up and three passes.

    Raises InputError for an unknown name, impossible settings and sizes that the network refuses; LightMError when a
    closed form differs from the count of the tensors. Without `latency` nothing is computed: about a second.
    """
    ops.check_spatial(spatial)
    given = dict(options or {})
    network = build_network(name, in_channels, out_channels, spatial, given)
    table = count_parts(network, name, len(spatial), in_channels, out_channels, given)
    return Account(
        name=name,
        spatial=tuple(spatial),
        in_channels=in_channels,
        out_channels=out_channels,
        options=given,
        parameters=table,
        operations=ops.count_operations(network, in_channels, spatial),
        memory=ops.activation_memory(network, in_channels, spatial),
        latency=measure_latency(name, spatial, in_channels, out_channels, given) if latency else None,
    )


def measure_latency(
    name: str,
    spatial: Sequence[int],
    in_channels: int,
    out_channels: int,
    options: Mapping[str, Any] | None = None,
    repeats: int = 3,
) -> Latency:
    """Time a network on the CPU on one random image: one pass that compiles and warms up, then `repeats` passes."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        network = build_network(name, in_channels, out_channels, spatial, options, device="cpu").eval()
        image = torch.randn(1, in_channels, *spatial)
        network(image)
        times = [seconds(lambda: network(image)) for _ in range(repeats)]
    return Latency(statistics.median(times), min(times), max(times), repeats, torch.get_num_threads())


def _layer_of(name: str, path: str) -> tuple[str, str]:
    if not path:
        return BETWEEN, ""
    if has_closed_form(name):
        return place(path)
    stage, _, layer = path.partition(".")
    return _shown(name, stage, layer)


def _shown(name: str, stage: str, layer: str) -> tuple[str, str]:
    """Where a part is shown: networks without named stages by the two first names of their modules."""
    return (stage, layer) if has_closed_form(name) else (stage, layer.partition(".")[0])


def _numbers(count: OperationCount) -> dict[str, Any]:
    return {
        "multiply_adds": count.multiply_adds.total(),
        "multiply_adds_by_kind": dict(count.multiply_adds),
        "multiply_adds_without_scan": count.without_scan,
        "exponentials": count.exponentials.total(),
        "exponentials_by_kind": dict(count.exponentials),
        "other_elements": count.other_elements,
    }
