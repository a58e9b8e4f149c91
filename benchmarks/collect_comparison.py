"""Keep what a comparison showed: `python benchmarks/collect_comparison.py runs/NAME docs/results/NAME`.

Copies the tables, the figures named below and the experiment (with its data set by name alone), and writes README.md
with the tables in it. Every number there is from a file in the same folder, which `lightm compare` wrote. With a single
folder, docs/results, its README.md gets a table of each comparison that lies there, from the same files.
"""

from __future__ import annotations

import csv
import re
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
TABLES = ("methods.csv", "classes.csv", "cases.csv", "trials.csv", "size.csv", "radius.csv")
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


def overview(results: Path) -> None:
    """Fill the part of README.md that follows each line `<!-- NAME -->` with the table of the comparison NAME."""
    readme = results / "README.md"

    def filled(match: re.Match[str]) -> str:
        with (results / match[1] / "tables" / "methods.csv").open(newline="", encoding="utf-8") as stream:
            rows = list(csv.DictReader(stream))
        seeds = sorted({row["seeds"] for row in rows})
        head = ["method", "DSC", "difference", "p", "verdict", "SD over seeds", "parameters (M)", "training (s)"]
        lines = [
            f"[{match[1]}]({match[1]}/README.md): {rows[0]['cases']} test cases, seeds {', '.join(seeds)}.",
            "",
            f"| {' | '.join(head)} |",
            "| --- | ---: | ---: | ---: | --- | ---: | ---: | ---: |",
        ]
        for row in rows:
            lines.append("| " + " | ".join(_cells(row)) + " |")
        return f"<!-- {match[1]} -->\n" + "\n".join(lines) + "\n<!-- end -->"

    text = readme.read_text(encoding="utf-8")
    text = re.sub(r"<!-- (?!end)([\w-]+) -->\n.*?<!-- end -->", filled, text, flags=re.S)
    readme.write_text(text, encoding="utf-8")


def _cells(row: dict[str, str]) -> list[str]:
    def interval(name: str, sign: str = "") -> str:
        mean, low, high = (float(row[f"{name} {part}"]) for part in ("mean", "low", "high"))
        return f"{mean:{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]"

    baseline = row["baseline"] == "True"
    p = row["dsc difference p_holm"]
    return [
        row["method"] + (" (baseline)" if baseline else ""),
        interval("dsc"),
        "–" if baseline else interval("dsc difference", "+"),
        "–" if not p else "<0.001" if float(p) < 0.001 else f"{float(p):.3f}",
        row["dsc difference verdict"] or "–",
        f"{float(row['dsc seed_sd']):.3f}" if row["dsc seed_sd"] else "–",
        f"{int(row['parameters']) / 1e6:.3f}" if row["parameters"] else "–",
        f"{float(row['train_seconds']):.0f}",
    ]


if __name__ == "__main__":
    if len(sys.argv) == 2:
        overview(Path(sys.argv[1]))
    elif len(sys.argv) == 3:
        collect(Path(sys.argv[1]), Path(sys.argv[2]))
    else:
        sys.exit(__doc__)
