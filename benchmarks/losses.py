"""Time and peak memory of the losses against MONAI's Dice + cross-entropy: forward and backward.

    python benchmarks/losses.py > benchmarks/results/losses.md

Prints a Markdown table. Every pair of calls alternates in one process; ratios are medians pair by pair, and are what
to quote. Peak memory is the growth of the process beyond its inputs in one forward and backward pass, each in a
process of its own (Linux: from /proc).
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import lightm
from lightm.losses import create_loss

import monai  # isort: skip  (after lightm, which sets how PyTorch's threads wait)
import torch  # isort: skip
from torch import Tensor  # isort: skip

NAMES = ("ce+arsl", "ce+arsl, 1/16 ignored", "ce+dice", "ce+tversky", "ce+focal-tversky", "bce+dice", "topk+dice")
BATCH = 2


def inputs(name: str, classes: int, size: int) -> tuple[Tensor, Tensor]:
    """Random logits and labels; with "ignored" in the name, a slab of a sixteenth of the voxels is left out."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(BATCH, classes, size, size, size, generator=generator)
    target = torch.randint(0, classes, (BATCH, size, size, size), generator=generator)
    if "ignored" in name:
        target[:, : size // 16] = 255
    return logits.requires_grad_(), target


def loss_of(name: str, classes: int) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss of that name, or MONAI's."""
    if name != "monai":
        return create_loss(name.split(",")[0], spatial_dims=3, num_classes=classes)
    loss = monai.losses.DiceCELoss(softmax=True, to_onehot_y=True, include_background=False)
    return lambda logits, target: loss(logits, target.unsqueeze(1))


def step(loss: Callable[[Tensor, Tensor], Tensor], logits: Tensor, target: Tensor) -> float:
    """Seconds of a forward and a backward pass."""
    logits.grad = None
    start = time.perf_counter()
    loss(logits, target).backward()
    return time.perf_counter() - start


def resident(field: str) -> float:
    """A field of /proc/self/status in MB."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field + ":"))
    return int(line.split()[1]) / 1024


def memory(name: str, classes: int, size: int) -> float:
    """MB that one pass needs beyond its inputs; call it in a fresh process."""
    loss, small = loss_of(name, classes), inputs(name, classes, 16)
    step(loss, *small)  # libraries and kernels are loaded before
    logits, target = inputs(name, classes, size)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident("VmRSS")
    step(loss, logits, target)
    return resident("VmHWM") - before


def measured(name: str, classes: int, size: int) -> float:
    """`memory` in a process of its own."""
    command = [sys.executable, __file__, "--memory", name, "--classes", str(classes), "--size", str(size)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    """Print the table, or with --memory one number for it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--classes", type=int, nargs="+", default=[2, 3, 5])
    parser.add_argument("--memory")
    options = parser.parse_args()
    if options.memory:
        print(memory(options.memory, options.classes[0], options.size))
        return
    print("# Losses against MONAI's Dice + cross-entropy\n")
    print(
        f"`python benchmarks/losses.py --size {options.size} --runs {options.runs}`, LightM {lightm.__version__}, ",
        end="",
    )
    print(f"MONAI {monai.__version__}, torch {torch.__version__}, {torch.get_num_threads()} CPU threads, float32.")
    print(f"Batch {BATCH} of {options.size}^3, forward and backward; MONAI's DiceCELoss without background.\n")
    print("| classes | loss | ms | MONAI, ms | time, ratio | MB | MONAI, MB | memory, ratio |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for classes in options.classes:
        theirs, their_input = loss_of("monai", classes), inputs("monai", classes, options.size)
        their_memory = measured("monai", classes, options.size)
        for name in NAMES:
            ours, our_input = loss_of(name, classes), inputs(name, classes, options.size)
            step(ours, *our_input)
            step(theirs, *their_input)
            pairs = [(step(ours, *our_input), step(theirs, *their_input)) for _ in range(options.runs)]
            a, b = (statistics.median(side) * 1e3 for side in zip(*pairs, strict=True))
            ratio = statistics.median(one / two for one, two in pairs)
            mb = measured(name, classes, options.size)
            print(
                f"| {classes} | {name} | {a:.0f} | {b:.0f} | {ratio:.2f} | {mb:.0f} | {their_memory:.0f} "
                f"| {mb / their_memory:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
