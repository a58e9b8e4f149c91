"""LightM-UNet: size by closed form, shapes, gradients, causality of its tokens, refusals."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch

from lightm.errors import InputError
from lightm.nets import PRESETS, count_parameters, create
from lightm.nets.blocks import RVM
from lightm.nets.lightm_unet import LightMUNet
from lightm.nets.state_space import VSS, ParallelVSS
from lightm.nets.token_layer import pool

PRESET_NAMES = sorted(PRESETS)
FAMILY = [name for name in PRESET_NAMES if PRESETS[name][0] is LightMUNet]  # whose closed form is below
ROOT = Path(__file__).resolve().parents[2]


def rvm_parameters(c: int, out: int, n: int = 16, k: int = 4) -> int:
    """Closed form of one RVM layer (the report's Eq. 7-9 with Mamba's depthwise convolution)."""
    e, r = 2 * c, math.ceil(c / 16)
    vss = 4 * c * c + 2 * c * c + e * (r + 2 * n) + r * e + e + e * n + e + e * k + e + 2 * e
    return vss + 2 * (2 * c) + c + c * out + out


def mamba2_parameters(c: int, out: int, n: int = 16, k: int = 4, p: int = 16) -> int:
    """Closed form of one RVM layer with Mamba-2's core and heads of p channels."""
    e = 2 * c
    vss = c * (2 * e + 2 * n + e // p) + (e + 2 * n) * (k + 1) + 3 * (e // p) + e * c + 2 * e
    return vss + 2 * (2 * c) + c + c * out + out


def spm_parameters(c: int, out: int, sets: int, n: int = 16, k: int = 4) -> int:
    """Closed form of one SPM layer of four parts with `sets` sets of weights (4, or 1 when shared)."""
    w = c // 4
    e, r = 2 * w, math.ceil(w / 16)
    vss = 4 * w * w + 2 * w * w + e * (r + 2 * n) + r * e + e + e * n + e + e * k + e + 2 * e
    return sets * vss + 2 * (2 * c) + c + c * out + out


def network_parameters(name: str, c0: int, dims: int, image: int, classes: int) -> int:
    """Closed form of a whole network of the LightM-UNet family."""
    k, own = 3**dims, name in ("lightm", "lightm-small")
    spm = own or name.startswith("spm")
    bottleneck = 3 if spm else 4
    widths = [(c0, 2 * c0)]
    for c in (2 * c0, 4 * c0):
        widths += [(c, c), (c, 2 * c)]
    widths += [(8 * c0, 8 * c0)] * bottleneck
    total = k * image * c0 + c0 if own else k * image + image * c0  # stem
    for c, out in widths:
        if spm:
            total += spm_parameters(c, out, 1 if "shared" in name else 4)
        else:
            total += (mamba2_parameters if name.endswith("mamba2") else rvm_parameters)(c, out)
        total += k * c if own else 0
    for c in (8 * c0, 4 * c0, 2 * c0):
        h = c // 2
        total += c * h + 2 * h + k * h + h * h + h + 2 * h
    return total + 2 * c0 + 2 * c0 + c0 * classes + classes


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize(("image", "classes"), [(1, 3), (4, 2)])
def test_parameter_count_equals_the_closed_form(name: str, dims: int, image: int, classes: int) -> None:
    network = create(name, dims, image, classes)
    filters = 16 if name.endswith("-small") else 32
    assert count_parameters(network) == network_parameters(name, filters, dims, image, classes)


def test_the_sizes_in_the_documents_are_the_counted_ones() -> None:
    counts = {
        name: tuple(count_parameters(create(name, d, 1, n)) for d, n in ((3, 3), (2, 2))) for name in PRESET_NAMES
    }
    networks = (ROOT / "docs" / "networks.md").read_text(encoding="utf-8")
    for name, (three, two) in counts.items():
        row = rf"^\| \[`{name}`\]\(presets/{name}\.md\) .*\| {three:,} \| {two:,} \|$"
        assert re.search(row, networks, re.M), f"docs/networks.md: {name} has {three:,} and {two:,} parameters"
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `([\w-]+)` .*\| ([\d,]+) \|$", readme, re.M)
    assert len(listed) >= 8
    for name, count in listed:
        assert count == f"{counts[name][0]:,}", f"README.md: {name}"


def test_the_own_and_the_spm_networks_keep_the_promise_of_a_million_parameters() -> None:
    for name in FAMILY:
        if not name.startswith("lightm-unet"):
            assert count_parameters(create(name, 3, 1, 3)) < 1.05e6


def test_size_is_within_three_percent_of_the_published_design() -> None:
    assert abs(count_parameters(create("lightm-unet", 3, 1, 3)) / 2.47e6 - 1) < 0.03


def test_equal_seeds_give_equal_networks_and_outputs() -> None:
    outputs = []
    for _ in range(2):
        torch.manual_seed(7)
        outputs.append(create("lightm-unet-small", 2, 1, 2)(torch.linspace(-1, 1, 256).reshape(1, 1, 16, 16)))
    assert torch.equal(*outputs)


def test_spm_with_equal_parts_is_the_shared_one_and_its_parts_do_not_mix() -> None:
    torch.manual_seed(4)
    shared, separate = ParallelVSS(16, shared=True), ParallelVSS(16, shared=False)
    with torch.no_grad():
        for name, parameter in separate.named_parameters():
            source = dict(shared.named_parameters())[name]
            parameter.copy_(source.expand_as(parameter))
        tokens = torch.randn(2, 12, 16)
        torch.testing.assert_close(separate(tokens), shared(tokens))
        changed = tokens.clone()
        changed[..., 4:8] += 1.0  # the second part
        moved = (shared(changed) - shared(tokens)).abs().amax((0, 1))
    assert moved[4:8].min() > 1e-4
    assert moved[:4].max() == 0
    assert moved[8:].max() == 0


def test_spm_runs_each_part_as_a_vss_of_its_own() -> None:
    torch.manual_seed(5)
    whole, one = ParallelVSS(16, shared=True), VSS(4)
    with torch.no_grad():
        for name in ("conv_weight", "conv_bias", "A_log", "d_skip"):
            getattr(one, name).copy_(getattr(whole, name)[0])
        for name in ("in_proj", "x_proj", "out_proj", "dt_proj"):
            getattr(one, name).weight.copy_(getattr(whole, name).weight[0])
        one.dt_proj.bias.copy_(whole.dt_bias[0])
        tokens = torch.randn(2, 9, 16)
        expected = torch.cat([one(part) for part in tokens.chunk(4, dim=-1)], dim=-1)
        torch.testing.assert_close(whole(tokens), expected, rtol=1e-4, atol=1e-5)


def test_pooling_add_is_the_sum_of_both_poolings() -> None:
    x = torch.tensor([[1.0, 2.0], [3.0, 6.0]]).reshape(1, 2, 2, 1)
    assert pool(x, "add").item() == 6.0 + 3.0


def test_vss_is_causal_and_rvm_is_not_the_identity() -> None:
    torch.manual_seed(2)
    vss = VSS(8)
    tokens = torch.randn(1, 20, 8)
    changed = tokens.clone()
    changed[:, 12] += 1.0
    with torch.no_grad():
        before, after = vss(tokens), vss(changed)
    torch.testing.assert_close(after[:, :12], before[:, :12])
    assert (after[:, 12:] - before[:, 12:]).abs().max() > 1e-4


def test_rvm_without_its_vss_is_norm_and_projection_of_the_scaled_input() -> None:
    torch.manual_seed(3)
    layer = RVM(8, 16)
    torch.nn.init.zeros_(layer.vss.out_proj.weight)
    with torch.no_grad():
        layer.skip_scale.uniform_(0.5, 2.0)
        m = torch.randn(2, 3, 4, 8)
        scaled = m * layer.skip_scale
        normed = (scaled - scaled.mean(-1, keepdim=True)) / torch.sqrt(
            scaled.var(-1, unbiased=False, keepdim=True) + 1e-5
        )
        expected = normed @ layer.proj.weight.T + layer.proj.bias
        torch.testing.assert_close(layer(m), expected, rtol=1e-4, atol=1e-5)


def test_dt_bias_is_initialised_so_that_softplus_is_in_mambas_range() -> None:
    dt = torch.nn.functional.softplus(VSS(32).dt_proj.bias)
    assert dt.min() > 0.9e-3
    assert dt.max() < 1.1e-1


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 1, 12, 8, 8), "Z=12 is not divisible by 8"),
        ((1, 1, 8, 8, 4), "X=4 is not divisible by 8.*pad it to 8"),
        ((1, 2, 8, 8, 8), r"expects \(B, 1, Z, Y, X\)"),
        ((1, 1, 8, 8), r"expects \(B, 1, Z, Y, X\)"),
    ],
)
def test_wrong_inputs_are_refused(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create("lightm-unet-small", 3, 1, 2)(torch.zeros(shape))


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        (("lightm-unt", 3, 1, 2), {}, "did you mean 'lightm-unet"),
        (("lightm-unet", 4, 1, 2), {}, "use 2 or 3"),
        (("lightm-unet", 3, 0, 2), {}, "at least one channel"),
        (("lightm-unet", 3, 1, 0), {}, "out_channels"),
        (("lightm-unet", 3, 1, 2), {"base_channels": 20}, "not divisible by the 8 groups"),
        (("lightm-unet", 3, 1, 2), {"filter": 16}, "filter"),
        (("lightm-unet", 3, 1, 2), {"encoder_layers": (1, 0)}, "needs a layer"),
    ],
)
def test_wrong_settings_are_refused(args: tuple[object, ...], options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        create(*args, **options)  # type: ignore[arg-type]
