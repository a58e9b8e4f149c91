"""Keep what a comparison showed: `python benchmarks/collect_comparison.py runs/NAME docs/results/NAME`.

Copies the tables, the figures named below and the experiment (with its data set by name alone), and writes README.md
with the tables in it. Every number there is from a file in the same folder, which `lightm compare` wrote.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import yaml

CAPTIONS = {
    "differences": "Differences to the baseline with 95% intervals, and p after Holm",
    "curves": "Losses and pseudo Dice while training",
    "coefficients": "ARSL's alpha and beta",
    "size": "Dice against the size of a component",
    "radius": "Dice against the radius of a vessel",
    "bubbles": "Dice over multiply-adds; areas are parameters",
    "time": "Dice over the time of training",
    "case_1_slices": "The baseline's worst case, by all methods",
    "case_4_slices": "The case in which methods differ most",
}
TABLES = ("methods.csv", "classes.csv", "cases.csv", "cells.csv", "size.csv", "radius.csv")
PATHS = ("dataset", "labels", "plan", "split")


def collect(run: Path, out: Path) -> None:
    """Copy one comparison's numbers and pictures to `out`, which is replaced."""
    if out.exists():
        shutil.rmtree(out)
    (out / "tables").mkdir(parents=True)
    (out / "figures").mkdir()
    for name in TABLES:
        if (run / "tables" / name).is_file():
            shutil.copy(run / "tables" / name, out / "tables" / name)
    shutil.copy(run / "networks.json", out)
    shutil.copy(run / "split.json", out)
    experiment = yaml.safe_load((run / "experiment.yaml").read_text(encoding="utf-8"))
    for key in PATHS:
        if experiment.get(key):
            experiment[key] = Path(experiment[key]).name
    (out / "experiment.yaml").write_text(yaml.safe_dump(experiment, sort_keys=False), encoding="utf-8")
    drawn = [name for name in CAPTIONS if (run / "figures" / f"{name}.png").is_file()]
    for name in drawn:
        shutil.copy(run / "figures" / f"{name}.png", out / "figures")
    given = f" --dataset DATA/{experiment['dataset']}" if experiment.get("dataset") else ""
    lines = [
        f"# {experiment['name']}",
        "",
        "```sh",
        f"lightm compare examples/compare/{experiment['name']}.yaml{given}",
        f"python benchmarks/collect_comparison.py runs/{experiment['name']} docs/results/{experiment['name']}",
        "```",
        "",
        "Two AMD EPYC cores with AVX-512, two trainings side by side on one core each. Every number is in `tables/`.",
        "What they say: [docs/results](../README.md). What they mean: [docs/compare.md](../../compare.md).",
        "",
        (run / "tables" / "methods.md").read_text(encoding="utf-8").strip(),
        "",
        "## By class",
        "",
        (run / "tables" / "classes.md").read_text(encoding="utf-8").split("\n\n")[0].strip(),
        "",
    ]
    for name in drawn:
        lines += [f"![{CAPTIONS[name]}](figures/{name}.png)", "", f"*{CAPTIONS[name]}.*", ""]
    (out / "README.md").write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    collect(Path(sys.argv[1]), Path(sys.argv[2]))
