"""A drawing of a network of the LightM-UNet family, made from its module tree and the tensors that pass through it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from xml.sax.saxutils import escape

import torch
from torch import Tensor, nn

from lightm.errors import InputError
from lightm.lab.complexity.account import place
from lightm.lab.complexity.operations import build_network, count_operations, meta_forward
from lightm.lab.complexity.report import giga
from lightm.nets.blocks import RVM, SPM, ConvStem, DecoderStage, DWConv, PositionConv
from lightm.nets.lightm_unet import ResidualRVM

_WIDTH, _LINE, _GAP, _MIDDLE, _PAD = 340, 17, 46, 190, 22  # of boxes, text lines, arrows, between the columns, inside
_FILLS = {"stem": "#f1f3f5", "head": "#f1f3f5", "encoder": "#e3eefa", "stage": "#e3eefa"}
_FILLS |= {"bottleneck": "#fdeedd", "decoder": "#e2f4ec"}
_INK, _MUTED, _SKIP = "#1f2933", "#52606d", "#b5470b"
_POOLINGS = {"max": "max pooling", "avg": "average pooling", "add": "Pooling Add"}


@dataclass
class Unit:
    """One box: a stage as it ran. `skip_of` is the unit whose input is this one's second input."""

    title: str
    takes: Tensor
    gives: Tensor
    skip: Tensor | None = None
    skip_of: int | None = None
    parameters: int = 0
    multiply_adds: int = 0
    lines: list[str] = field(default_factory=list)
    x: float = 0
    y: float = 0

    @property
    def height(self) -> float:
        return 2 * 13 + _LINE * (len(self.lines) + 1)

    @property
    def middle(self) -> float:
        return self.x + _WIDTH / 2

    @property
    def right(self) -> float:
        return self.x + _WIDTH

    @property
    def bottom(self) -> float:
        return self.y + self.height


def draw_network(
    name: str,
    *,
    spatial: Sequence[int] = (128, 128, 128),
    in_channels: int = 1,
    out_channels: int = 3,
    options: Mapping[str, Any] | None = None,
) -> str:
    """Return the SVG of a preset: its stages as a U with widths, sizes, parameters and multiply-adds, skips as arrows.

    Arguments as in `lightm.lab.complexity.account`; all is read off the modules and the tensors of one pass on the
    `meta` device. Raises InputError as `create` does, for sizes that the network refuses, and for baselines.
    """
    network = build_network(name, in_channels, out_channels, spatial, options)
    if not hasattr(network, "decoder") or not hasattr(network, "stem"):
        raise InputError(f"network '{name}': diagrams are drawn of LightM's own presets, not of baselines")
    units = trace(network, in_channels, spatial)
    down = next((i for i, unit in enumerate(units) if unit.skip is not None), len(units))
    _lay_out(units, down)
    return _svg(name, network, units, down, in_channels, out_channels, spatial)


def trace(network: nn.Module, in_channels: int, spatial: Sequence[int]) -> list[Unit]:
    """Return the stages of a network in the order in which they run, with their tensors and costs."""
    paths: dict[nn.Module, str] = {}
    for name, child in network.named_children():
        if isinstance(child, nn.ModuleList):
            paths |= {item: f"{name}.{index}" for index, item in enumerate(child)}
        else:
            paths[child] = name
    calls: list[tuple[str, nn.Module, list[Tensor], Tensor]] = []

    def remember(module: nn.Module, given: tuple[Any, ...], result: Tensor) -> None:
        calls.append((paths[module], module, [x for x in given if isinstance(x, Tensor)], result))

    handles = [module.register_forward_hook(remember) for module in paths]
    with meta_forward(in_channels, spatial) as image, torch.no_grad():
        network(image)
    for handle in handles:
        handle.remove()
    operations = count_operations(network, in_channels, spatial)
    units: list[Unit] = []
    for path, module, given, result in calls:
        title = "head" if path in ("head_norm", "head") else _title(path)
        if not units or units[-1].title != title:
            units.append(Unit(title, given[0], result, given[1] if len(given) > 1 else None))
        unit = units[-1]
        unit.gives = result
        unit.parameters += sum(p.numel() for p in module.parameters())
        unit.multiply_adds += operations.below(path).multiply_adds.total()
        unit.lines += _layer_lines(module, len(spatial))
    for unit in units:
        if unit.skip is not None:  # the tensors themselves say which stage read what is joined here
            unit.skip_of = next(i for i, other in enumerate(units) if other.takes is unit.skip)
    return units


def _title(path: str) -> str:
    if path.startswith("stages."):
        return f"stage {path.removeprefix('stages.')}"
    stage, layer = place(path)
    return f"{stage}, {layer}" if path.startswith("widen") else stage


