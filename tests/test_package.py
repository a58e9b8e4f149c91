"""The package as a user meets it: light import, public names, help, files in the wheel."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

import lightm

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("torch", "numpy", "numba", "monai", "lightning", "matplotlib", "nibabel", "scipy", "skimage")
VERBS = (
    "demo",
    "convert",
    "phantom",
    "check",
    "plan",
    "train",
    "predict",
    "evaluate",
    "report",
    "compare",
    "bench",
    "info",
    "import-released",
    "pack",
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
    done = subprocess.run([sys.executable, "-m", "lightm", verb, "--help"], capture_output=True, text=True, check=True)
    assert f"Example: lightm {verb}" in done.stdout


def test_imports_point_up_the_list_of_layers() -> None:
    layers = ["ops", "nets", "losses", "data", "train", "evaluate", "infer", "export"]
    base = {"errors", "files", "json_file", "memory", "__version__"}
    for index, layer in enumerate(layers):
        for path in (ROOT / "src" / "lightm" / layer).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            used = set(re.findall(r"^\s*from lightm\.(\w+)", text, re.M))
            used |= set(re.findall(r"^\s*from lightm import (\w+)", text, re.M))
            allowed = {layer, *layers[:index], *base} if layer != "ops" else {"ops"}
            assert used <= allowed, f"{path.relative_to(ROOT)} imports {sorted(used - allowed)}"


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


def test_submodules_named_in_the_public_list_import() -> None:
    for module in set(lightm._PUBLIC.values()):
        importlib.import_module(module)
