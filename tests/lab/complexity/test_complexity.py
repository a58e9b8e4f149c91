"""Accounting: closed forms against tensors, operations layer by layer, memory, comparison, the verb."""

from __future__ import annotations

import csv
import io
import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from lightm import ops
from lightm.cli import app
from lightm.errors import InputError, LightMError
from lightm.lab.complexity import account, build_network, compare, count_operations, count_parts, known_names
from lightm.lab.complexity.operations import OperationCount, activation_memory
from lightm.lab.complexity.report import Dice, as_csv, as_markdown, as_text
from lightm.nets import PRESETS, count_parameters, create
from tests.helpers import docs_script

NAMES = sorted(PRESETS)
OVERRIDES: list[tuple[str, dict[str, Any]]] = [
    ("lightm-unet", {"base_channels": 16, "state_size": 8, "expand": 1}),
    ("lightm-unet", {"encoder_layers": (2, 1), "bottleneck_layers": 0}),
    ("lightm-unet", {"stem": "conv", "position_conv": True, "pooling": "avg"}),
    ("spm-lightm-unet", {"parts": 2, "state_size": 24}),
    ("spm-lightm-unet", {"parts": 8, "expand": 3, "base_channels": 48}),
    ("spm-lightm-unet-shared", {"parts": 8, "position_conv": True}),
    ("lightm-unet", {"ssm": "mamba2", "base_channels": 16, "expand": 1, "state_size": 20}),
    ("spm-lightm-unet", {"ssm": "mamba2", "base_channels": 16}),
    ("spm-lightm-unet-shared", {"ssm": "mamba2", "parts": 8, "position_conv": True}),
    ("lightm-unet-released", {"base_channels": 16, "blocks_down": (1, 3, 1), "blocks_up": (1, 1), "state_size": 4}),
]


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize(("name", "options"), [*((name, {}) for name in NAMES), *OVERRIDES])
def test_closed_forms_equal_the_count_for_every_preset_and_option(
    name: str, options: dict[str, Any], dims: int
) -> None:
    network = build_network(name, 2, 4, (32,) * dims, options)
    table = count_parts(network, name, dims, 2, 4, options)
    assert table.closed_form
    assert table.total == count_parameters(network)
    for what in ("source", "stage", "kind"):
        assert sum(table.by(what).values()) == table.total
    assert table.expected_by_source() == table.by("source")


@pytest.mark.slow
def test_published_sizes_come_out() -> None:
    assert account("lightm-unet-released", spatial=(16, 16, 16)).parameters.total == 5_015_766
    assert account("lightm-unet-released", spatial=(16, 16), out_channels=2).parameters.total == 5_011_683
    stages = account("lightm-unet", spatial=(16, 16, 16)).parameters.by("stage")
    numbered = [[f"{half} {i}" for i in (1, 2, 3)] for half in ("encoder", "decoder")]
    assert list(stages) == ["stem", *numbered[0], "bottleneck", *numbered[1], "head"]


def test_one_layer_by_hand() -> None:
    network = build_network("lightm-unet", 1, 2, (16, 16))
    parts = {p.source: p for p in count_parts(network, "lightm-unet", 2, 1, 2).parts if p.stage == "encoder 1"}
    # C = 32, E = 64, N = 16, R = 2, K = 4, O = 64
    expected = {
        "in_proj": 4 * 32**2,
        "out_proj": 2 * 32**2,
        "x_proj": 64 * 34,
        "dt_proj": 2 * 64 + 64,
        "A_log": 64 * 16,
        "d_skip": 64,
        "conv1d": 64 * 4 + 64,
        "inner norm": 128,
        "layer norms": 128,
        "skip scale": 32,
        "projection": 32 * 64 + 64,
    }
    assert {source: part.counted for source, part in parts.items()} == expected


