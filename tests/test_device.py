"""Which device a name stands for on machines with and without GPUs."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from lightm.device import default_precision, default_workers, memory_bytes, resolve_device
from lightm.errors import InputError
from lightm.preparation.plan import _voxel_budget
from lightm.training.settle import build_fabric


@pytest.mark.parametrize(
    ("name", "cuda", "mps", "expected"),
    [
        ("cpu", 2, True, "cpu"),
        ("auto", 0, True, "cpu"),
        ("auto", 1, False, "cuda"),
        ("gpu", 1, True, "cuda"),
        ("gpu", 0, True, "mps"),
        ("cuda", 1, False, "cuda"),
        (torch.device("cuda:1"), 2, False, "cuda:1"),
        ("mps", 0, True, "mps"),
    ],
)
def test_names_become_devices_that_there_are(
    name: str, cuda: int, mps: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert resolve_device(name) == torch.device(expected)


@pytest.mark.parametrize(
    ("name", "cuda", "words"),
    [
        ("cuda", 0, "device 'cuda': PyTorch .* finds none on this machine"),
        ("gpu", 0, "device 'gpu'"),
        ("mps", 1, "device 'mps'"),
        ("cuda:2", 2, r"2 CUDA device\(s\), numbered from cuda:0"),
        ("gpus", 1, "device 'gpus': unknown; give cpu"),
        ("meta", 1, "device 'meta': not supported"),
    ],
)
def test_other_devices_are_one_clear_error(name: str, cuda: int, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(InputError, match=words):
        resolve_device(name)


def test_a_precision_that_does_not_exist_is_one_clear_error() -> None:
    with pytest.raises(InputError, match="precision '8-bit'"):
        build_fabric("cpu", "8-bit")


def test_a_gpu_brings_its_precision_its_workers_and_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a machine with a GPU would choose; the GPU is a fake."""
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    monkeypatch.setattr("os.cpu_count", lambda: 16)
    assert (default_precision(gpu), default_precision(cpu)) == ("bf16-mixed", "32-true")
    assert (default_workers(gpu), default_workers(cpu)) == (4, 0)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    assert default_precision(gpu) == "32-true"
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=8 << 30))
    assert memory_bytes(gpu) == 8 << 30
    monkeypatch.setattr("lightm.preparation.plan.resolve_device", torch.device)
    assert _voxel_budget(3, None, gpu) < _voxel_budget(3, 24.0, gpu)
    assert _voxel_budget(3, None, "cuda:1") == _voxel_budget(3, 0.6 * (8 << 30) / 1e9, cpu)
