"""Import of released weights: what is read, what is refused without being executed, what can be predicted with it."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from typer.testing import CliRunner

from lightm.cli import app
from lightm.errors import InputError
from lightm.images.io import read_volume, write_volume
from lightm.images.volume import Volume
from lightm.inference import predict_folder
from lightm.interchange.released import import_released
from lightm.nets import create, load_model
from lightm.nets.lightm_unet import ReleasedLightMUNet
from lightm.nets.released import load_released, original_name, read_checkpoint, released_name

STATS = {
    "mean": 40.0,
    "std": 20.0,
    "median": 42.0,
    "percentile_00_5": -100.0,
    "percentile_99_5": 180.0,
    "min": -900.0,
    "max": 990.0,
}
PLANS: dict[str, Any] = {
    "dataset_name": "Dataset007_Lung",
    "transpose_forward": [0, 1, 2],
    "configurations": {
        "3d_fullres": {
            "batch_size": 2,
            "patch_size": [8, 16, 20],
            "spacing": [2.0, 1.0, 1.0],
            "normalization_schemes": ["CTNormalization"],
            "use_mask_for_norm": [False],
            "median_image_size_in_voxels": [10.0, 20.0, 20.0],
        },
        "3d_low": {"inherits_from": "3d_fullres", "spacing": [4.0, 2.0, 2.0]},
    },
    "foreground_intensity_properties_per_channel": {"0": STATS},
}
DATASET = {
    "channel_names": {"0": "CT"},
    "labels": {"background": 0, "lung": 1, "lesion": 4},
    "file_ending": ".nii.gz",
    "numTraining": 9,
}


def network(dims: int = 3, image: int = 1, classes: int = 3, **options: Any) -> ReleasedLightMUNet:
    torch.manual_seed(3)
    settings = {"base_channels": 8, "blocks_down": (1, 1, 1, 1), **options}
    built = create("lightm-unet-released", dims, image, classes, **settings)
    assert isinstance(built, ReleasedLightMUNet)
    return built.eval()


def released_state(net: ReleasedLightMUNet) -> dict[str, Tensor]:
    """The weights as the released code would have saved them: its names, and convolutions as PyTorch lays them out."""
    state = {}
    axes = net.spatial_dims
    for name, tensor in net.state_dict().items():
        theirs, value = original_name(name), tensor.clone()
        if name.endswith("depthwise"):
            value = value.movedim(-1, 0).unsqueeze(1)
        elif name.endswith("conv_weight"):
            value = value.unsqueeze(1)
        elif theirs.endswith("conv.weight"):
            value = value.reshape(*value.shape, *(1,) * axes)
        state[theirs] = value.contiguous()
    return state


def checkpoint(state: dict[str, Tensor], **changes: Any) -> dict[str, Any]:
    """What nnU-Net's trainer saves."""
    beside = {"plans": PLANS, "configuration": "3d_fullres", "fold": 0, "dataset_json": DATASET}
    return {
        "network_weights": state,
        "optimizer_state": {
            "state": {0: {"exp_avg": torch.zeros(3)}},
            "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.9)}],
        },
        "grad_scaler_state": None,
        "logging": {"mean_fg_dice": [np.float64(0.5), np.float32(0.25)], "epoch_end_timestamps": [1.5]},
        "_best_ema": np.float64(0.5),
        "current_epoch": 100,
        "init_args": {**beside, "device": torch.device("cuda"), **changes},
        "trainer_name": "nnUNetTrainerLightMUNet",
        "inference_allowed_mirroring_axes": (0, 1, 2),
    }


