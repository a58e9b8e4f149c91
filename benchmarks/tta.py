"""What test-time flips do to the DSC of models that were trained with mirroring, and that they are refused for others.

    python benchmarks/tta.py Dataset802_ShenzhenXray --axes 1
    python benchmarks/tta.py Dataset004_Hippocampus --axes 2 --patch-size 32 48 32
    python benchmarks/tta.py Dataset004_Hippocampus --axes none --max-time 20s --patch-size 32 48 32

A training without mirroring (`--axes none`) must refuse `--tta`. With axes the validation cases are predicted with and
without flips, with the same weights. A row is added to the CSV file for every class. DATASET may be a kind of phantom:
liver, vessels or xray.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
from pathlib import Path

import numpy as np

import lightm
from lightm.datasets.discovery import open_dataset
from lightm.images.io import read_volume
from lightm.inference.postprocess_choice import case_dice
from lightm.inference.predictor import Predictor

EPOCHS = 30  # of 50 steps with two patches
PHANTOMS = {"liver": 48, "vessels": 48, "xray": 96}


def measure(dataset: Path, axes: list[int], given: argparse.Namespace, folder: Path) -> list[dict[str, object]]:
    """Train, predict the validation cases with and without flips, and return a row for each class."""
    network = given.network
    options = {"network": network, "batch_size": 2, "augment": {"mirror_axes": axes}, "test": False, "val_cases": 0}
    options |= {"max_time": given.max_time, "epochs": EPOCHS, "patch_size": given.patch_size}
    run = lightm.train(dataset, folder / "run", **options).training
    row = {"data": dataset.name, "network": network, "mirror_axes": " ".join(map(str, axes)) or "none"}
    row |= {"train_seconds": round(run.train_seconds), "epochs": run.epochs}
    if not axes:
        try:
            Predictor.from_folder(run.run_dir / "model", tta=True)
        except lightm.InputError:
            return [{**row, "class": "all", "tta": "refused"}]
        raise SystemExit("flips of a model without mirroring were not refused")
    data, plan = open_dataset(dataset), run.plan
    scores: dict[bool, np.ndarray] = {}
    for tta in (False, True):
        predictor = Predictor.from_folder(run.run_dir / "model", tta=tta)
        found = []
        for case in map(data.case, run.split.val):
            predicted = predictor.predict_volumes([read_volume(path) for path in case.images])
            label = read_volume(case.label, kind="label")  # type: ignore[arg-type]
            found.append(case_dice(predicted.data, label.data, plan.values[1:], plan.ignore_label))
        scores[tta] = np.stack(found)
    rows = []
    for column, name in [*enumerate(plan.classes[1:]), (slice(None), "mean")]:
        plain, flipped = (scores[tta][:, column].reshape(len(run.split.val), -1).mean(1) for tta in (False, True))
        gain = flipped - plain
        more = {"class": name, "tta": "allowed", "cases": len(gain), "dsc": plain.mean(), "dsc_tta": flipped.mean()}
        more |= {"difference": gain.mean(), "worst_case": gain.min(), "better": (gain > 0).sum()}
        rows.append(row | {key: round(v, 4) if isinstance(v, float) else v for key, v in more.items()})
    return rows


def main() -> None:
    """Measure one data set and add its rows to the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dataset")
    parser.add_argument("--axes", default="none", help="2 or 0,1,2; none: no mirroring")
    parser.add_argument("--max-time", default="10m")
    parser.add_argument("--network", default="unet")
    parser.add_argument("--patch-size", type=int, nargs="+", help="default: the plan's")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/tta.csv"))
    given = parser.parse_args()
    axes = [] if given.axes == "none" else [int(axis) for axis in given.axes.split(",")]
    with tempfile.TemporaryDirectory() as temporary:
        folder, dataset = Path(temporary), Path(given.dataset)
        if given.dataset in PHANTOMS:
            dataset = lightm.phantoms(given.dataset, folder / given.dataset, cases=60, size=PHANTOMS[given.dataset])
        rows = measure(dataset, axes, given, folder)
    columns = ["data", "network", "mirror_axes", "train_seconds", "epochs", "class", "tta"]
    columns += ["cases", "dsc", "dsc_tta", "difference", "worst_case", "better"]
    new = not given.out.exists()
    with given.out.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
