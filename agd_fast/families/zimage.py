"""ZImageTransformer2DModel: Z-Image, one stream over [image; text], each padded to a multiple of 32 tokens.

Latents and captions are lists with one tensor per sample. t runs from 0 (noise) to 1; the pipeline flips the prediction's sign.
It computes pos + g·(pos − neg), for g > 0: ω = g + 1. Z-Image-Turbo is called with g = 0 and gains nothing from AGD.
"""

from agd_fast.spec import Condition, DenoiserSpec, PipelineSpec, Site

SPECS = {
    "ZImageTransformer2DModel": DenoiserSpec(
        sample="x",
        timestep="t",
        conditions=(Condition("cap_feats", width="config.cap_feat_dim"),),
        timestep_scale=1000.0,
        timestep_ascends=False,
        patch=2,
        listed=("x", "cap_feats"),
        attention=(Site("layers.*.attention", tokens="first"),),
        feed_forward=(Site("layers.*.feed_forward.w2", tokens="first"),),
        modulation=(
            Site("noise_refiner.*.adaLN_modulation.0"),
            Site("layers.*.adaLN_modulation.0"),
            Site("all_final_layer.*.adaLN_modulation.1"),
            Site("all_final_layer.*.linear", form="affine"),
        ),
        omega_offset=1.0,
        pipeline=PipelineSpec(cfg_off_value=0.0, conditional="first"),
    )
}
