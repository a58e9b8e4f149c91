from __future__ import annotations

import shutil

import numpy as np
import pytest
import yaml

from lightm.datasets.discovery import open_dataset
from lightm.errors import InputError
from lightm.images.io import read_volume, write_volume
from lightm.images.volume import Volume
from lightm.preparation import plan as planning
from lightm.preparation.plan import Plan, load_plan, make_plan
from tests.helpers import describe


def test_plan_of_a_small_dataset_by_hand(make_dataset):
    plan = make_plan(open_dataset(make_dataset()))
    assert plan.spatial_dims == 3
    assert plan.spacing_mm == [2.0, 1.0, 1.0]
    assert plan.patch_size == [8, 8, 16]
    assert plan.batch_size == 2
    assert [channel.scheme for channel in plan.normalization] == ["zscore"]
    assert plan.fingerprint.shape_median == [6, 8, 10]
    assert plan.fingerprint.class_cases == {"background": 3, "organ": 3, "lesion": 3}
    assert plan.classes == ("background", "organ", "lesion")


def test_ct_is_clipped_to_the_foregrounds_percentiles(make_dataset):
    root = make_dataset(cases=1)
    describe(root, channel_names={"0": "ct"})
    label = read_volume(root / "labelsTr/case_0.nii.gz", kind="label")
    image = np.where(label.data > 0, 100, -1000).astype(np.int16)
    inside = np.flatnonzero(label.data)
    image.ravel()[inside[::2]] = 140
    write_volume(root / "imagesTr/case_0_0000.nii.gz", label.with_data(image))
    (channel,) = make_plan(open_dataset(root)).normalization
    assert (channel.scheme, channel.clip_low, channel.clip_high) == ("ct", 100, 140)
    assert channel.mean == pytest.approx(120, abs=1)
    assert channel.std == pytest.approx(20, abs=0.1)


def test_two_dimensions(make_dataset):
    dataset = open_dataset(make_dataset(ending=".png", shape=(30, 41)))
    plan = make_plan(dataset)
    assert (plan.patch_size, plan.batch_size, plan.spacing_mm) == ([32, 48], 12, [1.0, 1.0])
    assert make_plan(dataset, spacing_mm=(2, 2)).patch_size == [16, 24]
    assert make_plan(dataset, patch_size=(1024, 1024)).batch_size == 8
    assert make_plan(dataset, patch_size=(16, 16), batch_size=3).batch_size == 3


def test_coarse_axis_takes_its_finer_spacing():
    spacings = np.array([[5.0, 0.8, 0.8]] * 17 + [[3.0, 0.8, 0.8]] * 3)
    assert planning._choose_spacing(spacings) == pytest.approx([3.0, 0.8, 0.8])
    assert planning._choose_spacing(np.array([[2.0, 1, 1], [2.5, 1, 1], [3, 1, 1]])) == pytest.approx([2.5, 1, 1])


def test_patch_is_shortened_along_its_longest_axes():
    assert planning._choose_patch([36, 50, 36], 128**3) == [40, 56, 40]
    assert planning._choose_patch([300, 300, 300], 128**3) == [128, 128, 128]
    assert planning._choose_patch([16, 512, 512], 128**3) == [16, 360, 360]
    assert planning._choose_patch([300, 300, 300], 64**3) == [64, 64, 64]


