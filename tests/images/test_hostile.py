"""Hostile and odd files: each ends in a result or in one error that names it, in bounded time and memory.

`LIGHTM_FUZZ=20000 pytest tests/images/test_hostile.py -s -k mutations --timeout 0` runs as many of each kind and prints
a table.
"""

from __future__ import annotations

import gzip
import os
import shutil
import struct
import subprocess
import sys
import time
import tracemalloc
import warnings
import zipfile
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from lightm.datasets.check import check_dataset
from lightm.datasets.description import read_description
from lightm.datasets.discovery import open_dataset
from lightm.datasets.split import load_split
from lightm.errors import InputError, LightMError
from lightm.images import limits
from lightm.images.io import read_volume
from lightm.preparation.plan import load_plan

from .mutations import MAKERS, chunk, good_nifti, gzip_bomb, png_of

RUNS = int(os.environ.get("LIGHTM_FUZZ", "40"))
# A megabyte beside the 32 that trailing bytes and extensions may take, and what decoders keep.
MAX_MB, MAX_SECONDS = 100, 20.0


def outcome(path: Path, kind: str, turn: int) -> str:
    """Read one file as whatever its ending says; "result" or "error". Any other error is the test's failure."""
    try:
        if kind == "dataset.json":
            if turn % 2:
                load_split(path, ["a"])
            else:
                read_description(path)
        elif kind == "plan.yaml":
            load_plan(path)
        else:
            volume = read_volume(path, kind="label" if turn % 3 == 0 and "DICOM" not in kind else "image")
            assert np.isfinite(volume.data).all()
            assert np.isfinite(volume.affine).all()
    except InputError as error:
        assert path.name in str(error) or str(path) in str(error)  # noqa: PT017
        assert len(str(error)) < 3000  # noqa: PT017
        return "error"
    return "result"


@pytest.mark.parametrize("kind", list(MAKERS))
def test_mutations_end_in_a_result_or_one_error(tmp_path: Path, kind: str) -> None:
    if "DICOM" in kind:
        pytest.importorskip("pydicom")
    ending, make = MAKERS[kind]
    path = tmp_path / f"odd{ending}"
    for beside in ("img", "raw"):  # the voxels of pairs
        (tmp_path / f"odd.{beside}").write_bytes(np.arange(60, dtype=np.int16).tobytes())
    counts: Counter[str] = Counter()
    slowest, start = 0.0, time.monotonic()
    runs = RUNS if kind != "plan.yaml" else RUNS // 4  # PyYAML is slow
    if kind != "plan.yaml":  # tracing makes PyYAML ten times slower
        tracemalloc.start()
    try:
        for turn in range(runs):
            rng = np.random.default_rng([turn, zlib.crc32(kind.encode())])
            path.write_bytes(make(rng))
            tracemalloc.is_tracing() and tracemalloc.reset_peak()
            began, before = time.monotonic(), tracemalloc.get_traced_memory()[0]
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("error")
                    counts[outcome(path, kind, turn)] += 1
            except Exception as error:
                pytest.fail(f"{kind}, case {turn}: {type(error).__name__}: {error}")
            used = (tracemalloc.get_traced_memory()[1] - before) / 1e6
            slowest = max(slowest, time.monotonic() - began)
            assert used < MAX_MB, f"{kind}, case {turn}: {used:.0f} MB"
            assert slowest < MAX_SECONDS, f"{kind}, case {turn}: {slowest:.1f} s"
    finally:
        tracemalloc.stop()
    print(f"{kind}: {runs} files, {dict(counts)}, slowest {slowest:.2f} s, all {time.monotonic() - start:.0f} s")
    assert counts["error"] > runs // 10
    assert kind == "plan.yaml" or counts["result"] > 0


def refused(path: Path, words: str, **how: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=words) as raised:
            read_volume(path, **how)  # type: ignore[arg-type]
        assert tracemalloc.get_traced_memory()[1] < 60e6
    finally:
        tracemalloc.stop()
    assert path.name in str(raised.value)