def _layer_lines(module: nn.Module, dims: int) -> list[str]:
    """What a stage consists of, one line for each run of equal layers."""
    power = "³" if dims == 3 else "²"
    if isinstance(module, DecoderStage):
        reduce, half = module.reduce, module.reduce.out_features
        first = f"pointwise {reduce.in_features} → {half}, linear upsampling × 2, + skip"
        return [first, f"norm, ReLU, DWConv 3{power} + s · input, norm, ReLU"]
    if isinstance(module, nn.Sequential) and not _is_positioned(module):
        lines = []
        for text, group in itertools.groupby(_layer_name(layer, power) for layer in module):
            count = len(list(group))
            lines.append(f"{count} × {text}" if count > 1 else text)
        return lines
    return [_layer_name(module, power)]


def _is_positioned(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential) and len(module) == 2 and isinstance(module[0], PositionConv)


def _layer_name(module: nn.Module, power: str) -> str:
    if _is_positioned(module):
        _, layer = module.children()
        return f"position conv 3{power}, {_layer_name(layer, power)}"
    scan = "" if getattr(module, "scan", "raster") == "raster" else f", scan {module.scan}"
    if isinstance(module, SPM):
        parts = f"{module.vss.parts} parts{', shared' if getattr(module.vss, 'shared', False) else ''}"
        return f"SPM ({parts}) {module.norm_in.normalized_shape[0]} → {module.proj.out_features}{scan}"
    if isinstance(module, RVM):
        return f"RVM {module.norm_in.normalized_shape[0]} → {module.proj.out_features}{scan}"
    if isinstance(module, ResidualRVM):
        return f"residual block of 2 RVM, {module.layer1.proj.in_features} → {module.layer2.proj.out_features}"
    if isinstance(module, DWConv):
        kernel = "1" if module.kernel_size == 1 else f"3{power}"
        return f"DWConv {kernel}, {module.pointwise.in_features} → {module.pointwise.out_features}"
    if isinstance(module, ConvStem):
        return f"convolution 3{power}, {module.conv.in_channels} → {module.conv.out_channels}"
    return "norm, ReLU" if "Norm" in type(module).__name__ else type(module).__name__


def _lay_out(units: Sequence[Unit], down: int) -> None:
    """Place the way down on the left, the last of it at the bottom in the middle, the way up where its skips arrive."""
    up = units[down:]
    y = 60.0 + sum(unit.height + _GAP for unit in up if unit.skip is None)
    for unit in units[:down]:
        unit.x, unit.y = 24, y
        y = unit.bottom + _GAP
    right = 24 + _WIDTH + _MIDDLE
    if down:
        deepest = units[down - 1]
        deepest.x = (24 + right) / 2
        deepest.y += _GAP / 2
    ceiling = 0.0
    for unit in up:
        unit.x = right
        if unit.skip_of is not None:
            unit.y = units[unit.skip_of].y - _GAP / 2 - unit.height / 2
        else:
            unit.y = ceiling - _GAP - unit.height
        ceiling = unit.y


def _size(tensor: Tensor) -> str:
    """Channels and spatial sizes of a channels-last tensor."""
    return f"{tensor.shape[-1]} × {_sizes(tensor.shape[1:-1])}"


def _sizes(sizes: Sequence[int]) -> str:
    if len(set(sizes)) == 1:
        return f"{sizes[0]}{'³' if len(sizes) == 3 else '²'}"
    return "×".join(map(str, sizes))


def _svg(
    name: str,
    network: nn.Module,
    units: Sequence[Unit],
    down: int,
    in_channels: int,
    out_channels: int,
    spatial: Sequence[int],
) -> str:
    top = min(unit.y for unit in units) - _GAP - 64
    width = max(unit.right for unit in units) + 24
    height = max(unit.bottom for unit in units) + 24 - top
    total = sum(p.numel() for p in network.parameters())
    adds = sum(unit.multiply_adds for unit in units)
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 {top:g} {width:g} {height:g}" width="{width:g}" '
        f'height="{height:g}" font-family="system-ui, Segoe UI, Helvetica, Arial, sans-serif" role="img" '
        f'aria-label="diagram of {escape(name)}">',
        _marker("flow", _MUTED),
        _marker("skip", _SKIP),
        f'<rect x="0" y="{top:g}" width="{width:g}" height="{height:g}" fill="#ffffff"/>',
        _text(24, top + 30, name, 19, bold=True),
        _text(24, top + 52, f"{total:,} parameters, {giga(adds)} G multiply-adds at {_sizes(spatial)}", 13, _MUTED),
    ]
    out += [_box(unit) for unit in units]
    out += _flow(network, units, down, f"image {in_channels} × {_sizes(spatial)}", out_channels)
    for unit in units:
        if unit.skip_of is not None and unit.skip is not None:
            y = units[unit.skip_of].y - _GAP / 2
            start = units[unit.skip_of].middle
            out.append(f'<circle cx="{start:g}" cy="{y:g}" r="3.2" fill="{_SKIP}"/>')
            out.append(_arrow([(start, y), (unit.x - 2, y)], "skip", dashed=True))
            out.append(_text(24 + _WIDTH + _MIDDLE / 2, y - 7, f"skip {_size(unit.skip)}", 12, _SKIP, "middle"))
    return "\n".join([*out, "</svg>", ""])