@pytest.mark.parametrize("dims", [2, 3])
def test_names_map_one_to_one(dims: int) -> None:
    for name in network(dims).state_dict():
        assert released_name(original_name(name)) == name


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt"])
@pytest.mark.parametrize(
    ("dims", "image", "classes", "options"),
    [
        (2, 3, 2, {"base_channels": 16, "blocks_down": (1, 2), "blocks_up": (1,)}),
        (3, 4, 5, {"state_size": 8, "expand": 1, "blocks_down": (2, 1, 1, 1)}),
    ],
)
def test_settings_are_read_off_the_shapes(
    tmp_path: Path, suffix: str, dims: int, image: int, classes: int, options: dict[str, Any]
) -> None:
    original = network(dims, image, classes, **options)
    path = tmp_path / f"weights{suffix}"
    state = released_state(original)
    if suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=suffix == ".pth")
    x = torch.randn(1, image, *(8, 16, 8)[:dims])
    random = torch.get_rng_state()
    loaded = load_released(path)
    assert torch.equal(torch.get_rng_state(), random)
    with torch.no_grad():
        assert torch.equal(loaded(x), original(x))


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_orig_mod.module.", "module._orig_mod."])
@pytest.mark.parametrize("key", ["network_weights", "state_dict"])
def test_wrapped_checkpoints_are_unwrapped(tmp_path: Path, prefix: str, key: str) -> None:
    state = released_state(network(2))
    half = {prefix + name: torch.nn.Parameter(tensor.half()) for name, tensor in state.items()}
    torch.save({key: half, "epoch": 3}, tmp_path / "x.pth")
    found = read_checkpoint(tmp_path / "x.pth")
    assert found.epoch == 3
    assert found.state.keys() == state.keys()
    assert all(torch.equal(found.state[name], tensor.half()) for name, tensor in state.items())


def test_shared_and_strided_tensors_are_read_as_they_were(tmp_path: Path) -> None:
    state = released_state(network(2))
    base = torch.arange(40.0)
    state["convInit.1.conv.weight"] = base.view(5, 8).t()[:, 1:2].unflatten(1, (1, 1, 1))
    expected = state["convInit.1.conv.weight"].clone()
    for new in (True, False):
        torch.save(state, tmp_path / "x.pth", _use_new_zipfile_serialization=new)
        assert torch.equal(read_checkpoint(tmp_path / "x.pth").state["convInit.1.conv.weight"], expected)


@pytest.mark.parametrize("new", [True, False])
def test_an_nnunet_checkpoint_becomes_a_model_that_predicts(tmp_path: Path, new: bool) -> None:
    net = network()
    path = tmp_path / "checkpoint_final.pth"
    torch.save(checkpoint(released_state(net)), path, _use_new_zipfile_serialization=new)
    result = import_released(path, tmp_path / "model")
    loaded, info = load_model(tmp_path / "model")
    for name, tensor in net.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    plan = result.plan
    assert info["plan"] == plan.model_dump(mode="json")
    assert (plan.dataset, plan.channels, plan.labels) == ("Dataset007_Lung", ["CT"], DATASET["labels"])
    assert (plan.spacing_mm, plan.patch_size, plan.fingerprint.cases) == ([2.0, 1.0, 1.0], [8, 16, 24], 9)
    assert plan.normalization[0].model_dump() == {
        "scheme": "ct", "clip_low": -100.0, "clip_high": 180.0, "mean": 40.0, "std": 20.0
    }  # fmt: skip
    assert any("rounded up" in remark for remark in result.remarks)
    assert info["training"]["trainer"] == "nnUNetTrainerLightMUNet"
    assert info["training"]["epochs"] == 100
    data = np.random.default_rng(0).normal(40, 20, (10, 18, 22)).astype(np.float32)
    write_volume(tmp_path / "scan.nii.gz", Volume.from_spacing(data, (2.0, 1.0, 1.0)))
    (written,) = predict_folder(tmp_path / "model", tmp_path / "scan.nii.gz", tmp_path / "out", overlap=0.0)
    found = read_volume(written, kind="label")
    assert found.shape == data.shape
    assert set(np.unique(found.data)) <= {0, 1, 4}