@pytest.mark.parametrize(("kind", "sets"), [("spm", 4), ("spm-shared", 1)])
def test_one_layer_of_mamba2_with_parts_by_hand(kind: str, sets: int) -> None:
    options = {"layer": kind, "ssm": "mamba2"}
    network = build_network("lightm-unet", 1, 2, (16, 16), options)
    table = count_parts(network, "lightm-unet", 2, 1, 2, options)
    parts = {p.source: p for p in table.parts if p.stage == "encoder 3" and p.layer == "layer 1"}
    # C = 128, of one part C' = 32, E' = 64, H = 4 heads of 16 channels, N = 16, K = 4, O = 128
    expected = {
        "in_proj": sets * 32 * (2 * 64 + 2 * 16 + 4),
        "out_proj": sets * 64 * 32,
        "dt_proj": sets * 4,
        "A_log": sets * 4,
        "d_skip": sets * 4,
        "conv1d": sets * (64 + 2 * 16) * 5,
        "inner norm": sets * 128,
        "layer norms": 4 * 128,
        "skip scale": 128,
        "projection": 128 * 128 + 128,
    }
    assert {source: part.counted for source, part in parts.items()} == expected
    g = "g " if sets == 4 else ""
    assert [parts[source].formula for source in ("out_proj", "A_log", "inner norm")] == [
        f"{g}E' C'", f"{g}E' / P", f"2 {g}E'"
    ]  # fmt: skip


def test_a_count_that_is_not_the_formulas_is_an_error_that_names_the_part() -> None:
    network = build_network("lightm-unet", 1, 2, (16, 16), {"state_size": 8})
    with pytest.raises(LightMError, match=r"encoder 1 layer 1 x_proj: E \(R \+ 2 N\) = 2,176, counted 1,152"):
        count_parts(network, "lightm-unet", 2, 1, 2)
    network = build_network("lightm-unet", 1, 2, (16, 16))
    network.bottleneck.register_parameter("extra", nn.Parameter(torch.empty(7, device="meta")))  # type: ignore[operator]
    with pytest.raises(LightMError, match="extra: no formula = 0, counted 7"):
        count_parts(network, "lightm-unet", 2, 1, 2)


def test_baselines_are_held_against_the_forms_of_their_layers() -> None:
    network = build_network("segresnet", 1, 3, (32, 32, 32))
    table = count_parts(network, "segresnet", 3, 1, 3)
    assert table.total == count_parameters(network)
    assert table.closed_form
    assert set(table.by("kind")) == {"convolution", "normalisation"}
    unetr = build_network("unetr", 1, 3, (32, 32, 32))
    table = count_parts(unetr, "unetr", 3, 1, 3)
    assert table.total == count_parameters(unetr)
    assert not table.closed_form  # learnt positions have no form


class Seen(nn.Module):
    """The weights that a counter of called modules sees in the code as first uploaded, written down anew."""

    def __init__(self, dims: int, image: int, classes: int) -> None:
        super().__init__()
        conv = nn.Conv3d if dims == 3 else nn.Conv2d
        widths = [(32, 32)] * 2 + [(32, 64)] + [(64, 64)] * 4 + [(64, 128)] + [(128, 128)] * 4
        widths += [(128, 256)] + [(256, 256)] * 8
        self.layers = nn.ModuleList()
        for c, o in widths:
            self.layers += [nn.LayerNorm(c), nn.Linear(c, o)]
        self.stem = conv(image, 32, 3, bias=False)
        self.up = nn.ModuleList()
        for c in (128, 64, 32):
            self.up += [conv(2 * c, c, 1, bias=False), conv(c, c, 3, bias=False), conv(c, c, 3, bias=False)]
        self.head = conv(32, classes, 1)


@pytest.mark.parametrize(("dims", "image", "classes", "printed"), [(3, 1, 3, 1.87), (2, 1, 2, 1.09), (2, 3, 2, 1.09)])
def test_the_papers_sizes_are_those_of_the_modules_called_in_the_first_upload(
    dims: int, image: int, classes: int, printed: float
) -> None:
    seen, total, _ = docs_script("errata").first_upload((16,) * dims, image, classes, 1)
    assert seen == count_parameters(Seen(dims, image, classes))
    assert round(seen / 1e6, 2) == printed
    released = count_parameters(create("lightm-unet-released", dims, image, classes))
    taps = 3**dims
    # depthwise and pointwise convolutions and a scalar s in the stem, decoder and head against full convolutions
    theirs = taps * image * 32 + 2 * taps * sum(c * c for c in (128, 64, 32))
    ours = taps * image + image * 32 + sum(taps * c + c * c + 1 for c in (128, 64, 32)) + 64
    assert total == released - ours + theirs


