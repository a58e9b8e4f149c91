"""Groups of channels smaller than a vector: two of them share a tile."""

from __future__ import annotations

import pytest
import torch
from comparing import check_against_oracle, run
from scan_inputs import make_inputs, scan

from lightm.ops.jit import LANES
from lightm.ops.scan import cpu
from lightm.ops.scan.inputs import ScanInputs
from lightm.ops.scan.layout import Layout

HALF = LANES // 2


@pytest.mark.parametrize(
    ("groups", "of_group", "states", "optional"),
    [
        (4, HALF, 16, "dzbi"),
        (2, HALF, 8, ""),
        (6, HALF - 1, 4, "dz"),
        (2, 1, 16, "b"),
        (3, HALF, 16, "dzbi"),
        (4, 3, 5, "i"),
    ],
)
def test_against_oracle(groups: int, of_group: int, states: int, optional: str) -> None:
    inputs = make_inputs(2, 70, groups * of_group, states, groups, optional)
    check_against_oracle(scan("cpu", True), scan("reference", True), inputs)


def test_the_same_bits_as_with_a_tile_for_each_group(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = {name: x.float() for name, x in make_inputs(2, 200, 4 * HALF, 16, 4, "dzbi").items()}
    paired = run(scan("cpu", True), inputs, torch.float32)
    pair = cpu.layout_of
    used = []

    def apart(inputs: ScanInputs) -> Layout:
        layout = pair(inputs)
        used.append(layout.paired)
        return Layout(layout.batch, layout.length, layout.channels, layout.groups, layout.states)

    monkeypatch.setattr(cpu, "layout_of", apart)
    single = run(scan("cpu", True), inputs, torch.float32)
    assert used == [True, True]
    for name in ("out0", "out1", "du", "ddelta", "dA", "dd_skip", "dz", "ddelta_bias", "dinitial_state"):
        assert torch.equal(paired[name], single[name]), name
    for name in ("dB", "dC"):  # sums over channels: another order of additions
        torch.testing.assert_close(paired[name], single[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("of_group", [1, HALF - 1, HALF, HALF + 1, 2 * HALF + 3])
@pytest.mark.parametrize("groups", [1, 2, 3, 4])
def test_tiles_hold_every_channel_once(groups: int, of_group: int) -> None:
    plain, paired = (Layout(1, 1, groups * of_group, groups, 3, pair) for pair in (False, True))
    assert not plain.paired
    assert paired.paired == (groups % 2 == 0 and of_group <= HALF)
    for layout in (plain, paired):
        x = torch.arange(1.0, 1 + groups * of_group * 3).reshape(groups * of_group, 3)
        tiles = layout.tile_rows(x)
        assert tiles.shape == (layout.tiles, 3, LANES)
        assert torch.equal(layout.untile_rows(tiles), x)
        assert (tiles != 0).sum() == x.numel()


def test_operator_registration_is_sound() -> None:
    inputs = {name: x.float().requires_grad_() for name, x in make_inputs(1, 5, 2 * HALF, 8, 2, "").items()}
    args = (*(inputs[name] for name in ("u", "delta", "A", "B", "C")), None, None, None, True, None, 64)
    torch.library.opcheck(torch.ops.lightm.selective_scan.default, args, rtol=1e-4, atol=1e-4)