def test_regions_of_nnunet_stay_regions(tmp_path: Path) -> None:
    save_file(released_state(network(2, 1, 3)), tmp_path / "state.safetensors")
    regions = {"whole": [1, 2, 4], "core": [2, 4], "rim": [4]}
    content = {**DATASET, "labels": {"background": 0, **regions, "ignore": 5}, "regions_class_order": [1, 2, 4]}
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    result = import_released(tmp_path / "state.safetensors", tmp_path / "model", dataset_json=tmp_path / "dataset.json")
    assert (result.plan.regions, result.plan.regions_class_order, result.plan.ignore_label) == (regions, [1, 2, 4], 5)
    data = np.random.default_rng(0).integers(0, 200, (32, 32)).astype(np.uint8)
    write_volume(tmp_path / "scan.png", Volume.from_spacing(data, (1.0, 1.0)))
    (written,) = predict_folder(tmp_path / "model", tmp_path / "scan.png", tmp_path / "out")
    assert set(np.unique(read_volume(written, kind="label").data)) <= {0, 1, 2, 4}
    content["labels"].pop("rim")
    (tmp_path / "dataset.json").write_text(json.dumps({**content, "regions_class_order": [1, 2]}))
    with pytest.raises(InputError, match=r"2 regions \(whole, core\).*3 outputs"):
        import_released(tmp_path / "state.safetensors", tmp_path / "other", dataset_json=tmp_path / "dataset.json")


def test_without_plans_the_guesses_are_stated(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    save_file(released_state(network(2, 1, 3)), path)
    result = import_released(path, tmp_path / "model")
    assert result.plan.labels == {"background": 0, "class_1": 1, "class_2": 2}
    assert (result.plan.spacing_mm, result.plan.patch_size) == ([1.0, 1.0], [512, 512])
    remarks = " ".join(result.remarks)
    assert "made up" in remarks
    assert "z-score" in remarks
    assert "1 mm" in remarks
    (tmp_path / "dataset.json").write_text(json.dumps(DATASET))
    (tmp_path / "plans.json").write_text(json.dumps({"configurations": {"2d": {
        "spacing": [0.5, 0.5], "patch_size": [64, 32], "normalization_schemes": ["NoNormalization"]}}}))  # fmt: skip
    result = import_released(
        path,
        tmp_path / "other",
        dataset_json=tmp_path / "dataset.json",
        plans=tmp_path / "plans.json",
        spacing_mm=[1, 2],
    )
    assert (result.plan.spacing_mm, result.plan.patch_size) == ([1.0, 2.0], [64, 32])
    assert (result.plan.labels, result.plan.channels) == (DATASET["labels"], ["CT"])
    result.plan.save(tmp_path / "plan.yaml")
    again = import_released(path, tmp_path / "third", plans=tmp_path / "plan.yaml")
    assert again.plan == result.plan


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"normalization_schemes": ["OwnNormalization"]}, "OwnNormalization has no equivalent"),
        ({"normalization_schemes": ["ZScoreNormalization"], "use_mask_for_norm": [True]}, "voxels that are not zero"),
        ({"previous_stage": "3d_lowres"}, "prediction of '3d_lowres'"),
    ],
)
def test_what_a_plan_cannot_express_is_said(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    plans = {**PLANS, "configurations": {"3d_fullres": {**PLANS["configurations"]["3d_fullres"], **change}}}
    torch.save(checkpoint(released_state(network()), plans=plans), tmp_path / "x.pth")
    assert any(message in remark for remark in import_released(tmp_path / "x.pth", tmp_path / "model").remarks)


def test_other_axes_and_inherited_configurations(tmp_path: Path) -> None:
    plans = {**PLANS, "transpose_forward": [2, 0, 1]}
    torch.save(checkpoint(released_state(network()), plans=plans, configuration="3d_low"), tmp_path / "x.pth")
    result = import_released(tmp_path / "x.pth", tmp_path / "model")
    # nnU-Net's first axis is x there: spacing (4, 2, 2) and patch (8, 16, 20) in its order x, z, y
    assert result.plan.spacing_mm == [2.0, 2.0, 4.0]
    assert result.plan.patch_size == [16, 24, 8]
    assert any("permuted" in remark for remark in result.remarks)


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.path),)


class Evaluated:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return eval, ("__import__('os').mkdir('never')",)


