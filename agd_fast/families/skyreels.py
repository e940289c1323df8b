"""SkyReelsV2Transformer3DModel: SkyReels-V2, Wan's blocks, text to video by cross-attention, latents [B, C, F, H, W].

Each block adds its own table to one vector shared by all blocks, [B, 6, D]. The diffusion-forcing pipelines, where every frame
has its own t and scheduler, have nothing that could be recorded, and their blocks get a vector of another shape.
"""

from agd_fast.spec import Condition, DenoiserSpec, PipelineSpec, Site

SPECS = {
    "SkyReelsV2Transformer3DModel": DenoiserSpec(
        sample="hidden_states",
        timestep="timestep",
        conditions=(Condition("encoder_hidden_states", width="config.text_dim"),),
        time_embedding=("condition_embedder.timesteps_proj", "condition_embedder.time_embedder"),
        attention=(Site("blocks.*.attn2", width="to_out.0.bias"),),
        feed_forward=(Site("blocks.*.ffn"),),
        modulation=(
            Site("blocks.*", argument="temb", width="scale_shift_table"),
            Site("norm_out", form="affine"),
            Site("proj_out", form="affine"),
        ),
        pipeline=PipelineSpec(conditional="first"),
    )
}
