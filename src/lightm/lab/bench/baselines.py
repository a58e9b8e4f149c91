"""The networks that are compared: LightM's presets and the baselines by name, and the sizes that they take."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lightm.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from torch import nn

CLASSES = 3
DEFAULT = ("lightm-unet", "spm-lightm-unet", "dynunet", "unetr")
SIX_STAGES = "dynunet-6"
_LEAST = 64  # of six stages: at 32 the lowest one keeps a single voxel, which instance norm refuses
_NEEDS = {"unetr": ("einops",), "swinunetr": ("einops",)}  # what MONAI imports only when it builds them


def known() -> list[str]:
    """Every name that `create` takes."""
    from lightm.nets.baselines import BASELINES
    from lightm.nets.presets import PRESETS

    of_3d = [name for name, (_, _, dimensionalities) in BASELINES.items() if 3 in dimensionalities]
    return sorted([*PRESETS, *of_3d, SIX_STAGES])


def create(name: str, size: int) -> nn.Module:
    """A 3D network of one image channel and three classes for a cube of `size` voxels an edge, weights fresh.

    Names are those of `lightm.nets.create`; there `dynunet` has as many stages as nnU-Net's rules give a patch of that
    size. `dynunet-6` is MONAI's DynUNet with the six stages of a 128^3 patch at any size: kernels of 3, strides
    1, 2, 2, 2, 2, 2, filters 32 to 320, instance norm, no deep supervision, no residual blocks.
    Raises InputError for a name that is not known and for a size that a network cannot be built for.
    """
    if name == SIX_STAGES:
        return _six_stages()
    from lightm.nets import create as create_network

    return create_network(name, 3, 1, CLASSES, image_size=(size,) * 3)


def _six_stages() -> nn.Module:
    from monai.networks.nets import DynUNet

    strides = [1, 2, 2, 2, 2, 2]
    network: nn.Module = DynUNet(
        spatial_dims=3,
        in_channels=1,
        out_channels=CLASSES,
        kernel_size=[3] * 6,
        strides=strides,
        upsample_kernel_size=strides[1:],
        filters=[32, 64, 128, 256, 320, 320],
        norm_name="instance",
        deep_supervision=False,
        res_block=False,
    )
    return network


def check(names: Sequence[str], sizes: Sequence[int]) -> None:
    """Raise InputError for an unknown name, a size that a network cannot take, or a module that it lacks.

    Told before anything is measured, for all networks at once. Builds every network once for every size.
    """
    if not names:
        raise InputError(f"no network given; known: {', '.join(known())}")
    for name in names:
        if name not in known():
            raise InputError(f"unknown network '{name}'{did_you_mean(name, known())} Known: {', '.join(known())}.")
        missing = [module for module in _NEEDS.get(name, ()) if importlib.util.find_spec(module) is None]
        if missing:
            raise InputError(
                f"network '{name}' needs {', '.join(missing)}, which is not installed; `pip install "
                f"{' '.join(missing)}`, or name other networks with --networks"
            )
    if len(set(names)) < len(names):
        raise InputError(f"networks {', '.join(names)}: a name is given twice; give each once")
    for size in sizes:
        wrong = [text for name in names if (text := _complaint(name, size))]
        if wrong:
            low = size // 32 * 32
            near = [edge for edge in (low, low + 32, low + 64) if edge and not any(_complaint(n, edge) for n in names)]
            hint = f". Use {' or '.join(map(str, near[:2]))} for the networks named" if near else ""
            raise InputError(f"size {size}: {'; '.join(wrong)}{hint}")


def _complaint(name: str, size: int) -> str:
    """What is wrong with a cube of this size for a network, or nothing."""
    divisor, least = 32, _LEAST
    if name != SIX_STAGES:
        try:
            network = create(name, size)
        except InputError as error:
            return str(error)
        given = getattr(network, "divisor", 1)
        divisor = max(given) if isinstance(given, tuple) else int(given)
        least = divisor
    if size % divisor == 0 and size >= least:
        return ""
    return f"network '{name}' takes multiples of {divisor}{f' from {least} on' if least > divisor else ''}"