@pytest.mark.parametrize("new", [True, False])
def test_code_in_a_checkpoint_is_refused_and_not_executed(tmp_path: Path, new: bool) -> None:
    state, mark = released_state(network(2)), tmp_path / "executed"
    path = tmp_path / "evil.pth"
    for evil, name in (
        (Touch(mark), r"(posix|nt)\.mkdir"),
        (Evaluated(), r"eval"),
        (Path("x"), r"pathlib"),
    ):
        for content in ({**checkpoint(state), "extra": evil}, {**state, "x": evil}, {evil: 1} if new else [evil]):
            torch.save(content, path, _use_new_zipfile_serialization=new)
            with pytest.raises(InputError, match=rf"evil\.pth: refused: reading it would need {name}"):
                import_released(path, tmp_path / "model")
    path.write_bytes(pickle.dumps(Touch(mark)))  # no torch.save at all
    with pytest.raises(InputError, match=r"evil\.pth: "):
        import_released(path, tmp_path / "model")
    assert not mark.exists()
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    "program",
    [
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"cos\nsystem\n(S'true'\ntR.",
        b"(S'true'\nios\nsystem\n.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R.",
        b"ctorch._utils\n_rebuild_tensor_v2.__globals__\n.",
        b"ctorch\nfloat32\n(S'x'\ntR.",
        b"ccollections\nOrderedDict\n}S'__init__'\nI1\nsb.",
        b"\x82\x01.",
        b"]r\xff\xff\xff\x7f.",
        b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.",
        b"(I1\nI2\n",
    ],
)
def test_hostile_pickles_end_in_one_clear_error(tmp_path: Path, program: bytes) -> None:
    path = tmp_path / "x.pth"
    for content in (program, None):
        if content is None:
            with zipfile.ZipFile(path, "w") as archive:
                archive.writestr("x/data.pkl", program)
        else:
            path.write_bytes(content)
        with pytest.raises(InputError, match=r"x\.pth: "):
            read_checkpoint(path)


