"""Random changes of a training patch: parameters are drawn from a seed, then fixed transforms of MONAI are applied."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from lightm.errors import InputError
from lightm.labels import IGNORE_INDEX


def _rising(span: tuple[float, float]) -> tuple[float, float]:
    if not 0 < span[0] <= span[1]:
        raise ValueError("two positive numbers are needed, the lower first")
    return span


Probability = Annotated[float, Field(ge=0, le=1)]
Span = Annotated[tuple[float, float], AfterValidator(_rising)]


class AugmentConfig(BaseModel):
    """How strongly, and with which probability, patches are changed.

    rotation_degrees: about every axis, evenly from minus to plus. scale: magnification. gamma: exponent on
    intensities brought to 0..1. contrast: factor on the distance from the mean. brightness: shift in standard
    deviations. noise_std: largest standard deviation of added noise, for normalised images. low_resolution:
    sampled down to this share and up again. mirror_axes: axes of (z, y, x) or (y, x) that are flipped; none by
    default, as left and right differ in a body and short trainings lose much by it.
    """

    model_config = ConfigDict(extra="forbid")

    enabled: bool = True
    mirror_axes: list[int] = []
    mirror_probability: Probability = 0.5
    rotation_degrees: float = Field(default=15.0, ge=0, le=180)
    rotation_probability: Probability | None = None  # 0.2 in 3D, 0.3 in 2D
    scale: Span = (0.85, 1.2)
    scale_probability: Probability | None = None  # 0.2 in 3D, 0.3 in 2D
    gamma: Span = (0.7, 1.5)
    gamma_probability: Probability = 0.2
    contrast: Span = (0.75, 1.25)
    contrast_probability: Probability = 0.15
    brightness: float = Field(default=0.3, ge=0)
    brightness_probability: Probability = 0.15
    noise_std: float = Field(default=0.1, ge=0)
    noise_probability: Probability = 0.15
    low_resolution: Span = (0.5, 1.0)
    low_resolution_probability: Probability = 0.1

    @model_validator(mode="after")
    def _possible(self) -> AugmentConfig:
        if any(not 0 <= axis <= 2 for axis in self.mirror_axes) or len(set(self.mirror_axes)) < len(self.mirror_axes):
            raise ValueError(f"mirror_axes {self.mirror_axes}: different axes of 0, 1 and 2 are needed")
        if self.low_resolution[1] > 1:
            raise ValueError(f"low_resolution {self.low_resolution}: shares of at most 1 are needed")
        return self


@dataclass(frozen=True)
class AugmentParams:
    """The parameters of one change; None and empty mean that a transform is left out."""

    rotation_rad: tuple[float, ...] | None
    scale: float
    mirror: tuple[int, ...]
    gamma: float | None
    contrast: float | None
    brightness: float | None
    noise_std: float | None
    noise_seed: int
    low_resolution: float | None


class Augment:
    """Changes samples {"image": (C, *spatial) float32, "label": (*spatial) int64, ...} as a function of a seed alone.

    Rotation, scaling and flips are one interpolation: linear for the image, nearest for the label; what comes in
    from outside is 0 in the image and 255 (ignored) in the label. spacing_mm keeps rotations rigid where voxels are
    not cubes. Raises InputError for axes to mirror that a patch does not have.
    """

    def __init__(self, config: AugmentConfig, spatial_dims: int, spacing_mm: Sequence[float] | None = None) -> None:
        if any(axis >= spatial_dims for axis in config.mirror_axes):
            raise InputError(f"mirror_axes {config.mirror_axes}: in {spatial_dims}D axes 0 to {spatial_dims - 1} exist")
        if config.enabled:
            # Seconds: once here, where workers inherit it, not in each of them.
            import monai.transforms  # noqa: F401
        self.config = config
        self.spatial_dims = spatial_dims
        self.spacing_mm = tuple(spacing_mm) if spacing_mm is not None else (1.0,) * spatial_dims

    def __call__(self, sample: dict[str, Any], seed: int) -> dict[str, Any]:
        if not self.config.enabled:
            return sample
        params = self.sample_params(seed)
        image, label = self.apply_spatial(sample["image"], sample["label"], params)
        return {**sample, "image": self.apply_intensity(image, params), "label": label}

    def sample_params(self, seed: int) -> AugmentParams:
        """Return the parameters that a seed stands for."""
        config, dims = self.config, self.spatial_dims
        rng = np.random.default_rng(seed)
        often = 0.2 if dims == 3 else 0.3

        # Every number is drawn whether it is used or not: one probability does not change what another draws.
        def happens(probability: float | None) -> bool:
            return bool(rng.random() < (often if probability is None else probability))

        def within(span: tuple[float, float]) -> float:
            return float(math.exp(rng.uniform(math.log(span[0]), math.log(span[1]))))

        def step(probability: float | None, value: Any) -> Any:
            return value if happens(probability) else None

        most = math.radians(config.rotation_degrees)
        angles = tuple(float(angle) for angle in rng.uniform(-most, most, 3 if dims == 3 else 1))
        return AugmentParams(
            rotation_rad=step(config.rotation_probability, angles),
            scale=step(config.scale_probability, within(config.scale)) or 1.0,
            mirror=tuple(axis for axis in config.mirror_axes if happens(config.mirror_probability)),
            gamma=step(config.gamma_probability, within(config.gamma)),
            contrast=step(config.contrast_probability, within(config.contrast)),
            brightness=step(config.brightness_probability, float(rng.uniform(-1, 1)) * config.brightness),
            noise_std=step(config.noise_probability, float(rng.uniform(0, 1)) * config.noise_std),
            noise_seed=int(rng.integers(2**32)),
            low_resolution=step(config.low_resolution_probability, within(config.low_resolution)),
        )

    def apply_spatial(
        self, image: torch.Tensor, label: torch.Tensor, params: AugmentParams
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Flip, rotate and scale image and label."""
        if params.mirror:
            image = image.flip([axis + 1 for axis in params.mirror])
            label = label.flip(list(params.mirror))
        if params.rotation_rad is None and params.scale == 1.0:
            return image, label
        from monai.transforms import AffineGrid, Resample
        from monai.transforms.utils import create_rotate

        # Where an output voxel is read, about the centre: rotation and 1/scale in millimetres.
        matrix = np.eye(self.spatial_dims + 1)
        if params.rotation_rad is not None:
            steps = np.diag([*self.spacing_mm, 1.0])
            matrix = np.linalg.inv(steps) @ create_rotate(self.spatial_dims, params.rotation_rad) @ steps
        matrix[:-1] /= params.scale
        affine = torch.from_numpy(matrix.astype(np.float32))
        grid, _ = AffineGrid(affine=affine, dtype=torch.float32)(tuple(label.shape))
        resample = Resample(padding_mode="zeros", dtype=torch.float32)
        # Outside is filled with 0: in a label shifted by 255 that means "ignore".
        shifted = (label - IGNORE_INDEX).to(torch.float32)[None]
        moved = _plain(resample(shifted, grid, mode="nearest"))[0].round().to(torch.int64) + IGNORE_INDEX
        return _plain(resample(image, grid, mode="bilinear")), moved

    def apply_intensity(self, image: torch.Tensor, params: AugmentParams) -> torch.Tensor:
        """Change resolution, gamma, contrast, brightness and noise of an image."""
        from monai.transforms import AdjustContrast, RandGaussianNoise, RandSimulateLowResolution

        if params.low_resolution is not None:
            mode, zoom = "trilinear" if self.spatial_dims == 3 else "bilinear", params.low_resolution
            image = _plain(RandSimulateLowResolution(prob=1.0, upsample_mode=mode, zoom_range=(zoom, zoom))(image))
        if params.gamma is not None:
            bend = AdjustContrast(params.gamma, retain_stats=True)
            image = torch.cat([_plain(bend(channel)) for channel in image.split(1)])
        if params.contrast is not None:
            axes = tuple(range(1, image.ndim))
            mean, low, high = image.mean(axes, True), image.amin(axes, True), image.amax(axes, True)
            # Kept inside its range: no scanner gives the values beyond it.
            image = torch.clamp((image - mean) * params.contrast + mean, low, high)
        if params.brightness is not None:
            image = image + params.brightness * image.std(tuple(range(1, image.ndim)), correction=0, keepdim=True)
        if params.noise_std is not None:
            noise = RandGaussianNoise(prob=1.0, std=params.noise_std, sample_std=False)
            noise.set_random_state(seed=params.noise_seed)
            image = _plain(noise(image))
        return image


def _plain(image: Any) -> torch.Tensor:
    """MONAI wraps its results with metadata, which slows everything that follows."""
    return image.as_tensor() if hasattr(image, "as_tensor") else image
