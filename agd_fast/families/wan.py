"""WanTransformer3DModel: Wan 2.1 and 2.2, text to video by cross-attention, latents [B, C, F, H, W].

Each block adds its own table to one vector shared by all blocks, [B, 6, D], or [B, S, 6, D] where every token has a t of its own
(Wan 2.2 TI2V-5B). Wan 2.2 A14B has two such denoisers in one pipeline, each with its own guidance scale: `transformer` down to
the boundary timestep, then `transformer_2`; the second scale defaults to the first.
"""

from agd_fast.spec import Condition, DenoiserSpec, PipelineSpec, Site

SPECS = {
    "WanTransformer3DModel": DenoiserSpec(
        sample="hidden_states",
        timestep="timestep",
        conditions=(Condition("encoder_hidden_states", width="config.text_dim"),),
        time_embedding=("condition_embedder.timesteps_proj", "condition_embedder.time_embedder"),
        patch="config.patch_size",
        attention=(Site("blocks.*.attn2", width="to_out.0.bias"),),
        feed_forward=(Site("blocks.*.ffn"),),
        modulation=(
            Site("blocks.*", argument="temb", width="scale_shift_table"),
            Site("norm_out", form="affine"),
            Site("proj_out", form="affine"),
        ),
        pipeline=PipelineSpec(
            components=("transformer", "transformer_2"),
            omega_arguments=("guidance_scale", "guidance_scale_2"),
            conditional="first",
        ),
    )
}