def test_damaged_and_foreign_files_are_refused(tmp_path: Path) -> None:
    state = released_state(network(2))
    path = tmp_path / "x.pth"
    for new in (True, False):
        torch.save(state, path, _use_new_zipfile_serialization=new)
        whole = path.read_bytes()
        for length in (0, 3, 100, len(whole) // 2, len(whole) - 30):
            path.write_bytes(whole[:length])
            with pytest.raises(InputError, match=r"x\.pth: "):
                read_checkpoint(path)
    for garbage in (b"\x89HDF\r\n\x1a\n" + bytes(90), b"torn", bytes(1000), b"PK\x03\x04" + bytes(200)):
        path.write_bytes(garbage)
        with pytest.raises(InputError, match=r"x\.pth: "):
            read_checkpoint(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr("x/data.pkl", bytes(1 << 20))
    with pytest.raises(InputError, match="compressed"):
        read_checkpoint(path)
    torch.save({"network_weights": {**state, "convInit.1.conv.weight": torch.zeros(1).expand(10**6)}}, path)
    with pytest.raises(InputError, match="more than the file has"):
        read_checkpoint(path)
    for content, message in (({}, "no state dict"), ([1], "no state dict"), ({"a": 1}, "'a' is no tensor")):
        torch.save(content, path)
        with pytest.raises(InputError, match=message):
            read_checkpoint(path)
    with pytest.raises(InputError, match="no such file"):
        read_checkpoint(tmp_path / "none.pth")
    with pytest.raises(InputError, match="a folder"):
        read_checkpoint(tmp_path)
    (tmp_path / "x.safetensors").write_bytes(b"torn")
    with pytest.raises(InputError, match=r"x\.safetensors: not a readable"):
        read_checkpoint(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("names", "looks"),
    [
        (["encoder.stages.0.0.convs.0.conv.weight"], "nnU-Net's plain U-Net"),
        (["swinViT.layers1.0.blocks.0.norm1.weight"], "SwinUNETR"),
        (["convInit.conv.weight", "down_layers.0.1.norm1.weight", "down_layers.0.1.norm2.weight"], "SegResNet"),
        (["encoder.0.0.vss.A_log", "stem.depthwise"], "model folder"),
    ],
)
def test_other_networks_are_named(tmp_path: Path, names: list[str], looks: str) -> None:
    save_file({name: torch.zeros(2) for name in names}, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match=rf"names are not those of a released LightM-UNet.*looks like.*{looks}"):
        import_released(tmp_path / "x.safetensors", tmp_path / "model")


def test_names_that_do_not_match_are_listed(tmp_path: Path) -> None:
    state = released_state(network(2))
    del state["up_layers.1.0.skip_scale"]
    state["up_layers.0.1.norm1.weight"] = torch.zeros(4)
    state["conv_final.0.bias"] = torch.zeros(9)
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(InputError) as caught:
        import_released(tmp_path / "x.safetensors", tmp_path / "model")
    message = str(caught.value)
    assert "1 missing: up_layers.1.0.skip_scale" in message
    assert "1 unknown: up_layers.0.1.norm1.weight" in message
    assert "1 of another shape: conv_final.0.bias (9,) instead of (8,)" in message
    state = released_state(network(2))
    state["convInit.1.conv.weight"][0, 0] = torch.nan
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match=r"NaN or infinite: convInit\.1\.conv\.weight"):
        import_released(tmp_path / "x.safetensors", tmp_path / "model")
    del state["convInit.1.conv.weight"]
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match=r"not the weights of a whole.*1 missing: convInit\.1"):
        import_released(tmp_path / "x.safetensors", tmp_path / "model")
    kept = {name: tensor for name, tensor in released_state(network(2)).items() if not name.startswith("down_layers.2")}
    save_file(kept, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match="stage 2 lacks residual blocks"):
        import_released(tmp_path / "x.safetensors", tmp_path / "model")


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"dataset_json": {**DATASET, "labels": {"background": 0, "lung": 1}}}, {}, r"2 labels .*3 classes"),
        ({"dataset_json": {**DATASET, "labels": {"background": 0, "a": [1, 2], "b": 2}}}, {}, "no regions_class_order"),
        ({"dataset_json": {**DATASET, "channel_names": {"0": "CT", "1": "PET"}}}, {}, "2 channels"),
        ({}, {"labels": {"background": 1, "a": 2, "b": 3}}, "background, 0, first"),
        ({}, {"spacing_mm": [1.0, 1.0]}, "spacing_mm needs 3"),
        ({}, {"configuration": "3d_fulres"}, "did you mean '3d_fullres'"),
        ({"configuration": "2d"}, {}, "no configuration '2d'"),
        ({"plans": {"configurations": {"3d_fullres": {"spacing": "x"}}}}, {}, "expected 2 or 3 numbers"),
        ({"plans": {**PLANS, "foreground_intensity_properties_per_channel": {}}}, {}, "missing or not usable"),
        ({}, {"groups": 3}, "not divisible by the 3 groups"),
    ],
)
def test_descriptions_that_do_not_fit_are_refused(
    tmp_path: Path, changes: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    torch.save(checkpoint(released_state(network()), **changes), tmp_path / "x.pth")
    with pytest.raises(InputError, match=message):
        import_released(tmp_path / "x.pth", tmp_path / "model", **options)
    assert not (tmp_path / "model").exists()


def test_the_verb_imports_refuses_and_replaces(tmp_path: Path) -> None:
    save_file(released_state(network(2, 1, 2)), tmp_path / "x.safetensors")
    command = ["import-released", str(tmp_path / "x.safetensors"), str(tmp_path / "model")]
    options = ["--labels", "background=0,lung=7", "--spacing", "0.5,0.5", "--patch-size", "32,32", "--json"]
    done = CliRunner().invoke(app, [*command, *options])
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert result["plan"]["labels"] == {"background": 0, "lung": 7}
    assert result["network"]["options"]["base_channels"] == 8
    again = CliRunner().invoke(app, command)
    assert isinstance(again.exception, InputError)
    assert "already holds a model" in str(again.exception)
    assert CliRunner().invoke(app, [*command, "--overwrite"]).exit_code == 0
    (tmp_path / "model" / "model.json").rename(tmp_path / "model" / "notes.json")
    refused = CliRunner().invoke(app, [*command, "--overwrite"])
    assert "other files" in str(refused.exception)
    wrong = CliRunner().invoke(app, [*command[:2], str(tmp_path / "new"), "--labels", "background"])
    assert "background=0,lung=1" in str(wrong.exception)
