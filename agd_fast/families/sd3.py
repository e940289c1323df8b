"""SD3Transformer2DModel: Stable Diffusion 3 and 3.5, image and text streams in joint attention, latents [B, C, H, W].

`attn` returns (image, text). Layers with dual attention (3.5 medium) have a further `attn2`, self-attention of the image, and
nine chunks of modulation instead of six. Skip-layer guidance (skip_guidance_layers) is a third forward, made only while CFG is
on.
"""

from agd_fast.spec import Condition, DenoiserSpec, PipelineSpec, Site

SPECS = {
    "SD3Transformer2DModel": DenoiserSpec(
        sample="hidden_states",
        timestep="timestep",
        conditions=(
            Condition("encoder_hidden_states", width="config.joint_attention_dim"),
            Condition("pooled_projections", width="config.pooled_projection_dim"),
        ),
        time_embedding=("time_text_embed.time_proj", "time_text_embed.timestep_embedder"),
        patch="config.patch_size",
        attention=(Site("transformer_blocks.*.attn"),),
        feed_forward=(Site("transformer_blocks.*.ff"),),
        modulation=(
            Site("transformer_blocks.*.norm1.linear"),
            Site("transformer_blocks.*.norm1_context.linear"),
            Site("norm_out.linear"),
            Site("proj_out", form="affine"),
        ),
        pipeline=PipelineSpec(),
    )
}
