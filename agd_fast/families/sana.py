"""SanaTransformer2DModel: Sana, linear attention and text by cross-attention, latents [B, C, H, W] of a 32× autoencoder.

Each block adds its own table to one vector shared by all blocks, [B, 6·D]; its feed-forward is made of convolutions. The pipeline
multiplies t by config.timestep_scale, 1 except for Sana-Sprint, which is distilled and gains nothing from AGD.
"""

from agd_fast.spec import Condition, DenoiserSpec, PipelineSpec, Site

SPECS = {
    "SanaTransformer2DModel": DenoiserSpec(
        sample="hidden_states",
        timestep="timestep",
        conditions=(Condition("encoder_hidden_states", width="config.caption_channels", mask="encoder_attention_mask"),),
        time_embedding=("time_embed.emb.time_proj", "time_embed.emb.timestep_embedder"),
        patch="config.patch_size",
        attention=(Site("transformer_blocks.*.attn2"),),
        feed_forward=(Site("transformer_blocks.*.ff.conv_point", channel_dim=1),),
        modulation=(
            Site("transformer_blocks.*", argument="timestep", width="scale_shift_table"),
            Site("norm_out.norm", form="affine"),
            Site("proj_out", form="affine"),
        ),
        guided_channels="config.in_channels",
        pipeline=PipelineSpec(),
    )
}
