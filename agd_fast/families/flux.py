"""FluxTransformer2DModel: FLUX without guidance embeddings under true CFG, two-stream blocks, then single-stream blocks over
[text; image], packed latents [B, N, 4·C].

ω is `true_cfg_scale`, and guidance runs only with a negative prompt; `guidance_scale` is an input of guidance-distilled models
(FLUX.1-dev), which are refused. A single-stream block runs attention and feed-forward in parallel. The pipeline passes t/1000.
"""

from agd_fast.spec import Condition, DenoiserSpec, PipelineSpec, Site

SPECS = {
    "FluxTransformer2DModel": DenoiserSpec(
        sample="hidden_states",
        timestep="timestep",
        conditions=(
            Condition("encoder_hidden_states", width="config.joint_attention_dim"),
            Condition("pooled_projections", width="config.pooled_projection_dim"),
        ),
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
        pipeline=PipelineSpec(omega_arguments=("true_cfg_scale",), conditional="first", negative_prompt=""),
    )
}
