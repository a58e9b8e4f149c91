"""Reduce a run folder to the numbers worth keeping.

    python benchmarks/collect_run.py RUN > benchmarks/results/NAME.json

Command, versions, seed, data hash, sizes and times from run.json, sizes of the plan and the split, the summary of the
evaluation, and the last epoch. Absolute paths are cut down to their last part.
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import yaml


def collect(run: Path) -> dict[str, object]:
    """Return the record of one finished run."""
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    words = str(record["command"]).split()
    record["command"] = " ".join(Path(word).name if Path(word).is_absolute() else word for word in words)
    plan = yaml.safe_load((run / "plan.yaml").read_text(encoding="utf-8"))
    split = json.loads((run / "split.json").read_text(encoding="utf-8"))
    metrics = json.loads((run / "evaluation" / "metrics.json").read_text(encoding="utf-8"))
    with (run / "history.csv").open(newline="", encoding="utf-8") as file:
        last = list(csv.DictReader(file))[-1]
    return {
        **record,
        "plan": {key: plan[key] for key in ("spacing_mm", "patch_size", "batch_size")},
        "split": {part: len(split[part]) for part in ("train", "val", "test")},
        "last_epoch": last,
        "classes": metrics["classes"],
        "overall": metrics["overall"],
    }


if __name__ == "__main__":
    print(json.dumps(collect(Path(sys.argv[1])), indent=1))
