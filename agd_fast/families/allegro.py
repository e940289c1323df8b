"""AllegroTransformer3DModel: Allegro, text to video by cross-attention, latents [B, C, F, H, W].

Each block adds its own table to one vector shared by all blocks, [B, 6·D]. Rotary tables are passed as an argument.
"""

from agd_fast.spec import Condition, DenoiserSpec, PipelineSpec, Site

SPECS = {
    "AllegroTransformer3DModel": DenoiserSpec(
        sample="hidden_states",
        timestep="timestep",
        conditions=(Condition("encoder_hidden_states", width="config.caption_channels", mask="encoder_attention_mask"),),
        time_embedding=("adaln_single.emb.time_proj", "adaln_single.emb.timestep_embedder"),
        attention=(Site("transformer_blocks.*.attn2"),),
        feed_forward=(Site("transformer_blocks.*.ff"),),
        modulation=(
            Site("transformer_blocks.*", argument="temb", width="scale_shift_table"),
            Site("norm_out", form="affine"),
            Site("proj_out", form="affine"),
        ),
        batch_dims={"image_rotary_emb": None},
        pipeline=PipelineSpec(),
    )
}
