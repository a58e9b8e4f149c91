"""How fast do the networks learn? Pseudo Dice after each of four short epochs, by stem, layer and position convolution.

    python benchmarks/stem_and_position.py DATASET OUT > benchmarks/results/stem-and-position.md

DATASET is MSD Hippocampus in the nnU-Net raw layout; OUT takes a run folder per row, and rows that are already
there are not run again. Prints a Markdown page.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import torch

from lightm import __version__, train
from lightm.nets import count_parameters, create

SPM = {"layer": "spm", "pooling": "add", "bottleneck_layers": 3}
ROWS = [
    ("RVM, max", {}),
    ("RVM, max", {"stem": "conv"}),
    ("RVM, max", {"stem": "conv", "position_conv": True}),
    ("SPM, add", SPM),
    ("SPM, add", {**SPM, "stem": "conv"}),
    ("SPM, add", {**SPM, "stem": "conv", "position_conv": True}),
]


def main() -> None:
    """Run the rows that are missing and print the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dataset", type=Path)
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    print("# Stem and position convolution\n")
    print(f"`python benchmarks/stem_and_position.py {given.dataset.name} OUT`, LightM {__version__}, ", end="")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} CPU threads, float32.")
    print("16 filters, default recipe (AdamW 1e-2, cross-entropy + Dice), 4 epochs of 50 steps, seed 0; pseudo Dice")
    print("(anterior, posterior) on the same 16 validation patches after each epoch. One seed: read it as a trend.\n")
    print("| layer, pooling | stem | position convolution | parameters | 50 steps | 100 | 150 | 200 | seconds |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for index, (what, options) in enumerate(ROWS):
        run = given.out / f"row-{index}"
        if not (run / "model").is_dir():
            train(
                given.dataset,
                run,
                network="lightm-unet-small",
                network_options=options,
                epochs=4,
                steps_per_epoch=50,
                test=False,
            )
        with (run / "history.csv").open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        names = [name for name in rows[0] if name.startswith("pseudo_dice/")]
        dice = " | ".join(", ".join(f"{float(row[name]):.3f}" for name in names) for row in rows)
        parameters = count_parameters(create("lightm-unet-small", 3, 1, len(names) + 1, **options))
        seconds = sum(float(row["epoch_seconds"]) for row in rows)
        stem = "full" if options.get("stem") == "conv" else "depthwise"
        position = "yes" if options.get("position_conv") else "no"
        print(f"| {what} | {stem} | {position} | {parameters:,} | {dice} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
