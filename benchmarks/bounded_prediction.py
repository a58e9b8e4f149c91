"""Seconds and peak memory of prediction with and without a limit, on a made CT of 600 slices and on a real CT.

    python benchmarks/bounded_prediction.py [--ct DATASET] [--only made|real] [--out FILE.csv]

The made CT is 512 x 512 x 600 voxels of 0.75 x 0.75 x 1 mm, int16 .nii.gz: a body, organs, vessels and noise, the same
at each run. The networks are untrained (seed 0): speed and memory do not depend on the weights, and labels of an
untrained network, which change from voxel to voxel, show any difference between two ways to predict. Each prediction
runs in a process of its own; the peak is that process's largest resident set, Python and PyTorch included.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch

from lightm import __version__
from lightm.images.io import read_volume
from lightm.nets import create
from lightm.nets.folder import save_model
from lightm.preparation.fingerprint import ChannelIntensities, Fingerprint
from lightm.preparation.plan import ChannelNormalization, Plan

SHAPE, SPACING = (600, 512, 512), (1.0, 0.75, 0.75)
CLASSES = ("background", "liver", "kidneys", "spleen", "vessels")
COLUMNS = ("case", "shape", "spacing_mm", "plan_spacing_mm", "network", "patch", "classes", "limit", "windows",
           "seconds", "cpu_seconds", "peak_mb", "labels_sha256", "same_as_no_limit", "threads", "lightm",
           "torch")  # fmt: skip


def make_ct(path: Path) -> None:
    """Write the CT: ellipsoids in Hounsfield units with noise, slice by slice; the same bytes at each run."""
    z, y, x = (np.linspace(-1, 1, size, dtype=np.float32) for size in SHAPE)
    plane_y, plane_x = np.meshgrid(y, x, indexing="ij")
    # Centre and half axes (z, y, x) as a part of half the volume, Hounsfield units.
    organs = [(0.0, 0.0, -0.4, 0.35, 0.3, 0.5, 60), (0.1, 0.3, 0.4, 0.12, 0.12, 0.08, 30),
              (0.1, 0.3, -0.35, 0.12, 0.12, 0.08, 30), (-0.1, 0.1, 0.55, 0.15, 0.2, 0.12, 50),
              (0.0, 0.25, 0.0, 2.0, 0.06, 0.06, 180)]  # fmt: skip
    rng = np.random.default_rng(0)
    voxels = np.empty(SHAPE, np.int16)
    for index, height in enumerate(z):
        plane = np.where((plane_y / 0.75) ** 2 + (plane_x / 0.9) ** 2 < 1, np.float32(-20), np.float32(-1000))
        for at_z, at_y, at_x, long, wide, deep, value in organs:
            rest = 1 - ((height - at_z) / long) ** 2
            if rest > 0:
                plane[((plane_y - at_y) / wide) ** 2 + ((plane_x - at_x) / deep) ** 2 < rest] = value
        voxels[index] = plane + rng.normal(0, 15, plane.shape).astype(np.float32)
    image = nibabel.Nifti1Image(voxels.T, np.diag([*reversed(SPACING), 1.0]))
    nibabel.save(image, path)


def make_model(folder: Path, network: str, spacing_mm: tuple[float, ...], patch: int) -> None:
    """Write a model folder of an untrained network."""
    torch.manual_seed(0)
    arguments = {"spatial_dims": 3, "in_channels": 1, "out_channels": len(CLASSES)}
    stats = ChannelIntensities(mean=0, std=100, median=0, low=-200, high=300, min=-1000, max=1000)
    steps = list(spacing_mm)
    plan = Plan(
        dataset="made",
        spatial_dims=3,
        channels=["CT"],
        labels={name: index for index, name in enumerate(CLASSES)},
        file_ending=".nii.gz",
        spacing_mm=steps,
        patch_size=[patch] * 3,
        batch_size=2,
        normalization=[ChannelNormalization(scheme="ct", clip_low=-200, clip_high=300, mean=0, std=100)],
        fingerprint=Fingerprint(
            cases=1,
            data_hash="0",
            shape_min=list(SHAPE),
            shape_median=list(SHAPE),
            shape_max=list(SHAPE),
            spacing_mm_min=steps,
            spacing_mm_median=steps,
            spacing_mm_max=steps,
            intensities=[stats],
            class_fractions=dict.fromkeys(CLASSES, 0.2),
            class_cases=dict.fromkeys(CLASSES, 1),
        ),
    )
    save_model(
        folder,
        network={"name": network, **arguments, "options": {}},
        state_dict=create(network, **arguments).state_dict(),
        plan=plan.model_dump(mode="json"),
        training={},
    )


def child(request: dict[str, Any]) -> None:
    """Predict one image and print what was measured as JSON."""
    from lightm.inference import Predictor
    from lightm.inference.budget import peak_resident_bytes

    windows = [0]
    predictor = Predictor.from_folder(request["model"], max_memory=request["limit"])
    started, started_work = time.perf_counter(), time.process_time()
    labels = predictor.predict_files(
        [Path(request["image"])], progress=lambda done, total: windows.__setitem__(0, total)
    )
    seconds, work = time.perf_counter() - started, time.process_time() - started_work
    geometry = repr((labels.shape, labels.affine.tolist())).encode()
    print(
        json.dumps(
            {
                "seconds": round(seconds, 1),
                "cpu_seconds": round(work, 1),
                "windows": windows[0],
                "peak_mb": round((peak_resident_bytes() or 0) / 1e6),
                "labels_sha256": hashlib.sha256(geometry + labels.data.tobytes()).hexdigest()[:16],
                "found": np.unique(labels.data).tolist(),
                "threads": torch.get_num_threads(),
            }
        )
    )


def measured(image: Path, model: Path, limit: int | None) -> dict[str, Any]:
    """Run `child` in a fresh process."""
    request = json.dumps({"image": str(image), "model": str(model), "limit": limit})
    done = subprocess.run([sys.executable, __file__, "--child", request], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    """Make what is needed, predict by turns, write the rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ct", type=Path, help="a folder in the nnU-Net raw layout with one real CT")
    parser.add_argument("--only", choices=["made", "real"])
    parser.add_argument("--network", default="spm-lightm-unet")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child")
    given = parser.parse_args()
    if given.child:
        child(json.loads(given.child))
        return
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="lightm-bounded-") as place:
        jobs: list[tuple[str, Path, tuple[float, ...] | None, int, list[int | None]]] = []
        if given.ct is not None and given.only != "made":
            real = sorted((given.ct / "imagesTr").glob("*.nii.gz"))[0]
            jobs.append((given.ct.name, real, (1.5, 1.5, 1.5), 96, [None, 2 * 10**9, 13 * 10**8]))
            jobs.append((given.ct.name, real, None, 128, [None, 2 * 10**9]))
        if given.only != "real":
            made = Path(place) / "made_0000.nii.gz"
            make_ct(made)
            jobs.append(("made", made, (1.5, 1.5, 1.5), 128, [3 * 10**9, 18 * 10**8]))
            jobs.append(("made", made, None, 96, [3 * 10**9]))
        for case, image, spacing, patch, limits in jobs:
            volume = read_volume(image)
            model = Path(place) / f"model-{case}-{spacing}-{patch}"
            make_model(model, given.network, volume.to_canonical().spacing_mm if spacing is None else spacing, patch)
            first = ""
            for limit in limits:
                found = measured(image, model, limit)
                first = first or found["labels_sha256"]
                row = {
                    "case": case,
                    "shape": "x".join(map(str, volume.shape)),
                    "spacing_mm": "x".join(f"{step:.4g}" for step in volume.spacing_mm),
                    "plan_spacing_mm": "own" if spacing is None else "x".join(map(str, spacing)),
                    "network": given.network,
                    "patch": patch,
                    "classes": len(CLASSES),
                    "limit": "none" if limit is None else f"{limit / 1e9:g}GB",
                    "same_as_no_limit": found["labels_sha256"] == first if limits[0] is None else "",
                    "lightm": __version__,
                    "torch": torch.__version__,
                    **found,
                }
                print(row, flush=True)
                rows.append(row)
                if given.out is not None:
                    with given.out.open("w", newline="", encoding="utf-8") as file:
                        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
                        writer.writeheader()
                        writer.writerows(rows)


if __name__ == "__main__":
    main()
