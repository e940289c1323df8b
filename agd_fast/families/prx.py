"""PRXTransformer2DModel: PRX, image tokens that attend to themselves and to the text, latents [B, C, H, W].

The pipeline passes t/1000, one value for the whole batch, and with guidance takes one prompt per call. In pixel space
(PRXPixelPipeline), what the scheduler gets is a mix of the prediction and x_t.
"""

from agd_fast.spec import Condition, DenoiserSpec, PipelineSpec, Site

SPECS = {
    "PRXTransformer2DModel": DenoiserSpec(
        sample="hidden_states",
        timestep="timestep",
        conditions=(Condition("encoder_hidden_states", width="config.context_in_dim", mask="attention_mask"),),
        timestep_scale=1000.0,
        patch="config.patch_size",
        attention=(Site("blocks.*.attention.to_out.0"),),
        feed_forward=(Site("blocks.*.down_proj"),),
        modulation=(
            Site("blocks.*.modulation.lin"),
            Site("final_layer.adaLN_modulation.1"),
            Site("final_layer.linear", form="affine"),
        ),
        pipeline=PipelineSpec(batched=False),
    )
}
