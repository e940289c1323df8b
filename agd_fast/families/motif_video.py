"""MotifVideoTransformer3DModel: Motif-Video, two streams, then blocks over [video; text], latents [B, C, F, H, W].

Its input is (x_t, condition, its mask) along the channels, the prediction has only x_t's channels. The last single blocks are a
decoder, which reads the other blocks' video states in place of the text. The pipeline's call has no guidance scale: its guider
holds it and runs one forward per condition.
"""

from agd_fast.spec import Condition, DenoiserSpec, PipelineSpec, Site

SPECS = {
    "MotifVideoTransformer3DModel": DenoiserSpec(
        sample="hidden_states",
        timestep="timestep",
        conditions=(Condition("encoder_hidden_states", width="config.text_embed_dim", mask="encoder_attention_mask"),),
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
        pipeline=PipelineSpec(conditional="first", guider="guider"),
    )
}
