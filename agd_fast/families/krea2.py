"""Krea2Transformer2DModel: Krea 2, one stream over [text; image], packed latents [B, N, 4·C].

Each block adds its own table to one vector shared by all blocks, [B, 1, 6·D]. Text is the states of several layers of the
language model, [B, L, layers, D]. The pipeline computes pos + g·(pos − neg), for g > 0: ω = g + 1. It passes t/1000. A pipeline
that calls its model distilled (is_distilled) is refused.
"""

from agd_fast.spec import Condition, DenoiserSpec, PipelineSpec, Site

SPECS = {
    "Krea2Transformer2DModel": DenoiserSpec(
        sample="hidden_states",
        timestep="timestep",
        conditions=(Condition("encoder_hidden_states", width="config.text_hidden_dim", mask="encoder_attention_mask"),),
        timestep_scale=1000.0,
        attention=(Site("transformer_blocks.*.attn.to_out.0", tokens="last"),),
        feed_forward=(Site("transformer_blocks.*.ff.down", tokens="last"),),
        modulation=(
            Site("transformer_blocks.*", argument="temb", width="scale_shift_table"),
            Site("final_layer.norm", width="weight", form="affine"),
            Site("final_layer.linear", form="affine"),
        ),
        batch_dims={"position_ids": None},
        omega_offset=1.0,
        pipeline=PipelineSpec(cfg_off_value=0.0, conditional="first"),
    )
}
