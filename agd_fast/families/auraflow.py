"""AuraFlowTransformer2DModel: AuraFlow, joint blocks, then single ones over [registers; text; image], latents [B, C, H, W].

Joint `attn` returns (image, text). t runs from 0 to 1 (noise); the base's own projection of it multiplies by 1000.
"""

from agd_fast.spec import Condition, DenoiserSpec, PipelineSpec, Site

SPECS = {
    "AuraFlowTransformer2DModel": DenoiserSpec(
        sample="hidden_states",
        timestep="timestep",
        conditions=(Condition("encoder_hidden_states", width="config.joint_attention_dim"),),
        time_embedding=("time_step_embed", "time_step_proj"),
        timestep_scale=1000.0,
        patch="config.patch_size",
        attention=(
            Site("joint_transformer_blocks.*.attn"),
            Site("single_transformer_blocks.*.attn", tokens="last"),
        ),
        feed_forward=(
            Site("joint_transformer_blocks.*.ff.out_projection"),
            Site("single_transformer_blocks.*.ff.out_projection", tokens="last"),
        ),
        modulation=(
            Site("joint_transformer_blocks.*.norm1.linear"),
            Site("joint_transformer_blocks.*.norm1_context.linear"),
            Site("single_transformer_blocks.*.norm1.linear"),
            Site("norm_out.linear"),
            Site("proj_out", form="affine"),
        ),
        pipeline=PipelineSpec(),
    )
}
