"""Prediction of one case: its images in, a label map in their own geometry out."""

from __future__ import annotations

import copy
import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from math import prod
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from lightm.device import resolve_device
from lightm.errors import InputError, LightMError
from lightm.images.lazy import LazyVolume, open_volume, read_header
from lightm.images.volume import Volume
from lightm.inference import budget
from lightm.inference.native_space import (
    ProbabilityFile,
    check_path,
    mean_probabilities,
    native_logits,
    write_labels,
)
from lightm.inference.postprocess import Change, Step, apply_rules, read_postprocess
from lightm.inference.sliding import WindowProgress, logit_slabs, window_logits
from lightm.inference.suspicion import suspicions
from lightm.nets import folder as model_folder
from lightm.preparation.plan import MULTIPLE, Plan
from lightm.preparation.preprocess import NetworkGrid, check_fit, grid_shape

_log = logging.getLogger(__name__)

Window = Literal["patch", "whole"]
Remark = Callable[[str], None]


class Predictor:
    """A network with the plan it was trained by, ready to segment images.

    network: (B, C, *patch) -> logits (B, K, *patch); it is moved to `device` and put into evaluation mode.
    overlap: of neighbouring windows, as a share of the patch. tta: spatial axes over whose flips the logits are
    averaged, of (z, y, x) or (y, x), 2^n times the work; only axes that the network was trained to be mirrored along,
    as flips along others change its labels.
    rules: post-processing steps, see `lightm.inference.postprocess`.

    max_memory: bytes of resident memory that the whole process may reach (`lightm.inference.budget.parse_memory` reads
    "2GB"), what Python, PyTorch and compiled kernels hold included; None: no limit. It changes where arrays lie, in
    memory or in temporary files (`tempfile.gettempdir()`), and no label. A case that cannot be predicted within it is
    refused before it starts, with what it needs. The first case costs one more call of the network, on a part of a
    patch or a patch of zeros, to measure it. See docs/prediction.md.

    window: "patch": sliding windows of the plan's patch, each visited once; slices are done with when no later window
    reaches them. "whole": the volume, padded to multiples of 8, as one window, in memory for all of it: GroupNorm takes
    mean and standard deviation over all voxels first, and convolutions and upsampling look ahead, so slabs would not
    give the network's answer. A network trained on patches then sees statistics of a size that it was not trained on.

    correct_gantry_tilt: resample a tilted DICOM series onto a straight grid, on which its label map lies too.

    >>> import torch
    >>> plan = lightm.plan(lightm.phantoms("xray", folder / "data", cases=2, size=32), patch_size=[32, 32])
    >>> predictor = lightm.Predictor(torch.nn.Conv2d(1, 2, 3, padding=1), plan)
    >>> predictor(folder / "data" / "imagesTr" / "xray_000_0000.png").shape
    (32, 32)
    """

    def __init__(
        self,
        network: nn.Module,
        plan: Plan,
        device: str | torch.device = "auto",
        *,
        overlap: float = 0.5,
        tta: Sequence[int] = (),
        rules: Sequence[Step | Sequence[int]] = (),
        max_memory: int | None = None,
        window: Window = "patch",
        correct_gantry_tilt: bool = False,
    ) -> None:
        if not 0 <= overlap < 1:
            raise InputError(f"overlap={overlap}: expected a share of the patch of at least 0 and below 1, such as 0.5")
        if max_memory is not None and max_memory < 1:
            raise InputError(f"max_memory={max_memory}: expected a number of bytes, such as 2_000_000_000, or None")
        if window not in ("patch", "whole"):
            raise InputError(f"window='{window}': expected 'patch' (sliding windows) or 'whole' (one window)")
        if isinstance(tta, bool):
            raise InputError(f"tta={tta}: expected the axes to flip along, such as (2,); lightm.load takes yes or no")
        self.device = resolve_device(device)
        self.network = network.to(self.device).eval()
        self.plan, self.overlap, self.tta, self.rules = plan, overlap, tuple(tta), rules
        self.max_memory, self.window, self.correct_gantry_tilt = max_memory, window, correct_gantry_tilt
        self.source: Path | None = None  # the model folder or file that it was loaded from
        self.postprocess = True  # whether the post-processing of that model was asked for
        self.others: tuple[Predictor, ...] = ()  # of an ensemble
        self._measured: dict[tuple[int, ...], int] = {}

    @classmethod
    def ensemble(cls, models: Sequence[Predictor]) -> Predictor:
        """Return a Predictor whose probabilities are the mean of those of several models, such as the folds of one set.

        models: of the same channels and classes or regions; their spacings, patches and networks may differ. Options
        that are not a model's own (max_memory, window, ...) are the first one's. Post-processing is applied where all
        models have the same. Raises InputError for models that do not fit together, naming two. Memory: one network's
        activations at a time, and the sums of logits of one patch depth for each model.
        """
        if not models:
            raise InputError("an ensemble needs a model; give one or several")
        first = models[0]
        for other in models[1:]:
            for what in ("spatial_dims", "channels", "labels", "regions", "regions_class_order"):
                a, b = getattr(first.plan, what), getattr(other.plan, what)
                if a != b:
                    where = f"{first.source or 'the first model'} and {other.source or 'another'}"
                    raise InputError(f"{where}: cannot be averaged, their {what} differ: {a} and {b}")
        made = copy.copy(first)
        made.others, made._measured = tuple(models[1:]), {}
        if any(other.rules != first.rules for other in made.others):
            _log.warning("the models were saved with different post-processing: none is applied to their mean")
            made.rules = ()
        return made

    @property
    def models(self) -> tuple[Predictor, ...]:
        """The models whose probabilities are averaged; this one alone where it is no ensemble."""
        return (self, *self.others)

    @classmethod
    def from_folder(
        cls,
        model_dir: Path | str,
        device: str | torch.device = "auto",
        *,
        overlap: float = 0.5,
        tta: bool = False,
        max_memory: int | None = None,
        window: Window = "patch",
        postprocess: bool = True,
        correct_gantry_tilt: bool = False,
        network: nn.Module | None = None,
    ) -> Predictor:
        """Load a model folder; raises InputError, naming the file, for one that is missing or damaged.

        tta: average over flips along the axes that the model was trained to be mirrored along; InputError where there
        are none. postprocess: whether to apply the post-processing that the model was saved with. network: a module to
        load the weights into, for a model that was trained with a network of one's own.
        """
        network, info = model_folder.load_model(Path(model_dir), **({} if network is None else {"network": network}))
        try:
            plan = Plan.model_validate(info["plan"])
        except ValueError as error:
            raise InputError(f"{Path(model_dir) / 'model.json'}: its plan is not valid: {error}") from error
        rules = read_postprocess(info, str(Path(model_dir) / "model.json")).steps if postprocess else ()
        axes = info.get("training", {}).get("mirror_axes", ()) if tta else ()
        if tta and not axes:
            raise InputError(
                f"{model_dir}: tta: this model was not trained with mirroring, and averaging over flips would spoil "
                "its labels; predict without it, or train with augment: {mirror_axes: [...]}"
            )
        more: dict[str, Any] = {"max_memory": max_memory, "window": window, "correct_gantry_tilt": correct_gantry_tilt}
        made = cls(network, plan, device, overlap=overlap, tta=axes, rules=rules, **more)
        made.source, made.postprocess = Path(model_dir), postprocess
        return made

    def __call__(self, *images: Path | str | Volume) -> Volume:
        """Return the label map of one case: a file or Volume for each channel of the plan; see `predict_volumes`."""
        volumes = [image for image in images if isinstance(image, Volume)]
        if len(volumes) == len(images):
            return self.predict_volumes(volumes)
        return self.predict_files([Path(image) for image in images if not isinstance(image, Volume)])

    def predict_volumes(
        self,
        images: Sequence[Volume],
        *,
        progress: WindowProgress | None = None,
        probabilities: Path | None = None,
        changes: dict[int, Change] | None = None,
        remark: Remark | None = None,
    ) -> Volume:
        """Return the label map of one case, in the geometry of its first image; uint8, or int16 for values above 255.

        images: one volume per channel of the plan, in its order. They are brought to canonical orientation and the
        plan's spacing and normalised; windows give logits, the largest one in every voxel of the original grid the
        label (of regions: `lightm.inference.native_space.label_map`), which is brought back to the original
        orientation. progress(done, total) counts windows. probabilities: a .nii.gz or .nii file for those of all
        classes, see `lightm.inference.native_space.ProbabilityFile`. changes: is given, for each label value, what
        post-processing changed. remark(text) is called with what is odd about the images for this model
        (`lightm.inference.suspicion`); by default it is logged.

        Raises InputError for images that do not fit the plan or each other or the limit of memory, LightMError for a
        network whose output does not, or a disk that refuses. Memory: the images as they are, in float32 at the plan's
        spacing only where they are resampled, one byte per voxel for the result, and the logits of one slab of patch
        depth; with a limit less, see the class.
        """

        def opened(folder: Path | None) -> list[LazyVolume]:
            return [LazyVolume.of(image) for image in images]

        return self._predict(images, opened, 0, progress, probabilities, changes, remark)

    def predict_files(
        self,
        paths: Sequence[Path],
        *,
        progress: WindowProgress | None = None,
        probabilities: Path | None = None,
        changes: dict[int, Change] | None = None,
        remark: Remark | None = None,
    ) -> Volume:
        """Return the label map of one case from its files, one per channel; as `predict_volumes`, with less memory.

        NIfTI images are never held as a whole in another dtype than the file's and, where a limit asks for it, not held
        at all. Raises InputError as `read_volume` too.
        """
        headers = [read_header(path, correct_gantry_tilt=self.correct_gantry_tilt) for path in paths]
        # PNG and DICOM are there already; they are counted by what the process holds.
        itemsize = sum(0 if header.whole else header.itemsize for header in headers)

        def opened(folder: Path | None) -> list[LazyVolume]:
            return [
                LazyVolume.of(header.geometry) if header.whole else open_volume(path, folder)
                for path, header in zip(paths, headers, strict=True)
            ]

        geometries = [header.geometry for header in headers]
        return self._predict(geometries, opened, itemsize, progress, probabilities, changes, remark)

    def window_bytes(self) -> int | None:
        """Return what one call of the network on a patch needs, in bytes, measured once; None where unknown."""
        return self._measure(tuple(self.plan.patch_size))

    def _predict(
        self,
        geometries: Sequence[Volume],
        opened: Callable[[Path | None], list[LazyVolume]],
        itemsize: int,
        progress: WindowProgress | None,
        probabilities: Path | None,
        changes: dict[int, Change] | None,
        remark: Remark | None,
    ) -> Volume:
        check_fit(geometries, None, self.plan)
        if probabilities is not None:
            check_path(probabilities)
        values = self.plan.values
        dtype = np.dtype(np.uint8 if max(values) <= 255 else np.int16)
        # Geometry alone, so that the image can go before the end.
        native = geometries[0].with_data(np.broadcast_to(np.zeros((), geometries[0].data.dtype), geometries[0].shape))
        canonical = native.to_canonical()
        grids = [grid_shape(canonical, one.plan) for one in self.models]
        patches = [one._window(grid) for one, grid in zip(self.models, grids, strict=True)]
        case = budget.CaseSize(
            shape=canonical.shape,
            grid=tuple(map(max, *grids)) if self.others else grids[0],
            patch=tuple(map(max, *patches)) if self.others else patches[0],
            classes=len(self.plan.outputs),
            channels=len(geometries),
            itemsize=itemsize,
            label_itemsize=dtype.itemsize,
            rules=bool(self.rules),
            probabilities=probabilities is not None,
            models=len(self.models),
        )
        del geometries
        if self.max_memory is None:
            budget.check_sizes(case, self.plan.spacing_mm)
        held = budget.MemoryPlan() if self.max_memory is None else self._within(case, self.max_memory)
        folder = Path(tempfile.gettempdir())
        images = opened(None if held.voxels else folder)
        for text in suspicions(images, self.plan):
            (remark or _log.warning)(text)
        prepared: list[NetworkGrid] = []
        data = np.zeros(native.shape, dtype)
        regions, several = bool(self.plan.regions), bool(self.others)
        soft = None
        try:
            if probabilities is not None:
                soft = ProbabilityFile(
                    Path(probabilities), native, len(self.plan.outputs), regions=regions, probabilities=several
                )
            counts = _Counts(progress, len(self.models))
            found = []
            for index, (one, grid, patch) in enumerate(zip(self.models, grids, patches, strict=True)):
                prepared.append(NetworkGrid(images, one.plan, None if held.grid else folder))
                slabs = logit_slabs(
                    one.network,
                    prepared[-1],
                    patch_size=patch,
                    overlap=self.overlap,
                    mirror_axes=one.tta,
                    device=self.device,
                    progress=counts.of(index),
                    folder=None if held.sums else folder,
                )
                found.append(native_logits(one._checked(slabs), grid, canonical.shape))
            del images
            write_labels(
                mean_probabilities(found, regions=regions) if several else found[0],
                canonical.shape,
                values=values,
                regions_class_order=self.plan.regions_class_order,
                probabilities=several,
                out=native.with_data(data).to_canonical().data,  # a view: no second map is needed to turn it
                sink=None if soft is None else soft.add,
            )
            for made in prepared:
                made.close()
            if soft is not None:
                soft.finish()
            cleaned = apply_rules(data, self.rules, native.spacing_mm, in_place=True, changes=changes)
            return native.with_data(cleaned)
        finally:
            for made in prepared:
                made.close()
            if soft is not None:
                soft.close()

    def _window(self, grid: Sequence[int]) -> tuple[int, ...]:
        """The window for a grid: the patch, or the smallest that holds it and that three poolings halve evenly."""
        if self.window == "patch":
            return tuple(self.plan.patch_size)
        return tuple(-(-size // MULTIPLE) * MULTIPLE for size in grid)

    def _within(self, case: budget.CaseSize, limit: int) -> budget.MemoryPlan:
        """Return what can be held in memory under the limit; raises InputError where nothing is enough."""
        part = tuple(max(MULTIPLE, -(-size // (2 * MULTIPLE)) * MULTIPLE) for size in self.plan.patch_size)
        try:
            for one in self.models:
                if part not in one._measured:
                    one._call(part)  # kernels are compiled, which takes memory of its own
            least = self._measure(part)
        except InputError:
            raise
        except Exception:  # a network may be made for its own patch alone, and fails in any way on half of one
            _log.debug("half a patch, %s, cannot be measured; a whole one is", part, exc_info=True)
            part = tuple(self.plan.patch_size)
            least = self._measure(part)
        held = budget.resident_bytes()
        if least is None or held is None:
            raise InputError("max_memory: this system does not say how much memory a process holds; leave it out")
        # Fixed costs weigh more in a smaller window, so that this is never too little.
        most = least * prod(case.patch) // prod(part)
        exact = max(most, least)
        chosen = budget.choose(case, exact, limit, held)
        if chosen != budget.MemoryPlan() and held + least <= limit:
            exact = self._measure(tuple(self.plan.patch_size)) or most
            exact = max(exact, exact * prod(case.patch) // prod(self.plan.patch_size))
            held = budget.resident_bytes() or held
            chosen = budget.choose(case, exact, limit, held)
        if chosen is None:
            least = held + budget.min_bytes(case, exact)
            what = "the whole volume as one window" if self.window == "whole" else "a window"
            raise InputError(
                f"max_memory {budget.megabytes(limit)}: an image of shape {case.shape}, {case.grid} at the model's "
                f"spacing, needs at least {budget.megabytes(least)}: {budget.megabytes(held)} that the process holds, "
                f"{budget.megabytes(exact)} for the network on {what} of {case.patch}, "
                f"{budget.megabytes(prod(case.shape) * case.label_itemsize)} for the label map, and more for sums of "
                f"{case.classes} classes{' and their post-processing' if case.rules else ''}; allow more"
                + (", or use window='patch'" if self.window == "whole" else "")
            )
        return chosen

    def _measure(self, patch: tuple[int, ...]) -> int | None:
        """What one call of the network on a patch needs, of an ensemble the largest; None where it is unknown."""
        each = [self._measure_own(patch), *(other._measure(patch) for other in self.others)]
        known = [size for size in each if size is not None]
        return max(known) if len(known) == len(each) else None

    def _measure_own(self, patch: tuple[int, ...]) -> int | None:
        if patch not in self._measured and (found := budget.call_bytes(lambda: self._call(patch))) is not None:
            self._measured[patch] = found
        return self._measured.get(patch)

    def _call(self, patch: tuple[int, ...]) -> Tensor:
        """Run the network on zeros; one flip stands for all, since each is added to the sum before the next."""
        window = torch.zeros((len(self.plan.channels), *patch))
        return window_logits(self.network, window, self.tta[:1], self.device)

    def _checked(self, slabs: Iterator[Tensor]) -> Iterator[Tensor]:
        for slab in slabs:
            if slab.shape[0] != len(self.plan.outputs):
                what = "regions" if self.plan.regions else "classes"
                raise LightMError(
                    f"the network returned {slab.shape[0]} {what}; its plan has {len(self.plan.outputs)} "
                    f"({', '.join(self.plan.outputs)})"
                )
            yield slab


class _Counts:
    """The windows of several models as one count. A model that has not begun counts as many as the first."""

    def __init__(self, progress: WindowProgress | None, models: int) -> None:
        self._progress, self._done, self._total = progress, [0] * models, [0] * models

    def of(self, model: int) -> WindowProgress | None:
        progress = self._progress
        if progress is None:
            return None

        def count(done: int, total: int) -> None:
            self._done[model], self._total[model] = done, total
            progress(sum(self._done), sum(known or self._total[0] for known in self._total))

        return count
