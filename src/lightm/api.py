"""The verbs as functions, as the commands of their names; `lightm.train` and `lightm.resume` are in `pipeline`.

The examples run in a test; `folder` is an empty folder there.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import BeforeValidator, Field
from torch import nn

from lightm.datasets.cases import Dataset
from lightm.datasets.check import CheckResult, check_dataset
from lightm.datasets.convert import Converted, convert_dataset
from lightm.datasets.discovery import open_dataset
from lightm.datasets.phantoms import make_phantoms
from lightm.errors import InputError, LightMError
from lightm.evaluation.evaluation import Evaluation
from lightm.evaluation.folder import EvaluateOptions, evaluate_folder
from lightm.evaluation.report import write_report
from lightm.inference.folder import LOADING, PredictOptions, load_predictor, predict_folder
from lightm.inference.predictor import Predictor
from lightm.nets.folder import pack_model
from lightm.options import Names, Numbers, Options, PathText, Sizes
from lightm.pipeline import score_run
from lightm.preparation.plan import Plan, make_plan
from lightm.progress import Progress

if TYPE_CHECKING:
    from lightm.interchange.released import ImportedModel
    from lightm.lab.bench import Row
    from lightm.lab.compare import CompareResult, Experiment
    from lightm.lab.complexity import Account

_log = logging.getLogger(__name__)


class PlanOptions(Options):
    """What a plan takes as given instead of choosing it."""

    labels: PathText | None = Field(None, description="Folder of labels, when DATASET is a folder of images.")
    channels: Names | None = Field(None, description="Names of the channels: CT, or T1,T2.")
    trust_image_geometry: bool = Field(False, description="Take labels to lie where the image does.")
    patch_size: Sizes | None = Field(None, description="Patch in voxels, z,y,x: 40,56,40.")
    batch_size: int | None = Field(None, ge=1, description="Patches per step.")
    spacing_mm: Numbers | None = Field(None, description="Spacing in mm, z,y,x: 1,0.8,0.8.")
    memory_gb: float | None = Field(
        None, description="GB of memory to plan for; default: the device's.", json_schema_extra={"flags": ["--memory"]}
    )
    device: str = Field("auto", description="Whose memory to plan for: auto (a GPU if there is one), cpu, cuda, ...")


class ConvertOptions(Options):
    """How a public download is converted."""

    labels: PathText | None = Field(None, description="For folder: label maps, when SRC is the folder of images.")
    link: bool = Field(False, description="Link files that need no change, instead of copying.")
    trust_image_geometry: bool = Field(False, description="Give labels the image's geometry where theirs differs.")
    skip_faulty: bool = Field(False, description="Leave faulty cases out, and name them.")
    overwrite: bool = Field(False, description="Replace a data set in OUT.")


class BenchOptions(Options):
    """What is measured, and where it is written."""

    size: int | None = Field(None, description="Edge of the cube; default 96 for networks, else 64.")
    repeats: int = Field(5, description="Rounds; every case is measured once in each.")
    networks: Names | None = Field(None, description="Names with commas: presets, and baselines such as unetr.")
    baseline: str | None = Field(None, description="Network to compare with; default dynunet.")
    train: bool = Field(False, description="Measure training steps instead of inference.")
    sizes: Sizes | None = Field(None, description="Edges for scaling, e.g. 32,64,96.")
    memory: bool = Field(True, description="Measure peak memory, each case in a process of its own.")
    out: PathText | None = Field(None, description="CSV file.", json_schema_extra={"flags": ["-o"]})
    plot: PathText | None = Field(None, description="Plot of scaling: .svg, .png or .pdf.")
    threads: int | None = Field(None, ge=1, description="CPU threads; default: PyTorch's choice.")


def _as_labels(given: Any) -> Any:
    if not isinstance(given, str):
        return given
    labels: dict[str, int] = {}
    for name, _, value in (part.rpartition("=") for part in given.split(",")):
        if not name.strip() or not value.strip().isdigit() or name.strip() in labels:
            raise ValueError(f"labels '{given}': write each name once with its value, as background=0,lung=1")
        labels[name.strip()] = int(value)
    return labels


class ImportOptions(Options):
    """What a checkpoint of the released code does not say of itself."""

    labels: Annotated[dict[str, int] | None, BeforeValidator(_as_labels)] = Field(
        None, description="Labels: background=0,lung=1.", json_schema_extra={"text": True}
    )
    dataset_json: PathText | None = Field(None, description="nnU-Net's dataset.json: labels and channels.")
    plans: PathText | None = Field(None, description="nnU-Net's plans (JSON), or a plan.yaml of LightM.")
    configuration: str | None = Field(None, description="Of nnU-Net's plans: 2d, 3d_fullres, ...")
    spacing_mm: Numbers | None = Field(
        None, description="Spacing in mm, z,y,x: 1,0.8,0.8.", json_schema_extra={"flags": ["--spacing"]}
    )
    patch_size: Sizes | None = Field(None, description="Patch in voxels, z,y,x: 96,96,96.")
    groups: int = Field(8, description="Groups of GroupNorm, which the weights do not tell.")
    overwrite: bool = Field(False, description="Replace a model in OUT.")


def check(
    dataset: Dataset | Path | str,
    *,
    labels: Path | str | None = None,
    channels: Sequence[str] | None = None,
    trust_image_geometry: bool = False,
    progress: Progress | None = None,
) -> CheckResult:
    """Read every file of a data set once, on all cores; return every problem, with its file and remedy, and a summary.

    dataset: folder in the nnU-Net raw or MSD layout, or a folder of images with `labels` beside it. channels: names of
    the channels, instead of those found. trust_image_geometry: take all files of a case to lie where its first image
    does. Raises InputError only where there is no data set to check.

    >>> data = lightm.phantoms("xray", folder / "data", cases=2, size=32)
    >>> result = lightm.check(data)
    >>> result.ok, result.summary["training_cases"]
    (True, 2)
    """
    how: dict[str, Any] = {"channels": channels, "trust_image_geometry": trust_image_geometry}
    return check_dataset(dataset, labels=labels, **how, progress=progress)


def plan(
    dataset: Dataset | Path | str, *, out: Path | str | None = None, progress: Progress | None = None, **options: Any
) -> Plan:
    """Choose spacing, patch, batch and normalization from the data, write them as YAML, and return them.

    out: the file, by default DATASET/plan.yaml, which `lightm.train` then takes. options: labels, channels,
    trust_image_geometry, patch_size, batch_size, spacing_mm (each taken as given), memory_gb and device. Raises
    InputError for unusable data or options, or a file that cannot be written. Cost: every file read twice.

    >>> data = lightm.phantoms("xray", folder / "data", cases=2, size=32)
    >>> lightm.plan(data, patch_size=[32, 24]).patch_size
    [32, 24]
    """
    chosen = PlanOptions.of(None, options, "plan")
    reading = {"labels", "channels", "trust_image_geometry"}
    how = chosen.model_dump(include=reading)
    data = dataset if isinstance(dataset, Dataset) else open_dataset(dataset, **how)
    made = make_plan(data, **chosen.model_dump(exclude=reading), progress=progress)
    try:
        made.save(data.root / "plan.yaml" if out is None else out)
    except LightMError as error:
        raise InputError(f"{error}, or give another file (out)") from error
    return made


def load(model: Path | str | Sequence[Path | str], *, network: nn.Module | None = None, **options: Any) -> Predictor:
    """Return a model ready to segment: `predictor("scan.nii.gz")` is a label map, `predictor.network` the module.

    model: a model folder or single-file model, or the run folder that holds one; or several, such as the folds of one
    data set, whose probabilities are averaged. network: the module, for a model that was trained with a network of
    one's own; the weights are loaded into it. options: device, overlap, tta, window, postprocess, max_memory ("2GB"),
    correct_gantry_tilt, as `PredictOptions`. One file or Volume per channel is given to the predictor; the result has
    the geometry of the first. Raises InputError, naming the file, for a missing or damaged model, and for models that
    do not fit together.

    >>> data = lightm.phantoms("xray", folder / "data", cases=4, size=32)
    >>> options = {"epochs": 1, "steps_per_epoch": 1, "val_patches": 1, "patch_size": [32, 32], "test": False}
    >>> run = lightm.train(data, folder / "run", **options)
    >>> predictor = lightm.load(run.model)
    >>> predictor(data / "imagesTr" / "xray_000_0000.png").shape
    (32, 32)
    """
    chosen = PredictOptions.of(None, options, "load")
    if wrong := sorted(chosen.model_fields_set.difference(LOADING)):
        raise InputError(f"load: {', '.join(wrong)} belong to lightm.predict; expected some of {', '.join(LOADING)}")
    return load_predictor(model, chosen, network)


def predict(
    model: Path | str | Sequence[Path | str] | Predictor,
    inputs: Path | str | Sequence[Path | str],
    out: Path | str,
    *,
    options: PredictOptions | Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    **more: Any,
) -> list[Path]:
    """Segment every case in `inputs`, each in its own geometry, and return the label maps in `out`, sorted by case.

    model: a model folder or single-file model, the run folder that holds one, several of these, whose probabilities are
    averaged, or a Predictor of `lightm.load`. inputs:
    an image, a folder of images, DICOM series, a data set, a list in a .txt or .csv file, or several of these. options:
    a PredictOptions, or its fields as `more`. A case that fails is left out and the others go on; the call ends with
    one LightMError that lists all of them. Raises InputError before anything is written for a wrong model, input or
    option, and where `out` holds files and neither `overwrite` nor `resume` is set. Memory: bounded by `max_memory`.

    >>> data = lightm.phantoms("xray", folder / "data", cases=4, size=32)
    >>> options = {"epochs": 1, "steps_per_epoch": 1, "val_patches": 1, "patch_size": [32, 32], "test": False}
    >>> run = lightm.train(data, folder / "run", **options)
    >>> [path.name for path in lightm.predict(run.model, data, folder / "labels", cases=["xray_000"])]
    ['xray_000.png']
    """
    chosen = PredictOptions.of(options, more, "predict")
    writer = None
    if chosen.dicom_seg:
        from lightm.interchange.dicom_seg import seg_writer_of_model

        if not isinstance(model, Predictor):
            model = load_predictor(model, chosen)
            chosen = PredictOptions(**chosen.model_dump(exclude_unset=True, exclude=set(LOADING)))
        writer = seg_writer_of_model(model)
    return predict_folder(model, inputs, out, options=chosen, progress=progress, extra_writer=writer)


def evaluate(
    predictions: Path | str,
    labels: Path | str | None = None,
    *,
    options: EvaluateOptions | Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    **more: Any,
) -> Evaluation:
    """Score label maps: DSC, IoU, HD95 and surface Dice per case and class, with bootstrap intervals.

    predictions: a folder of label maps, with `labels` the folder of the true ones, of the same names; or a run, whose
    test cases are predicted and scored. options: an EvaluateOptions, or its fields as `more`. Raises InputError naming
    the files for a case without prediction or label, and for shapes, affines or values that do not fit.

    >>> data = lightm.phantoms("xray", folder / "data", cases=2, size=32)
    >>> result = lightm.evaluate(data / "labelsTr", data / "labelsTr")
    >>> result.overall.dsc.mean
    1.0
    """
    chosen = EvaluateOptions.of(options, more, "evaluate")
    if labels is not None:
        return evaluate_folder(predictions, labels, options=chosen, progress=progress)
    return score_run(predictions, options=chosen, progress=progress)


def report(run: Path | str, *, out: Path | str | None = None, progress: Progress | None = None) -> Path:
    """Write the self-contained HTML report of a run, by default RUN/report.html, and return its path.

    Raises InputError for a folder that is no run and for parts that cannot be read.

    >>> data = lightm.phantoms("xray", folder / "data", cases=4, size=32)
    >>> options = {"epochs": 1, "steps_per_epoch": 1, "val_patches": 1, "patch_size": [32, 32], "test": False}
    >>> run = lightm.train(data, folder / "run", **options)
    >>> lightm.report(run.run_dir).name
    'report.html'
    """
    return write_report(Path(run), out=None if out is None else Path(out), progress=progress)


def compare(
    experiment: Path | str | Experiment,
    out: Path | str | None = None,
    *,
    dataset: Path | str | None = None,
    jobs: int | None = None,
    total_time: str | float | None = None,
    retry: bool = False,
    progress: Progress | None = None,
) -> CompareResult:
    """Train a grid of networks, losses, recipes and seeds on one split, and say what is better by how much.

    experiment: its YAML file, the folder of an earlier comparison, or an Experiment. out: by default runs/NAME;
    finished trainings there are kept, interrupted ones resumed. See docs/compare.md. Raises InputError for a faulty
    experiment before anything is written.

    >>> text = "name: tiny\\nphantom: {kind: liver, cases: 4, size: 24}\\nnetworks: [unit]\\nepochs: 1"
    >>> _ = (folder / "tiny.yaml").write_text(text)
    >>> lightm.compare(folder / "tiny.yaml")
    Traceback (most recent call last):
    ...
    lightm.errors.InputError: ...tiny.yaml: network 'unit': 'unit' is not known...
    """
    from lightm.lab.compare import compare_experiment

    if isinstance(experiment, str | Path) and Path(experiment).is_dir():
        experiment, out = Path(experiment) / "experiment.yaml", experiment if out is None else out
    asked: dict[str, Any] = {"dataset": dataset, "jobs": jobs, "total_time": total_time, "retry": retry}
    return compare_experiment(experiment, out, **asked, progress=progress)


def convert(
    layout: str, source: Path | str, out: Path | str, *, progress: Progress | None = None, **options: Any
) -> Converted:
    """Convert a public download to nnU-Net's raw layout, without loss, and return what was found.

    layout: lits, montgomery-shenzhen, msd or folder. options: labels, link, trust_image_geometry, skip_faulty,
    overwrite. Any error ends the conversion with all problems named and nothing written, unless `skip_faulty`. Raises
    InputError for what is wrong with the data or the call. Cost: every file read twice and written once.

    >>> made = lightm.phantoms("xray", folder / "made", cases=2, size=32)
    >>> for image in (made / "imagesTr").iterdir():
    ...     _ = image.rename(image.with_name(image.name.replace("_0000", "")))
    >>> lightm.convert("folder", made / "imagesTr", folder / "data", labels=made / "labelsTr").train
    2
    """
    chosen = ConvertOptions.of(None, options, "convert")
    return convert_dataset(layout, source, out, **chosen.model_dump(), progress=progress)


def phantoms(
    kind: str,
    out: Path | str,
    *,
    cases: int = 20,
    size: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Path:
    """Write a data set of synthetic scans with exact labels in the nnU-Net raw layout, and return its folder.

    kind: "liver" (CT), "vessels" (CT), "xray" (2D) or "brain" (MR: four channels, regions). size: typical voxels along
    an axis, at least 24; default 64, of vessels 96, of xray 256. The same seed gives the same files. Raises InputError
    for a wrong argument or a folder that holds something.

    >>> data = lightm.phantoms("xray", folder / "data", cases=2, size=32)
    >>> sorted(path.name for path in (data / "labelsTr").iterdir())
    ['xray_000.png', 'xray_001.png']
    """
    default = {"vessels": 96, "xray": 256}.get(kind, 64)
    return make_phantoms(kind, out, cases=cases, size=default if size is None else size, seed=seed, progress=progress)


def export(model: Path | str, out: Path | str, *, overwrite: bool = False) -> Path:
    """Write a trained model as a single file, which every verb takes in place of the folder, and return its path.

    model: a model folder, or the run folder that holds it. Raises InputError for a wrong or damaged model, another
    ending than that of a single-file model, and a file that is there already unless `overwrite`.

    >>> lightm.export(folder / "nothing", folder / "model.bin")
    Traceback (most recent call last):
    ...
    lightm.errors.InputError: ...model.bin: a single-file model needs a name that ends in ...
    """
    return pack_model(model, out, overwrite=overwrite)


def import_released(checkpoint: Path | str, out: Path | str, **options: Any) -> ImportedModel:
    """Convert weights of LightM-UNet's released code into a model folder, without executing anything in the file.

    checkpoint: a plain state dict (.safetensors, .pth, .pt), or an nnU-Net checkpoint that holds one. options: labels,
    dataset_json, plans, configuration, spacing_mm, patch_size, groups, overwrite; what is not given is taken from the
    checkpoint, or guessed, which the result's `remarks` say. Raises InputError, naming the file, for a checkpoint that
    is unreadable or of another network, and for labels or channels that do not fit it. Memory: the weights three times.

    >>> lightm.import_released(folder / "nothing.pth", folder / "model")
    Traceback (most recent call last):
    ...
    lightm.errors.InputError: ...nothing.pth: ...
    """
    from lightm.interchange.released import import_released as run

    return run(checkpoint, out, **ImportOptions.of(None, options, "import_released").model_dump())


def info(
    network: str,
    *,
    spatial: Sequence[int] = (128, 128, 128),
    in_channels: int = 1,
    out_channels: int = 3,
    latency: bool = False,
    **options: Any,
) -> Account:
    """Return what a network costs for one image: parameters by source, operations with the scan, memory.

    spatial: sizes of the image, (Z, Y, X) or (Y, X). latency: run it on this machine's CPU too, and time it. options:
    those of the network. Raises InputError for an unknown network or impossible settings.

    >>> lightm.info("lightm-small", spatial=(32, 32, 32)).parameters.total
    265811
    """
    from lightm.lab.complexity import account

    image: dict[str, Any] = {"spatial": spatial, "in_channels": in_channels, "out_channels": out_channels}
    return account(network, **image, options=options, latency=latency)


def bench(what: str = "network", *, progress: Progress | None = None, **options: Any) -> list[Row]:
    """Measure time, peak memory and the machine's roofline of operators, layers and networks on this machine.

    what: op, layer, network, scaling, all, or one operator or layer such as selective_scan. options: size, repeats,
    networks, baseline, train, sizes, memory, out (CSV), plot, threads. Raises InputError for what there is not.

    >>> lightm.bench("selective_scam")
    Traceback (most recent call last):
    ...
    lightm.errors.InputError: ...selective_scan...
    """
    chosen = BenchOptions.of(None, options, "bench")
    from lightm.lab.bench import run

    if chosen.threads is not None:
        torch.set_num_threads(chosen.threads)
    arguments = chosen.model_dump(exclude={"threads", "sizes"} if chosen.sizes is None else {"threads"})
    return run(what, **arguments, progress=progress)
