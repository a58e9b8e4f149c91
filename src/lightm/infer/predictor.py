"""Prediction of one case: its images in, a label map in their own geometry out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from lightm.data.plan import Plan
from lightm.data.preprocess import preprocess_case
from lightm.data.volume import Volume, to_native
from lightm.errors import InputError, LightMError
from lightm.infer.native import class_indices
from lightm.infer.postprocess import apply_rules
from lightm.infer.sliding import WindowProgress, logit_slabs
from lightm.nets import folder as model_folder


class Predictor:
    """A network with the plan it was trained by, ready to segment images.

    network: (B, C, *patch) -> logits (B, K, *patch); it is moved to `device` and put into evaluation mode.
    overlap: of neighbouring windows, as a share of the patch. tta: average the logits over all flips (4 in 2D, 8 in 3D:
    that many times the work); only for structures that a flip leaves what they are, so not for left and right.
    rules: label values whose stray components are removed, see `lightm.infer.postprocess`.
    """

    def __init__(
        self,
        network: nn.Module,
        plan: Plan,
        device: str | torch.device = "cpu",
        *,
        overlap: float = 0.5,
        tta: bool = False,
        rules: Sequence[Sequence[int]] = (),
    ) -> None:
        if not 0 <= overlap < 1:
            raise InputError(f"overlap={overlap}: expected a share of the patch of at least 0 and below 1, such as 0.5")
        try:
            self.device = torch.device(device)
            self.network = network.to(self.device).eval()
        except (RuntimeError, AssertionError) as error:  # PyTorch asserts when it was built without the device
            raise InputError(f"device '{device}' cannot be used here ({error}); try 'cpu'") from error
        self.plan = plan
        self.overlap = overlap
        self.tta = tta
        self.rules = rules

    @classmethod
    def from_folder(
        cls,
        model_dir: Path | str,
        device: str | torch.device = "cpu",
        *,
        overlap: float = 0.5,
        tta: bool = False,
    ) -> Predictor:
        """Load a model folder; raises InputError, naming the file, for one that is missing or damaged."""
        network, info = model_folder.load_model(Path(model_dir))
        try:
            plan = Plan.model_validate(info["plan"])
        except ValueError as error:
            raise InputError(f"{Path(model_dir) / 'model.json'}: its plan is not valid: {error}") from error
        rules = info.get("postprocess", {}).get("keep_largest", [])
        return cls(network, plan, device, overlap=overlap, tta=tta, rules=rules)

    def predict_volumes(self, images: Sequence[Volume], *, progress: WindowProgress | None = None) -> Volume:
        """Return the label map of one case, in the geometry of its first image; uint8, or int16 for values above 255.

        images: one volume per channel of the plan, in its order. The way: canonical orientation, the plan's spacing,
        normalised; logits by sliding windows; the largest one in every voxel of the original grid; original
        orientation. progress(done, total) counts windows.

        Raises InputError for images that do not fit the plan or each other, LightMError for a network whose output
        does not. Memory: the images in float32 at the plan's spacing, one byte a voxel for the result, and the
        logits of one slab of patch depth; never those of the whole volume.
        """
        image, _ = preprocess_case(list(images), None, self.plan)
        native = images[0]
        slabs = logit_slabs(
            self.network,
            torch.from_numpy(image),
            patch_size=self.plan.patch_size,
            overlap=self.overlap,
            mirror_axes=range(self.plan.spatial_dims) if self.tta else (),
            device=self.device,
            progress=progress,
        )
        values = self.plan.values
        indices = class_indices(self._checked(slabs), image.shape[1:], native.to_canonical().shape)
        dtype = np.uint8 if max(values) <= 255 else np.int16
        labels = np.asarray(values, dtype=dtype)[to_native(indices, native)]
        return native.like(apply_rules(np.ascontiguousarray(labels), self.rules))

    def _checked(self, slabs: Iterator[Tensor]) -> Iterator[Tensor]:
        for slab in slabs:
            if slab.shape[0] != len(self.plan.classes):
                raise LightMError(
                    f"the network returned {slab.shape[0]} classes; its plan has {len(self.plan.classes)} "
                    f"({', '.join(self.plan.classes)})"
                )
            yield slab