def header(shape: tuple[int, int, int], **changes: tuple[int, str, float]) -> bytes:
    content = bytearray(good_nifti(np.random.default_rng(0)))
    struct.pack_into("<8h", content, 40, 3, *shape, 1, 1, 1, 1)
    for at, form, value in changes.values():
        struct.pack_into("<" + form, content, at, value)
    return bytes(content)


def test_bombs_are_refused_before_they_take_memory_or_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = tmp_path / "bomb.nii.gz"
    bomb.write_bytes(gzip_bomb(good_nifti(np.random.default_rng(0)), 1 << 27))  # 128 MB of zeros in 130 kB
    assert bomb.stat().st_size < 150_000
    refused(bomb, "more than its header promises")
    bomb.write_bytes(gzip_bomb(header((5, 4, 3), offset=(108, "f", 2.0**26)), 1 << 20))
    refused(bomb, "its voxels start at byte")
    bomb.write_bytes(gzip.compress(header((32767, 32767, 32767))))
    refused(bomb, "at most 2147483648")
    bomb.write_bytes(gzip.compress(header((1000, 1000, 1000))))
    refused(bomb, "promises")
    bomb.write_bytes(
        gzip.compress(header((500, 500, 2)) + np.random.default_rng(0).bytes(9999))
    )  # cut off: 1 MB promised
    refused(bomb, "not a readable NIfTI|truncated")
    monkeypatch.setattr(limits, "available_bytes", lambda: 1000)
    bomb.write_bytes(gzip.compress(header((50, 50, 2)) + bytes(40_000)))
    refused(bomb, "memory, and .* are there; crop")


def test_archives_that_promise_too_much_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("pydicom")
    path = tmp_path / "odd.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.dcm", bytes(1 << 27))  # 128 MB of zeros in 130 kB
    refused(path, "cannot be read as DICOM")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.dcm", bytes(128) + b"DICM" + bytes(1 << 27))  # as many empty elements
    refused(path, "holds far more elements than")
    content = bytearray(path.read_bytes())
    table = content.rindex(b"PK\x01\x02")
    struct.pack_into("<I", content, table + 24, 0xFFFFFFF0)
    path.write_bytes(content)
    refused(path, "the archive promises 4294967280 bytes")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("a.dcm", np.random.default_rng(0).bytes(1 << 10))
    refused(path, "only stored and deflated files are read")
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(60_000):
            archive.writestr(f"{number:0100d}", b"")
    refused(path, "table of contents takes")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.dcm", b"x")
    content = bytearray(path.read_bytes())
    content[content.rindex(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(content)
    refused(path, "encrypted; unpack")


def test_pngs_that_promise_too_much_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "odd.png"
    for width, height, words in ((60000, 60000, "at most"), (8000, 8000, "too short to hold"), (0, 5, "odd.png")):
        path.write_bytes(png_of(width, height, 8, 0, b"\0\0"))
        refused(path, words)
    late = chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 0, 0, 0, 0))
    path.write_bytes(png_of(1, 1, 8, 0, b"\0\0", more=late))
    refused(path, "odd.png")
    path.write_bytes(png_of(1, 1, 8, 0, b"\0\0", more=chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 27)))))
    refused(path, "odd.png")
    path.write_bytes(png_of(1, 1, 16, 2, bytes(7)))
    refused(path, "16 bits a channel")


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_grey_pngs_of_any_depth_give_the_values_stored(tmp_path: Path, depth: int) -> None:
    values = np.random.default_rng(depth).integers(0, 2**depth, (5, 8))
    values[0, 0] = 2**depth - 1
    rows = b"".join(
        b"\0" + int("".join(f"{v:0{depth}b}" for v in row), 2).to_bytes(depth, "big") for row in values.tolist()
    )
    (tmp_path / "a.png").write_bytes(png_of(8, 5, depth, 0, rows))
    np.testing.assert_array_equal(read_volume(tmp_path / "a.png").data, values)


