"""A released LightM-UNet's checkpoint as a model folder that `lightm predict` takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightm.config_io import read_json, validated
from lightm.datasets.description import Labels, _channels, read_labels
from lightm.errors import InputError
from lightm.files import file_hash
from lightm.images.limits import naming
from lightm.interchange.nnunet_plans import NnunetPlan, read_nnunet_plans
from lightm.nets.folder import save_model
from lightm.nets.released import Checkpoint, build_released, read_checkpoint
from lightm.preparation.plan import MULTIPLE, ChannelNormalization, Plan, load_plan

NETWORK = "lightm-unet-released"
DEFAULT_PATCH = {2: 512, 3: 96}
_ORIENTATION = (
    "nnU-Net feeds arrays in the order in which the file stores them, LightM turns them to right-anterior-superior "
    "first; if the training files were stored otherwise, predictions will differ"
)


@dataclass(frozen=True)
class ImportedModel:
    """What was written: the folder, the arguments of the network, its parameters, the plan, and what to know of it."""

    folder: Path
    network: dict[str, Any]
    parameters: int
    plan: Plan
    remarks: list[str]


def import_released(
    checkpoint: Path | str,
    out: Path | str,
    *,
    labels: Mapping[str, int] | None = None,
    dataset_json: Path | str | None = None,
    plans: Path | str | None = None,
    configuration: str | None = None,
    spacing_mm: Sequence[float] | None = None,
    patch_size: Sequence[int] | None = None,
    groups: int = 8,
    overwrite: bool = False,
) -> ImportedModel:
    """Convert weights of LightM-UNet's released code into a model folder of LightM.

    checkpoint: a plain state dict, or an nnU-Net checkpoint that holds one, as `lightm.nets.released.read_checkpoint`
    takes it: nothing in it is executed. The network is read off the shapes. labels: name to value, background first;
    dataset_json: nnU-Net's file of labels and channels; plans: nnU-Net's plans, or a plan.yaml of LightM, which then
    says everything; configuration: of nnU-Net's plans; spacing_mm in millimetres and patch_size in voxels: (z, y, x)
    or (y, x); groups: of GroupNorm. What is not given is taken from the checkpoint, and where that holds nothing:
    labels class_1, class_2, ...; z-scores; a spacing of 1 mm; patches of 96^3 or 512^2. Every such guess, and all of
    nnU-Net's plan that LightM cannot express, is a remark in the result and in the folder's model.json.

    Raises InputError, naming the file: an unreadable, damaged or executable checkpoint, another network, labels or
    channels that do not fit the network, and an `out` that exists, unless
    `overwrite` and it is a model folder. Cost: seconds; memory: the weights three times.
    """
    out = Path(out)
    _check_out(out, overwrite)
    found = read_checkpoint(checkpoint)
    with naming(found.path):
        network, settings = build_released(found.state, groups=groups)
    remarks: list[str] = []
    if plans is not None and Path(plans).suffix in (".yaml", ".yml"):
        plan = load_plan(plans)
        given = (plan.spatial_dims, len(plan.channels), len(plan.outputs))
        needed = tuple(settings[key] for key in ("spatial_dims", "in_channels", "out_channels"))
        if given != needed:
            raise InputError(
                f"{plans}: {given[0]}D with {given[1]} channels and {given[2]} labels; the network is {needed[0]}D "
                f"with {needed[1]} channels and {needed[2]} classes"
            )
    else:
        planned, where = _plans(found, plans, configuration, settings, assumed=spacing_mm is None)
        known, cases = _describe(found, dataset_json, labels, settings, remarks)
        planned.spacing_mm = list(spacing_mm or planned.spacing_mm)
        planned.patch_size = list(patch_size or planned.patch_size)
        remarks.extend(planned.remarks)
        plan = _make_plan(planned, where, known, cases, settings, remarks)
    if found.trainer is not None or found.plans is not None:
        remarks.append(_ORIENTATION)
    described = {key: settings.pop(key) for key in ("spatial_dims", "in_channels", "out_channels")}
    description = {"name": NETWORK, **described, "options": settings}
    training = {
        "source": "imported weights of LightM-UNet's released code",
        "checkpoint": found.path.name,
        "checkpoint_sha256": file_hash(found.path).partition(":")[2],
        **{key: value for key, value in (("trainer", found.trainer), ("epochs", found.epoch)) if value is not None},
        "remarks": remarks,
    }
    save_model(
        out, network=description, state_dict=network.state_dict(), plan=plan.model_dump(mode="json"), training=training
    )
    parameters = sum(parameter.numel() for parameter in network.parameters())
    return ImportedModel(out, description, parameters, plan, remarks)


def _check_out(out: Path, overwrite: bool) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise InputError(f"{out}: a file; give a folder for the model")
    if any(out.iterdir()) and not (overwrite and (out / "model.json").is_file()):
        kind = "a model; allow overwriting, or give" if (out / "model.json").is_file() else "other files; give"
        raise InputError(f"{out}: already holds {kind} another folder")


def _read_json(path: Path | str) -> dict[str, Any]:
    content = read_json(Path(path))
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a JSON object")
    return content


def _plans(
    found: Checkpoint, given: Path | str | None, configuration: str | None, settings: Mapping[str, Any], assumed: bool
) -> tuple[NnunetPlan, str]:
    """nnU-Net's plan, or one of defaults (`assumed`: with the spacing), and the file that it is from."""
    dims, channels = settings["spatial_dims"], settings["in_channels"]
    content, where = (found.plans, str(found.path)) if given is None else (_read_json(given), str(given))
    if content is not None:
        with naming(f"{where}: plans"):
            return read_nnunet_plans(content, configuration or found.configuration, dims, channels), where
    plan = NnunetPlan([1.0] * dims, [DEFAULT_PATCH[dims]] * dims, [ChannelNormalization(scheme="zscore")] * channels)
    plan.remarks.append("no plans of nnU-Net: every channel is normalised by its z-score")
    if assumed:
        plan.remarks.append(
            "no plans of nnU-Net: a spacing of 1 mm is taken; give the one that the network was trained at"
        )
    return plan, where


