"""What a run folder holds, read part by part; every part may be missing."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from lightm.errors import InputError
from lightm.evaluation.evaluation import Evaluation, load_evaluation
from lightm.evaluation.figures import History, read_history
from lightm.evaluation.folder import case_files

_PARTS = ("config.yaml", "run.json", "history.csv", "model", "predictions", "evaluation")


@dataclass(frozen=True)
class RunFolder:
    """The parts of a run; an empty mapping or `None` stands for a part that is not there."""

    path: Path
    config: dict[str, Any]
    plan: dict[str, Any]
    split: dict[str, Any]
    record: dict[str, Any]
    model: dict[str, Any]
    history: History
    evaluation: Evaluation | None
    predictions: dict[str, Path]

    def setting(self, name: str) -> Any:
        """Return a training setting, whether it stands at the top of the configuration or in its recipe."""
        settings = self.config.get("settings")
        inner = settings.get(name) if isinstance(settings, dict) else None
        return self.config.get(name, inner)

    @property
    def window(self) -> tuple[float, float] | None:
        """The range of intensities the network sees, when the plan fixes one (CT)."""
        channels = self.plan.get("normalization") or [{}]
        first = channels[0] if isinstance(channels[0], dict) else {}
        low, high = first.get("clip_low"), first.get("clip_high")
        return None if first.get("scheme") != "ct" or low is None or high is None else (float(low), float(high))


@dataclass(frozen=True)
class CaseImages:
    """Image (first channel), label and prediction of one case, in closest-RAS orientation in 3D."""

    image: NDArray[Any]
    label: NDArray[Any]
    pred: NDArray[Any]
    spacing_mm: tuple[float, ...]


def read_run(run_dir: Path) -> RunFolder:
    """Read what there is of a run; raises `InputError` for no run folder and for parts that are broken."""
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise InputError(f"{run_dir}: is no folder; give the folder that `lightm train` wrote")
    if not any((run_dir / part).exists() for part in _PARTS):
        raise InputError(f"{run_dir}: holds no part of a run; expected one of {', '.join(_PARTS)}")
    history, metrics = run_dir / "history.csv", run_dir / "evaluation" / "metrics.json"
    predictions = run_dir / "predictions"
    return RunFolder(
        path=run_dir,
        config=_mapping(run_dir / "config.yaml"),
        plan=_mapping(run_dir / "plan.yaml"),
        split=_mapping(run_dir / "split.json"),
        record=_mapping(run_dir / "run.json"),
        model=_mapping(run_dir / "model" / "model.json"),
        history=read_history(history) if history.is_file() else {},
        evaluation=load_evaluation(metrics) if metrics.is_file() else None,
        predictions=case_files(predictions) if predictions.is_dir() else {},
    )


def case_loader(run: RunFolder) -> Callable[[str], CaseImages]:
    """Return a function that reads the images of one case; raises `InputError` if the data set is gone."""
    from lightm.datasets.discovery import open_dataset
    from lightm.images.io import read_volume

    given, labels = run.config.get("dataset"), run.config.get("labels")
    if not given:
        raise InputError("config.yaml names no data set")
    dataset = open_dataset(given, labels=labels if isinstance(labels, str) else None)

    def load(case_id: str) -> CaseImages:
        case = dataset.case(case_id)
        if case_id not in run.predictions:
            raise InputError(f"case {case_id}: no prediction in {run.path / 'predictions'}")
        if case.label is None:
            raise InputError(f"case {case_id}: has no label")
        masks = [read_volume(path, kind="label") for path in (case.label, run.predictions[case_id])]
        picture = read_volume(case.images[0])
        if run.config.get("trust_image_geometry") and masks[0].shape == picture.shape:
            masks[0] = picture.with_data(masks[0].data)
        volumes = [volume.to_canonical() for volume in (picture, *masks)]
        image, label, pred = (np.ascontiguousarray(volume.data) for volume in volumes)
        if not image.shape == label.shape == pred.shape:
            raise InputError(
                f"case {case_id}: image, label and prediction have shapes {image.shape}, {label.shape} and "
                f"{pred.shape}; predict and evaluate it again"
            )
        return CaseImages(image, label, pred, tuple(volumes[1].spacing_mm))

    return load


def _mapping(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"{path}: cannot be read ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds {type(content).__name__}, expected names and values")
    return content
