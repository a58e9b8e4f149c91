"""State-space and channels-last operators; they know tensors only. See README.md beside this file."""

from __future__ import annotations

from lightm.ops.conv1d import causal_conv1d
from lightm.ops.depthwise import depthwise_conv
from lightm.ops.norms import gated_norm, group_norm_relu
from lightm.ops.resample import avg_pool2, max_pool2, upsample_linear2
from lightm.ops.scan import selective_scan

__all__ = [
    "avg_pool2",
    "causal_conv1d",
    "depthwise_conv",
    "gated_norm",
    "group_norm_relu",
    "max_pool2",
    "selective_scan",
    "upsample_linear2",
]