def _flow(network: nn.Module, units: Sequence[Unit], down: int, image: str, classes: int) -> list[str]:
    """Arrows from box to box with what passes; the image and the logits at the ends."""
    first, last = units[0], units[-1]
    out = [
        _arrow([(first.middle, first.y - _GAP + 14), (first.middle, first.y - 2)], "flow"),
        _text(first.middle, first.y - _GAP + 8, image, 12, _INK, "middle"),
    ]
    pooling = _POOLINGS.get(str(getattr(network, "pooling", "max")), "pooling")
    for index, (one, two) in enumerate(itertools.pairwise(units)):
        descends = index < down - 1
        sizes = [tensor.shape[1:-1] for tensor in (one.takes, one.gives, two.takes)]
        label = f"{pooling} {_size(two.takes)}" if descends and len(set(sizes)) > 1 else _size(two.takes)
        if index == down - 2:  # into the deepest stage: round the corner
            x, y = one.middle, two.y + two.height / 2
            points, text = [(x, one.bottom), (x, y), (two.x - 2, y)], (x - 8, one.bottom + 28)
        elif index == down - 1:
            x, y = two.middle, one.y + one.height / 2
            points, text = [(one.right, y), (x, y), (x, two.bottom + 2)], (x + 8, two.bottom + 28)
        else:
            x = one.middle
            start, end = (one.bottom, two.y - 2) if descends else (one.y, two.bottom + 2)
            points, text = [(x, start), (x, end)], (x - 8 if descends else x + 8, (start + end) / 2 + 4)
        out += [_arrow(points, "flow"), _text(*text, label, 12, _INK, "end" if descends else "start")]
    logits = f"logits {classes} × {_sizes(last.gives.shape[1:-1])}"
    out.append(_arrow([(last.middle, last.y), (last.middle, last.y - _GAP + 18)], "flow"))
    return [*out, _text(last.middle, last.y - _GAP + 10, logits, 12, _INK, "middle")]


def _box(unit: Unit) -> str:
    fill = next(colour for prefix, colour in _FILLS.items() if unit.title.startswith(prefix))
    x, y = unit.x + _PAD / 2, unit.y
    lines = [
        f'<rect x="{unit.x:g}" y="{y:g}" width="{_WIDTH}" height="{unit.height:g}" rx="7" fill="{fill}" '
        'stroke="#9aa8b5"/>',
        _text(x, y + 20, unit.title, 13.5, bold=True),
        _text(unit.right - _PAD / 2, y + 20, f"{unit.parameters:,} parameters", 11, _MUTED, "end"),
    ]
    lines += [_text(x, y + 20 + _LINE * (i + 1), line, 12) for i, line in enumerate(unit.lines)]
    work = f"{giga(unit.multiply_adds)} G multiply-adds"
    return "\n".join([*lines, _text(unit.right - _PAD / 2, unit.bottom - 7, work, 11, _MUTED, "end")])


def _text(
    x: float, y: float, text: str, size: float, fill: str = _INK, anchor: str = "start", bold: bool = False
) -> str:
    weight = ' font-weight="600"' if bold else ""
    return (
        f'<text x="{x:g}" y="{y:g}" font-size="{size:g}" fill="{fill}" text-anchor="{anchor}"{weight}>'
        f"{escape(text)}</text>"
    )


def _arrow(points: Sequence[tuple[float, float]], kind: str, *, dashed: bool = False) -> str:
    path = "M" + " L".join(f"{x:g} {y:g}" for x, y in points)
    colour = _SKIP if kind == "skip" else _MUTED
    dashes = ' stroke-dasharray="6 4"' if dashed else ""
    return f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="1.6"{dashes} marker-end="url(#{kind})"/>'


def _marker(name: str, colour: str) -> str:
    return (
        f'<defs><marker id="{name}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
        f'orient="auto"><path d="M0 0 8 4 0 8z" fill="{colour}"/></marker></defs>'
    )
