"""The fused state-space layer: against the plain float64 layer, chunks, pooling, scans, states, memory, threads."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from comparing import relative
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightm.nets.blocks import RVM, SPM
from lightm.nets.token_layer import TokenLayer
from lightm.ops import layer_runs_fused, state_space_layer
from lightm.ops.layer import cpu

# widths at and beside whole vectors of channels, every number of states, with and without the inner norm
LAYERS: dict[str, tuple[type[TokenLayer], dict[str, Any]]] = {
    "rvm": (RVM, {"channels": 16, "out_channels": 32}),
    "rvm, N 8": (RVM, {"channels": 24, "out_channels": 5, "state_size": 8, "expand": 4}),
    "rvm, N 4, no inner norm": (RVM, {"channels": 40, "out_channels": 33, "state_size": 4, "inner_norm": False}),
    "rvm, narrow": (RVM, {"channels": 8, "out_channels": 1}),
    "rvm, one norm, one scale": (RVM, {"channels": 16, "out_channels": 16, "one_norm": True, "vector_scale": False}),
    "spm": (SPM, {"channels": 32, "out_channels": 64}),
    "spm, shared": (SPM, {"channels": 32, "out_channels": 17, "shared": True, "state_size": 8}),
    "spm, 3 parts": (SPM, {"channels": 12, "out_channels": 7, "parts": 3, "expand": 4, "inner_norm": False}),
    "spm, half vectors": (SPM, {"channels": 16, "out_channels": 24}),
    "spm, wide": (SPM, {"channels": 64, "out_channels": 16, "parts": 2, "vector_scale": False}),
}


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def _layer(name: str, scan: str = "raster", seed: int = 0) -> TokenLayer:
    """A layer in which every parameter counts: no norm, scale or skip is left at its neutral start."""
    torch.manual_seed(seed)
    kind, settings = LAYERS[name]
    layer = kind(**settings, scan=scan)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    layer.checkpointing = False
    return layer


def _fused(
    layer: TokenLayer, x: Tensor, pooling: str | None = None, keep_states: int = 0
) -> tuple[Tensor, Tensor | None]:
    parameters = layer.layer_parameters()
    assert parameters is not None
    return state_space_layer(x, parameters, layer.scan, pooling, keep_states)


def _plain(layer: TokenLayer, x: Tensor, pooling: str | None = None) -> Tensor:
    """The float64 composition of the layer's operators, on all tokens."""
    with torch.no_grad():
        return copy.deepcopy(layer).double()._plain(x.double(), pooling)


@pytest.mark.parametrize("name", list(LAYERS))
@pytest.mark.parametrize("sizes", [(1, 1), (1, 2), (3, 1, 1), (7, 9), (1, 5, 6), (5, 7, 9)])
def test_against_plain_float64(name: str, sizes: tuple[int, ...]) -> None:
    layer = _layer(name)
    x = 2 * torch.randn(2, *sizes, LAYERS[name][1]["channels"]) + 0.5
    out, states = _fused(layer, x)
    assert states is None
    assert out.shape == (2, *sizes, LAYERS[name][1]["out_channels"])
    assert relative(out, _plain(layer, x)) < 1e-5
    with torch.no_grad():
        assert torch.equal(layer(x), out)  # the module's own way without gradients


@pytest.mark.parametrize("name", ["rvm", "spm", "spm, half vectors"])
@pytest.mark.parametrize("scan", ["bidirectional", "axes"])
@pytest.mark.parametrize(("sizes", "pooling"), [((5, 8), None), ((3, 5, 4), None), ((4, 6), "add"), ((4, 2, 6), "max")])
def test_scans_are_sums_over_orders(name: str, scan: str, sizes: tuple[int, ...], pooling: str | None) -> None:
    layer = _layer(name, scan)
    x = torch.randn(2, *sizes, LAYERS[name][1]["channels"])
    out = _fused(layer, x, pooling)[0]
    assert relative(out, _plain(layer, x, pooling)) < 1e-5
    # the scans differ, so the test tells them apart
    assert relative(out, _plain(_layer(name), x, pooling)) > 1e-2


