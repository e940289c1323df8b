"""Lumina2Transformer2DModel: Lumina-Image 2.0, one stream over [text; image; padding], latents [B, C, H, W].

A sample's image follows its own text, however long that is, so sites act on all tokens: "last" would depend on the batch. t runs
from 0 (noise) to 1, and the pipeline flips the prediction's sign. By default the guided prediction is rescaled to the conditional
one's norm, row by row (cfg_normalization), and guidance may end early (cfg_trunc_ratio).
"""

from agd_fast.spec import Condition, DenoiserSpec, PipelineSpec, Site

SPECS = {
    "Lumina2Transformer2DModel": DenoiserSpec(
        sample="hidden_states",
        timestep="timestep",
        conditions=(Condition("encoder_hidden_states", width="config.cap_feat_dim", mask="encoder_attention_mask"),),
        time_embedding=("time_caption_embed.time_proj", "time_caption_embed.timestep_embedder"),
        timestep_scale=1000.0,
        timestep_ascends=False,
        patch="config.patch_size",
        attention=(Site("layers.*.attn"),),
        feed_forward=(Site("layers.*.feed_forward.linear_2"),),
        modulation=(
            Site("noise_refiner.*.norm1.linear"),
            Site("layers.*.norm1.linear"),
            Site("norm_out.linear_1"),
            Site("norm_out.linear_2", form="affine"),
        ),
        pipeline=PipelineSpec(conditional="first"),
    )
}
