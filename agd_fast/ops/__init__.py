"""The operations that may run on one of our kernels, one per file; nothing else in the package runs `kernels/`."""

from agd_fast.ops.absorbed_attention import absorbed_attention
from agd_fast.ops.activated_linear import activated_linear
from agd_fast.ops.ada_group_norm import ada_group_norm
from agd_fast.ops.ada_layer_norm import ada_layer_norm
from agd_fast.ops.centred import centre
from agd_fast.ops.choice import (
    Kernels,
    checked_policy,
    default_policy,
    kernels_info,
    refusal,
    refusal_of_epilogue,
    refusal_of_join,
)
from agd_fast.ops.gated_lora import gated_lora
from agd_fast.ops.gated_residual import gated_residual
from agd_fast.ops.guidance_combine import guidance_combine
from agd_fast.ops.guided_update import guided_update
from agd_fast.ops.norm_scores import norm_scores
from agd_fast.ops.projection_mix import projection_mix
from agd_fast.ops.projection_scores import projection_scores
from agd_fast.ops.registry import OPS, Op
from agd_fast.ops.residual_norm import residual_norm
from agd_fast.ops.write_merged import WriteMerged

__all__ = [
    "OPS",
    "Kernels",
    "Op",
    "WriteMerged",
    "absorbed_attention",
    "activated_linear",
    "ada_group_norm",
    "ada_layer_norm",
    "centre",
    "checked_policy",
    "default_policy",
    "gated_lora",
    "gated_residual",
    "guidance_combine",
    "guided_update",
    "kernels_info",
    "norm_scores",
    "projection_mix",
    "projection_scores",
    "refusal",
    "refusal_of_epilogue",
    "refusal_of_join",
    "residual_norm",
]
