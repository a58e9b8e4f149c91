"""Why does the loss fall off a cliff when training with the adaptive region-specific loss (ARSL)?

    python benchmarks/arsl_cliff.py --out DIR [--data SHARED_DATA] [--minutes 30]

Three parts, each into CSV files in DIR/csv: the loss of a region without foreground against its soft false
positives (`curve.csv`), the share of such regions in real and made-up data (`shares.csv`), and short trainings that
take the loss apart while it falls (`epochs.csv`, `runs.csv`). Figures and the tables of docs/results/arsl-cliff.md
go to DIR/figures and DIR/tables.md. Runs that are finished in DIR are not repeated; without time left for one more,
the rest is drawn from what is there.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from arsl_cliff_figures import draw, read_csv, tables, takeover
from lightm.datasets.discovery import open_dataset
from lightm.datasets.phantoms import make_phantoms
from lightm.losses import AdaptiveRegion, SegmentationLoss, create_loss
from lightm.losses.regions import Grid, soft_counts
from lightm.preparation.patches import PatchDataset
from lightm.preparation.plan import make_plan
from lightm.preparation.preprocess import preprocess_dataset
from lightm.training import train_model

A_PLUS_B = 0.7
EPS = (1e-7, 1e-5, 1e-3, 1e-1, 1.0)
PATCH, EPOCHS, STEPS = 32, 20, 20
SGD = {"optimizer": "sgd", "momentum": 0.99, "weight_decay": 3e-5, "clip_norm": 12.0, "warmup_steps": 0}
# name: loss, its options, the recipe's settings. Those on top first: what time there is goes to them.
RUNS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "adamw published": ("ce+arsl", {}, {}),
    "adamw skip-empty": ("ce+arsl", {"skip_empty": True}, {}),
    "adamw dice": ("ce+dice", {}, {}),
    "sgd published": ("ce+arsl", {}, {**SGD, "lr": 1e-3}),
    "sgd skip-empty": ("ce+arsl", {"skip_empty": True}, {**SGD, "lr": 1e-3}),
    "sgd dice": ("ce+dice", {}, {**SGD, "lr": 1e-3}),
    **{f"adamw eps {eps:g}": ("ce+arsl", {"eps": eps}, {}) for eps in EPS if eps != 1e-5},
    "adamw regions of 8": ("ce+arsl", {"region_size": 8}, {}),
    "adamw sum": ("ce+arsl", {"reduction": "sum"}, {}),
    "sgd 1e-4 published": ("ce+arsl", {}, {**SGD, "lr": 1e-4}),
    "adamw published, seed 1": ("ce+arsl", {}, {}),
}


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows with the keys of the first as columns; floats with seven digits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        for row in rows:
            writer.writerow({key: f"{v:.7g}" if isinstance(v, float) else v for key, v in row.items()})


# ---- (a) the curve ----------------------------------------------------------------------------------------------


def curve() -> list[dict[str, Any]]:
    """Loss of one empty region of 512 voxels and its derivative by FP, from the loss itself, in float64."""
    rows = []
    target = torch.zeros(1, 8, 8, 8, dtype=torch.int64)
    for eps in EPS:
        loss = AdaptiveRegion(spatial_dims=3, num_classes=2, regions=1, eps=eps)
        for exponent in np.arange(-9, 2.51, 0.125):
            fp = 10.0**exponent
            p = torch.full((1, 1, 8, 8, 8), fp / 512, dtype=torch.float64)
            p = p.requires_grad_()
            value = loss(torch.cat([torch.log1p(-p), torch.log(p)], dim=1), target)
            (slope,) = torch.autograd.grad(value, p)  # FP is the sum of p: d loss / d FP is the mean over voxels
            closed = 1 / (1 + eps / (A_PLUS_B * fp))
            rows.append(
                {
                    "eps": eps,
                    "fp_voxels": fp,
                    "loss": value.item(),
                    "closed_form": closed,
                    "dloss_dfp": slope.mean().item(),
                    "dloss_dln_fp": slope.mean().item() * fp,
                }
            )
    return rows


# ---- (a) the share of empty regions ---------------------------------------------------------------------------------


def shares(data: Path, work: Path, patches: int = 100) -> list[dict[str, Any]]:
    """Share of (class, region) pairs without foreground, in patches as the default recipe draws them."""
    folders: dict[str, tuple[Path, list[int] | None]] = {}
    for kind, size in (("liver", 96), ("vessels", 96)):
        folder = work / f"{kind}-{size}"
        if not folder.is_dir():
            make_phantoms(kind, folder, cases=10, size=size, seed=0)
        folders[f"{kind} phantoms, {size}"] = (folder, None)
    folders[f"liver phantoms, 48, patch {PATCH} (the trainings here)"] = (training_data(work), [PATCH] * 3)
    for name, folder, patch in (
        ("MSD Hippocampus", "Dataset004_Hippocampus", None),
        ("Shenzhen X-ray", "Dataset802_ShenzhenXray", None),
        ("CHAOS CT, one case", "chaos_ct_1case", [128, 128, 128]),
    ):
        if (data / folder).is_dir():
            folders[name] = (data / folder, patch)
        else:
            print(f"{data / folder} is absent: left out", file=sys.stderr)
    rows = []
    for name, (folder, patch) in folders.items():
        dataset = open_dataset(folder)
        plan = make_plan(dataset, patch_size=patch)
        ids = [case.id for case in dataset.cases if case.label is not None][:100]
        cases = preprocess_dataset(dataset, plan, work / "cache", case_ids=ids)
        drawn = PatchDataset(cases, patch_size=plan.patch_size, seed=0)
        labels = torch.stack([drawn[index]["label"] for index in range(patches)])
        labels = labels[: patches // plan.batch_size * plan.batch_size]
        for count in (16, 8, 4, 1):
            rows.append({"data": name, **share_row(labels, plan.patch_size, plan.batch_size, count)})
            print(rows[-1], file=sys.stderr)
    return rows


def share_row(labels: Tensor, patch: Sequence[int], batch: int, count: int) -> dict[str, Any]:
    """Empty pairs of `labels` (patches, *spatial) on a grid of `count` regions an axis, per sample and pooled."""
    grid = Grid.by_count(patch, [count] * len(patch))
    classes = [k for k in labels.unique().tolist() if k not in (0, 255)]
    valid = grid.sum((labels != 255).float())
    held = torch.stack([grid.sum((labels == k).float()) for k in classes], dim=1)  # patches, classes, *grid
    known = (valid > 0).unsqueeze(1).expand_as(held)

    def pooled(values: Tensor) -> Tensor:
        return values.unflatten(0, (-1, batch)).sum(1)

    pooled_known = pooled(known.float()) > 0
    empty = (held == 0) & known
    return {
        "patch": "x".join(map(str, patch)),
        "regions_per_axis": count,
        "voxels_per_region": math.prod(patch) / math.prod(grid.shape),
        "share_empty": (empty.sum() / known.sum()).item(),
        "share_empty_by_class": " ".join(
            f"{(empty[:, i].sum() / known[:, i].sum()).item():.3f}" for i in range(len(classes))
        ),
        "batch": batch,
        "share_empty_batch": (((pooled(held) == 0) & pooled_known).sum() / pooled_known.sum()).item(),
        "patches": len(labels),
    }


# ---- (b), (c) trainings ---------------------------------------------------------------------------------------------


class Probe:
    """Takes the loss of every training step apart, as a forward hook of all modules.

    The published ARSL (empty regions kept, mean) is computed beside the run's own loss, with the run's eps and grid,
    and split into what its empty (sample, class, region) triples add to the mean and what the others add. A row an
    epoch goes to `path` at once.
    """

    def __init__(self, path: Path, options: dict[str, Any]) -> None:
        known = {key: value for key, value in options.items() if key in ("eps", "region_size")}
        self.arsl = AdaptiveRegion(spatial_dims=3, num_classes=3, **known)
        self.ce = create_loss("ce", spatial_dims=3, num_classes=3)
        self.path, self.steps, self.rows = path, [], []
        self.gradients: dict[str, float] = {}

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if not isinstance(module, SegmentationLoss) or not module.training or module in (self.arsl, self.ce):
            return
        logits, target = inputs[0].detach(), inputs[1]
        step = {"loss": float(output.detach())}
        if not self.steps:
            self.gradients = self.logit_gradients(logits, target)
        with torch.no_grad():
            step.update(self.parts(logits, target))
        self.steps.append(step)
        if len(self.steps) == STEPS:
            mean = {key: float(np.mean([s[key] for s in self.steps])) for key in self.steps[0]}
            mean["fp_empty_median"] = math.exp(mean.pop("ln_fp_empty_median"))
            self.rows.append({"epoch": len(self.rows) + 1, **mean, **self.gradients})
            write_csv(self.path, self.rows)
            self.steps = []

    def tables(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Loss, FP, empty, counted: per sample, class and region."""
        arsl = self.arsl
        grid = arsl.grid(target.shape[1:])
        prepared = arsl._prepare(logits, target)
        tp, fp, fn = soft_counts(prepared.probabilities, prepared.target, grid, first=1)
        alpha, beta = arsl._weights(fp, fn)
        value = 1 - (tp + arsl.eps) / (tp + alpha * fp + beta * fn + arsl.eps)
        known = (grid.sum((target != 255).float()) > 0).unsqueeze(1).expand_as(tp)
        return value, fp, (tp + fn).detach() < 0.5, known

    def parts(self, logits: Tensor, target: Tensor) -> dict[str, float]:
        """ARSL of one batch by parts, and what the empty regions would add with other eps."""
        value, fp, empty, known = self.tables(logits, target)
        total, empty = known.sum(), empty & known
        fp = fp[empty].double()
        return {
            "ce": self.ce(logits, target).item(),
            "arsl": (value[known].sum() / total).item(),
            "arsl_empty": (value[empty].sum() / total).item(),
            "arsl_rest": (value[known & ~empty].sum() / total).item(),
            "share_empty": (empty.sum() / total).item(),
            "fp_empty_mean": fp.mean().item(),
            "ln_fp_empty_median": fp.clamp(min=1e-30).median().log().item(),
            **{f"empty_at_{eps:g}": ((1 / (1 + eps / (A_PLUS_B * fp))).sum() / total).item() for eps in EPS},
        }

    def logit_gradients(self, logits: Tensor, target: Tensor) -> dict[str, float]:
        """Sum of |d/d logit| over the foreground logits of empty and of other regions, for CE and ARSL."""
        with torch.enable_grad():
            logits = logits.clone().requires_grad_()
            value, _, empty, known = self.tables(logits, target)
            (arsl,) = torch.autograd.grad(value[known].mean(), logits)
            (ce,) = torch.autograd.grad(self.ce(logits, target), logits)
        where = self.arsl.grid(target.shape[1:]).spread((empty & known).float()) > 0
        result = {}
        for name, grad in (("ce", ce[:, 1:].abs()), ("arsl", arsl[:, 1:].abs())):
            result[f"grad_{name}_empty"] = grad[where].sum().item()
            result[f"grad_{name}_rest"] = grad[~where].sum().item()
        return result


