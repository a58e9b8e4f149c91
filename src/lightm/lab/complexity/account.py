"""Everything that a network costs: parameters, operations, memory and, on request, time; one function, one record."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lightm.lab.complexity.formulas import has_closed_form
from lightm.lab.complexity.meta import Memory, activation_memory, build_network, check_spatial
from lightm.lab.complexity.operations import OperationCount, Operations, count_operations
from lightm.lab.complexity.parameters import BETWEEN, ParameterTable, count_parts, place


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
    """What one layer costs; `stage` and `layer` as in the parameters' parts."""

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
    memory: Memory
    latency: Latency | None

    @property
    def layers(self) -> list[Layer]:
        """The layers in the order of computation; what runs between them, as poolings do, comes last."""
        counts: dict[tuple[str, str], int] = {}
        for part in self.parameters.parts:
            key = _shown(self.name, part.stage, part.layer)
            counts[key] = counts.get(key, 0) + part.counted
        counts_of = {key: OperationCount() for key in counts}
        for path, count in self.operations.layers.items():
            key = _layer_of(self.name, path)
            counts_of.setdefault(key, OperationCount()).add(count)
        if (rest := counts_of.pop((BETWEEN, ""), None)) is not None:
            counts_of[BETWEEN, ""] = rest
        return [Layer(*key, counts.get(key, 0), count) for key, count in counts_of.items()]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values for JSON."""
        table, total = self.parameters, self.operations.total
        return {
            "network": self.name,
            "spatial": list(self.spatial),
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "options": self.options,
            "parameters": {
                "total": table.total,
                "closed_form": table.closed_form,
                "by_source": _sources(table),
                "by_stage": table.by("stage"),
                "by_kind": table.by("kind"),
                "parts": [asdict(part) for part in table.parts],
            },
            "operations": _numbers(total),
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

    Arguments: `name` and `options` as `lightm.nets.create` takes them; `spatial` sizes of the image, (Z, Y, X) or
    (Y, X), which also say whether the network is 3D or 2D; `latency`: run it on the CPU, a warm-up and three passes.

    Raises InputError for an unknown name, impossible settings and sizes that the network refuses; LightMError when a
    closed form differs from the count of the tensors. Without `latency` nothing is computed: about a second.
    """
    check_spatial(spatial)
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
        operations=count_operations(network, in_channels, spatial),
        memory=activation_memory(network, in_channels, spatial),
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
    import torch

    with torch.random.fork_rng(devices=[]), torch.no_grad():
        network = build_network(name, in_channels, out_channels, spatial, options, device="cpu").eval()
        image = torch.randn(1, in_channels, *spatial)
        network(image)
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            network(image)
            seconds.append(time.perf_counter() - start)
    return Latency(statistics.median(seconds), min(seconds), max(seconds), repeats, torch.get_num_threads())


def _layer_of(name: str, path: str) -> tuple[str, str]:
    if not path:
        return BETWEEN, ""
    if has_closed_form(name):
        return place(path)
    stage, _, layer = path.partition(".")
    return _shown(name, stage, layer)


def _shown(name: str, stage: str, layer: str) -> tuple[str, str]:
    """Where a part is shown: networks without named stages by the two first names of their modules."""
    return (stage, layer) if has_closed_form(name) else (stage, ".".join(layer.split(".")[:1]))


def _sources(table: ParameterTable) -> dict[str, Any]:
    counted, expected, texts = table.by("source"), table.expected_by_source(), table.formulas()
    return {
        source: {"formulas": texts[source], "expected": expected[source], "counted": number}
        for source, number in counted.items()
    }


def _numbers(count: OperationCount) -> dict[str, Any]:
    return {
        "multiply_adds": count.multiply_adds.total(),
        "multiply_adds_by_kind": dict(count.multiply_adds),
        "multiply_adds_without_scan": count.without_scan,
        "exponentials": count.exponentials.total(),
        "exponentials_by_kind": dict(count.exponentials),
        "other_elements": count.other_elements,
    }
