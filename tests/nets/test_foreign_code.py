"""LightM's networks in other programs' hands: loops, sliding windows, hooks, replaced layers, copies, ranks."""

from __future__ import annotations

import copy
import runpy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightm.nets import create, parameter_groups, set_activation_checkpointing

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
NAMES = ("lightm-small", "lightm-unet-released-small", "spm-lightm-unet-shared-small", "lightm-unet-mamba2")
every_kind = pytest.mark.parametrize("name", NAMES)


def small(name: str = "lightm-unet-small", dims: int = 2) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    options: dict[str, Any] = {"base_channels": 8}
    if "released" in name:
        options |= {"blocks_down": (1, 1, 1), "blocks_up": (1, 1)}
    else:
        options |= {"encoder_layers": (1, 1), "bottleneck_layers": 1}
    return create(name, dims, 1, 3, **options).eval(), torch.randn(2, 1, *(16,) * dims)


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.slow
def test_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    source = (EXAMPLES / "monai_inference.py").read_text(encoding="utf-8").splitlines()
    assert len([line for line in source if line.strip()]) <= 15
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MONAI's own
        runpy.run_path(str(EXAMPLES / "monai_inference.py"))
    assert "logits (1, 2, 20, 27, 33)" in capsys.readouterr().out


def test_a_window_that_does_not_fit_and_metadata() -> None:
    from monai.data import MetaTensor
    from monai.inferers import sliding_window_inference

    network, image = small()
    with torch.no_grad():
        expected = network(image)
        assert torch.equal(network(MetaTensor(image)), expected)
        assert torch.equal(sliding_window_inference(image, (16, 16), 1, network), expected)
        with pytest.raises(ValueError, match=r"X=18 is not divisible by 4 .*pad it to 16 or 20"):
            sliding_window_inference(torch.zeros(1, 1, 30, 30), (16, 18), 1, network)


@every_kind
@pytest.mark.parametrize("dims", [2, 3])
def test_hooks_without_gradients_see_every_module_and_its_true_result(name: str, dims: int) -> None:
    network, image = small(name, dims)
    with torch.no_grad():
        expected = network(image)
    held: dict[str, Tensor] = {}
    copied: dict[str, Tensor] = {}

    def hook(path: str) -> Any:
        def keep(module: nn.Module, given: tuple[Any, ...], result: Any) -> None:
            if isinstance(result, Tensor):
                held[path], copied[path] = result, result.clone()

        return keep

    leaves = [
        path
        for path, module in network.named_modules()
        if path and any(True for _ in module.parameters()) and not isinstance(module, nn.ModuleList)
    ]
    handles = [network.get_submodule(path).register_forward_hook(hook(path)) for path in leaves]
    with torch.no_grad():
        close(network(image), expected)
    grouped = {path for path in leaves if type(network.get_submodule(path)).__name__ == "GroupedLinear"}
    assert set(leaves) - grouped == held.keys()  # those give a tuple
    for path, tensor in held.items():
        assert torch.equal(tensor, copied[path]), f"{path} was overwritten"
    for handle in handles:
        handle.remove()
    with torch.no_grad():
        assert torch.equal(network(image), expected)


def test_one_hook_far_from_the_skips_keeps_them(monkeypatch: pytest.MonkeyPatch) -> None:
    network, image = small(dims=3)
    seen: list[Tensor] = []
    network.get_submodule("stem").register_forward_hook(lambda module, given, result: seen.append(result))
    with torch.no_grad():
        network(image)
        expected = network.get_submodule("stem")(image.movedim(1, -1).contiguous())
    assert torch.equal(seen[0], expected)


