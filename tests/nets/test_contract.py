"""What every preset promises, in 2D and 3D: one test over all of them, which takes up new ones by itself.

The networks are made small by the options that their builders know; structure and code path stay those of the preset.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightm.errors import InputError
from lightm.nets import PRESETS, create, load_model, save_model

SMALL = {
    "base_channels": 8,
    "encoder_layers": (1, 2, 1),
    "bottleneck_layers": 2,
    "blocks_down": (1, 1, 1, 1),
    "blocks_up": (1, 1, 1),
}
NAMES = sorted(PRESETS)
every_preset = pytest.mark.parametrize("name", NAMES)
in_2d_and_3d = pytest.mark.parametrize("dims", [2, 3])


def known(name: str) -> set[str]:
    """Options that the preset's builder takes."""
    return set(inspect.signature(PRESETS[name][0]).parameters)


def small(name: str) -> dict[str, Any]:
    return {option: value for option, value in SMALL.items() if option in known(name)}


def size(network: nn.Module, dims: int) -> tuple[int, ...]:
    """Sizes that differ and of which only one is a power of two times another: odd multiples of the divisor."""
    divisor = int(getattr(network, "divisor", 8))
    return tuple(step * divisor for step in (1, 2, 3)[-dims:])


def case(name: str, dims: int, *, batch: int = 2, channels: int = 1, seed: int = 0) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(seed)
    network = create(name, dims, channels, 3, **small(name))
    return network, torch.randn(batch, channels, *size(network, dims))


@pytest.mark.slow
@every_preset
@in_2d_and_3d
@pytest.mark.parametrize(("batch", "channels"), [(1, 4), (2, 1)])
def test_logits_gradients_and_one_step_of_learning(name: str, dims: int, batch: int, channels: int) -> None:
    network, image = case(name, dims, batch=batch, channels=channels)
    target = (image.mean(1) > 0).long() + (image.mean(1) > 1).long()
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-4)
    logits = network(image.requires_grad_())
    assert logits.shape == (batch, 3, *image.shape[2:])
    assert logits.dtype == torch.float32
    assert torch.isfinite(logits).all()
    loss = nn.functional.cross_entropy(logits, target)
    loss.backward()
    for what, tensor in (("the image", image), *network.named_parameters()):
        assert tensor.grad is not None, f"no gradient reaches {what}"
        assert torch.isfinite(tensor.grad).all(), what
        assert tensor.grad.abs().max() > 0, f"the gradient of {what} is zero everywhere"
    optimizer.step()
    with torch.no_grad():
        after = nn.functional.cross_entropy(network(image), target)
    assert after < loss


@pytest.mark.slow
@every_preset
@in_2d_and_3d
def test_modes_batches_and_seeds_do_not_change_the_result(name: str, dims: int) -> None:
    network, image = case(name, dims, channels=2)
    graded = network.train()(image).detach()  # the path that keeps what the backward pass needs
    with torch.no_grad():
        trained = network(image)
        evaluated = network.eval()(image)
        one_by_one = torch.cat([network(image[:1]), network(image[1:])])
        other = case(name, dims, channels=2)[0](image)
    assert torch.equal(trained, evaluated)
    assert torch.equal(other, evaluated)
    scale = float(evaluated.abs().max())
    torch.testing.assert_close(graded, evaluated, rtol=1e-4, atol=1e-4 * scale)
    torch.testing.assert_close(one_by_one, evaluated, rtol=1e-4, atol=1e-4 * scale)


@pytest.mark.slow
@every_preset
@in_2d_and_3d
def test_a_saved_model_is_the_same_one(name: str, dims: int, tmp_path: Path) -> None:
    network, image = case(name, dims, channels=4, seed=1)
    described = {"name": name, "spatial_dims": dims, "in_channels": 4, "out_channels": 3, "options": small(name)}
    save_model(tmp_path / "model", network=described, state_dict=network.state_dict(), plan={}, training={})
    loaded, info = load_model(tmp_path / "model")
    assert info["network"]["name"] == name
    state = network.state_dict()
    assert loaded.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[key]) for key, tensor in loaded.state_dict().items())
    with torch.no_grad():
        assert torch.equal(loaded(image), network.eval()(image))


@every_preset
@in_2d_and_3d
def test_wrong_images_are_refused(name: str, dims: int) -> None:
    network, image = case(name, dims, batch=1)
    divisor = int(getattr(network, "divisor", 8))
    axes = "Z, Y, X" if dims == 3 else "Y, X"
    off = size(network, dims)[-1] - divisor // 2
    with pytest.raises(ValueError, match=f"X={off} is not divisible by {divisor} .*pad it to {off - divisor // 2} or"):
        network(image[..., :off])
    with pytest.raises(ValueError, match=rf"shape .*expects \(B, 1, {axes}\)"):
        network(image.expand(1, 2, *image.shape[2:]))
    with pytest.raises(ValueError, match=rf"shape .*expects \(B, 1, {axes}\)"):
        network(image[..., 0])


@every_preset
@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((4, 1, 3), {}, "spatial_dims 4.*2 or 3"),
        ((3, 0, 3), {}, "in_channels 0.*at least one"),
        ((3, 1, 0), {}, "out_channels 0"),
        ((3, 1, 3), {"base_channels": 20}, "base_channels 20 is not divisible by the 8 groups"),
        ((3, 1, 3), {"base_channels": 8, "groups": 3}, "base_channels 8 is not divisible by the 3 groups"),
        ((3, 1, 3), {"layer": "spm", "base_channels": 8, "parts": 3}, "8 channels are not divisible by (the )?3 parts"),
        ((3, 1, 3), {"blocks_up": (1,)}, "blocks_up"),
        ((3, 1, 3), {"no_such_option": 1}, "no_such_option"),
    ],
)
def test_impossible_settings_are_refused(
    name: str, arguments: tuple[int, int, int], options: dict[str, Any], message: str
) -> None:
    if not set(options) - {"no_such_option"} <= known(name):
        pytest.skip(f"{name} has no such option")
    # Mamba-2's module speaks for itself, without the network's name
    own = PRESETS[name][1].get("ssm") == "mamba2" and "parts" in options
    with pytest.raises(InputError, match=message if own else f"network '{name}': .*{message}"):
        create(name, *arguments, **options)


@every_preset
def test_a_name_that_is_nearly_right_is_suggested(name: str) -> None:
    with pytest.raises(InputError, match=f"unknown network '{name}x'; did you mean '{name}'"):
        create(name + "x", 3, 1, 2)
