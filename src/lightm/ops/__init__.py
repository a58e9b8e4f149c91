"""State-space and channels-last operators; they know tensors only. See README.md beside this file."""

from __future__ import annotations

from lightm.ops.convolutions import causal_conv1d, depthwise_conv
from lightm.ops.layer import LayerParameters, layer_runs_fused, state_space_layer
from lightm.ops.linear import linear
from lightm.ops.norms import GroupNormParameters, gated_norm, group_norm_relu
from lightm.ops.resample import avg_pool2, max_pool2, upsample_linear2
from lightm.ops.scan import selective_scan, selective_scan_with_state
from lightm.ops.ssd import ssd_scan, ssd_scan_with_state
from lightm.ops.stage import decoder_head, decoder_stage, stage_runs_fused

__all__ = [
    "GroupNormParameters",
    "LayerParameters",
    "avg_pool2",
    "causal_conv1d",
    "decoder_head",
    "decoder_stage",
    "depthwise_conv",
    "gated_norm",
    "group_norm_relu",
    "layer_runs_fused",
    "linear",
    "max_pool2",
    "selective_scan",
    "selective_scan_with_state",
    "ssd_scan",
    "ssd_scan_with_state",
    "stage_runs_fused",
    "state_space_layer",
    "upsample_linear2",
]
