"""Prediction of many cases: a model and images in, label maps and a record of the run out."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from lightm.config_io import load_json
from lightm.datasets.cases import Case
from lightm.datasets.inputs import find_cases
from lightm.errors import InputError, LightMError
from lightm.files import LOCK, locked_folder, remove_temporaries
from lightm.images.io import file_suffix, split_path
from lightm.inference import record as records
from lightm.inference.budget import peak_resident_bytes
from lightm.inference.one_case import CaseWriter, DiskError, Job, each_read, failed_case
from lightm.inference.predictor import Predictor
from lightm.inference.record import (
    PREVIEWS,
    PROBABILITIES,
    RECORD,
    CaseRecord,
    PredictOptions,
    Record,
    RecordedOptions,
    file_record,
)
from lightm.inference.statistics import write_statistics
from lightm.nets.folder import find_model
from lightm.progress import Progress

_log = logging.getLogger(__name__)


Models = Path | str | Sequence[Path | str]
"""A model folder, file or run, or several of them, whose probabilities are averaged."""


def predict_folder(
    model: Models | Predictor,
    inputs: Path | str | Sequence[Path | str],
    out: Path | str,
    *,
    options: PredictOptions | Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    extra_writer: CaseWriter | None = None,
    **more: Any,
) -> list[Path]:
    """Segment every case in `inputs` and return the label maps in `out` that are done, sorted by case.

    model: a model folder, a file that `lightm export` wrote, the run folder that holds one, several of these as an
    ensemble, or a Predictor made of them, whose own options for loading hold then. inputs: what `find_cases` takes: an
    image; a folder of CASE_0000.EXT, CASE_0001.EXT, ... (CASE.EXT with one channel); a dataset, whose imagesTs is
    taken; with `cases`, only these ids, from imagesTr too; DICOM series, which give CASE.nii.gz; a .txt or .csv list;
    or several of these.
    options: an object, or its fields as `more`. progress("predict", done, total) counts cases, progress("windows",
    done, total) the windows of the present case; a line per case and one at the end are logged.

    Written to `out`, each file complete or not at all: CASE + its own file ending, in the geometry of its image; after
    every case prediction.json (`lightm.inference.record.Record`: model, options, times, checksums, errors, peak
    memory); and as asked for probabilities/CASE.nii.gz (`lightm.inference.native_space.ProbabilityFile`),
    statistics.csv and .json (`lightm.inference.statistics`), previews/CASE.png, and what extra_writer(case) writes: it
    may refuse a case, and returns what writes a second file of its label map, as
    `lightm.interchange.dicom_seg.seg_writer` does. The option `report` names a .json file for a copy of the record.

    A case that cannot be predicted, for whatever reason, is left out and the others are predicted; the call ends with
    one LightMError that lists every error (the InputError itself where there is one case alone). A disk that refuses
    ends the run at once. With `overwrite` the files that prediction.json there lists are removed first. With `resume`
    the cases that it lists stay, if model, options (but for max_memory, which changes no label) and images are the
    same, and the others are predicted.

    Raises InputError before anything is written for a wrong model, input, case or option, where `out` holds files and
    neither `overwrite` nor `resume`, or another process writes to it. Memory: as `Predictor`, and without `max_memory`
    the images of the next case, which are read meanwhile.
    """
    chosen = PredictOptions.of(options, more, "predict")
    out = Path(out)
    if chosen.overwrite and chosen.resume:
        raise InputError("overwrite and resume exclude each other: start anew, or resume; choose one")
    replace = chosen.overwrite or chosen.resume
    _check_out(out, any_content=replace or (out / LOCK).exists())
    report = None if chosen.report is None else Path(chosen.report)
    if report is not None and report.suffix.lower() != ".json":
        raise InputError(f"{report}: a report needs a name that ends in .json")
    if report is not None and (report.is_dir() or (report.exists() and not replace)):
        raise InputError(f"{report}: is there already; give the report another name, or allow overwriting")
    given = [Path(inputs)] if isinstance(inputs, (str, Path)) else [Path(path) for path in inputs]
    if isinstance(model, Predictor):
        predictor, chosen = model, _as_loaded(model, chosen)
    else:
        predictor = load_predictor(model, chosen)
    sources = [one.source for one in predictor.models if one.source is not None]
    if len(sources) < len(predictor.models):
        raise InputError("a Predictor without a file: save its network as a model and load that, so that it is known")
    found = find_cases(given, predictor.plan.channels, cases=chosen.cases)
    targets = {case.id: out / (case.id + _result_suffix(case)) for case in found}
    _check_targets(found, targets, out)
    recorded = RecordedOptions(
        **{name: getattr(chosen, name) for name in RecordedOptions.model_fields if name != "second_file"},
        second_file=extra_writer is not None,
    ).model_copy(update={"device": str(predictor.device)})
    described = records.describe_models(sources)
    record = records.new_record(described, [str(path) for path in given], out, recorded)
    with contextlib.ExitStack() as stack:
        if not out.exists():
            stack.callback(_remove_empty, out)
        stack.enter_context(locked_folder(out, "prediction"))
        for folder in (out, out / PREVIEWS, out / PROBABILITIES):
            remove_temporaries(folder)
        _check_out(out, any_content=replace)
        if chosen.overwrite:
            records.remove_written(out)
        elif chosen.resume and (out / RECORD).is_file():
            what, remedy = "a record of predictions of this version", "give another folder, or empty it"
            _take_over(load_json(out / RECORD, Record, what, remedy), record, found, out)
        elif chosen.resume:
            _check_out(out, any_content=False)
        try:
            record.write(out / RECORD)  # so that a run that is killed in its first case can resume too
            on_window = None if progress is None else functools.partial(progress, "windows")
            job = Job(predictor, recorded, targets, extra_writer, on_window)
            _run(job, record, found, out, progress)
        finally:
            if not record.cases:
                with contextlib.suppress(OSError):  # what stopped the run is the error to report
                    (out / RECORD).unlink(missing_ok=True)
            if report is not None:
                record.write(report)
    _log.info(_closing(record))
    if record.failed:
        if len(found) == 1 and record.failed[0].kind == InputError.__name__:
            raise InputError(record.failed[0].error)
        lines = "\n".join(f"  case '{failed.case}': {failed.error}" for failed in record.failed)
        raise LightMError(f"{len(record.failed)} of {len(found)} cases could not be predicted:\n{lines}")
    return [targets[case.id] for case in found]


LOADING = ("device", "overlap", "tta", "window", "postprocess", "max_memory", "correct_gantry_tilt")
"""The options that concern loading a model; `lightm.load` takes these."""


def _as_loaded(predictor: Predictor, options: PredictOptions) -> PredictOptions:
    """The options with those that a Predictor has already; raises InputError where others were asked for."""
    if wrong := [name for name in LOADING if name in options.model_fields_set]:
        raise InputError(f"{', '.join(wrong)}: the Predictor has these already; give them to lightm.load instead")
    loaded = {name: getattr(predictor, name) for name in LOADING if name != "device"}
    return options.model_copy(update=loaded | {"tta": bool(predictor.tta)})


def load_predictor(model: Models, options: PredictOptions, network: nn.Module | None = None) -> Predictor:
    """Return the model of a model folder, single file or run, or an ensemble of several, with the options for loading.

    network: the module, for a model with a network of one's own. Raises InputError as `load_model` and
    `Predictor.ensemble`.
    """
    chosen = options.model_dump(include={*LOADING} - {"device"})
    given = [model] if isinstance(model, str | Path) else list(model)
    if not given:
        raise InputError("no model; give a model folder, a run, or several of them")
    if network is not None and len(given) > 1:
        raise InputError("network: one module cannot hold the weights of several models; give one model")
    loaded = [Predictor.from_folder(find_model(one), options.device, network=network, **chosen) for one in given]
    return loaded[0] if len(loaded) == 1 else Predictor.ensemble(loaded)


def _run(job: Job, record: Record, found: list[Case], out: Path, progress: Progress | None) -> None:
    """Predict what the record does not hold yet, and keep it up to date."""
    finished = {entry.case for entry in record.cases}
    left = [case for case in found if case.id not in finished]
    if finished:
        _log.info(f"{len(finished)} of {len(found)} case(s) finished earlier")
    if progress is not None:
        progress("predict", len(finished), len(found))
    done = len(finished)
    # Within a limit the predictor reads bit by bit, and needs all of it.
    for case, reading in each_read(left, job.read, ahead=job.predictor.max_memory is None):
        done += 1
        try:
            entry = job.predict(case, reading)
        except DiskError as error:
            raise LightMError(f"case '{case.id}': {error}") from error.__cause__
        except Exception as error:
            record.failed.append(failed_case(case, error))
            _log.info(f"[{done}/{len(found)}] {case.id} failed: {record.failed[-1].error}")
        else:
            record.cases.append(entry)
            record.cases.sort(key=lambda one: one.case)
            size = "x".join(str(length) for length in reversed(entry.shape))
            _log.info(f"[{done}/{len(found)}] {case.id} {size} {entry.seconds:.1f} s{_cleaned(entry)}")
        record.peak_resident_bytes = peak_resident_bytes()
        record.write(out / RECORD)
        if progress is not None:
            progress("predict", done, len(found))
    if record.options.statistics and record.cases:
        write_statistics(out, [(entry.case, entry.statistics or []) for entry in record.cases])
    record.finished, record.peak_resident_bytes = records.now(), peak_resident_bytes()
    record.write(out / RECORD)


def _cleaned(entry: CaseRecord) -> str:
    """What post-processing changed of a case, for its line of the log."""
    if entry.postprocess is None:
        return ""
    said = "; ".join(f"{name}: {change}" for name, change in entry.postprocess.items())
    return f"; post-processing: {said or 'nothing changed'}"


def _remove_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):  # it holds something
        folder.rmdir()


def _check_out(out: Path, *, any_content: bool) -> None:
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: a file; give a folder for the predictions")
    if out.is_dir() and not any_content and any(not path.name.startswith(".") for path in out.iterdir()):
        hint = "resume an unfinished run (--resume), " if (out / RECORD).is_file() else ""
        raise InputError(
            f"{out}: the folder already holds files; {hint}give another one, or allow overwriting (--overwrite)"
        )


def _result_suffix(case: Case) -> str:
    """The format of a case's label map: that of its image, PNG for JPEG, which cannot hold one."""
    suffix = file_suffix(case.images[0]) or ".nii.gz"
    return ".png" if suffix in (".jpg", ".jpeg") else suffix