def training_data(work: Path) -> Path:
    """Thirty liver phantoms of 48 voxels."""
    folder = work / "liver-48"
    if not folder.is_dir():
        make_phantoms("liver", folder, cases=30, size=48, seed=0)
    return folder


def train(name: str, work: Path) -> list[dict[str, Any]]:
    """One training; rows of its epochs with the run's name, from the folder where it is finished already."""
    loss, options, recipe = RUNS[name]
    run = work / "runs" / name.replace(",", "").replace(" ", "-")
    table = run.parent / f"{run.name}.csv"
    if not (run / "model").is_dir():
        shutil.rmtree(run, ignore_errors=True)
        handle = register_module_forward_hook(Probe(table, options))
        try:
            train_model(
                training_data(work),
                run,
                loss=loss,
                epochs=EPOCHS,
                patch_size=[PATCH],
                batch_size=2,
                settings={"steps_per_epoch": STEPS, "loss_options": options, **recipe},
                seed=1 if name.endswith("seed 1") else 0,
                val_patches=24,
            )
        finally:
            handle.remove()
    dice = {int(float(row["epoch"])): row for row in read_csv(run / "history.csv")}
    rows: list[dict[str, Any]] = []
    for row in read_csv(table):
        history = dice[int(row["epoch"]) - 1]  # counted from 0 there
        scores = {key.replace("pseudo_dice/", "dice_"): history[key] for key in history if "pseudo_dice/" in key}
        rows.append({"run": name, **row, "pseudo_dice": history["pseudo_dice"], **scores})
    return rows