@pytest.mark.parametrize("sizes", [(4, 6), (3, 5), (3, 4, 5)])
def test_orders_visit_every_row_once_along_their_axis(sizes: tuple[int, ...]) -> None:
    rows = torch.arange(torch.Size(sizes).numel()).view(sizes)
    wanted = {
        "raster": [rows.flatten()],
        "bidirectional": [rows.flatten(), rows.flatten().flip(0)],
        "axes": [rows.flatten(), rows.transpose(-1, -2).flatten()],
    }
    if len(sizes) == 3:
        wanted["axes"].append(rows.movedim(0, -1).flatten())
    for scan, expected in wanted.items():
        found = [
            [
                base + t // n2 // n1 * s0 + t // n2 % n1 * s1 + t % n2 * s2
                for t in range(rows.numel())
            ]
            for base, n1, n2, s0, s1, s2 in cpu.orders(sizes, scan)
        ]  # fmt: skip
        assert sorted(found[1:]) == sorted(order.tolist() for order in expected[1:]), scan
        assert found[0] == expected[0].tolist()


@pytest.mark.parametrize("pooling", ["max", "avg", "add"])
@pytest.mark.parametrize("sizes", [(2, 2), (34, 22), (2, 2, 2), (14, 6, 10)])
def test_pooling(monkeypatch: pytest.MonkeyPatch, pooling: str, sizes: tuple[int, ...]) -> None:
    layer = _layer("spm")
    x = torch.randn(2, *sizes, 32)
    whole = _fused(layer, x, pooling)[0]
    assert relative(whole, _plain(layer, x, pooling)) < 1e-5
    monkeypatch.setattr(cpu, "_CHUNK", 1)  # slabs of few rows, so many of them
    assert torch.equal(_fused(layer, x, pooling)[0], whole)


@pytest.mark.parametrize("name", ["rvm", "rvm, N 8", "spm, shared", "spm, half vectors"])
@pytest.mark.parametrize("scan", ["raster", "bidirectional", "axes"])
def test_chunks_do_not_change_a_bit(monkeypatch: pytest.MonkeyPatch, name: str, scan: str) -> None:
    layer = _layer(name, scan)
    x = torch.randn(2, 6, 13, 17, LAYERS[name][1]["channels"])  # 1326 tokens
    assert cpu._chunks(1326, 1326, 1 << 20) == [(0, 1326)]
    whole = _fused(layer, x)[0]
    for size in (1, 30000):
        monkeypatch.setattr(cpu, "_CHUNK", size)
        assert torch.equal(_fused(layer, x)[0], whole)


