"""A trained model on disk: a folder of `model.safetensors`, `model.json` and `card.md`, or a zip of these three.

Loading executes nothing.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightm import __version__
from lightm.config_io import read_json
from lightm.errors import InputError, LightMError
from lightm.files import disk_refusals, file_hash, sync_folder, write_text
from lightm.nets.described import check_shapes, create_described, tensor_shapes
from lightm.nets.zipped import extracted, is_zip_path, write_zip

SCHEMA_VERSION = 1
_KEYS = {"schema_version", "lightm_version", "network", "plan", "training", "weights_sha256"}


def save_model(
    folder: Path,
    *,
    network: dict[str, Any],
    state_dict: dict[str, Tensor],
    plan: dict[str, Any],
    training: dict[str, Any],
) -> Path:
    """Write a model folder, or a single file when the name ends in .zip, and return its path.

    It appears complete or not at all, and replaces an older one. Raises LightMError when the disk refuses.
    Arguments: `network`: name, spatial_dims, in_channels, out_channels and options, as `create` takes them;
    `state_dict`: the weights; `plan`: the plan as plain values; `training`: a summary (data set, recipe, scores).
    """
    folder = Path(folder)
    content = {"network": network, "state_dict": state_dict, "plan": plan, "training": training}
    if is_zip_path(folder):
        with tempfile.TemporaryDirectory(prefix="lightm-model-", ignore_cleanup_errors=True) as place:
            write_zip(_save(Path(place) / "model", **content), folder)
        return folder
    with disk_refusals(folder):
        return _save(folder, **content)


def _save(
    folder: Path,
    *,
    network: dict[str, Any],
    state_dict: dict[str, Tensor],
    plan: dict[str, Any],
    training: dict[str, Any],
) -> Path:
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        weights = temporary / "model.safetensors"
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in state_dict.items()}, weights)
        weights.chmod(0o644)  # as every other file; safetensors makes it readable to its owner alone
        description = {
            "schema_version": SCHEMA_VERSION,
            "lightm_version": __version__,
            "network": network,
            "plan": plan,
            "training": training,
            "weights_sha256": file_hash(weights).partition(":")[2],
        }
        (temporary / "model.json").write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
        (temporary / "card.md").write_text(_card(description), encoding="utf-8")
        temporary.chmod(0o755)
        for path in temporary.iterdir():
            with path.open("rb+") as file:
                os.fsync(file.fileno())
        if folder.exists():
            older = Path(tempfile.mkdtemp(prefix=f".{folder.name}-old-", dir=folder.parent))
            os.replace(folder, older / folder.name)
            os.replace(temporary, folder)
            shutil.rmtree(older)
        else:
            os.replace(temporary, folder)
        sync_folder(folder.parent)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, SafetensorError):
            raise LightMError(f"{folder}: cannot be written ({error}); check the free space") from error
        raise
    return folder


def find_model(path: Path | str) -> Path:
    """Return the model of a run folder; any other path as it is."""
    inside = Path(path) / "model"
    return inside if (inside / "model.json").is_file() else Path(path)


def pack_model(model: Path | str, out: Path | str, *, overwrite: bool = False) -> Path:
    """Write a model folder as a single .zip file, which `load_model` reads like the folder, and return its path.

    model: a model folder, or a run folder that holds one; it is loaded first, so that what is packed is whole.
    Raises InputError for a wrong or damaged model, another ending than .zip, and a file that is there already unless
    `overwrite`; LightMError when the disk refuses.
    """
    model, out = Path(model), Path(out)
    folder = find_model(model)
    if not is_zip_path(out):
        raise InputError(f"{out}: a single-file model needs a name that ends in .zip")
    if is_zip_path(folder) and folder.is_file():
        raise InputError(f"{folder}: is a single-file model already; copy it")
    if out.is_dir() or (out.exists() and not overwrite):
        raise InputError(f"{out}: is there already; give another name, or allow overwriting")
    load_model(folder)
    write_zip(folder, out)
    return out


def set_postprocess(folder: Path, record: Mapping[str, Any]) -> None:
    """Keep the clean-up of its predictions with a model: `lightm.inference.postprocess.Postprocess` as plain values.

    Raises InputError for a folder without a model and for a single-file model, LightMError when the disk refuses.
    """
    if is_zip_path(folder) and Path(folder).is_file():
        raise InputError(f"{folder}: a single-file model is not changed; set the clean-up in its folder and pack it")
    info = _read_description(Path(folder))
    info["postprocess"] = dict(record)
    write_text(Path(folder) / "model.json", json.dumps(info, indent=1) + "\n")


def load_model(folder: Path, network: nn.Module | None = None) -> tuple[nn.Module, dict[str, Any]]:
    """Read a model folder or single-file model: the network in evaluation mode on the CPU, and its `model.json`.

    network: a module to load the weights into, for a model that was trained with a network of one's own.
    Raises InputError, naming the file, for a missing, damaged or foreign folder, a newer schema, weights whose
    checksum differs, that hold NaN or belong to another network (whose memory is not asked for), and a zip that holds
    anything but a model's three files or looks like a bomb. Executes nothing from the folder. Cost for a zip: its
    weights once more in the temporary folder.
    """
    folder = Path(folder)
    if is_zip_path(folder) and folder.is_file():
        with extracted(folder) as place:
            return _load(place, network)
    return _load(folder, network)


def _load(folder: Path, network: nn.Module | None) -> tuple[nn.Module, dict[str, Any]]:
    info = _read_description(folder)
    weights = folder / "model.safetensors"
    if not weights.is_file():
        raise InputError(f"{weights}: the weights are missing; a model folder holds model.safetensors")
    if file_hash(weights).partition(":")[2] != info["weights_sha256"]:
        raise InputError(f"{weights}: its checksum differs from that in model.json; the file is damaged or exchanged")
    shapes = tensor_shapes(weights)
    if network is None:
        network = create_described(info["network"], shapes, folder / "model.json", weights)
    else:
        check_shapes(network.state_dict(), shapes, type(network).__name__, weights)
    try:
        state = load_file(weights)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{weights}: not a readable safetensors file ({error})") from error
    _check_values(state, weights)
    network.load_state_dict(state)
    return network.eval(), info


def _check_values(state: dict[str, Tensor], weights: Path) -> None:
    for name, tensor in state.items():
        if tensor.is_complex() or (tensor.is_floating_point() and not bool(torch.isfinite(tensor).all())):
            raise InputError(f"{weights}: '{name}' holds values that are NaN, infinite or complex; train it again")


def _read_description(folder: Path) -> dict[str, Any]:
    path = folder / "model.json"
    if not path.is_file():
        raise InputError(f"{folder}: not a model folder, model.json is missing; give the folder `model` of a run")
    info = read_json(path)
    if not isinstance(info, dict) or not isinstance(info.get("schema_version"), int):
        raise InputError(f"{path}: not a LightM model description, its schema_version is missing")
    if info["schema_version"] > SCHEMA_VERSION:
        raise InputError(
            f"{path}: schema version {info['schema_version']} is newer than {SCHEMA_VERSION}, the newest that LightM "
            f"{__version__} knows; install a newer lightm-unet"
        )
    missing = _KEYS - info.keys()
    if missing or not isinstance(info["network"], dict) or not isinstance(info["plan"], dict):
        raise InputError(f"{path}: not a complete model description, {sorted(missing) or 'network and plan'} missing")
    return info


def _card(info: dict[str, Any]) -> str:
    network, plan, training = info["network"], info["plan"], info["training"]
    lines = [
        f"# {network['name']} for {plan.get('dataset', 'an unnamed data set')}",
        "",
        "For research. Not for clinical decisions.",
        "",
        f"- network: {network['name']}, {network['spatial_dims']}D, {network['in_channels']} image channel(s), "
        f"{network['out_channels']} classes, background included",
        f"- labels: {', '.join(f'{name} = {value}' for name, value in plan.get('labels', {}).items())}",
        f"- voxel spacing in mm: {plan.get('spacing_mm')}; patch: {plan.get('patch_size')}",
        f"- LightM {info['lightm_version']}, weights SHA-256 {info['weights_sha256']}",
        "",
        "## Training",
        "",
        *(f"- {key}: {value}" for key, value in training.items()),
        "",
    ]
    return "\n".join(lines)
