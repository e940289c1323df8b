"""QwenImageTransformer2DModel: Qwen-Image and its edits, a two-stream transformer on packed latents [B, N, 4·C].

ω is `true_cfg_scale`, and guidance runs only with a negative prompt; `guidance_scale` would be an input of a guidance-distilled
model. The guided prediction is rescaled to the conditional one's norm, token by token. The pipeline passes t/1000, which
`time_proj` scales back, and no mask when no prompt of the batch is padded.
"""

from agd_fast.spec import Condition, DenoiserSpec, PipelineSpec, Site

SPECS = {
    "QwenImageTransformer2DModel": DenoiserSpec(
        sample="hidden_states",
        timestep="timestep",
        conditions=(Condition("encoder_hidden_states", width="config.joint_attention_dim", mask="encoder_hidden_states_mask"),),
        time_embedding=("time_text_embed.time_proj", "time_text_embed.timestep_embedder"),
        timestep_scale=1000.0,
        attention=(Site("transformer_blocks.*.attn"),),
        feed_forward=(Site("transformer_blocks.*.img_mlp"),),
        modulation=(
            Site("transformer_blocks.*.img_mod.1"),
            Site("transformer_blocks.*.txt_mod.1"),
            Site("norm_out.linear"),
            Site("proj_out", form="affine"),
        ),
        pipeline=PipelineSpec(omega_arguments=("true_cfg_scale",), conditional="first", negative_prompt=" "),
    )
}
