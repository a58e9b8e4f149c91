"""A limit of memory changes where arrays lie, and not one bit of the result."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor, nn

from lightm.errors import InputError
from lightm.images.io import write_volume
from lightm.images.lazy import LazyVolume
from lightm.images.volume import Volume
from lightm.inference import Predictor, budget
from lightm.inference.budget import MemoryPlan
from lightm.inference.sliding import logit_slabs
from lightm.preparation.plan import ChannelNormalization
from lightm.preparation.preprocess import NetworkGrid, preprocess_case
from lightm.preparation.resample import resample_image

from .factories import InMemory, PlanMaker

TURNED = np.array([[0, 0.875, 0, 5], [0, 0, -1.25, 7], [-2.0, 0, 0, 9], [0, 0, 0, 1]])
CLASSES = {"background": 0, "one": 1, "two": 2, "three": 5}


class Noise(nn.Module):
    """Classes that change from voxel to voxel and, by padding, from window to window."""

    def __init__(self, dims: int, channels: int = 1, classes: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        conv = (nn.Conv2d, nn.Conv3d)[dims - 2]
        self.layers = nn.Sequential(conv(channels, 6, 3, padding=1), nn.ReLU(), conv(6, classes, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return out


def made(shape: tuple[int, ...], seed: int = 0) -> Volume:
    voxels = np.random.default_rng(seed).normal(0, 300, shape).astype(np.int16)
    return Volume(voxels, (1.25, 0.875, 2.0), TURNED) if len(shape) == 3 else Volume.from_spacing(voxels, (1.25, 0.875))


def only(held: MemoryPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Predictor, "_within", lambda *_: held)


@pytest.mark.slow
@pytest.mark.parametrize("spacing", [None, (1.7, 1.1, 1.2), (1.0, 2.5, 1.3)])
@pytest.mark.parametrize("scheme", ["ct", "zscore"])
def test_every_way_to_hold_a_case_gives_the_same_labels(
    spacing: tuple[float, ...] | None,
    scheme: str,
    make_plan: PlanMaker,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Small blocks, so that a volume has many.
    for name, size in [("inference.sliding._CHUNK_VALUES", 900), ("inference.native_space._CHUNK_VALUES", 1500),
                       ("preparation.resample._SLAB_VOXELS", 700), ("images.nifti._SLAB_BYTES", 900)]:  # fmt: skip
        monkeypatch.setattr(f"lightm.{name}", size)
    image = made((21, 26, 19))
    write_volume(tmp_path / "image.nii.gz", image)
    plan = make_plan(spacing or image.to_canonical().spacing_mm, (16, 8, 8), labels=CLASSES)
    if scheme == "zscore":
        plan.normalization = [ChannelNormalization(scheme="zscore")]
    expected = Predictor(Noise(3), plan).predict_volumes([image]).data
    assert set(np.unique(expected)) == {0, 1, 2, 5}
    bounded = Predictor(Noise(3), plan, max_memory=10**11)
    for held in product((True, False), repeat=3):
        only(MemoryPlan(*held), monkeypatch)
        for found in (bounded.predict_volumes([image]), bounded.predict_files([tmp_path / "image.nii.gz"])):
            np.testing.assert_array_equal(found.data, expected)
            assert found.data.flags.c_contiguous
            np.testing.assert_array_equal(found.affine, image.affine)


@pytest.mark.parametrize("spacing", [(1.25, 0.875), (0.8, 2.0)])
def test_2d_and_mirroring_and_two_channels(
    spacing: tuple[float, ...], make_plan: PlanMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = [made((70, 43), seed) for seed in (0, 1)]
    plan = make_plan(spacing, (16, 8), labels=CLASSES, channels=("a", "b"))
    expected = Predictor(Noise(2, 2), plan, tta=(0, 1)).predict_volumes(images).data
    only(MemoryPlan(False, False, False), monkeypatch)
    found = Predictor(Noise(2, 2), plan, tta=(0, 1), max_memory=10**11).predict_volumes(images).data
    np.testing.assert_array_equal(found, expected)
    assert len(np.unique(expected)) == 4


@pytest.mark.parametrize("overlap", [0.0, 0.5, 0.8])
def test_sums_in_a_file_have_the_same_bits(overlap: float, tmp_path: Path) -> None:
    image = torch.randn(1, 29, 14, 20, generator=torch.Generator().manual_seed(3))
    options = {"patch_size": (16, 8, 8), "overlap": overlap}
    held = torch.cat(list(logit_slabs(Noise(3), InMemory(image), **options)), dim=1)
    spooled = torch.cat(list(logit_slabs(Noise(3), InMemory(image), **options, folder=tmp_path)), dim=1)
    assert torch.equal(held, spooled)
    assert held.abs().min(1).values.std() > 0
    assert list(tmp_path.iterdir()) == []


def test_the_grid_is_what_training_saw(make_plan: PlanMaker) -> None:
    image = made((21, 26, 19))
    for spacing in (image.to_canonical().spacing_mm, (1.7, 1.1, 1.2)):
        for scheme in ("ct", "zscore"):
            plan = make_plan(spacing, (8, 8, 8))
            if scheme == "zscore":
                plan.normalization = [ChannelNormalization(scheme="zscore")]
            expected, _ = preprocess_case([image], None, plan)
            grid = NetworkGrid([LazyVolume.of(image)], plan)
            parts = [
                grid.read((slice(z, min(z + 5, grid.shape[0])), *(slice(0, size) for size in grid.shape[1:])))
                for z in range(0, grid.shape[0], 5)
            ]
            assert expected.dtype == np.float32
            np.testing.assert_array_equal(np.concatenate(parts, axis=1), expected)


@pytest.mark.parametrize(
    ("shape", "target"), [((9, 14, 11), (13, 8, 11)), ((1, 5, 7), (4, 9, 3)), ((12, 30), (31, 12))]
)
def test_streamed_resampling_is_the_spline_of_the_whole(
    shape: tuple[int, ...], target: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = np.random.default_rng(1).normal(1e3, 200, shape).astype(np.float32)
    box = tuple(slice(0, size) for size in target)
    factors = [new / old for new, old in zip(target, shape, strict=True)]
    expected = ndimage.zoom(image, factors, mode="nearest", grid_mode=True)
    at_once = resample_image(lambda start, stop: image[start:stop], shape, target).read(box)
    np.testing.assert_allclose(at_once, expected, rtol=0, atol=1e-6 * np.abs(expected).max())
    monkeypatch.setattr("lightm.preparation.resample._SLAB_VOXELS", 60)
    by_slab = resample_image(lambda start, stop: image[start:stop], shape, target, tmp_path).read(box)
    np.testing.assert_array_equal(by_slab, at_once)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_probabilities(
    dims: int, ending: str, make_plan: PlanMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightm.inference.native_space._CHUNK_VALUES", 1500)
    monkeypatch.setattr("lightm.inference.native_space._BLOCK_VOXELS", 700)
    image = made((21, 26, 19)[:dims])
    plan = make_plan(image.to_canonical().spacing_mm, (32, 32, 32)[:dims], labels=CLASSES)
    network = Noise(dims)
    path = tmp_path / "new" / f"p{ending}"
    predictor = Predictor(network, plan)
    labels = predictor.predict_volumes([image], probabilities=path)
    np.testing.assert_array_equal(labels.data, predictor.predict_volumes([image]).data)
    stored = nibabel.load(path)
    assert stored.get_data_dtype() == np.uint8
    assert stored.dataobj.slope == pytest.approx(1 / 255)
    np.testing.assert_allclose(stored.affine, image.affine, atol=1e-5)
    found = np.moveaxis(np.asarray(stored.dataobj), -1, 0).T  # (z, y, x, class)
    found = found.reshape(*image.shape, 4)
    canonical, _ = preprocess_case([image], None, plan)
    pads = [pad for size in reversed(canonical.shape[1:]) for pad in ((32 - size) // 2, 32 - size - (32 - size) // 2)]
    window = nn.functional.pad(torch.from_numpy(canonical), pads)[None]
    inside = tuple(slice((32 - size) // 2, (32 - size) // 2 + size) for size in canonical.shape[1:])
    with torch.no_grad():
        expected = network(window)[(0, slice(None), *inside)].softmax(0).numpy()
    like = image.to_canonical()
    turned = [Volume(found[..., index], image.spacing_mm, image.affine).to_canonical().data for index in range(4)]
    assert like.shape == canonical.shape[1:]
    np.testing.assert_allclose(turned, expected, atol=0.5 / 255 + 1e-4)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_probabilities_need_a_nifti_name(make_plan: PlanMaker, tmp_path: Path) -> None:
    predictor = Predictor(Noise(2), make_plan((1.25, 0.875), (8, 8), labels=CLASSES))
    with pytest.raises(InputError, match="written as NIfTI"):
        predictor.predict_volumes([made((9, 9))], probabilities=tmp_path / "p.png")


def test_the_whole_volume_as_one_window(make_plan: PlanMaker) -> None:
    sizes = []

    class Seen(Noise):
        def forward(self, x: Tensor) -> Tensor:
            sizes.append(tuple(x.shape))
            return super().forward(x)

    image = made((21, 26, 19))
    shape = image.to_canonical().shape
    plan = make_plan(image.to_canonical().spacing_mm, (8, 8, 8), labels=CLASSES)
    whole = Predictor(Seen(3), plan, window="whole").predict_volumes([image])
    patch = tuple(-(-size // 8) * 8 for size in shape)
    assert sizes == [(1, 1, *patch)]
    one_patch = plan.model_copy(update={"patch_size": list(patch)})
    np.testing.assert_array_equal(whole.data, Predictor(Noise(3), one_patch).predict_volumes([image]).data)
    with pytest.raises(InputError, match="window='hole'"):
        Predictor(Noise(3), plan, window="hole")  # type: ignore[arg-type]


@pytest.mark.slow
def test_what_does_not_fit_is_refused_with_what_it_needs(make_plan: PlanMaker) -> None:
    image = made((21, 26, 19))
    plan = make_plan(image.to_canonical().spacing_mm, (8, 8, 8), labels=CLASSES)
    held = budget.resident_bytes()
    if held is None:
        pytest.skip("this system does not say how much memory a process holds")
    with pytest.raises(InputError, match=r"needs at least \d+ MB.*allow more$"):
        Predictor(Noise(3), plan, max_memory=held // 2).predict_volumes([image])
    huge = Volume.from_spacing(np.zeros((400, 400, 400), np.uint8), (1.0, 1.0, 1.0))
    at_one = plan.model_copy(update={"spacing_mm": [1.0, 1.0, 1.0]})
    limit = budget.resident_bytes() + 300_000_000  # type: ignore[operator]
    with pytest.raises(InputError, match=r"one window.*use window='patch'"):
        Predictor(Noise(3), at_one, window="whole", max_memory=limit).predict_volumes([huge])
    with pytest.raises(InputError, match="max_memory=0"):
        Predictor(Noise(3), plan, max_memory=0)


def test_files_say_what_is_wrong_with_them(make_plan: PlanMaker, tmp_path: Path) -> None:
    image = made((9, 9, 9))
    nibabel.save(nibabel.Nifti1Image(np.full((9, 9, 9), np.inf, np.float32), TURNED), tmp_path / "a.nii.gz")
    predictor = Predictor(Noise(3), make_plan((2, 2, 2), (8, 8, 8), labels=CLASSES))
    with pytest.raises(InputError, match=r"a\.nii\.gz: 729 voxels are NaN or infinite"):
        predictor.predict_files([tmp_path / "a.nii.gz"])
    with pytest.raises(InputError, match="2 images, but the plan has 1"):
        predictor.predict_volumes([image, image])
