"""JoyImage Edit and Edit Plus, JoyImageEditTransformer3DModel and JoyImageEditPlusTransformer3DModel, two streams.

Edit has latents [B, items, C, 1, H, W] of the picture to edit, if any, and of the new one; Edit Plus has patches of the new one
and of any number of input pictures, [B, N, C, 1, p, p]. Each block adds its own tables, one per stream, to one vector shared by
all blocks, [B, 6, D]. The pipelines rescale the guided prediction to the conditional one's norm along the channels, and put
pictures to edit back into x_t before each step. Edit has no mask: a prompt padded to a longer one's length gives another
prediction than alone.
"""

from dataclasses import replace

from agd_fast.spec import Condition, DenoiserSpec, PipelineSpec, Site

EDIT = DenoiserSpec(
    sample="hidden_states",
    timestep="timestep",
    conditions=(Condition("encoder_hidden_states", width="config.text_dim"),),
    time_embedding=("condition_embedder.timesteps_proj", "condition_embedder.time_embedder"),
    attention=(Site("double_blocks.*.attn", width="img_attn_proj.bias"),),
    feed_forward=(Site("double_blocks.*.img_mlp"),),
    modulation=(
        Site("double_blocks.*.img_mod", argument="x", width="modulate_table"),
        Site("double_blocks.*.txt_mod", argument="x", width="modulate_table"),
        Site("norm_out", form="affine"),
        Site("proj_out", form="affine"),
    ),
    pipeline=PipelineSpec(conditional="first"),
)

SPECS = {
    "JoyImageEditTransformer3DModel": EDIT,
    "JoyImageEditPlusTransformer3DModel": replace(
        EDIT,
        conditions=(Condition("encoder_hidden_states", width="config.text_dim", mask="encoder_hidden_states_mask"),),
        repeated=("shape_list",),
        pipeline=PipelineSpec(own_negative=True),
    ),
}
