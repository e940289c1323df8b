"""SanaVideoTransformer3DModel: SANA-Video, linear attention and text by cross-attention, latents [B, C, F, H, W].

Each block adds its own table to one vector shared by all blocks, [B, 1, 6·D]; its feed-forward is made of convolutions, the last
of which runs over the frames.
"""

from agd_fast.spec import Condition, DenoiserSpec, PipelineSpec, Site

SPECS = {
    "SanaVideoTransformer3DModel": DenoiserSpec(
        sample="hidden_states",
        timestep="timestep",
        conditions=(Condition("encoder_hidden_states", width="config.caption_channels", mask="encoder_attention_mask"),),
        time_embedding=("time_embed.emb.time_proj", "time_embed.emb.timestep_embedder"),
        attention=(Site("transformer_blocks.*.attn2"),),
        feed_forward=(Site("transformer_blocks.*.ff.conv_temp", channel_dim=1),),
        modulation=(
            Site("transformer_blocks.*", argument="timestep", width="scale_shift_table"),
            Site("norm_out.norm", form="affine"),
            Site("proj_out", form="affine"),
        ),
        guided_channels="config.in_channels",
        pipeline=PipelineSpec(),
    )
}