def test_errata_are_said_and_hold_for_the_network_at_hand() -> None:
    cost = account("lightm-unet", spatial=(16, 16, 16))
    errata = docs_script("errata")
    wrong, seen = errata.full_convolution(cost), errata.called_modules(cost)
    assert wrong is not None
    assert wrong.total_as_printed - wrong.total == wrong.printed - wrong.true
    assert seen is not None
    hidden = ("vss.in_proj", "vss.out_proj", "vss.x_proj", "vss.dt_proj", "A_log", "d_skip", "conv_")
    network = create("lightm-unet", 3, 1, 3)
    called = sum(
        p.numel()
        for name, p in network.named_parameters()
        if not any(part in name for part in hidden) and "skip_scale" not in name
    )
    group_norms = sum(p.numel() for m in network.modules() if isinstance(m, nn.GroupNorm) for p in m.parameters())
    assert seen.seen == called - group_norms
    text = "\n".join(errata.errata_lines(cost))
    assert "printed number to its last digit" in text
    assert "E E K + E" in text
    inner = [64] + [128] * 2 + [256] * 2 + [512] * 4  # E of every layer
    assert wrong.printed == sum(4 * e * e + e for e in inner)
    assert errata.called_modules(account("segresnet", spatial=(32, 32, 32))) is None
    parted = account("spm-lightm-unet", spatial=(16, 16, 16))  # four parts of a quarter of the width in each layer
    assert errata.full_convolution(parted).printed == sum(4 * (e * e // 4 + e // 4) for e in inner[:-1])
    other = account("lightm-unet-mamba2", spatial=(16, 16))  # neither the paper's network nor the report's formula
    assert errata.called_modules(other) is None
    assert errata.full_convolution(other) is None


def vss(tokens: int, c: int, n: int = 16, k: int = 4, parts: int = 1) -> tuple[int, int, int]:
    """(matmuls, scan, exponentials) of the state-space module of width c; the causal convolution apart."""
    w = c // parts
    e, r = 2 * w, math.ceil(w / 16)
    products = parts * tokens * (2 * e * w + e * w + e * (r + 2 * n) + r * e)
    scan = parts * tokens * e * (3 * n + 1)
    exponentials = parts * tokens * e * (n + 3)  # SiLU of the convolution, softplus, the gate's SiLU
    return products, scan, exponentials


def vss2(tokens: int, c: int, n: int = 16, p: int = 16, parts: int = 1) -> tuple[int, int, int]:
    """The same of the module with Mamba-2's core, heads of p channels."""
    w = c // parts
    e = 2 * w
    heads = e // p
    products = parts * tokens * (w * (2 * e + 2 * n + heads) + e * w)
    scan = parts * tokens * (e * n * 5 // 2 + heads // 2 + e)
    # SiLU of the convolved x, B and C, the gate's SiLU; a head's decay and softplus
    exponentials = parts * tokens * (e + 2 * n + e + 2 * heads)
    return products, scan, exponentials


def layer(tokens: int, c: int, out: int, parts: int = 1, ssm: str = "mamba1") -> tuple[int, int]:
    """(multiply-adds, exponentials) of an RVM (one part) or SPM layer."""
    products, scan, exponentials = (vss if ssm == "mamba1" else vss2)(tokens, c, parts=parts)
    convolved = 2 * c + (0 if ssm == "mamba1" else 2 * 16 * parts)
    return products + scan + tokens * (convolved * 4 + c * out), exponentials


@pytest.mark.slow
@pytest.mark.parametrize("spatial", [(32, 64, 32), (64, 80)])  # 64 tokens or more in the bottleneck
@pytest.mark.parametrize(
    ("name", "options", "parts", "bottleneck"),
    [
        ("lightm-unet", {}, 1, 4),
        ("spm-lightm-unet", {}, 4, 3),
        ("spm-lightm-unet-shared", {}, 4, 3),
        ("lightm-unet-mamba2", {"ssm": "mamba2"}, 1, 4),
        ("spm-lightm-unet", {"ssm": "mamba2", "base_channels": 64}, 4, 3),
        ("spm-lightm-unet-shared", {"ssm": "mamba2", "base_channels": 64}, 4, 3),
    ],
)
def test_operations_equal_closed_forms_layer_by_layer(
    name: str, options: dict[str, Any], parts: int, bottleneck: int, spatial: tuple[int, ...]
) -> None:
    cost = account(name, spatial=spatial, in_channels=2, out_channels=5, options=options)
    f, ssm = options.get("base_channels", 32), options.get("ssm", "mamba1")
    found = {
        (x.stage, x.layer): (x.operations.multiply_adds.total(), x.operations.exponentials.total()) for x in cost.layers
    }
    voxels, dims = math.prod(spatial), len(spatial)
    taps, per = 3**dims, 2**dims
    expected: dict[tuple[str, str], tuple[int, int]] = {("stem", ""): (voxels * (taps * 2 + 2 * f), 0)}
    for stage, (c, count) in enumerate([(f, 1), (2 * f, 2), (4 * f, 2)], start=1):
        for number in range(1, count + 1):
            out = 2 * c if number == count else c
            expected[f"encoder {stage}", f"layer {number}"] = layer(voxels // per ** (stage - 1), c, out, parts, ssm)
    for number in range(1, bottleneck + 1):
        expected["bottleneck", f"layer {number}"] = layer(voxels // per**3, 8 * f, 8 * f, parts, ssm)
    for stage, h in enumerate([4 * f, 2 * f, f], start=1):
        high = voxels // per ** (3 - stage)
        work = high // per * 2 * h * h + high * (dims * h + taps * h + h * h)
        expected[f"decoder {stage}", ""] = (work, 0)
    expected["head", ""] = (voxels * f * 5, 0)
    assert {key: value for key, value in found.items() if any(value)} == expected


def test_a_scan_in_several_orders_is_counted_once_for_each() -> None:
    once = account("lightm-unet", spatial=(8, 16, 8)).operations.total
    for scan, orders in (("bidirectional", 2), ("axes", 3)):
        total = account("lightm-unet", spatial=(8, 16, 8), options={"scan": scan}).operations.total
        for kind in ("scan", "causal convolution"):
            assert total.multiply_adds[kind] == orders * once.multiply_adds[kind]
        assert total.multiply_adds["interpolation"] == once.multiply_adds["interpolation"]


@pytest.mark.parametrize("states", [16, 40])
def test_the_scan_is_counted_by_its_sizes(states: int) -> None:
    class Scan(nn.Module):
        def forward(self, image: Tensor) -> Tensor:
            u = image.flatten(2).transpose(1, 2)  # (1, 6, 8)
            weights = torch.empty(8, states), torch.empty(1, 6, states), torch.empty(1, 6, states)
            return ops.selective_scan(u, u, *weights, delta_softplus=False)

    count = count_operations(Scan(), 8, (2, 3)).total
    assert count.multiply_adds["scan"] == 3 * 6 * 8 * states
    assert count.exponentials["scan"] == 6 * 8 * states
    assert count.without_scan == 0


@pytest.mark.parametrize("states", [12, 40])
@pytest.mark.parametrize("extras", [False, True])
def test_the_scan_of_mamba2_is_counted_by_its_sizes(states: int, extras: bool) -> None:
    tokens, heads, width, groups = 6, 4, 6, 2

    class Scan(nn.Module):
        def forward(self, image: Tensor) -> Tensor:
            u = image.flatten(2).transpose(1, 2).unflatten(-1, (heads, width))
            delta, rates = u[..., 0].contiguous(), torch.empty(heads)
            to_states = torch.empty(1, tokens, groups, states), torch.empty(1, tokens, groups, states)
            if not extras:
                return ops.ssd_scan(u, delta, rates, *to_states)
            return ops.ssd_scan(u, delta, rates, *to_states, d_skip=rates, z=u, delta_bias=rates, delta_softplus=True)

    count = count_operations(Scan(), heads * width, (2, 3)).total
    blocks, inner = math.ceil(states / 16), heads * width  # more than 16 states run in blocks
    skip = tokens * inner * (extras and blocks == 1)  # beside the blocks the skip is an element-wise product
    assert count.multiply_adds["scan"] == tokens * (5 * inner * states + blocks * heads) // 2 + skip
    assert count.exponentials["scan"] == blocks * tokens * heads
    assert count.exponentials["activation"] == extras * tokens * (blocks * heads + inner)
    assert count.without_scan == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["segresnet", "unet", "unetr", "swinunetr"])
def test_baselines_have_the_multiply_adds_that_pytorchs_counter_finds(name: str) -> None:
    network = build_network(name, 1, 3, (64, 64, 64))
    found = count_operations(network, 1, (64, 64, 64)).total
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(torch.empty(1, 1, 64, 64, 64))
    assert 2 * (found.multiply_adds.total() - found.multiply_adds["interpolation"]) == counter.get_total_flops()


def test_attention_has_its_products_and_one_exponential_for_each_pair() -> None:
    class Attend(nn.Module):
        def forward(self, image: Tensor) -> Tensor:
            q = image.reshape(2, 3, 10, 4)  # batch, heads, tokens, width
            return nn.functional.scaled_dot_product_attention(q, q, q)

    count = count_operations(Attend(), 24, (2, 5)).total
    assert count.multiply_adds.total() == 2 * 3 * 10 * 10 * (4 + 4)
    assert count.exponentials.total() == 2 * 3 * 10 * 10


def test_transposed_and_grouped_convolutions() -> None:
    network = nn.Sequential(nn.ConvTranspose2d(4, 6, 2, 2), nn.Conv2d(6, 6, 3, padding=1, groups=6)).to("meta")
    count = count_operations(network, 4, (5, 7)).total
    assert count.multiply_adds["convolution"] == 35 * 4 * 6 * 4
    assert count.multiply_adds["depthwise convolution"] == 10 * 14 * 6 * 9


def test_an_operator_without_a_rule_is_an_error_not_a_zero() -> None:
    @torch.library.custom_op("lightm::unheard_of", mutates_args=(), device_types="cpu")
    def unheard_of(x: Tensor) -> Tensor:
        return x.clone()

    unheard_of.register_fake(lambda x: torch.empty_like(x))

    class New(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = unheard_of(x)
            return result

    with pytest.raises(LightMError, match=r"lightm::unheard_of has no rule"):
        count_operations(New(), 1, (4, 4))


def test_counts_of_modules_add_up_to_the_whole() -> None:
    operations = account("lightm", spatial=(16, 16, 16)).operations
    parts = OperationCount()
    for path in ("stem", "encoder", "bottleneck", "decoder", "head", "head_norm"):
        parts.add(operations.below(path))
    total = operations.total
    assert parts.multiply_adds == total.multiply_adds
    assert parts.exponentials == total.exponentials
    assert 0 < total.without_scan < total.multiply_adds.total()


class Chain(nn.Module):
    """x -> 4 x -> relu -> sum with x, of one channel: every step makes one image."""

    def forward(self, x: Tensor) -> Tensor:
        y = x * 4
        z = torch.relu(y)
        del y
        return z + x


def test_inference_memory_of_a_chain_by_hand() -> None:
    # x, y and z are alive together, then x, z and the sum
    assert activation_memory(Chain(), 1, (8, 8)).inference_bytes == 3 * 4 * 64


def test_training_memory_of_a_network_by_hand() -> None:
    network = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 1, 1)).to("meta")
    # the image for the first weight; the ReLU's result for itself and, the same storage, for the second weight
    assert activation_memory(network, 2, (8, 8)).training_bytes == 4 * 64 * (2 + 3)


def test_memory_of_a_preset_grows_with_the_voxels_and_training_needs_more() -> None:
    network = build_network("lightm-unet-small", 1, 3, (16, 16, 16))
    small = activation_memory(network, 1, (16, 16, 16))
    large = activation_memory(network, 1, (16, 16, 32))
    assert small.training_bytes > small.inference_bytes > 4 * 16**3 * 16
    assert large.training_bytes == pytest.approx(2 * small.training_bytes, rel=0.02)
    assert large.inference_bytes == pytest.approx(2 * small.inference_bytes, rel=0.02)


def test_counting_leaves_the_random_generator_and_the_network_as_they_were() -> None:
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    account("swinunetr", spatial=(64, 64))
    assert torch.equal(before, torch.random.get_rng_state())
    network = build_network("lightm-small", 1, 2, (16, 16))
    count_operations(network, 1, (16, 16))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())


def test_comparison_is_sorted_scored_and_names_networks_that_refuse() -> None:
    scores = {"lightm": [Dice("liver", 0.9, 0.8, 0.95)]}
    rows = compare(["lightm", "transunet", "lightm-unet", "lightm-small"], spatial=(16, 16, 16), dice=scores)
    assert [row.name for row in rows] == ["lightm-small", "lightm", "lightm-unet", "transunet"]
    assert "0.900 [0.800, 0.950]" in as_text(rows)
    assert "TransUNet is defined for 2D" in as_markdown(rows)
    read = list(csv.DictReader(io.StringIO(as_csv(rows))))
    assert [row["parameters"] for row in read[:3]] == [str(row.parameters) for row in rows[:3]]
    assert (read[1]["dice_data"], read[1]["dice"], read[0]["dice"]) == ("liver", "0.9", "")
    assert {len(line) for line in csv.reader(io.StringIO(as_csv(rows)))} == {len(read[0])}
    with pytest.raises(InputError, match="did you mean 'lightm-small'"):
        compare(["lightm-smal"])


def run(*words: str) -> Any:
    return CliRunner().invoke(app, ["info", *words])


def test_the_verb_prints_complete_json_and_takes_sizes_apart_or_together() -> None:
    first = run("lightm-unet-small", "--spatial", "16", "24", "8", "--json", "--latency")
    assert first.exit_code == 0, first.output
    found = json.loads(first.stdout)
    assert found["spatial"] == [16, 24, 8]
    assert found["parameters"]["total"] == sum(part["counted"] for part in found["parameters"]["parts"]) == 662_990
    assert found["operations"]["multiply_adds"] == sum(layer["multiply_adds"] for layer in found["layers"])
    assert found["operations"]["multiply_adds_without_scan"] < found["operations"]["multiply_adds"]
    assert found["latency"]["seconds"] > 0
    second = json.loads(run("--spatial", "16,24,8", "lightm-unet-small", "--json").stdout)
    assert second == {**found, "latency": None}


@pytest.mark.slow
def test_the_verb_prints_tables_of_one_network_with_settings_and_of_several(monkeypatch: pytest.MonkeyPatch) -> None:
    text = run("spm-lightm-unet", "--spatial", "16x16", "--set", "parts=8", "--set", "layer=spm-shared").stdout
    for expected in ("parts 8, layer spm-shared: 16 x 16", "in_proj", "2 E' C'", "decoder 3", "inference: peak"):
        assert expected in text
    names = ["lightm-small", "spm-lightm-unet", "unet", "nnformer"]  # all of them take seconds
    assert set(names) <= set(known_names())
    monkeypatch.setattr("lightm.lab.complexity.report.known_names", lambda: names)
    listed = json.loads(run("--all", "--spatial", "32", "32", "--json").stdout)
    assert sorted(row["name"] for row in listed) == sorted(names)
    assert [row["name"] for row in listed if row["refused"]] == ["nnformer"]
    assert all(row["parameters"] > 0 for row in listed if not row["refused"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("lightm-unt",), "did you mean 'lightm-unet'"),
        (("lightm", "--spatial", "100", "128", "128"), "Z=100 is not divisible by 8"),
        (("lightm", "--spatial", "64"), "give two sizes"),
        (("lightm", "--spatial", "0", "8"), "give two sizes"),
        (("lightm", "--spatial", "wide"), "write whole numbers, as --spatial 128 128 128"),
        (("lightm", "32", "32"), "given as --spatial 32 32"),
        (("lightm", "--set", "base_channels"), "write name=value"),
        (("lightm", "--set", "base_channels=20"), "not divisible by the 8 groups"),
        (("lightm", "--set", "filter=16"), "filter"),
        (("lightm", "lightm-unet"), "one network is needed, got lightm, lightm-unet"),
        ((), "one network is needed, got none"),
        (("lightm", "--out", "here"), "belong to --all"),
        (("--all", "lightm"), "PRESET cannot be given with it"),
        (("unetr", "--spatial", "32", "32", "--diagram", "x.svg"), "not of baselines"),
    ],
)
def test_the_verb_refuses_with_a_reason(words: tuple[str, ...], message: str) -> None:
    result = run(*words)
    assert isinstance(result.exception, InputError)
    assert message in str(result.exception)
