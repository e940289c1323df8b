"""HunyuanVideo15Transformer3DModel: HunyuanVideo 1.5, two streams, latents [B, C, F, H, W].

Its input is (x_t, condition, its mask) along the channels, the prediction has only x_t's channels. Text comes from a language
model and, for text quoted in a prompt, from ByT5, whose tokens are all masked when nothing is quoted. The pipeline's call has no
guidance scale: its guider holds it and runs one forward per condition.
"""

from agd_fast.spec import Condition, DenoiserSpec, PipelineSpec, Site

SPECS = {
    "HunyuanVideo15Transformer3DModel": DenoiserSpec(
        sample="hidden_states",
        timestep="timestep",
        conditions=(
            Condition("encoder_hidden_states", width="config.text_embed_dim", mask="encoder_attention_mask"),
            Condition("encoder_hidden_states_2", width="config.text_embed_2_dim", mask="encoder_attention_mask_2"),
        ),
        time_embedding=("time_embed.time_proj", "time_embed.timestep_embedder"),
        attention=(Site("transformer_blocks.*.attn"),),
        feed_forward=(Site("transformer_blocks.*.ff"),),
        modulation=(
            Site("transformer_blocks.*.norm1.linear"),
            Site("transformer_blocks.*.norm1_context.linear"),
            Site("norm_out.linear"),
            Site("proj_out", form="affine"),
        ),
        pipeline=PipelineSpec(conditional="first", guider="guider"),
    )
}
