"""Kandinsky5Transformer3DModel: Kandinsky 5.0, text blocks, then video blocks with cross-attention; latents [B, F, H, W, C].

Channels come last, in and out. With `visual_cond` the input is (x_t, condition, its mask) along the channels, and the prediction
has only x_t's channels. The pipeline updates its latents in place at each step, so a denoiser's inputs must be copied to be kept.
For videos its default negative prompt is not empty.
"""

from agd_fast.spec import Condition, DenoiserSpec, PipelineSpec, Site

SPECS = {
    "Kandinsky5Transformer3DModel": DenoiserSpec(
        sample="hidden_states",
        timestep="timestep",
        conditions=(
            Condition("encoder_hidden_states", width="config.in_text_dim"),
            Condition("pooled_projections", width="config.in_text_dim2"),
        ),
        time_embedding=("time_embeddings",),
        attention=(Site("visual_transformer_blocks.*.cross_attention", width="out_layer.bias"),),
        feed_forward=(Site("visual_transformer_blocks.*.feed_forward.out_layer"),),
        modulation=(
            Site("text_transformer_blocks.*.text_modulation.out_layer"),
            Site("visual_transformer_blocks.*.visual_modulation.out_layer"),
            Site("out_layer.modulation.out_layer"),
            Site("out_layer.out_layer", form="affine"),
        ),
        batch_dims={"visual_rope_pos": None, "text_rope_pos": None},
        pipeline=PipelineSpec(conditional="first", own_negative=("Kandinsky5T2VPipeline", "Kandinsky5I2VPipeline")),
    )
}