class LowRank(nn.Module):
    """A linear layer with a low-rank addition, as LoRA replaces them."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Parameter(0.3 * torch.randn(2, base.in_features))
        self.up = nn.Parameter(0.3 * torch.randn(base.out_features, 2))

    @property
    def merged(self) -> Tensor:
        return self.base.weight + self.up @ self.down

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.down.T @ self.up.T


def linears(network: nn.Module) -> list[str]:
    return [path for path, module in network.named_modules() if type(module) is nn.Linear]


def exchange(network: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(network.get_submodule(parent), name, module)


@every_kind
@pytest.mark.parametrize("checkpointing", [False, True])
def test_adapters_are_used_and_trained(name: str, checkpointing: bool) -> None:
    network, image = small(name)
    merged = copy.deepcopy(network)
    for path in linears(network):
        adapter = LowRank(network.get_submodule(path))  # type: ignore[arg-type]
        exchange(network, path, adapter)
        with torch.no_grad():
            merged.get_submodule(path).weight.copy_(adapter.merged)  # type: ignore[union-attr,operator]
    set_activation_checkpointing(network, checkpointing)
    with torch.no_grad():
        close(network(image), merged(image))
    network(image).square().mean().backward()
    for path, parameter in network.named_parameters():
        if path.endswith((".up", ".down")):
            assert parameter.grad is not None, path
            assert parameter.grad.abs().max() > 0, path


class Int8(nn.Module):
    """A linear layer with weights of eight bits; it has no `weight` at all."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        scale = base.weight.detach().abs().amax() / 127
        self.scale = float(scale)
        self.register_buffer("codes", (base.weight / scale).round().to(torch.int8))
        self.offset = base.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.codes.to(x.dtype) * self.scale, self.offset)


@every_kind
def test_quantised_linears_are_called(name: str) -> None:
    network, image = small(name)
    rounded = copy.deepcopy(network)
    for path in linears(network):
        module = Int8(network.get_submodule(path))  # type: ignore[arg-type]
        exchange(network, path, module)
        with torch.no_grad():
            rounded.get_submodule(path).weight.copy_(module.codes * module.scale)  # type: ignore[union-attr,operator]
    with torch.no_grad():
        close(network(image), rounded(image))


class Double(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


@every_kind
def test_parametrised_weights_and_bound_methods_are_used(name: str) -> None:
    network, image = small(name)
    doubled = copy.deepcopy(network)
    for path in linears(network):
        module = network.get_submodule(path)
        with torch.no_grad():
            doubled.get_submodule(path).weight.mul_(2)  # type: ignore[union-attr,operator]
        if path.endswith("proj"):
            parametrize.register_parametrization(module, "weight", Double())
        else:
            module.forward = lambda x, m=module: nn.functional.linear(x, 2 * m.weight, m.bias)  # type: ignore[method-assign]
    with torch.no_grad():
        close(network(image), doubled(image))


@every_kind
def test_copies_decay_what_their_original_does(name: str) -> None:
    network, image = small(name)
    other = copy.deepcopy(network)
    with torch.no_grad():
        assert torch.equal(other(image), network(image))
    sizes = [[len(group["params"]) for group in parameter_groups(net, 0.1)] for net in (network, other)]
    assert sizes[0] == sizes[1]
    kept = {id(parameter) for parameter in parameter_groups(other, 0.1)[1]["params"]}
    spared = {path.rpartition(".")[2] for path, parameter in other.named_parameters() if id(parameter) in kept}
    assert {"A_log", "d_skip", "bias", "conv_weight", "skip_scale"} <= spared
    assert sum(sizes[0]) == len(list(network.parameters()))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES[:2])
def test_compiled_whole(name: str) -> None:
    network, image = small(name)
    torch._dynamo.reset()
    compiled = torch.compile(network, backend="aot_eager")
    with torch.no_grad():
        close(compiled(image), network(image))


def _rank(rank: int, world: int, file: str, results: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{file}", rank=rank, world_size=world)
    network, image = small()
    parallel = nn.parallel.DistributedDataParallel(network)
    share = image.chunk(world)[rank]
    parallel(share).square().mean().backward()
    if rank == 0:
        torch.save({path: p.grad for path, p in network.named_parameters()}, results)
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch was built without torch.distributed")
@pytest.mark.parametrize("world", [1, 2])
def test_ranks_share_gradients(tmp_path: Path, world: int) -> None:
    files = (str(tmp_path / "meet"), str(tmp_path / "gradients.pt"))
    torch.multiprocessing.spawn(_rank, (world, *files), nprocs=world)
    network, image = small()
    network(image).square().mean().backward()
    found = torch.load(files[1])
    for path, parameter in network.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(found[path], parameter.grad, rtol=1e-3, atol=1e-5)
