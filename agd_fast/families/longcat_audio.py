"""LongCatAudioDiTTransformer: LongCat-AudioDiT, text by cross-attention, latents [B, T, C].

Each block adds its own table to one vector, of t and the text's mean, shared by all blocks, [B, 6·D]. Convolutions over the text
reach across its padding. t runs from 0 (noise) to 1; without a negative prompt the unconditional text is zeros.
"""

from agd_fast.spec import Condition, DenoiserSpec, PipelineSpec, Site

SPECS = {
    "LongCatAudioDiTTransformer": DenoiserSpec(
        sample="hidden_states",
        timestep="timestep",
        conditions=(
            Condition("encoder_hidden_states", null=0, width="config.dit_text_dim", mask="encoder_attention_mask"),
            Condition("latent_cond", null="same", adapt=False),
        ),
        time_embedding=("time_embed",),
        timestep_scale=1000.0,
        attention=(Site("blocks.*.cross_attn", width="to_out.0.bias"),),
        feed_forward=(Site("blocks.*.ffn", width="ff.3.bias"),),
        modulation=(
            Site("blocks.*", argument="adaln_global_out", width="adaln_scale_shift"),
            Site("norm_out.linear"),
            Site("proj_out", form="affine"),
        ),
        pipeline=PipelineSpec(conditional="first", own_negative=True, pictures=False),
    )
}
