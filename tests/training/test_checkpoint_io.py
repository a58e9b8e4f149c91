"""Checkpoints without pickles: nested state comes back the same, other files are refused."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

from lightm.errors import InputError, LightMError
from lightm.training.checkpoint_io import load_checkpoint, save_checkpoint
from lightm.training.loop import State
from lightm.training.selection import best_epoch


def test_nested_state_comes_back_with_its_types_and_bits(tmp_path: Path) -> None:
    torch.manual_seed(0)
    shared = torch.randn(3, 4)
    state = {
        "epoch": 3,
        "state_dict": OrderedDict(w=shared, same=shared, half=shared.half(), t=shared.T),
        "optimizer": {"state": {0: {"step": torch.tensor(5.0)}}, "groups": [{"betas": (0.9, 0.999), "lr": 1e-3}]},
        "rng": torch.get_rng_state(),
        "array": np.arange(4),
        "odd": [None, True, float("inf"), "text", {1, 2}, (), {}],
        "numpy scalar": np.float64(0.5),
        "path": tmp_path,
    }
    path = tmp_path / "a" / "last.ckpt"
    save_checkpoint(state, path)
    back = load_checkpoint(path)
    assert list(back) == list(state)
    assert type(back["state_dict"]) is OrderedDict
    for name, tensor in state["state_dict"].items():  # type: ignore[attr-defined]
        assert torch.equal(back["state_dict"][name], tensor)
    assert back["optimizer"]["state"][0]["step"] == 5.0
    assert back["optimizer"]["groups"] == [{"betas": (0.9, 0.999), "lr": 1e-3}]
    assert torch.equal(back["rng"], state["rng"])  # type: ignore[arg-type]
    assert back["array"].tolist() == [0, 1, 2, 3]
    assert back["odd"] == state["odd"]
    assert back["numpy scalar"] == 0.5
    assert back["path"] == str(tmp_path)
    assert [p.name for p in path.parent.iterdir()] == ["last.ckpt"]


def test_what_cannot_be_kept_is_named_and_the_older_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    save_checkpoint({"epoch": 1}, path)
    with pytest.raises(LightMError, match=r"checkpoint\.callbacks\.mine.*object"):
        save_checkpoint({"callbacks": {"mine": object()}}, path)
    assert load_checkpoint(path) == {"epoch": 1}


def test_the_state_of_a_run_that_chose_by_an_average_from_its_first_epoch_is_converted(tmp_path: Path) -> None:
    """Earlier releases kept the average alone: a later epoch must be better than the kept one's."""
    old = {"epoch": 5, "batch": 0, "step": 15, "elapsed_s": 1.0, "skipped": 0, "losses": [], "coefficients": []}
    averages = {"ema_dice": 0.4, "best_dice": 0.5, "waited": 2, "random": None}
    save_checkpoint({"lightm": {**old, **averages}}, tmp_path / "last.ckpt")
    state = State(**load_checkpoint(tmp_path / "last.ckpt")["lightm"])
    assert (state.dice, state.best_epoch, state.best_dice, state.waited) == ([0.5] * 5, 2, 0.5, 2)
    assert best_epoch([*state.dice, 0.45], state.best_epoch) == 2
    assert best_epoch([*state.dice, 0.55], state.best_epoch) == 5
    save_checkpoint({"lightm": {**old, "ema_dice": None, "best_dice": None, "waited": 5}}, tmp_path / "none.ckpt")
    state = State(**load_checkpoint(tmp_path / "none.ckpt")["lightm"])
    assert (state.best_epoch, state.best_dice, state.waited) == (None, None, 5)


class _Trap:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (Path.touch, (Path("sprung"),))  # type: ignore[return-value]


def test_a_pickle_is_refused_and_nothing_in_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "evil.ckpt"
    path.write_bytes(pickle.dumps(_Trap()))
    with pytest.raises(InputError, match="not a readable checkpoint"):
        load_checkpoint(path)
    assert not (tmp_path / "sprung").exists()


def test_a_safetensors_file_of_something_else_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"w": torch.zeros(2)}, tmp_path / "weights.ckpt")
    with pytest.raises(InputError, match="not a LightM checkpoint"):
        load_checkpoint(tmp_path / "weights.ckpt")
