"""PixArtTransformer2DModel: PixArt-α and -Σ, text by cross-attention, latents [B, C, H, W].

Each block adds its own table to one vector shared by all blocks, [B, 6·D]. α at 1024 pixels is given the size and the aspect
ratio as well; elsewhere they are None. The pipelines guide all channels, then drop the learned-sigma half.
"""

from agd_fast.spec import Condition, DenoiserSpec, PipelineSpec, Site

SPECS = {
    "PixArtTransformer2DModel": DenoiserSpec(
        sample="hidden_states",
        timestep="timestep",
        conditions=(
            Condition("encoder_hidden_states", width="config.caption_channels", mask="encoder_attention_mask"),
            Condition("added_cond_kwargs.resolution", null="same", adapt=False),
            Condition("added_cond_kwargs.aspect_ratio", null="same", adapt=False),
        ),
        time_embedding=("adaln_single.emb.time_proj", "adaln_single.emb.timestep_embedder"),
        patch="config.patch_size",
        attention=(Site("transformer_blocks.*.attn2"),),
        feed_forward=(Site("transformer_blocks.*.ff"),),
        modulation=(
            Site("transformer_blocks.*", argument="timestep", width="scale_shift_table"),
            Site("norm_out", form="affine"),
            Site("proj_out", form="affine"),
        ),
        guided_channels="config.in_channels",
        pipeline=PipelineSpec(),
    )
}