def _describe(
    found: Checkpoint,
    given: Path | str | None,
    labels: Mapping[str, int] | None,
    settings: Mapping[str, Any],
    remarks: list[str],
) -> tuple[dict[str, Any], int]:
    """What a plan says of the data, and the number of cases, from the options or dataset.json."""
    content, where = (found.dataset_json, str(found.path)) if given is None else (_read_json(given), str(given))
    image, classes = settings["in_channels"], settings["out_channels"]
    channels = [f"channel_{index}" for index in range(image)]
    read: Labels | None = None
    content = content or {}
    if labels is not None:
        read = Labels(dict(sorted(labels.items(), key=lambda item: item[1])))
    with naming(where):
        if content:
            channels = list(_channels(content.get("channel_names", content.get("modality"))))
            if read is None:
                read = read_labels(content)
    if read is None:
        read = Labels({"background": 0, **{f"class_{index}": index for index in range(1, classes)}})
        remarks.append(f"the checkpoint names no labels: {', '.join(list(read.values)[1:])} are made up")
    outputs = read.regions or read.values
    if len(outputs) != classes or len(channels) != image:
        where = where if labels is None else "labels"
        what, how = ("regions", "outputs") if read.regions else ("labels", "classes, background included,")
        raise InputError(
            f"{where}: {len(outputs)} {what} ({', '.join(outputs)}) and {len(channels)} channels; the network has "
            f"{classes} {how} and {image} channels"
        )
    ending, cases = content.get("file_ending"), content.get("numTraining")
    if not isinstance(ending, str):
        ending = ".nii.gz" if settings["spatial_dims"] == 3 else ".png"
    known = {
        "channels": channels,
        "labels": read.values,
        "regions": {name: list(values) for name, values in read.regions.items()},
        "regions_class_order": list(read.order),
        "ignore_label": read.ignore,
        "file_ending": ending,
    }
    return known, cases if isinstance(cases, int) and cases > 0 else 0


def _make_plan(
    planned: NnunetPlan,
    where: str,
    known: Mapping[str, Any],
    cases: int,
    settings: Mapping[str, Any],
    remarks: list[str],
) -> Plan:
    multiple = max(MULTIPLE, 2 ** len(settings["blocks_up"]))
    rounded = [-(-size // multiple) * multiple for size in planned.patch_size]
    if rounded != planned.patch_size:
        remarks.append(f"the patch {planned.patch_size} is rounded up to multiples of {multiple}: {rounded}")
    content = {
        **known,
        "dataset": planned.dataset or "an unnamed data set",
        "spatial_dims": settings["spatial_dims"],
        "spacing_mm": planned.spacing_mm,
        "patch_size": rounded,
        "batch_size": planned.batch_size,
        "normalization": planned.normalization,
        "fingerprint": {
            "cases": cases,
            "data_hash": "unknown",
            **{f"shape_{kind}": planned.median_shape or rounded for kind in ("min", "median", "max")},
            **{f"spacing_mm_{kind}": planned.spacing_mm for kind in ("min", "median", "max")},
            "intensities": planned.intensities,
            "class_fractions": {},
            "class_cases": {},
        },
    }
    return validated(Plan, content, f"{where}: plan")
