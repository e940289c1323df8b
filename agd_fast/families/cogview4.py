"""CogView4Transformer2DModel: CogView4, image and text streams in joint attention, latents [B, C, H, W].

`attn1` returns (image, text); one `ff` serves both streams in turn, so there is no site at it. Sizes and crop are arguments. Each
prompt is padded to a multiple of 16 of its own, so the two forwards of CFG may get texts of different lengths.
"""

from agd_fast.spec import Condition, DenoiserSpec, PipelineSpec, Site

SPECS = {
    "CogView4Transformer2DModel": DenoiserSpec(
        sample="hidden_states",
        timestep="timestep",
        conditions=(
            Condition("encoder_hidden_states", width="config.text_embed_dim", mask="attention_mask"),
            Condition("original_size", null="same", adapt=False),
            Condition("target_size", null="same", adapt=False),
            Condition("crop_coords", null="same", adapt=False),
        ),
        time_embedding=("time_condition_embed.time_proj", "time_condition_embed.timestep_embedder"),
        patch="config.patch_size",
        attention=(Site("transformer_blocks.*.attn1"),),
        modulation=(
            Site("transformer_blocks.*.norm1.linear"),
            Site("norm_out.linear"),
            Site("proj_out", form="affine"),
        ),
        pipeline=PipelineSpec(conditional="first"),
    )
}
