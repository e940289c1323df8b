"""ChromaTransformer2DModel: FLUX without its guidance distillation, on packed latents [B, N, 4·C].

One network makes all modulation of all blocks, so blocks have no projection of their own: δ acts on the norms and on what the
gates multiply, which is the same set of changes. The two-stream blocks come first, then blocks over [text; image]. The mask
covers the text and, behind it, the image. The pipeline passes t/1000.
"""

from agd_fast.spec import Condition, DenoiserSpec, PipelineSpec, Site

SPECS = {
    "ChromaTransformer2DModel": DenoiserSpec(
        sample="hidden_states",
        timestep="timestep",
        conditions=(Condition("encoder_hidden_states", width="config.joint_attention_dim", mask="attention_mask"),),
        timestep_scale=1000.0,
        attention=(Site("transformer_blocks.*.attn"), Site("single_transformer_blocks.*.attn", tokens="last")),
        feed_forward=(Site("transformer_blocks.*.ff"),),
        modulation=(
            Site("transformer_blocks.*.norm1.norm", form="affine"),
            Site("transformer_blocks.*.norm1_context.norm", form="affine"),
            Site("transformer_blocks.*.norm2", form="affine"),
            Site("transformer_blocks.*.norm2_context", form="affine"),
            Site("transformer_blocks.*.attn.to_out.0", form="scale"),
            Site("transformer_blocks.*.ff.net.2", form="scale"),
            Site("single_transformer_blocks.*.norm.norm", form="affine"),
            Site("single_transformer_blocks.*.proj_out", form="scale"),
            Site("norm_out.norm", form="affine"),
            Site("proj_out", form="affine"),
        ),
        batch_dims={"img_ids": None, "txt_ids": None},
        pipeline=PipelineSpec(conditional="first"),
    )
}
