"""HunyuanVideoTransformer3DModel: SkyReels-V1, two streams, then blocks over [video; text], latents [B, C, F, H, W].

ω is `true_cfg_scale`, and guidance runs only with a negative prompt; `guidance_scale` is an input of models with
`guidance_embeds`, such as HunyuanVideo itself, which are refused. Single blocks take both streams and join them inside: the
video's part is the first of the two outputs of their attention.
"""

from agd_fast.spec import Condition, DenoiserSpec, PipelineSpec, Site

SPECS = {
    "HunyuanVideoTransformer3DModel": DenoiserSpec(
        sample="hidden_states",
        timestep="timestep",
        conditions=(
            Condition("encoder_hidden_states", width="config.text_embed_dim", mask="encoder_attention_mask"),
            Condition("pooled_projections", width="config.pooled_projection_dim"),
        ),
        time_embedding=("time_text_embed.time_proj", "time_text_embed.timestep_embedder"),
        attention=(Site("transformer_blocks.*.attn"), Site("single_transformer_blocks.*.attn")),
        feed_forward=(Site("transformer_blocks.*.ff"),),
        modulation=(
            Site("transformer_blocks.*.norm1.linear"),
            Site("transformer_blocks.*.norm1_context.linear"),
            Site("single_transformer_blocks.*.norm.linear"),
            Site("norm_out.linear"),
            Site("proj_out", form="affine"),
        ),
        pipeline=PipelineSpec(omega_arguments=("true_cfg_scale",), conditional="first", negative_prompt=""),
    )
}
