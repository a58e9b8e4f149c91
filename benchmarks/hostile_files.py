"""What happens to files that break readers: `python benchmarks/hostile_files.py FOLDER --out FILE.csv`.

Every file below FOLDER is read as an image and as a label map, by its own name and, where its ending is not one that is
read, once more as NIfTI and as DICOM. Each reading is a process of its own, with its time and the memory it grew by.
One row for each kind of file and outcome; anything that is neither a volume nor one error that names the file is
listed and gives exit code 1. Linux.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import resource
import shutil
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from multiprocessing.connection import Connection
from pathlib import Path

from lightm.errors import InputError
from lightm.images.io import read_volume

LIMIT_S = 60.0
READ = (".nii", ".nii.gz", ".png", ".dcm")


def read(path: Path, kind: str, sender: Connection) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.monotonic()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            read_volume(path, kind=kind)  # type: ignore[arg-type]
        outcome = "volume"
    except InputError as error:
        outcome = "error naming the file" if path.name in str(error) else f"error without the name: {error}"
    except BaseException as error:
        outcome = f"{type(error).__name__}: {error}"
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    sender.send((outcome, time.monotonic() - start, grown / 1024))


def attempt(path: Path, kind: str) -> tuple[str, float, float]:
    """Outcome, seconds and MiB of one reading; a reader that dies or hangs is an outcome too."""
    fork = multiprocessing.get_context("fork")
    receiver, sender = fork.Pipe(duplex=False)
    child = fork.Process(target=read, args=(path, kind, sender))
    child.start()
    sender.close()
    try:
        if not receiver.poll(LIMIT_S):
            child.kill()
            return "hang", LIMIT_S, 0.0
        return receiver.recv()
    except EOFError:
        return "died", 0.0, 0.0
    finally:
        child.join()
        receiver.close()


def ending_of(path: Path) -> str:
    return next((ending for ending in READ if path.name.lower().endswith(ending)), "other")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    read_volume_once()
    rows: dict[tuple[str, str, str], list[tuple[float, float]]] = defaultdict(list)
    bad = []
    with tempfile.TemporaryDirectory() as scratch:
        for path in sorted(file for file in given.folder.rglob("*") if file.is_file()):
            tries = [(ending_of(path), path)]
            if ending_of(path) == "other":
                for ending in (".nii", ".dcm"):
                    copy = Path(scratch) / f"odd{ending}"
                    shutil.copyfile(path, copy)
                    tries.append((f"other as {ending}", copy))
            for ending, file in tries:
                for kind in ("image", "label"):
                    outcome, seconds, grown = attempt(file, kind)
                    rows[ending, kind, outcome.split(":")[0]].append((seconds, grown))
                    if outcome not in ("volume", "error naming the file"):
                        bad.append(f"{path} ({ending}, {kind}): {outcome}")
    with given.out.open("w", newline="", encoding="utf-8") as stream:
        table = csv.writer(stream)
        table.writerow(["files", "read as", "outcome", "count", "slowest_s", "most_memory_mib"])
        for key, values in sorted(rows.items()):
            table.writerow([*key, len(values), f"{max(v[0] for v in values):.2f}", f"{max(v[1] for v in values):.0f}"])
    print(given.out.read_text(encoding="utf-8"), *bad, sep="\n")
    return 1 if bad else 0


def read_volume_once() -> None:
    """Let the readers import what they need, so that no child pays for it."""
    import nibabel  # noqa: F401
    import PIL.Image  # noqa: F401
    import pydicom  # noqa: F401


if __name__ == "__main__":
    sys.exit(main())