def _check_targets(found: list[Case], targets: dict[str, Path], out: Path) -> None:
    sources = {split_path(image)[0].resolve() for case in found for image in case.images}
    for case in found:
        extra = (out / PREVIEWS / f"{case.id}.png", out / PROBABILITIES / f"{case.id}.nii.gz")
        for target in (targets[case.id], *extra):
            if target.resolve() in sources:
                raise InputError(f"{target}: the prediction would replace its own image; give another output folder")


def _take_over(earlier: Record, record: Record, found: list[Case], out: Path) -> None:
    """Take the finished cases of an earlier run into the record of this one; InputError for another model, options or
    images, and for label maps that were changed since. A case whose files are gone is predicted again.
    """
    where = out / RECORD
    if earlier.model.sha256 != record.model.sha256:
        raise InputError(
            f"{where}: made with another model ('{earlier.model.name}', {earlier.model.path}, checksum "
            f"{earlier.model.sha256[:12]}, now {record.model.sha256[:12]}); resume with that one, or give another "
            "folder"
        )
    differing = [
        f"{name} was {was}, is {value}"
        for name, value in record.options.model_dump(exclude={"max_memory"}).items()
        if (was := getattr(earlier.options, name)) != value
    ]
    if differing:
        raise InputError(f"{where}: made with other options: {'; '.join(differing)}; give the same, or another folder")
    by_id = {case.id: case for case in found}
    for entry in earlier.cases:
        case = by_id.get(entry.case)
        if case is None:
            raise InputError(
                f"{where}: case '{entry.case}' is finished, but not in the input ({', '.join(record.inputs)}); give "
                "the same input, or another folder"
            )
        images = [file_record(path, str(path)) for path in case.images]
        if [image.sha256 for image in images] != [image.sha256 for image in entry.images]:
            raise InputError(
                f"{case.images[0]}: the image of case '{entry.case}' changed since it was predicted; give another "
                "folder, or --overwrite"
            )
        present = [output for output in entry.outputs if (out / output.path).is_file()]
        for output in present:
            if file_record(out / output.path, output.path).sha256 != output.sha256:
                raise InputError(
                    f"{out / output.path}: changed since it was predicted; move it away to have it made again"
                )
        if len(present) == len(entry.outputs):
            record.cases.append(entry)
    record.started = earlier.started


def _closing(record: Record) -> str:
    parts = [f"{len(record.cases)} case(s) segmented into {record.out}"]
    parts += [f"{len(record.failed)} failed"] if record.failed else []
    parts.append(f"{sum(entry.seconds for entry in record.cases):.1f} s")
    if record.peak_resident_bytes is not None:
        parts.append(f"peak memory {record.peak_resident_bytes / 1e9:.2f} GB")
    return ", ".join(parts)
