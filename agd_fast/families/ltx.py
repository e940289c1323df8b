"""LTXVideoTransformer3DModel: LTX-Video, text to video by cross-attention, on packed latents [B, N, C].

Each block adds its own table to one vector shared by all blocks, [B, 1, 6·D]; where frames have their own t (image to video), it
holds one entry per token, and t is [B, N]. Guidance may be rescaled (guidance_rescale). The RoPE scale is a tuple.
"""

from agd_fast.spec import Condition, DenoiserSpec, PipelineSpec, Site

SPECS = {
    "LTXVideoTransformer3DModel": DenoiserSpec(
        sample="hidden_states",
        timestep="timestep",
        conditions=(Condition("encoder_hidden_states", width="config.caption_channels", mask="encoder_attention_mask"),),
        time_embedding=("time_embed.emb.time_proj", "time_embed.emb.timestep_embedder"),
        attention=(Site("transformer_blocks.*.attn2"),),
        feed_forward=(Site("transformer_blocks.*.ff"),),
        modulation=(
            Site("transformer_blocks.*", argument="temb", width="scale_shift_table"),
            Site("norm_out", form="affine"),
            Site("proj_out", form="affine"),
        ),
        pipeline=PipelineSpec(),
    )
}
