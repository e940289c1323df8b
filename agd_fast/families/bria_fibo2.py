"""BriaFibo2Transformer2DModel: Bria FIBO 2, one stream over the image and a resampler's output for the text, latents
[B, C, H, W].

Text is bundles of layers of the language model, [B, bundles, L, D], and some blocks each read one bundle by cross-attention.
Where the image's tokens are depends on the prompts of a batch, so sites act on all tokens. A block is modulated by t at the
image's tokens and by t = 0 at the others; δ acts on both. The pipeline passes t/1000, and no mask when no prompt of the batch is
padded. Prompts that ask for text to be drawn change the condition from step to step, and are refused.
"""

from agd_fast.spec import Condition, DenoiserSpec, PipelineSpec, Site

SPECS = {
    "BriaFibo2Transformer2DModel": DenoiserSpec(
        sample="hidden_states",
        timestep="timestep",
        conditions=(Condition("encoder_hidden_states", width="config.cap_feat_dim", mask="encoder_attention_mask", mask_dim=2),),
        timestep_scale=1000.0,
        attention=(Site("layers.*.attention.to_out.0"),),
        feed_forward=(Site("layers.*.feed_forward.w2"),),
        modulation=(
            Site("noise_refiner.*.adaLN_modulation.0"),
            Site("layers.*.adaLN_modulation.0"),
            Site("final_layer.adaLN_modulation.1"),
            Site("final_layer.linear", form="affine"),
        ),
        pipeline=PipelineSpec(conditional="first", own_negative=True),
    )
}