@pytest.mark.parametrize(
    ("tokens", "slab", "longest"), [(1, 1, 192), (1000, 1000, 192), (1001, 143, 384), (600, 600, 9999)]
)
def test_chunks_cover_all_tokens(tokens: int, slab: int, longest: int) -> None:
    chunks = cpu._chunks(tokens, slab, longest)
    assert [chunks[0][0], chunks[-1][1]] == [0, tokens]
    assert all(a[1] == b[0] for a, b in pairwise(chunks))
    assert all(0 < last - first <= longest and first // slab == (last - 1) // slab for first, last in chunks)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rvm", "rvm, N 4, no inner norm", "spm", "spm, half vectors"])
@pytest.mark.parametrize("rows", [1, 2, 4, 6])
def test_kept_states_are_the_scans(monkeypatch: pytest.MonkeyPatch, name: str, rows: int) -> None:
    layer = _layer(name)
    x = torch.randn(2, 6, 5, 43, LAYERS[name][1]["channels"])
    whole = _fused(layer, x)[0]
    monkeypatch.setattr(cpu, "_CHUNK", 1)  # chunks of less than a row, too
    out, states = _fused(layer, x, keep_states=rows)
    assert torch.equal(out, whole)
    wide = copy.deepcopy(layer).double()
    parameters = layer.layer_parameters()
    assert states is not None
    assert parameters is not None
    assert states.shape == (-(-6 // rows), 2, parameters.inner, parameters.states)
    assert not states[0].any()
    with torch.no_grad():
        for index in range(1, len(states)):
            normed = wide.norm_in(x.double()[:, : index * rows].flatten(1, -2))
            assert relative(states[index], wide.vss(normed, return_state=True)[1]) < 1e-5


@pytest.mark.parametrize("pooling", ["max", "add"])
def test_kept_states_with_pooling(pooling: str) -> None:
    layer, x = _layer("spm"), torch.randn(1, 6, 4, 8, 32)
    out, states = _fused(layer, x, pooling, keep_states=2)
    assert torch.equal(out, _fused(layer, x, pooling)[0])
    plain = _fused(layer, x, keep_states=2)[1]
    assert states is not None
    assert plain is not None
    assert torch.equal(states, plain)


@pytest.mark.parametrize("view", ["channels first", "part", "repeated"])
def test_strides(view: str) -> None:
    torch.manual_seed(0)
    x = {
        "channels first": torch.randn(2, 16, 5, 6).movedim(1, -1),
        "part": torch.randn(2, 5, 9, 40)[:, :, 2:8, 7:23],
        "repeated": torch.randn(1, 5, 1, 16).expand(2, 5, 6, 16),
    }[view]
    layer = _layer("rvm")
    assert not x.is_contiguous()
    assert torch.equal(_fused(layer, x)[0], _fused(layer, x.contiguous())[0])


@pytest.mark.parametrize(
    ("name", "scan", "pooling"),
    [
        ("rvm", "raster", None),
        ("rvm, N 8", "raster", "max"),
        ("spm", "axes", "add"),
        ("spm, 3 parts", "bidirectional", None),
        ("spm, half vectors", "raster", None),
    ],
)
def test_memory_that_nobody_wrote_does_not_matter(name: str, scan: str, pooling: str | None) -> None:
    layer = _layer(name, scan)
    x = torch.randn(2, 6, 8, 14, LAYERS[name][1]["channels"])
    expected = _fused(layer, x, pooling, 2 if scan == "raster" else 0)
    torch.use_deterministic_algorithms(True)  # new memory is filled with NaN
    try:
        assert torch.empty(4).isnan().all()
        got = _fused(layer, x, pooling, 2 if scan == "raster" else 0)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(got[0], expected[0])
    assert (got[1] is None) == (expected[1] is None)
    if got[1] is not None and expected[1] is not None:
        assert torch.equal(got[1], expected[1])


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("scan", ["raster", "axes"])
def test_bit_equal_on_any_number_of_threads(monkeypatch: pytest.MonkeyPatch, scan: str) -> None:
    layer, x = _layer("spm", scan), torch.randn(2, 16, 16, 20, 32)
    monkeypatch.setattr(cpu, "_CHUNK", 1 << 17)
    found = []
    for count in (1, 2, 4, 4):
        torch.set_num_threads(count)
        found.append(_fused(layer, x, "add")[0])
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_entries_of_a_batch_do_not_meet() -> None:
    layer, x = _layer("rvm"), torch.randn(3, 9, 11, 16)
    out = _fused(layer, x)[0]
    for entry in range(3):
        assert torch.equal(out[entry], _fused(layer, x[entry : entry + 1])[0][0])


def test_later_tokens_do_not_reach_earlier_ones() -> None:
    layer, x = _layer("rvm"), torch.randn(1, 20, 25, 16)
    changed = x.clone()
    changed[0, 12, 7] += 1
    one, other = (_fused(layer, given)[0].flatten(1, 2) for given in (x, changed))
    assert torch.equal(one[:, :307], other[:, :307])
    assert not torch.equal(one[:, 307], other[:, 307])


class _Allocations(TorchDispatchMode):
    """Numbers in the memory that every tensor made inside holds."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, int] = {}
        self.alive: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(one, Tensor):
                self.alive.append(one)  # kept, so that no address comes back
                storage = one.untyped_storage()
                self.seen[storage.data_ptr()] = storage.nbytes() // 4
        return out


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(("scan", "pooling"), [("raster", None), ("raster", "add"), ("axes", None), ("axes", "max")])
def test_nothing_of_the_inner_width_is_ever_whole(
    monkeypatch: pytest.MonkeyPatch, scan: str, pooling: str | None
) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr(cpu, "_CHUNK", 1 << 15)
    layer, x = _layer("spm", scan), torch.randn(1, 48, 32, 32, 32)
    parameters = layer.layer_parameters()
    assert parameters is not None
    inner = parameters.inner * x[..., 0].numel()
    with _Allocations() as made:
        result = _fused(layer, x, pooling)[0]
    made.seen.pop(result.data_ptr())
    made.seen.pop(x.data_ptr(), None)
    tokens = x.numel() if scan == "axes" else 0  # the sum over the orders has the input's size
    assert max(made.seen.values(), default=0) <= max(tokens, inner // 8)
    # the pooled pieces, here kept all, are as large as the result: largest, average and sum
    pieces = 3 * result.numel() if pooling else 0
    assert sum(made.seen.values()) - tokens - pieces < inner // 3


def test_who_can_run() -> None:
    layer, x = _layer("rvm"), torch.randn(1, 4, 4, 16)
    parameters = layer.layer_parameters()
    assert parameters is not None
    assert layer_runs_fused(x, parameters)
    for other in (x.double(), x.bfloat16(), x.to("meta"), x[:0], torch.nn.Parameter(x)):
        assert not layer_runs_fused(other, parameters)
    with torch.autocast("cpu", torch.bfloat16):
        assert not layer_runs_fused(x, parameters)
    for settings in ({"channels": 9}, {"channels": 16, "state_size": 5}):
        odd = RVM(**settings, out_channels=3).layer_parameters()
        assert odd is not None
        assert not layer_runs_fused(torch.randn(1, 4, 4, settings["channels"]), odd)
    wide = layer.double().layer_parameters()
    assert wide is not None
    assert not layer_runs_fused(x, wide)


def test_odd_layers_run_operator_by_operator() -> None:
    for settings in ({"channels": 9, "expand": 3}, {"channels": 16, "state_size": 5}):
        torch.manual_seed(0)
        layer = RVM(**settings, out_channels=3)
        x = torch.randn(2, 4, 5, settings["channels"])
        with torch.no_grad():
            assert relative(layer(x), _plain(layer, x)) < 1e-5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scan": "spiral"}, "scan 'spiral': one of raster, bidirectional, axes"),
        ({"scan": "axes", "keep_states": 2}, "keep_states=2 with scan 'axes': states are kept for 'raster' only"),
        ({"x": torch.ones(1, 4, 4, 16).double()}, r"x \(1, 4, 4, 16\) torch.float64 on cpu with E = 32"),
        ({"x": torch.empty(0, 4, 4, 16)}, r"x \(0, 4, 4, 16\)"),
    ],
)  # fmt: skip
def test_errors(settings: dict[str, Any], message: str) -> None:
    parameters = _layer("rvm").layer_parameters()
    assert parameters is not None
    with pytest.raises(ValueError, match=message):
        state_space_layer(**{"x": torch.randn(1, 4, 4, 16), "parameters": parameters, **settings})


def test_gradients_are_not_recorded() -> None:
    layer = _layer("rvm")
    out = _fused(layer, torch.randn(1, 4, 4, 16, requires_grad=True))[0]
    assert not out.requires_grad