def hostile_folder(root: Path) -> dict[str, str]:
    """Two folders of six sound cases and many bad ones; what a check must say of each bad file."""
    rng = np.random.default_rng(1)
    for name in ("images", "labels"):
        (root / name).mkdir(parents=True)
    label = header((5, 4, 3), kind=(70, "h", 2), bits=(72, "h", 8))[:352] + bytes([0, 1, 2] * 20)
    sound = header((5, 4, 3), kind=(70, "h", 4), bits=(72, "h", 16))[:352] + rng.bytes(120)
    expected: dict[str, str] = {}
    bad: dict[str, tuple[bytes, str]] = {
        "empty": (b"", "empty"),
        "text": (b"hello " * 99, "not a NIfTI file"),
        "bomb": (gzip_bomb(sound, 1 << 25), "more than its header"),
        "cut": (gzip.compress(sound)[:-9], "truncated"),
        "absurd": (gzip.compress(header((32767, 32767, 32767))), "at most 2147483648"),
        "offset": (gzip.compress(header((5, 4, 3), offset=(108, "f", 1e30))), "start at byte"),
        "micro": (gzip.compress(header((5, 4, 3), step=(280, "f", 1e-9))), "voxels of"),
        "flat": (gzip.compress(header((5, 4, 3), step=(280, "f", 0.0))), "spacing|affine"),
        "time": (gzip.compress(header((5, 4, 1), axes=(40, "h", 4), count=(48, "h", 3))), "it holds 3 volumes"),
    }
    for case in range(6):
        (root / f"images/good{case}.nii.gz").write_bytes(gzip.compress(sound))
        (root / f"labels/good{case}.nii.gz").write_bytes(gzip.compress(label))
    for name, (content, words) in bad.items():
        for folder, other in (("images", "labels"), ("labels", "images")):
            (root / folder / f"{name}_{folder}.nii.gz").write_bytes(content)
            (root / other / f"{name}_{folder}.nii.gz").write_bytes(gzip.compress(label))
            expected[f"{folder}/{name}_{folder}.nii.gz"] = words
    (root / "images/notes.txt").write_text("x", encoding="utf-8")
    (root / "images/other.png").write_bytes(b"x")
    return {**expected, "images/notes.txt": "not a format", "images/other.png": "several formats"}


def test_a_check_lists_each_hostile_file_and_does_not_stop(tmp_path: Path) -> None:
    expected = hostile_folder(tmp_path / "set")
    result = check_dataset(tmp_path / "set")
    said = {str(p.file.relative_to(tmp_path / "set")): str(p) for p in result.problems if p.file}
    for file, words in expected.items():
        assert any(word in said.get(file, "") for word in words.split("|")), (file, said.get(file))
    assert set(said) == set(expected)
    assert result.summary["training_cases"] == 6 + len(expected) - 2
    with pytest.raises(InputError, match=r"other\.png"):
        open_dataset(tmp_path / "set")


@pytest.mark.slow
def test_a_check_of_files_that_others_keep_because_they_break_readers(tmp_path: Path, shared: Path) -> None:
    source = shared / "data/badinput"
    if not source.is_dir():
        pytest.skip("no badinput")
    hostile_folder(tmp_path / "set")
    files = [file for file in sorted(source.rglob("*")) if file.is_file() and file.stat().st_size < 1 << 20]
    names = {}
    for number, file in enumerate(files):
        name = f"bad{number}{'.nii.gz' if file.name.endswith('.gz') else '.nii'}"
        if name.endswith(".gz"):
            shutil.copy(file, tmp_path / "set/images" / name)
        else:
            (tmp_path / "set/images" / f"{name}.gz").write_bytes(gzip.compress(file.read_bytes(), 1))
            name += ".gz"
        shutil.copy(tmp_path / "set/labels/good0.nii.gz", tmp_path / "set/labels" / name)
        names[name] = file
    result = check_dataset(tmp_path / "set")
    reported = {problem.file.name for problem in result.problems if problem.file}
    unsaid = [name for name in names if name not in reported]
    assert len(names) > 300
    for name in unsaid:  # not a word: then it must be a sound image
        read_volume(tmp_path / "set/images" / name)
    assert len(unsaid) < 5  # none has the shape of the labels


