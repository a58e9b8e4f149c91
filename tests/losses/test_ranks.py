"""Losses over two ranks: the gradients that they average to are those of the whole batch in one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightm.losses import create_loss
from lightm.losses.regions import sum_over_ranks

OPTIONS: dict[str, dict[str, object]] = {
    "dice": {"batch": True},
    "tversky": {"batch": True, "alpha": 0.3, "beta": 0.7},
    "focal-tversky": {"batch": True},
    "arsl": {"batch": True, "regions": (2, 3), "skip_empty": True},
    "ce+arsl": {"regions": 2},  # sample by sample: nothing to gather
    "ce+dice": {"batch": True},
}


def data(ignored: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Four samples; with `ignored`, the second rank alone has voxels to ignore."""
    generator = torch.Generator().manual_seed(7)
    logits = 2 * torch.randn(4, 3, 6, 7, generator=generator, dtype=torch.float64)
    target = torch.randint(0, 3, (4, 6, 7), generator=generator)
    target[:2, :, 4:] = 0
    if ignored:
        target[2:, :3] = 255
    return logits, target


def gradient(name: str, logits: torch.Tensor, target: torch.Tensor) -> tuple[float, torch.Tensor]:
    """Value and gradient with respect to a scale of the logits, a parameter that all samples share."""
    scale = torch.linspace(0.5, 1.5, 21, dtype=torch.float64).reshape(3, 1, 7).requires_grad_()
    loss = create_loss(name, spatial_dims=2, num_classes=3, **OPTIONS[name])(logits * scale, target)
    loss.backward()
    assert scale.grad is not None
    return loss.item(), scale.grad


def one_rank(rank: int, store: str, out: str) -> None:
    """What each of two processes does; the mean of the gradients is DistributedDataParallel's."""
    from torch import distributed

    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    results = {}
    for ignored in (False, True):
        logits, target = data(ignored)
        half = slice(2 * rank, 2 * rank + 2)
        for name in OPTIONS:
            value, grad = gradient(name, logits[half], target[half])
            distributed.all_reduce(grad)
            results[name, ignored] = (value, grad / 2)
    torch.save(results, f"{out}.{rank}")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[tuple[str, bool], tuple[float, torch.Tensor]]]:
    folder = tmp_path_factory.mktemp("ranks")
    if not torch.distributed.is_available() or os.name != "posix":
        pytest.skip("torch.distributed with gloo and a file store is needed")
    code = "import sys; from tests.losses.test_ranks import one_rank; one_rank(int(sys.argv[1]), *sys.argv[2:])"
    root = Path(__file__).resolve().parents[2]
    interface = {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
    path = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **interface}
    command = [sys.executable, "-c", code]
    arguments = [str(folder / "store"), str(folder / "out")]
    processes = [
        subprocess.Popen([*command, str(rank), *arguments], env=environment, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    return [torch.load(f"{folder / 'out'}.{rank}") for rank in range(2)]


# Cross-entropy is a mean over each rank's own voxels: that of the whole batch where the ranks count equally many.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "ignored"), [(n, i) for n in OPTIONS for i in (False, True) if not ("ce" in n.split("+") and i)]
)
def test_two_ranks_are_one_batch(name: str, ignored: bool, ranks: list[dict]) -> None:
    value, grad = gradient(name, *data(ignored))
    values = [found[name, ignored][0] for found in ranks]
    for found in ranks:
        torch.testing.assert_close(found[name, ignored][1], grad, rtol=1e-12, atol=1e-15)
    assert sum(values) / 2 == pytest.approx(value, rel=1e-12)
    if OPTIONS[name].get("batch") and "+" not in name:
        assert values[0] == pytest.approx(values[1], rel=1e-14)


def test_one_process_alone_sums_nothing() -> None:
    tensors = (torch.ones(2), torch.zeros(1, 3))
    assert all(a is b for a, b in zip(sum_over_ranks(*tensors), tensors, strict=True))
