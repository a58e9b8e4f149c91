"""A trained model on disk: a folder of `model.safetensors`, `model.json` and `card.md`, or one file of all three.

The single file is a safetensors file: weights, and the two texts in its header's metadata.

Neither weights nor description are trusted. Loading executes nothing, and memory is bounded although a description may
ask for any number of layers of any width: by limits on the settings of LightM's own networks and of the baselines, and
by the weights beside it, whose names and shapes the network must have before memory is asked for.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightm import __version__
from lightm.config_io import MAX_JSON_BYTES, parse_json, read_json, validated
from lightm.errors import InputError, LightMError
from lightm.files import disk_refusals, file_hash, replacing, sync_folder
from lightm.nets.presets import NETWORKS, create, current_options

OWN = "own:"
"""How the name of a network begins that is no name but a module of the caller's."""

Shapes = Mapping[str, tuple[int, ...]]

SCHEMA_VERSION = 1
_KEYS = {"schema_version", "lightm_version", "network", "plan", "training", "weights_sha256"}
_ENDING = ".safetensors"
# Far above any setting of a network that trains, far below one that takes minutes to lay out.
_MAX_SETTINGS = 10_000


class Description(BaseModel):
    """A network as `model.json` describes it: what `lightm.nets.create` takes."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: str
    spatial_dims: Annotated[int, Field(ge=2, le=3)]
    in_channels: Annotated[int, Field(ge=1, le=1000)]
    out_channels: Annotated[int, Field(ge=1, le=1000)]
    image_size: list[Annotated[int, Field(ge=1, le=_MAX_SETTINGS)]] | None = None
    options: dict[str, Any] = Field(default_factory=dict)


def save_model(
    folder: Path,
    *,
    network: dict[str, Any],
    state_dict: dict[str, Tensor],
    plan: dict[str, Any],
    training: dict[str, Any],
    postprocess: dict[str, Any] | None = None,
) -> Path:
    """Write a model folder and return its path; it appears complete or not at all, and replaces an older one.

    Arguments: `network`: name, spatial_dims, in_channels, out_channels and options, as `lightm.network` takes them;
    `state_dict`: the weights; `plan`: the plan as plain values; `training`: a summary (data set, recipe, scores);
    `postprocess`: `lightm.inference.postprocess.Postprocess` as plain values.
    Raises LightMError when the disk refuses.
    """
    folder = Path(folder)
    with disk_refusals(folder):
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
                **({} if postprocess is None else {"postprocess": postprocess}),
            }
            (temporary / "model.json").write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
            (temporary / "card.md").write_text(_card(description), encoding="utf-8")
            temporary.chmod(0o755)
            for path in temporary.iterdir():
                with path.open("rb+") as file:
                    os.fsync(file.fileno())
            older = None
            if folder.exists():
                older = Path(tempfile.mkdtemp(prefix=f".{folder.name}-old-", dir=folder.parent))
                os.replace(folder, older / folder.name)
            os.replace(temporary, folder)
            if older is not None:
                shutil.rmtree(older)
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
    """Write a model folder as one safetensors file, which `load_model` reads like the folder, and return its path.

    The weights are the folder's, so that any program that reads safetensors finds them; the header's metadata holds
    `model.json` and `card.md` as text, and the SHA-256 of the weights' bytes.

    model: a model folder, or a run folder that holds one; it is loaded first, so that what is packed is intact. Raises
    InputError for a wrong or damaged model, another ending than .safetensors, and a file that exists, unless
    `overwrite`; LightMError when the disk refuses. Memory: the weights twice.
    """
    model, out = Path(model), Path(out)
    folder = find_model(model)
    if out.suffix != _ENDING:
        raise InputError(f"{out}: a single-file model needs a name that ends in {_ENDING}")
    if folder.is_file():
        raise InputError(f"{folder}: is a single-file model already; copy it")
    if out.is_dir() or (out.exists() and not overwrite):
        raise InputError(f"{out}: is there already; give another name, or allow overwriting")
    load_model(folder)
    files = [folder / name for name in ("model.json", "card.md") if (folder / name).is_file()]
    texts = {file.name: file.read_text(encoding="utf-8") for file in files}
    state = load_file(folder / "model.safetensors")
    try:
        with replacing(out) as temporary:
            save_file(state, temporary)  # for the sum of its tensors' bytes, which the header then holds
            save_file(state, temporary, metadata={**texts, "tensors_sha256": _tensors_sha256(temporary)})
            temporary.chmod(0o644)
    except SafetensorError as error:
        raise LightMError(f"{out}: cannot be written ({error}); check the free space") from error
    return out


def load_model(model: Path | str, network: nn.Module | None = None) -> tuple[nn.Module, dict[str, Any]]:
    """Read a model folder or single-file model: the network in evaluation mode on the CPU, and its `model.json`.

    network: a module to load the weights into, for a model trained with a network of one's own; one registered from
    outside must be registered here too. Raises InputError, naming the file, for a missing, damaged or foreign model, a
    newer schema, weights whose checksum differs, that hold NaN or belong to another network. Executes nothing.
    """
    model = Path(model)
    info = read_description(model)
    single = model.is_file()
    weights, where = (model, model) if single else (model / "model.safetensors", model / "model.json")
    if not weights.is_file():
        raise InputError(f"{weights}: the weights are missing; a model folder holds model.safetensors")
    if single:
        found, expected = _tensors_sha256(weights), _metadata(weights).get("tensors_sha256")
    else:
        found, expected = file_hash(weights).partition(":")[2], info["weights_sha256"]
    if found != expected:
        raise InputError(f"{weights}: its checksum differs from that in its description; the file is damaged")
    shapes = tensor_shapes(weights)
    if network is None:
        network = create_described(info["network"], shapes, where, weights)
    else:
        check_shapes(network.state_dict(), shapes, type(network).__name__, weights)
    try:
        state = load_file(weights)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{weights}: not a readable safetensors file ({error})") from error
    for name, tensor in state.items():
        if tensor.is_complex() or (tensor.is_floating_point() and not bool(torch.isfinite(tensor).all())):
            raise InputError(f"{weights}: '{name}' holds values that are NaN, infinite or complex; train it again")
    network.load_state_dict(state)
    return network.eval(), info


def read_description(model: Path | str) -> dict[str, Any]:
    """Return the `model.json` of a model folder or single-file model, checked; raises InputError as `load_model`."""
    model = Path(model)
    path = model if model.is_file() else model / "model.json"
    if not path.is_file():
        raise InputError(f"{model}: not a model folder, model.json is missing; give the folder `model` of a run")
    if path is not model:
        info = read_json(path)
    elif model.suffix.lower() == ".zip":
        raise InputError(f"{model}: models are no longer zip files; unzip it: it holds a model folder")
    elif model.suffix.lower() != _ENDING:
        raise InputError(f"{model}: not a model folder, and not a {_ENDING} file that `lightm pack` wrote")
    else:
        text = _metadata(model).get("model.json")
        if text is None:
            raise InputError(
                f"{model}: a file of weights alone; a model is a folder that holds model.json, or a file that "
                "`lightm pack` wrote"
            )
        info = parse_json(text.encode(), f"{model}: model.json", MAX_JSON_BYTES)
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


def _metadata(file: Path) -> dict[str, str]:
    with _header(file) as opened:
        return opened.metadata() or {}


def tensor_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of the tensors of a safetensors file from its header; raises InputError naming it."""
    with _header(file) as opened:
        return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118


