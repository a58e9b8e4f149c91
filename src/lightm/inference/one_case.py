"""One case of a run: read, predicted, written with all that was asked for, and described."""

from __future__ import annotations

import errno
import logging
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from lightm.datasets.cases import Case
from lightm.errors import InputError, LightMError
from lightm.files import atomic_file
from lightm.images.io import read_volume, write_volume
from lightm.images.lazy import LazyVolume, open_volume
from lightm.images.volume import Volume
from lightm.inference.predictor import Predictor
from lightm.inference.prefetch import Reading
from lightm.inference.record import (
    PREVIEWS,
    PROBABILITIES,
    CaseRecord,
    Fault,
    FileRecord,
    RecordedOptions,
    Seconds,
    file_record,
)
from lightm.inference.sliding import WindowProgress
from lightm.inference.statistics import ClassStatistics, class_statistics

_log = logging.getLogger("lightm.inference")

# Asked before a case is predicted whether it can be served, then given its label map and the file that holds it.
CaseWriter = Callable[[Case], Callable[[Volume, Path], Path]]


class DiskError(LightMError):
    """The disk of the output refuses (full, no rights), so that no other case can be written either."""


@dataclass(frozen=True)
class Images:
    """What was read of a case. volumes: None where the predictor reads the files itself."""

    volumes: list[Volume] | None
    files: list[FileRecord]
    seconds: float


@dataclass(frozen=True)
class Job:
    """What all cases of a run share. targets: the label map of each case."""

    predictor: Predictor
    options: RecordedOptions
    targets: Mapping[str, Path]
    also: CaseWriter | None
    windows: WindowProgress | None

    def read(self, case: Case) -> Images:
        """Read the images of a case, if they may be held as a whole, and take their checksums."""
        started = time.perf_counter()
        volumes = None if self.options.max_memory is not None else [read_volume(path) for path in case.images]
        files = [file_record(path, str(path)) for path in case.images]
        return Images(volumes, files, time.perf_counter() - started)

    def predict(self, case: Case, reading: Reading[Images]) -> CaseRecord:
        """Predict a case and write its files; the label map comes last, so that it stands for all of them.

        Raises DiskError where the disk of the output refuses; whatever else is raised concerns this case alone.
        """
        try:
            return self._predict(case, reading)
        except InputError:
            raise
        except LightMError as error:
            if isinstance(error.__cause__, OSError):
                raise DiskError(str(error)) from error.__cause__
            raise
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EROFS, getattr(errno, "EDQUOT", errno.ENOSPC)):
                raise DiskError(
                    f"{error.filename or tempfile.gettempdir()}: {error.strerror}; free some space"
                ) from error
            raise

    def _predict(self, case: Case, reading: Reading[Images]) -> CaseRecord:
        target = self.targets[case.id]
        out = target.parent
        second = None if self.also is None else self.also(case)
        probabilities = out / PROBABILITIES / f"{case.id}.nii.gz" if self.options.save_probabilities else None
        images = reading.take()
        started = time.perf_counter()
        if images.volumes is None:
            labels = self.predictor.predict_files(case.images, progress=self.windows, probabilities=probabilities)
        else:
            labels = self.predictor.predict_volumes(images.volumes, progress=self.windows, probabilities=probabilities)
        predicted = time.perf_counter()
        written = [] if probabilities is None else [probabilities]
        statistics: list[ClassStatistics] | None = None
        if self.options.statistics or self.options.preview:
            image = LazyVolume.of(images.volumes[0]) if images.volumes else _opened(case.images[0])
            classes = {name: value for name, value in self.predictor.plan.labels.items() if value != 0}
            if self.options.statistics:
                statistics = class_statistics(labels, image, classes)
            if self.options.preview:
                from lightm.inference.preview import preview_png

                written.append(out / PREVIEWS / f"{case.id}.png")
                picture = preview_png(image, labels, classes)
                with atomic_file(written[-1]) as stream:
                    stream.write(picture)
        if second is not None:
            written.append(second(labels, target))
        write_volume(target, labels, kind="label")
        finished = time.perf_counter()
        names = [path.relative_to(out).as_posix() for path in (target, *written)]
        return CaseRecord(
            case=case.id,
            file=target.name,
            more=names[1:],
            shape=list(labels.shape),
            spacing_mm=list(labels.spacing_mm),
            seconds=round(images.seconds + finished - started, 3),
            phases=Seconds(
                read=round(images.seconds, 3),
                predict=round(predicted - started, 3),
                write=round(finished - predicted, 3),
            ),
            images=images.files,
            outputs=[file_record(out / name, name) for name in names],
            statistics=statistics,
        )


def _opened(path: Path) -> LazyVolume:
    """Open an image once more, so that its voxels are read by the slice (from a temporary copy where compressed)."""
    return open_volume(path, Path(tempfile.gettempdir()))


def fault_of(case: Case, error: Exception) -> Fault:
    """Describe why a case failed, in one line for people; what was not foreseen goes to the log with its traceback."""
    text = " ".join(str(error).split()) if not isinstance(error, LightMError) else str(error)
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _says_memory(text)):
        text = f"not enough memory ({text or 'MemoryError'}); set a limit (--max-memory), or use a larger machine"
    elif not isinstance(error, LightMError):
        _log.error("case '%s' failed unexpectedly", case.id, exc_info=error)
        text = f"{type(error).__name__}: {text}"
    if str(case.images[0].parent) not in text:
        text = f"{case.images[0]}: {text}"
    return Fault(case=case.id, error=text, kind=type(error).__name__)


def _says_memory(text: str) -> bool:
    """Whether a RuntimeError is PyTorch's for a refused allocation, on the CPU or a GPU."""
    return any(words in text.lower() for words in ("can't allocate memory", "out of memory", "not enough memory"))
