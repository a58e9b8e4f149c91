"""Whole validation cases: they choose between the best and the last weights, and the post-processing.

Patches that are centred on foreground say little about false positives elsewhere, so the pseudo Dice only names a
candidate. Every case is predicted once with each candidate; the predictions of the kept one choose the post-processing.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightm.datasets.cases import Dataset
from lightm.errors import LightMError
from lightm.images.io import read_volume
from lightm.images.volume import Volume
from lightm.inference.folder import load_predictor
from lightm.inference.postprocess import Postprocess, counted
from lightm.inference.postprocess_choice import CaseLabels, Labels, TimeIsUp, case_dice, choose_rules
from lightm.inference.predictor import Predictor
from lightm.inference.record import PredictOptions
from lightm.nets.folder import read_description, save_model
from lightm.preparation.plan import Plan
from lightm.progress import Progress
from lightm.training.checkpoint_io import LAST, load_checkpoint
from lightm.training.record import TrainResult

_log = logging.getLogger(__name__)

FEWEST_CASES = 3  # that a choice between weights is made on, where there are so many


def choose_on_whole_cases(training: TrainResult, *, progress: Progress | None = None) -> Predictor:
    """Choose a finished training's weights and post-processing on whole validation cases, and save its model so.

    At most `val_cases` of the configuration are predicted, and with a time budget as many as are done within it; what
    cannot be chosen then stays: the best weights by pseudo Dice, no post-processing. The last weights are kept where
    their mean DSC over cases and classes is higher. Returns the model as it was saved. What was found and why stands in
    the log and in model.json: `training.whole_cases` and `postprocess`.

    Memory: that of one prediction and of two sets of weights; of the predictions their deflated label maps.
    """
    config, plan, data, model = training.config, training.plan, training.data, training.run_dir / "model"
    check_time = _clock(None if config.max_time_s is None else config.max_time_s - training.train_seconds)
    predictor = load_predictor(model, PredictOptions(device=config.device), training.network)
    predictor.rules = ()
    info = read_description(model)
    epochs = {"best": int(info["training"]["best_epoch"])}
    weights = {"best": {name: tensor.clone() for name, tensor in predictor.network.state_dict().items()}}
    last = load_checkpoint(training.run_dir / "checkpoints" / LAST)
    state = _network_part(last)
    if last["epoch"] != epochs["best"] and all(bool(torch.isfinite(tensor).all()) for tensor in state.values()):
        epochs["last"], weights["last"] = int(last["epoch"]), state
    ids = [case for case in training.split.val if data.case(case).label is not None][: config.val_cases]
    predicted = _predict(predictor, weights, data, ids, check_time, progress)
    found = {name: _mean_dice(cases, plan) for name, cases in predicted.items() if cases}
    kept = "best"
    if found and len(next(iter(predicted.values()))) >= min(FEWEST_CASES, len(ids)):
        kept = max(found, key=lambda name: (float(found[name].mean()), name == "best"))
    predictor.network.load_state_dict(weights[kept])
    names = list(plan.targets)
    whole = {
        "cases": len(predicted["best"]),
        "kept": kept,
        "epochs": epochs,
        "dsc": {name: dict(zip(names, dsc.round(6).tolist(), strict=True)) for name, dsc in found.items()},
    }
    _log_weights(whole, len(ids))
    chosen = None
    if config.postprocess:
        cases = predicted[kept]

        def labels() -> Labels:
            return _labels(data, [*training.split.train, *training.split.val])

        known: dict[str, Any] = {"names": {value: name for name, value in plan.labels.items()}}
        known.update(ignore_label=plan.ignore_label, check_time=check_time)
        chosen = choose_rules(cases, plan.values[1:], labels, **known)
        predictor.rules = chosen.steps
        _log_steps(chosen)
    save_model(
        model,
        network=info["network"],
        state_dict=predictor.network.state_dict(),
        plan=info["plan"],
        training={**info["training"], "whole_cases": whole},
        postprocess=None if chosen is None else chosen.model_dump(mode="json"),
    )
    return predictor


def scorer(data: Dataset, plan: Plan, device: str) -> Callable[[nn.Module, Sequence[str]], float]:
    """Return what scores whole cases with a network: the mean DSC over cases and classes, NaN where it cannot be."""

    def score(network: nn.Module, ids: Sequence[str]) -> float:
        try:
            predictor = Predictor(network, plan, device)
            cases = _predict(predictor, {"": {}}, data, ids, lambda: None, None)[""]
        except LightMError as error:  # a network that has not learnt yet may give what is not finite
            _log.warning("whole validation cases are not scored: %s", error)
            return float("nan")
        return float(_mean_dice(cases, plan).mean())

    return score


def _clock(seconds: float | None) -> Callable[[], None]:
    """What raises TimeIsUp when it is called after so many seconds; None: never."""
    end = None if seconds is None else time.monotonic() + seconds

    def check_time() -> None:
        if end is not None and time.monotonic() > end:
            raise TimeIsUp

    return check_time


def _network_part(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    items = checkpoint["state_dict"].items()
    return {name.removeprefix("network."): tensor for name, tensor in items if name.startswith("network.")}


def _predict(
    predictor: Predictor,
    weights: dict[str, dict[str, Tensor]],
    data: Dataset,
    ids: Sequence[str],
    check_time: Callable[[], None],
    progress: Progress | None,
) -> dict[str, list[CaseLabels]]:
    """Predict the cases with each set of weights (none: those it has), as many as the time allows with all of them."""
    found: dict[str, list[CaseLabels]] = {name: [] for name in weights}
    try:
        for done, case in enumerate(map(data.case, ids)):
            check_time()
            images, truth = [read_volume(path) for path in case.images], _label(data, case.id)
            predicted: list[Volume] = []
            for state in weights.values():
                if state and len(weights) > 1:
                    predictor.network.load_state_dict(state)
                predicted.append(predictor.predict_volumes(images, progress=lambda *_: check_time()))
            for cases, labels in zip(found.values(), predicted, strict=True):
                cases.append(CaseLabels(labels.data, truth.data, labels.spacing_mm))
            if progress is not None:
                progress("validation cases", done + 1, len(ids))
    except TimeIsUp:
        pass
    return found


def _label(data: Dataset, case_id: str) -> Volume:
    path = data.case(case_id).label
    if path is None:
        raise LightMError(f"case {case_id} has no label map; give its label, or leave it out of training")
    return read_volume(path, kind="label")


def _labels(data: Dataset, ids: Sequence[str]) -> Iterator[tuple[np.ndarray, Sequence[float]]]:
    for case_id in ids:
        volume = _label(data, case_id)
        yield volume.data, volume.spacing_mm


def _mean_dice(cases: Sequence[CaseLabels], plan: Plan) -> np.ndarray:
    """Mean DSC over the cases, of each class or region; 1 counts where it is absent in label and prediction."""
    values = list(plan.targets.values())
    rows = [case_dice(case.predicted, case.truth, values, plan.ignore_label) for case in cases]
    return np.stack(rows).mean(0)


def _log_weights(whole: dict[str, Any], asked: int) -> None:
    what = {"best": "the best weights by pseudo Dice", "last": "the last weights"}
    for name, dsc in whole["dsc"].items():
        classes = ", ".join(f"{label} {value:.3f}" for label, value in dsc.items())
        kept = "; kept" if name == whole["kept"] else ""
        count = counted(whole["cases"], "whole validation case")
        _log.info(f"DSC of {count}: {classes} with {what[name]} (epoch {whole['epochs'][name]}){kept}")
    if whole["cases"] < asked:
        _log.info(f"{whole['cases']} of {asked} whole validation cases were predicted within the time budget")


def _log_steps(chosen: Postprocess) -> None:
    for trial in chosen.tried:
        verdict = "taken" if trial.taken else "not taken"
        _log.info(f"post-processing: {trial.what}: {verdict}, {trial.why}")
    if not chosen.steps:
        _log.info(f"post-processing: none{f' ({chosen.why})' if chosen.why else ''}")