@contextmanager
def _header(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as opened:
            yield opened
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{file}: not a readable safetensors file ({error})") from error


def create_described(described: Mapping[str, Any], shapes: Shapes, where: Path, weights: Path) -> nn.Module:
    """Return the network of a description, with fresh weights, if its tensors have the names and shapes given.

    described: as in `save_model`; options may have their former names. where, weights: the files for messages. The
    network is laid out without memory first, on PyTorch's meta device. Raises InputError for all else. Cost: some 20 ms
    more than `create`.
    """
    if str(described.get("name")).startswith(OWN):
        raise InputError(
            f"{where}: trained with a network of your own, '{str(described['name']).removeprefix(OWN)}', which no file "
            "holds; make it again as it was and give it: lightm.load(..., network=module)"
        )
    description = validated(Description, dict(described), f"{where}: network")
    name = description.name
    try:
        options = current_options(name, description.options)
        arguments = {**description.model_dump(exclude={"options"}, exclude_none=True), **options}
        if NETWORKS.is_built_in(name) and _total(options) > _MAX_SETTINGS:
            raise InputError(f"network '{name}': settings that add up to more than {_MAX_SETTINGS}")
        with torch.random.fork_rng(devices=[]):  # building draws initial weights; the caller's generator is left alone
            try:
                with torch.device("meta"):
                    expected = create(**arguments).state_dict()
            except (RuntimeError, NotImplementedError) as error:  # a network that computes numbers while it is built
                if "meta" not in str(error):
                    raise
                expected = create(**arguments).state_dict()
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    except Exception as error:  # impossible settings end in errors of any kind
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise InputError(f"{where}: its 'network' cannot be built ({reason}); the file is damaged") from error
    check_shapes(expected, shapes, name, weights)
    with torch.random.fork_rng(devices=[]):
        return create(**arguments)


def check_shapes(expected: Mapping[str, Tensor], shapes: Shapes, name: str, weights: Path) -> None:
    """Raise InputError where a network's tensors differ from those in a file of weights."""
    missing, unknown = sorted(expected.keys() - shapes.keys()), sorted(shapes.keys() - expected.keys())
    other = sorted(n for n in expected.keys() & shapes.keys() if tuple(expected[n].shape) != tuple(shapes[n]))
    if missing or unknown or other:
        raise InputError(
            f"{weights}: weights of another network than '{name}': {len(missing)} missing "
            f"{missing[:3]}, {len(unknown)} unknown {unknown[:3]}, {len(other)} of another shape {other[:3]}"
        )


def _total(value: Any) -> float:
    """The sum of all numbers in a setting, and of the lengths of its lists."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return len(value) + sum(_total(part) for part in value)
    return abs(value) if isinstance(value, (int, float)) else 0


def _tensors_sha256(weights: Path) -> str:
    """SHA-256 of what follows the header of a safetensors file, whose length its first eight bytes give."""
    digest = hashlib.sha256()
    with weights.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        file.seek(8 + min(length, weights.stat().st_size))
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _whole_cases(whole: dict[str, Any]) -> list[str]:
    """The line of the card on the whole validation cases that chose the weights."""
    if not whole.get("dsc"):
        return []
    kept = whole["kept"]
    classes = ", ".join(f"{name} {value:.3f}" for name, value in whole["dsc"][kept].items())
    return [f"- mean DSC of {whole['cases']} validation case(s): {classes} (weights of epoch {whole['epochs'][kept]})"]


def _card(info: dict[str, Any]) -> str:
    network, plan, training = info["network"], info["plan"], info["training"]
    regions = plan.get("regions")
    lines = [
        f"# {network['name']} for {plan.get('dataset', 'an unnamed data set')}",
        "",
        "For research. Not for clinical decisions.",
        "",
        f"- network: {network['name']}, {network['spatial_dims']}D, {network['in_channels']} image channel(s), "
        f"{network['out_channels']} {'regions' if regions else 'classes, background included'}",
        f"- {'regions' if regions else 'labels'}: "
        f"{', '.join(f'{name} = {value}' for name, value in (regions or plan.get('labels', {})).items())}",
        *([f"- regions_class_order: {plan.get('regions_class_order')}"] if regions else []),
        f"- voxel spacing in mm: {plan.get('spacing_mm')}; patch: {plan.get('patch_size')}",
        f"- LightM {info['lightm_version']}, weights SHA-256 {info['weights_sha256']}",
        "",
        "## Training",
        "",
        *(f"- {key}: {value}" for key, value in training.items() if key != "whole_cases"),
        *_whole_cases(training.get("whole_cases") or {}),
        "",
    ]
    return "\n".join(lines)
