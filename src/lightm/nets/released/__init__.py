"""The network of LightM-UNet's released code; `checkpoint` loads its weights."""

from lightm.nets.released.network import ReleasedLightMUNet, ResidualRVM, released_layer

__all__ = ["ReleasedLightMUNet", "ResidualRVM", "released_layer"]
