"""The package as a user meets it: light import, public names, help, files in the wheel."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import zipfile
from collections.abc import Collection
from importlib import metadata
from pathlib import Path

import pytest
from typer.testing import CliRunner

import lightm
from lightm.cli import app

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("torch", "numpy", "numba", "monai", "lightning_fabric", "matplotlib", "nibabel", "scipy", "skimage")
VERBS = (
    "demo",
    "convert",
    "phantoms",
    "check",
    "plan",
    "train",
    "resume",
    "predict",
    "evaluate",
    "report",
    "compare",
    "bench",
    "info",
    "import-released",
    "export",
)


@pytest.mark.parametrize("code", ["import lightm", "import lightm.cli"])
def test_importing_pulls_in_nothing_heavy(code: str) -> None:
    heavy = f"import sys; {code}; print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_exists_and_has_a_docstring() -> None:
    for name in lightm.__all__:
        if name != "__version__":
            first = getattr(lightm, name)
            assert (first.__doc__ or "").strip(), name
            assert callable(first), name
            assert getattr(lightm, name) is first, f"{name} is hidden by a module of that name once it is imported"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = lightm.nothing


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_an_example(verb: str) -> None:
    done = CliRunner().invoke(app, [verb, "--help"])
    assert done.exit_code == 0
    assert f"Example: lightm {verb}" in done.stdout


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    source = ROOT / "src"
    found = {}
    for path in sorted((source / "lightm").rglob("*.py")):
        parts = path.relative_to(source).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path, known: Collection[str]) -> set[str]:
    """The modules of the package that a file imports, inside functions and for type checkers too."""
    used: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            used |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.relative_to(ROOT)}: imports are absolute here"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            used |= {name if name in known else str(node.module) for name in names}
    return used & set(known)


GROUND_FLOOR = ("errors", "files", "config_io", "labels", "memory", "device", "progress", "options", "registry")
ROOMS = (
    *("ops", "nets", "losses", "images", "datasets", "preparation", "training", "evaluation", "inference"),
    *("interchange", "pipeline", "lab", "api", "cli", "__main__"),
)


def room_of(module: str) -> str:
    return module.removeprefix("lightm").removeprefix(".").split(".")[0]


def test_imports_point_up_the_list_of_rooms() -> None:
    known = modules()
    for name, path in known.items():
        room = room_of(name)
        assert room in ("", *GROUND_FLOOR, *ROOMS), f"{name} is in no room"
        allowed = {"", room, *GROUND_FLOOR}  # lightm itself: its version
        if room == "ops":
            allowed = {"ops"}
        elif room in ROOMS:
            allowed.update(ROOMS[: ROOMS.index(room)])
        if room not in ("lab", "api", "cli"):
            allowed.discard("lab")
        used = {room_of(module) for module in imports(path, known)}
        assert used <= allowed, f"{name} imports {sorted(used - allowed)}"


def test_no_modules_import_each_other_in_a_circle() -> None:
    known = modules()
    left = {name: imports(path, known) - {name} for name, path in known.items()}
    while free := [name for name, used in left.items() if not used & left.keys()]:
        for name in free:
            del left[name]
    assert not left, {name: sorted(used & left.keys()) for name, used in left.items()}


@pytest.mark.slow
def test_the_wheel_holds_every_file_of_the_package(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)],
        check=True,
    )
    (wheel,) = tmp_path.glob("lightm_unet-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = set(archive.namelist())
    source = ROOT / "src"
    kept = {p.relative_to(source).as_posix() for p in source.rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    assert {name for name in kept if "egg-info" not in name} <= packed


def test_nothing_in_the_base_install_names_torchvision() -> None:
    requirements = metadata.requires("lightm-unet") or []
    assert any(requirement.startswith("torch>") for requirement in requirements)
    assert not any("torchvision" in requirement for requirement in requirements)
    assert "torchvision" not in (ROOT / "constraints.txt").read_text(encoding="utf-8")


def test_importing_changes_nothing_in_the_process_and_the_command_line_settles_its_own() -> None:
    code = """
import logging, os
before = dict(os.environ)
import lightm
import lightm.pipeline, lightm.api, lightm.images.nifti
assert dict(os.environ) == before, set(os.environ.items()) ^ set(before.items())
assert logging.getLogger("nibabel.global").level <= logging.WARNING
from lightm.cli import main
import sys
sys.argv = ["lightm", "--version"]
try:
    main()
except SystemExit:
    pass
assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
"""
    unset = {
        name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "THP_MEM_ALLOC_ENABLE")
    }
    subprocess.run([sys.executable, "-c", code], check=True, env=unset)
