"""What the networks of a comparison cost on one training patch: counted, and measured once the cells are done."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightm.files import write_text
from lightm.lab.compare.experiment import file_name
from lightm.lab.compare.processes import pool, start, wait_for_one
from lightm.lab.compare.results import NETWORKS, Comparison, NetworkRecord
from lightm.lab.complexity import build_network, count_operations
from lightm.nets import count_parameters


def measure_networks(
    comparison: Comparison, out: Path, *, threads: int, say: Callable[[str], None] = print
) -> list[NetworkRecord]:
    """Count and measure every network of finished cells that has no entry yet, and write `networks.json`.

    Parameters are summed over tensors and multiply-adds include the scan. Latency is the median of five forward
    passes of one patch on `threads` threads, peak memory that of one pass, each network in a fresh process, on the
    CPU whatever the device of the training was. A network whose process ends early has None for both.
    """
    plan = comparison.plan
    records = dict(comparison.networks)
    for label in dict.fromkeys(found.cell.network for found in comparison.finished):
        if label in records:
            continue
        choice = comparison.experiment.networks[label]
        described: dict[str, Any] = {
            "name": choice.network,
            "spatial_dims": plan.spatial_dims,
            "in_channels": len(plan.channels),
            "out_channels": len(plan.labels),
            "image_size": plan.patch_size,
        }
        say(f"measuring {label} on one patch of {' x '.join(map(str, plan.patch_size))}")
        request = {"work": "measure", "network": described, "options": choice.options, "threads": threads}
        measured = _measured(label, request, out / "logs" / f"network-{file_name(label)}.log")
        meta = build_network(choice.network, len(plan.channels), len(plan.labels), plan.patch_size, choice.options)
        records[label] = NetworkRecord(
            label=label,
            network=choice.network,
            parameters=count_parameters(meta),
            multiply_adds=count_operations(meta, len(plan.channels), plan.patch_size).total.multiply_adds.total(),
            patch_size=plan.patch_size,
            latency_s=measured.get("latency_s"),
            latency_threads=threads if measured else None,
            peak_memory_bytes=measured.get("peak_memory_bytes"),
        )
        entries = [record.model_dump(mode="json") for record in records.values()]
        write_text(out / NETWORKS, json.dumps(entries, indent=1) + "\n")
    return list(records.values())


def _measured(label: str, request: dict[str, Any], log: Path) -> dict[str, Any]:
    with pool() as jobs:
        jobs.append(start(label, request, log))
        job = wait_for_one(jobs)
    if job.process.returncode != 0:
        return {}
    found: dict[str, Any] = json.loads(log.read_text(encoding="utf-8").splitlines()[-1])
    return found