@pytest.mark.skipif(sys.platform != "linux", reason="limits of address space are Linux's")
def test_the_command_checks_a_hostile_folder_in_bounded_memory(tmp_path: Path) -> None:
    expected = hostile_folder(tmp_path / "set")
    code = (
        "import resource, sys; from lightm.datasets.check import check_dataset\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * 4096\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (400 << 20),) * 2)\n"
        "print(len({p.file for p in check_dataset(sys.argv[1]).problems}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "set")], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == len(expected)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("a: &a [1, 1]\nb: [*a, *a]\n", r"the alias '\*a' is not allowed"),
        ("a: &a {k: 1}\nb:\n  <<: *a\n", "alias"),
        ("a: " + "[" * 5000, "nested too deeply"),
        ("a: " + "9" * 5000, "not valid YAML"),
        ("a: !!int x", "not valid YAML"),
        ("a: !!timestamp x", "not valid YAML"),
        ("a: !!python/object/apply:os.system [ls]", "not valid YAML"),
        ("a: 1\na: 2\n", "given twice"),
        ("# " + "x" * 300_000, "longer than 256 kB"),
        ("".join(f"k{i}: 1\n" for i in range(5000)), "and [0-9]+ more"),
    ],
)
def test_hostile_settings_are_refused(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=words) as raised:
        load_plan(path)
    assert str(raised.value).startswith(str(path))


def test_hostile_descriptions_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "dataset.json"
    for content, words in (
        ("[" * 200_000, "nested too deeply"),
        ("9" * 5000, "not readable as JSON"),
        ('{"labels": {"background": 0, "a": "' + "9" * 5000 + '"}, "channel_names": {"0": "CT"}}', "whole number"),
        ('{"labels": {' + ", ".join(f'"{i}": "{i}"' for i in range(50_000)) + "}}", "at most 255|numbers|possible"),
        ("\ud800", "JSON"),
    ):
        path.write_bytes(content.encode("utf-8", "surrogatepass"))
        for read in (read_description, lambda file: load_split(file, ["a"])):
            began = time.monotonic()
            with pytest.raises(InputError, match=f"{words}|not a split|JSON"):
                read(path)  # type: ignore[operator]
            assert time.monotonic() - began < 5
    path.write_text('{"kind": "x", "seed": 0, "train": ' + str([f"c{i}" for i in range(30_000)] * 2).replace("'", '"')
                    + ', "val": ["v"], "test": []}', encoding="utf-8")  # fmt: skip
    began = time.monotonic()
    with pytest.raises(InputError, match="more than once"):
        load_split(path, [*(f"c{i}" for i in range(30_000)), "v"])
    assert time.monotonic() - began < 5


def test_the_gate_lets_large_files_through_one_at_a_time() -> None:
    import threading

    gate, at_once, most = limits.MemoryGate(100), [0], [0]
    lock = threading.Lock()

    def work(size: int) -> None:
        with gate.hold(size):
            with lock:
                at_once[0] += size
                most[0] = max(most[0], at_once[0])
            time.sleep(0.01)
            with lock:
                at_once[0] -= size

    threads = [threading.Thread(target=work, args=(size,)) for size in [40, 40, 40, 90, 150, 10, 60] * 3]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert not any(thread.is_alive() for thread in threads)
    assert 100 >= most[0] > 60 or most[0] == 150
    assert issubclass(InputError, LightMError)
