"""Flux2Transformer2DModel: FLUX.2 [klein] base, two-stream blocks, then single-stream blocks over [text; image], packed latents
[B, N, 4·C].

Three projections of t make the modulation of all blocks, so blocks have none of their own: δ acts on the norms and on what the
gates multiply, which is the same set of changes. FLUX.2-dev has its guidance embedded and is refused; so is a pipeline that calls
its model distilled (is_distilled). The pipeline passes t/1000, and positions with one entry per sample.
"""

from agd_fast.spec import Condition, DenoiserSpec, PipelineSpec, Site

SPECS = {
    "Flux2Transformer2DModel": DenoiserSpec(
        sample="hidden_states",
        timestep="timestep",
        conditions=(Condition("encoder_hidden_states", width="config.joint_attention_dim"),),
        timestep_scale=1000.0,
        attention=(Site("transformer_blocks.*.attn"), Site("single_transformer_blocks.*.attn", tokens="last")),
        feed_forward=(Site("transformer_blocks.*.ff.linear_out"),),
        modulation=(
            Site("transformer_blocks.*.norm1", form="affine"),
            Site("transformer_blocks.*.norm1_context", form="affine"),
            Site("transformer_blocks.*.norm2", form="affine"),
            Site("transformer_blocks.*.norm2_context", form="affine"),
            Site("transformer_blocks.*.attn.to_out.0", form="scale"),
            Site("transformer_blocks.*.ff.linear_out", form="scale"),
            Site("single_transformer_blocks.*.norm", form="affine"),
            Site("single_transformer_blocks.*.attn.to_out", form="scale"),
            Site("norm_out.linear"),
            Site("proj_out", form="affine"),
        ),
        pipeline=PipelineSpec(conditional="first"),
    )
}