def summary(epochs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row a run: when the empty regions' loss was expected to fall, when it fell, what fell, how the run ended.

    - `epoch_cliff_without`: first epoch at which the empty regions of the run of the same optimiser that leaves them
      out (skip-empty) would have a mean loss below 1/2 with this eps: the cliff if their gradient did nothing.
    - `epoch_takeover`: first epoch whose first batch has more gradient from ARSL than from cross-entropy on the
      logits of empty regions. `epoch_cliff`: first epoch with a mean loss of the empty regions below 1/2.
    - `fall_*`: from the last epoch before the cliff with that loss above 0.9 (the first, if none) to the first with
      it below 0.3 (or the last one). Scores: means of the last three epochs.
    """
    rows = []
    by_run: dict[str, list[dict[str, Any]]] = {}
    for row in epochs:
        by_run.setdefault(row["run"], []).append(row)
    for name, of in by_run.items():
        loss, options, _ = RUNS[name]
        eps, size = options.get("eps", 1e-5), options.get("region_size")
        voxels = float(size**3 if size else (PATCH / 16) ** 3)
        summed = options.get("reduction") == "sum"
        limit = takeover(eps, voxels, regions=16**3 if summed else 1)
        published = "arsl" in loss and not options.get("skip_empty")
        value = {key: [float(row[key]) for row in of] for key in of[0] if key != "run" and of[0][key]}
        relative = [empty / share for empty, share in zip(value["arsl_empty"], value["share_empty"], strict=True)]
        stronger = [a > c for a, c in zip(value["grad_arsl_empty"], value["grad_ce_empty"], strict=True)]
        without = by_run.get(f"{name.split()[0]} skip-empty", [])
        key = f"empty_at_{eps:g}"
        passed = [float(row[key]) < 0.5 * float(row["share_empty"]) for row in without]
        cliff = first([r < 0.5 for r in relative]) if published else ""
        result: dict[str, Any] = {
            "run": name,
            "eps": eps if "arsl" in loss else "",
            "voxels_per_region": voxels,
            "fp_half": eps / A_PLUS_B if published else "",
            "fp_takeover": limit if published else "",
            "epoch_cliff_without": (first(passed) or f">{len(without)}") if published and not size else "",
            "epoch_takeover": first(stronger) if published and not summed else "",
            "epoch_cliff": (cliff or f">{len(of)}") if published else "",
        }
        ends = [i for i in range((cliff or len(of)) - 1) if relative[i] > 0.9]
        start = ends[-1] if ends else 0
        stop = next((i for i, r in enumerate(relative) if r < 0.3), len(of) - 1)
        result.update(fall_from=start + 1 if cliff else "", fall_to=stop + 1 if cliff else "")
        for key in ("loss", "ce", "arsl_empty", "arsl_rest"):
            fall = value[key][start] - value[key][stop]
            result[f"fall_{key.replace('arsl_', '')}"] = fall if cliff else ""
        result["fp_median"] = value["fp_empty_median"][-1]
        for key in ("loss", "ce", "dice_liver", "dice_tumour"):
            result[key] = float(np.mean(value[key][-3:]))
        rows.append(result)
    return rows


def first(true: Sequence[bool]) -> int | str:
    """Number, from 1, of the first True; empty text if there is none."""
    return next((index for index, value in enumerate(true, start=1) if value), "")


def main() -> None:
    """Curve, shares, trainings, then figures and tables from the files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the real data sets")
    parser.add_argument("--minutes", type=float, default=30.0, help="no training starts after them")
    given = parser.parse_args()
    begun = time.monotonic()
    torch.set_num_threads(1)
    os.environ["LIGHTM_CACHE"] = str(given.out / "cache")
    folder = given.out / "csv"
    write_csv(folder / "curve.csv", curve())
    if not (folder / "shares.csv").is_file():
        write_csv(folder / "shares.csv", shares(given.data, given.out))
    epochs: list[dict[str, Any]] = []
    for name in RUNS:
        if time.monotonic() - begun < 60 * given.minutes:
            epochs += train(name, given.out)
            write_csv(folder / "epochs.csv", epochs)
            write_csv(folder / "runs.csv", summary(epochs))
    draw(folder, given.out / "figures")
    (given.out / "tables.md").write_text(tables(folder), encoding="utf-8")


if __name__ == "__main__":
    main()
