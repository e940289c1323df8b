"""LuminaNextDiT2DModel: Lumina-Next (T2I), text by cross-attention beside self-attention, latents [B, C, H, W].

One output projection, `attn2.to_out`, serves both attentions. t runs from 0 (noise) to 1, and the pipeline flips the prediction's
sign. It guides only the first three channels, takes the fourth from the conditional pass, and drops the learned-sigma half. All
samples share one table of rotary positions; a `scaling_watershed` below 1 changes it in the middle of a run, and is refused.
"""

from agd_fast.spec import Condition, DenoiserSpec, PipelineSpec, Site

SPECS = {
    "LuminaNextDiT2DModel": DenoiserSpec(
        sample="hidden_states",
        timestep="timestep",
        conditions=(Condition("encoder_hidden_states", width="config.cross_attention_dim", mask="encoder_mask"),),
        time_embedding=("time_caption_embed.time_proj", "time_caption_embed.timestep_embedder"),
        timestep_scale=1000.0,
        timestep_ascends=False,
        patch="config.patch_size",
        attention=(Site("layers.*.attn2.to_out.0"),),
        feed_forward=(Site("layers.*.feed_forward.linear_2"),),
        modulation=(
            Site("layers.*.norm1.linear"),
            Site("norm_out.linear_1"),
            Site("norm_out.linear_2", form="affine"),
        ),
        batch_dims={"image_rotary_emb": None},
        guided_channels="config.in_channels",
        pipeline=PipelineSpec(conditional="first"),
    )
}
