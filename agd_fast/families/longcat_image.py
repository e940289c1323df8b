"""LongCatImageTransformer2DModel: LongCat-Image, two-stream blocks, then single-stream blocks over [text; image], packed latents
[B, N, 4·C].

By default the guided prediction is shortened, token by token, to the conditional one's norm where it is longer
(enable_cfg_renorm). The pipeline passes t/1000.
"""

from agd_fast.spec import Condition, DenoiserSpec, PipelineSpec, Site

SPECS = {
    "LongCatImageTransformer2DModel": DenoiserSpec(
        sample="hidden_states",
        timestep="timestep",
        conditions=(Condition("encoder_hidden_states", width="config.joint_attention_dim"),),
        timestep_scale=1000.0,
        attention=(Site("transformer_blocks.*.attn"), Site("single_transformer_blocks.*.attn", tokens="last")),
        feed_forward=(Site("transformer_blocks.*.ff"),),
        modulation=(
            Site("transformer_blocks.*.norm1.linear"),
            Site("transformer_blocks.*.norm1_context.linear"),
            Site("single_transformer_blocks.*.norm.linear"),
            Site("norm_out.linear"),
            Site("proj_out", form="affine"),
        ),
        batch_dims={"img_ids": None, "txt_ids": None},
        pipeline=PipelineSpec(conditional="first"),
    )
}
