"""StableCascadeUNet: Stable Cascade's prior and its decoder, convolutions and attention, latents [B, C, H, W].

Each timestep block has its own projection of features of t, and of two numbers that the pipelines leave at 0. The prior is
conditioned on tokens and a pooled prompt, the decoder on the pooled prompt and the prior's latents, which the unconditional pass
drops as well; adapters see the pooled prompt, which both have. t runs from 1 (noise) to 0. Only the decoder makes pictures; it is
called without guidance by default.
"""

from agd_fast.spec import Condition, DenoiserSpec, PipelineSpec, Site

SPECS = {
    "StableCascadeUNet": DenoiserSpec(
        sample="sample",
        timestep="timestep_ratio",
        conditions=(
            Condition("clip_text_pooled", width="config.clip_text_pooled_in_channels"),
            Condition("clip_text", adapt=False),
            Condition("clip_img", adapt=False),
            Condition("effnet", adapt=False),
        ),
        timestep_scale=1000.0,
        attention=(Site("*.attention.to_out.0"),),
        convolution=(Site("*.depthwise", channel_dim=1),),
        modulation=(
            Site("*_blocks.*.mapper"),
            Site("*_blocks.*.norm", form="scale", channel_dim=1),
            Site("clf.0", form="affine", channel_dim=1),
        ),
        adapter_kind="modulation+gated_lora",
        pipeline=PipelineSpec(components=("prior", "decoder"), conditional="first"),
    )
}
