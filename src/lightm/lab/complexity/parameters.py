"""Parameters of a network: counted from its tensors, source by source, beside the closed forms."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import nn

from lightm.errors import LightMError
from lightm.lab.complexity.formulas import CONVOLUTION, MATRIX, NORM, SCALE, STATE, Term, has_closed_form, network_terms
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
        sums: dict[str, int] = {}
        for part in self.parts:
            key = getattr(part, what)
            sums[key] = sums.get(key, 0) + part.counted
        return sums

    def formulas(self) -> dict[str, list[str]]:
        """Return the different closed forms of every source."""
        found: dict[str, list[str]] = {}
        for part in self.parts:
            known = found.setdefault(part.source, [])
            if part.formula is not None and part.formula not in known:
                known.append(part.formula)
        return found

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
            f"{part.stage} {part.layer} {part.source}: {part.formula or 'no formula'} = {part.expected:,}, counted "
            f"{part.counted:,}"
            for part in wrong[:5]
        )
        raise LightMError(
            f"network '{name}': {len(wrong)} closed form(s) differ from the count of the tensors ({listed}); the "
            "formulas and the network do not describe the same layers"
        )
    return ParameterTable(tuple(parts), closed_form=all(part.expected is not None for part in parts))


def _family_parts(network: nn.Module, terms: list[Term]) -> list[Part]:
    counts: dict[tuple[str, str, str], int] = {}
    kinds: dict[str, str] = {}
    position = {id(p) for m in network.modules() if isinstance(m, PositionConv) for p in m.parameters()}
    for path, parameter in network.named_parameters():
        source, kind = ("position conv", CONVOLUTION) if id(parameter) in position else _source(path)
        key = (*place(path), source)
        counts[key] = counts.get(key, 0) + parameter.numel()
        kinds[source] = kind
    parts = []
    for term in terms:
        counted = counts.pop((term.stage, term.layer, term.source), 0)
        form = (term.kind, term.formula, term.value)
        parts.append(Part(term.stage, term.layer, term.source, *form, counted))
    for (stage, layer, source), counted in counts.items():  # tensors that no formula speaks of
        parts.append(Part(stage, layer, source, kinds[source], None, 0, counted))
    return parts


def _source(path: str) -> tuple[str, str]:
    for pattern, source, kind in _SOURCES:
        if re.search(rf"(^|\.)({pattern})$", path):
            return source, kind
    return path.rsplit(".", 1)[-1], OTHER


def place(path: str) -> tuple[str, str]:
    """The stage and layer that a parameter or module of the LightM-UNet family belongs to, by its name."""
    head, *rest = path.split(".")
    first, second = (int(part) + 1 if part.isdigit() else 0 for part in (*rest[:2], "", "")[:2])
    if head == "encoder":
        return f"encoder {first}", f"layer {second}"
    if head == "bottleneck":
        return "bottleneck", f"layer {first}"
    if head == "decoder":
        return f"decoder {first}", ""
    if head == "widen":
        return f"stage {first}", "widening layer"
    if head == "stages":
        number = re.search(r"(?:norm|layer)([12])", path)
        return (f"stage {first - 1}", f"block {second}, layer {number[1]}") if number else (BETWEEN, "")
    return ("head" if head == "head_norm" else head), ""


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