def test_memory_bounds_the_patch(make_dataset):
    dataset = open_dataset(make_dataset(shape=(40, 40, 40)))
    assert make_plan(dataset).patch_size == [40, 40, 40]
    small = make_plan(dataset, memory_gb=0.1).patch_size
    assert np.prod(small) * 2 * 12_000 <= 0.1e9
    assert max(small) - min(small) <= 8
    with pytest.raises(InputError, match="memory_gb -1"):
        make_plan(dataset, memory_gb=-1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"patch_size": (16, 16, 20)}, r"patch size \(16, 16, 20\): X=20 is not a multiple of 8.*use 16 or 24"),
        ({"patch_size": (16, 16)}, "is 3D, so 3 numbers are needed"),
        ({"spacing_mm": (1, 1, 0)}, "positive millimetres"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_unusable_arguments(make_dataset, arguments, message):
    with pytest.raises(InputError, match=message):
        make_plan(open_dataset(make_dataset()), **arguments)


def test_faults_of_the_data_name_file_and_case(make_dataset):
    root = make_dataset()
    volume = read_volume(root / "labelsTr/case_1.nii.gz", kind="label")
    write_volume(root / "labelsTr/case_1.nii.gz", volume.with_data(volume.data * 2))
    with pytest.raises(InputError, match=r"case_1\.nii\.gz: case case_1: label value 4 is not in dataset\.json"):
        make_plan(open_dataset(root))
    write_volume(root / "labelsTr/case_1.nii.gz", Volume.from_spacing(volume.data, (1, 1, 1)))
    with pytest.raises(InputError, match=r"case case_1: does not lie where case_1_0000\.nii\.gz does: spacing"):
        make_plan(open_dataset(root))


def test_data_hash_follows_content_and_names_but_not_the_place(make_dataset, tmp_path):
    root = make_dataset()
    plan = make_plan(open_dataset(root))
    shutil.copytree(root, tmp_path / "elsewhere")
    assert make_plan(open_dataset(tmp_path / "elsewhere")).fingerprint == plan.fingerprint
    volume = read_volume(root / "imagesTr/case_2_0000.nii.gz")
    changed = volume.data.copy()
    changed[0, 0, 0] += 1
    write_volume(root / "imagesTr/case_2_0000.nii.gz", volume.with_data(changed))
    assert make_plan(open_dataset(root)).fingerprint.data_hash != plan.fingerprint.data_hash


def test_the_file_is_readable_and_comes_back_equal(make_dataset, tmp_path):
    root = make_dataset()
    describe(root, labels={"background": 0, "organ": 1, "lesion": 2, "ignore": 9})
    plan = make_plan(open_dataset(root))
    plan.save(tmp_path / "plan.yaml")
    assert load_plan(tmp_path / "plan.yaml") == plan
    assert load_plan(tmp_path / "plan.yaml").ignore_label == 9
    text = (tmp_path / "plan.yaml").read_text()
    assert text.startswith("# How LightM prepares this dataset")
    lines = [line.split(":")[0] for line in text.splitlines() if line[0].isalpha()]
    assert lines == [name for name in Plan.model_fields if not name.startswith("regions")]
    assert "patch_size: [8, 8, 16]" in text
    assert "null" not in text


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("pach_size", [8, 8, 8], "unknown key 'pach_size'; did you mean 'patch_size'"),
        ("patch_size", [8, 8, 9], "X=9 is not a multiple of 8"),
        ("patch_size", [8, 8], "patch_size needs 3 numbers"),
        ("spacing_mm", [1, 1, -1], "spacing_mm must be positive"),
        ("schema_version", 2, "schema_version"),
        ("batch_size", "many", "batch_size: .*'many'"),
        ("normalization", [{"scheme": "ct"}], "scheme 'ct' needs clip_low"),
        ("normalization", [{"scheme": "zscore", "clip_lo": 1}], "clip_lo'; did you mean 'clip_low'"),
        ("labels", {"organ": 1, "background": 0}, "labels need the background"),
        ("channels", None, "the key 'channels' is missing"),
    ],
)
def test_edits_that_go_wrong_name_the_file_and_the_key(make_dataset, tmp_path, key, value, message):
    path = tmp_path / "plan.yaml"
    make_plan(open_dataset(make_dataset())).save(path)
    content = yaml.safe_load(path.read_text())
    content[key] = value
    if value is None:
        del content[key]
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    with pytest.raises(InputError, match=message) as raised:
        load_plan(path)
    assert str(raised.value).startswith(f"{path}: ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "not valid YAML"),
        ("- 1", "expected keys and values"),
        ("dataset: a\ndataset: b", "'dataset' is given twice"),
    ],
)
def test_files_that_are_no_plan(tmp_path, text, message):
    (tmp_path / "plan.yaml").write_text(text)
    with pytest.raises(InputError, match=message):
        load_plan(tmp_path / "plan.yaml")
    with pytest.raises(InputError, match="cannot be opened"):
        load_plan(tmp_path / "absent.yaml")


def test_the_two_real_tasks_get_the_patches_they_need(shared):
    plan = make_plan(open_dataset(shared / "data/Dataset004_Hippocampus"))
    assert (plan.patch_size, plan.batch_size) == ([40, 56, 40], 2)
