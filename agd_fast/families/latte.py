"""LatteTransformer3DModel: Latte-1, alternating blocks over a frame's patches and over a patch's frames, latents [B, C, F, H, W].

Frames are batch entries in the former, patches in the latter. Each block adds its own table to one vector shared by all blocks,
[B·F, 6·D]. The pipeline guides all channels, then drops the learned-sigma half. With `mask_feature` (the default) it cuts a
single prompt's text to its length: distil with `call={"mask_feature": False}`, or with a number of prompts that fills all runs.
"""

from agd_fast.spec import Condition, DenoiserSpec, PipelineSpec, Site

SPECS = {
    "LatteTransformer3DModel": DenoiserSpec(
        sample="hidden_states",
        timestep="timestep",
        conditions=(Condition("encoder_hidden_states", width="config.caption_channels"),),
        time_embedding=("adaln_single.emb.time_proj", "adaln_single.emb.timestep_embedder"),
        attention=(Site("transformer_blocks.*.attn2"),),
        feed_forward=(Site("*transformer_blocks.*.ff"),),
        modulation=(
            Site("*transformer_blocks.*", argument="timestep", width="scale_shift_table"),
            Site("norm_out", form="affine"),
            Site("proj_out", form="affine"),
        ),
        guided_channels="config.in_channels",
        pipeline=PipelineSpec(),
    )
}
