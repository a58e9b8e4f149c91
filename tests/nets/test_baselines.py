"""Baseline networks: shapes, learning, model folders, sizes, training, and counts against what is printed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lightm import read_volume
from lightm.errors import InputError
from lightm.inference import Predictor
from lightm.nets import PRESETS, create, load_model, save_model
from lightm.nets.baselines import BASELINES
from lightm.nets.baselines.mamba import MambaBlock
from lightm.nets.presets import names
from lightm.training import train_model
from lightm.training.run import new_run
from tests.helpers import docs_script, make_balls

DOCUMENT = docs_script("baselines_table")
COUNTED, FACTS, parameters, table = DOCUMENT.COUNTED, DOCUMENT.FACTS, DOCUMENT.parameters, DOCUMENT.table

# Small versions, and sizes of two unequal sides in the plane; what a size is in 3D follows from them.
TINY: dict[str, tuple[dict[str, Any], tuple[int, int]]] = {
    "unet": ({"channels": (4, 8, 8), "residual_units": 1}, (8, 16)),
    "dynunet": ({"base_channels": 4}, (16, 24)),
    "segresnet": ({"base_channels": 8, "blocks_down": (1, 1, 1), "blocks_up": (1, 1)}, (8, 12)),
    "attention-unet": ({"channels": (4, 8, 8)}, (8, 16)),
    "unetr": ({"base_channels": 4, "hidden": 12, "mlp": 16, "heads": 2}, (16, 32)),
    "swinunetr": ({"base_channels": 12, "window": 2}, (32, 64)),
    "umamba-bot": ({"base_channels": 4, "blocks": 1, "decoder_blocks": 1}, (16, 24)),
    "umamba-enc": ({"base_channels": 4, "blocks": 2, "decoder_blocks": 1, "residual": False}, (16, 24)),
    "ultralight-vm-unet": ({"channels": (8, 8, 8, 8, 8, 16), "state_size": 4}, (32, 64)),
    "transunet": (
        {"depths": (1, 2, 1), "width": 4, "hidden": 16, "layers": 1, "heads": 2, "mlp": 16, "dropout": 0.0}
        | {"decoder": (8, 8, 4, 4)},
        (32, 48),
    ),
    "nnformer": ({"base_channels": 6, "heads": (1, 2, 2, 2)}, (32, 64)),
    "deeplabv3plus": ({"backbone": "resnet50", "width": 4, "features": 16, "low": 4}, (32, 48)),
}
CASES = [(name, dims) for name, (_, _, known) in BASELINES.items() for dims in known]
ALL = pytest.mark.parametrize(("name", "dims"), CASES)


def tiny_size(name: str, dims: int) -> tuple[int, ...]:
    low, high = TINY[name][1]
    return (low, high) if dims == 2 else (low, high, low)


def tiny(name: str, dims: int, channels: int = 1, classes: int = 3, **options: Any) -> nn.Module:
    return create(name, dims, channels, classes, tiny_size(name, dims), **{**TINY[name][0], **options})


def test_every_baseline_has_facts_and_a_small_version_here() -> None:
    assert set(FACTS) == set(BASELINES) == set(TINY)
    assert names()[: len(PRESETS) + len(BASELINES)] == [*PRESETS, *BASELINES]
    assert not set(BASELINES) & set(PRESETS)


@pytest.mark.slow
def test_naming_the_baselines_imports_no_monai() -> None:
    code = "import sys, lightm.lab.complexity.report as known; known.source_of('unet'); print('monai' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Networks as small as these lose more to waiting threads than they win."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
@ALL
def test_a_step_lowers_the_loss_and_reaches_every_parameter(name: str, dims: int) -> None:
    torch.manual_seed(0)
    network, size = tiny(name, dims, channels=4), tiny_size(name, dims)
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3)
    image, target = torch.randn(2, 4, *size), torch.randint(0, 3, (2, *size))
    losses = []
    for _ in range(2):
        logits = network(image)
        assert logits.shape == (2, 3, *size)
        assert logits.dtype == torch.float32
        loss = torch.nn.functional.cross_entropy(logits, target)
        losses.append(loss.item())
        if len(losses) == 1:
            loss.backward()
            optimizer.step()
    without = [n for n, p in network.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
    assert not without
    assert losses[1] < losses[0]


@pytest.mark.slow
@ALL
def test_a_model_folder_gives_back_the_same_network(name: str, dims: int, tmp_path: Path) -> None:
    torch.manual_seed(1)
    network = tiny(name, dims)
    size = tiny_size(name, dims)
    # in training mode, so that running statistics move away from their start; one image must do
    assert network(torch.randn(1, 1, *size)).shape == (1, 3, *size)
    network.eval()
    described = {
        "name": name,
        "spatial_dims": dims,
        "in_channels": 1,
        "out_channels": 3,
        "image_size": list(size),
        "options": TINY[name][0],
    }
    save_model(tmp_path / "m", network=described, state_dict=network.state_dict(), plan={}, training={})
    loaded, _ = load_model(tmp_path / "m")
    image = torch.randn(1, 1, *size)
    with torch.no_grad():
        expected = network(image)
        assert torch.equal(network(image), expected)
        assert torch.equal(loaded(image), expected)


@ALL
def test_impossible_sizes_and_inputs_are_refused_with_one_that_fits(name: str, dims: int) -> None:
    network = tiny(name, dims)
    size = tiny_size(name, dims)
    divisor: Any = network.divisor
    last = divisor[-1] if isinstance(divisor, tuple) else divisor
    odd = (*size[:-1], size[-1] + 1)
    message = rf"X={size[-1] + 1} is not divisible by {last}; use {size[-1] // last * last} or {size[-1] + last}"
    with pytest.raises(ValueError, match=message):
        network(torch.zeros(1, 1, *odd))
    with pytest.raises(InputError, match=rf"network '{name}'.*X={size[-1] + 1}.*use "):
        create(name, dims, 1, 2, odd, **TINY[name][0])
    with pytest.raises(ValueError, match=r"this network expects \(B, 1, "):
        network(torch.zeros(1, 2, *size))
    with pytest.raises(InputError, match=f"{dims} positive numbers"):
        create(name, dims, 1, 2, (*size, 8), **TINY[name][0])


@pytest.mark.parametrize("name", ["unet", "attention-unet", "swinunetr"])
def test_a_single_voxel_cannot_be_normalised(name: str) -> None:
    network = tiny(name, 2)
    divisor = int(network.divisor)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=rf"one voxel is left.*use Y={2 * divisor} or more"):
        network(torch.zeros(2, 1, divisor, divisor))


@pytest.mark.parametrize("name", ["unetr", "transunet", "nnformer"])
def test_networks_with_learnt_positions_take_one_size(name: str) -> None:
    dims = BASELINES[name][2][-1]
    network, size = tiny(name, dims), tiny_size(name, dims)
    other = (*size[:-1], size[-1] * 2)
    with pytest.raises(ValueError, match=rf"X={size[-1] * 2}, but this network was built for .*use X={size[-1]}"):
        network(torch.zeros(1, 1, *other))
    with pytest.raises(InputError, match="image_size is missing"):
        create(name, dims, 1, 2)


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        (("dynunett", 3, 1, 2), {}, "did you mean 'dynunet'"),
        (("lightm-unt", 3, 1, 2), {}, "did you mean 'lightm-unet"),
        (("umamba", 3, 1, 2), {}, "did you mean 'umamba"),
        (("unet", 4, 1, 2), {}, "use 2 or 3"),
        (("unet", 3, 0, 2), {}, "at least one channel"),
        (("unet", 3, 1, 0), {}, "a region, or background and at least one class"),
        (("unet", 3, 1, 2), {"filter": 8}, "filter"),
        (("transunet", 3, 1, 2, (32, 32, 32)), {}, "2D images alone; in 3D use"),
        (("nnformer", 2, 1, 2, (32, 32)), {}, "3D images alone; in 2D use"),
        (("nnformer", 3, 1, 2, (64, 64, 64)), {"patch": (3, 4, 4)}, "sides of 2 or 4"),
        (("dynunet", 3, 1, 2), {}, "image_size is missing"),
        (("dynunet", 2, 1, 2, (8, 8)), {}, "use 16 or more"),
        (("dynunet", 2, 1, 2, (64, 64)), {"spacing": (1, 1, 1)}, "2 positive numbers"),
        (("segresnet", 3, 1, 2), {"base_channels": 12}, "8 groups"),
        (("swinunetr", 3, 1, 2), {"base_channels": 20}, "multiple of 12"),
        (("deeplabv3plus", 2, 1, 2), {"backbone": "resnet5"}, "did you mean 'resnet50'"),
        (("ultralight-vm-unet", 2, 1, 2), {"channels": (8, 16)}, "six widths"),
        (("umamba-bot", 2, 1, 2, (32, 32)), {"blocks": 0}, "one or more"),
    ],
)
def test_wrong_settings_are_refused(args: tuple[Any, ...], options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        create(*args, **options)


def test_own_networks_ignore_the_image_size() -> None:
    states = []
    for size in ((24, 24), None):
        torch.manual_seed(2)
        states.append(create("lightm-unet-small", 2, 1, 2, size, base_channels=8).state_dict())
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


# ---- counts --------------------------------------------------------------------------------------------------------


def counted_by_module(body: Any, extra: int = 0) -> int:
    """What a counter finds that meets encoder layers four times and decoder layers twice."""

    def size(*modules: Any) -> int:
        return sum(p.numel() for module in modules for p in module.parameters())

    if hasattr(body, "bottleneck"):  # nnU-Net's
        up = size(*(stage.transp_conv for stage in body.decoder))
        return 4 * size(body.encoder, body.bottleneck) + 2 * (size(body.decoder) - up) + up
    mamba = size(*(module for module in body.modules() if isinstance(module, MambaBlock)))
    return 4 * (size(body.stem, body.encoder) - mamba) + 2 * size(body.decoder) + size(body.up)


def test_counts_that_were_printed_come_out_or_their_difference_is_explained() -> None:
    # nnU-Net's baseline of FLARE 2021: its convolution biases and supervision heads, less one bias here
    flare = parameters("dynunet", spatial_dims=3, in_channels=1, out_channels=5, image_size=(80, 192, 160))
    biases = 2 * (32 + 64 + 128 + 256 + 320 + 320) + 2 * (320 + 256 + 128 + 64 + 32)
    assert flare + biases + 5 * (320 + 256 + 128 + 64) - 5 == 30_787_584
    printed = {"dynunet": (88.62e6, 127e6), "umamba-bot": (173.53e6, 243e6)}
    for name, (in_3d, in_2d) in printed.items():
        with torch.device("meta"):
            bodies = {dims: create(name, **COUNTED[dims]).body for dims in (2, 3)}
        assert counted_by_module(bodies[3]) == pytest.approx(in_3d, rel=2e-4)
        assert counted_by_module(bodies[2]) == pytest.approx(in_2d, rel=1e-2)
    for name, close in (("unetr", 0.003), ("swinunetr", 0.004), ("attention-unet", 0.08), ("ultralight-vm-unet", 0.01)):
        known = FACTS[name]
        assert known.printed is not None
        assert parameters(name, **known.printed_for) == pytest.approx(float(known.printed[:-2]) * 1e6, rel=close)


def test_counting_without_weights_is_counting() -> None:
    for name in ("swinunetr", "umamba-enc", "transunet"):
        built = sum(p.numel() for p in tiny(name, 2).parameters())
        settings = {"spatial_dims": 2, "in_channels": 1, "out_channels": 3, "image_size": tiny_size(name, 2)}
        assert parameters(name, **settings, **TINY[name][0]) == built


def test_the_document_holds_the_generated_table() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "baselines.md").read_text(encoding="utf-8")
    assert table() in text, "docs/baselines.md differs from what docs/baselines_table.py prints"


# ---- the whole way -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "options"), [("dynunet", {"base_channels": 4}), ("unetr", {**TINY["unetr"][0]})])
def test_a_baseline_is_trained_saved_and_predicts(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    data = make_balls(tmp_path / "Dataset001_Balls", cases=4, size=32, dims=2, classes=1)
    result = train_model(
        data,
        tmp_path / "run",
        network=name,
        network_options=options,
        settings={"steps_per_epoch": 2},
        epochs=1,
        val_patches=2,
        patch_size=[32, 32],
    )
    assert result.epochs == 1
    _, info = load_model(result.run_dir / "model")
    assert info["network"]["image_size"] == [32, 32]
    predictor = Predictor.from_folder(result.run_dir / "model")
    image = read_volume(sorted((data / "imagesTr").iterdir())[0])
    labels = predictor.predict_volumes([image])
    assert labels.data.shape == image.data.shape
    assert set(np.unique(labels.data).tolist()) <= {0, 1}


def test_a_patch_that_a_baseline_cannot_take_is_rounded_up_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = make_balls(tmp_path / "Dataset001_Balls", cases=4, dims=2, classes=1)
    run = new_run(data, tmp_path / "run", network="swinunetr", patch_size=[16, 16], epochs=1)
    assert run.plan.patch_size == [64, 64]
    assert "patch size 16,16 is rounded up to 64,64, the next that network 'swinunetr' can take" in caplog.text
    assert not (tmp_path / "run").exists()
