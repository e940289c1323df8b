"""ErnieImageTransformer2DModel: ERNIE-Image, one stream over [image; text], latents [B, C, H, W].

One projection of t makes the modulation of all blocks. Tokens come before the batch, [S, B, D], except in attention: δ acts on
that projection and on each attention's output. Instead of a mask, the number of tokens of each prompt is passed, [B].
"""

from agd_fast.spec import Condition, DenoiserSpec, PipelineSpec, Site

SPECS = {
    "ErnieImageTransformer2DModel": DenoiserSpec(
        sample="hidden_states",
        timestep="timestep",
        conditions=(Condition("text_bth", width="config.text_in_dim", mask="text_lens"),),
        time_embedding=("time_proj", "time_embedding"),
        patch="config.patch_size",
        attention=(Site("layers.*.self_attention", tokens="first"),),
        modulation=(
            Site("adaLN_modulation.1"),
            Site("layers.*.self_attention", form="affine"),
            Site("final_norm.linear"),
        ),
        pipeline=PipelineSpec(),
    )
}
