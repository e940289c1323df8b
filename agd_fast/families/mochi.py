"""MochiTransformer3DModel: Mochi 1, streams of video and text of different widths in joint attention, latents [B, C, F, H, W].

`attn1` returns (video, text). `norm1_context` projects to four chunks, except in the last block, whose text output is not used:
there to one scale. t runs from 0 (noise) to 1000, and the scheduler inverts it: the prediction's sign is its own.
"""

from agd_fast.spec import Condition, DenoiserSpec, PipelineSpec, Site

SPECS = {
    "MochiTransformer3DModel": DenoiserSpec(
        sample="hidden_states",
        timestep="timestep",
        conditions=(Condition("encoder_hidden_states", width="config.text_embed_dim", mask="encoder_attention_mask"),),
        time_embedding=("time_embed.time_proj", "time_embed.timestep_embedder"),
        attention=(Site("transformer_blocks.*.attn1", width="to_out.0.bias"),),
        feed_forward=(Site("transformer_blocks.*.ff"),),
        modulation=(
            Site("transformer_blocks.*.norm1.linear"),
            Site("transformer_blocks.*.norm1_context.linear*"),
            Site("norm_out.linear"),
            Site("proj_out", form="affine"),
        ),
        pipeline=PipelineSpec(),
    )
}
