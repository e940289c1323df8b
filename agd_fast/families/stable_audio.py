"""StableAudioDiTModel: Stable Audio Open, text and duration by cross-attention, latents [B, C, T].

Time and duration are one more token, before the audio's, so no conditioning projection reaches the blocks: as in the UNet,
modulation acts on the γ of their norms. All sites have 1 + T tokens. The scheduler computes t from σ, one value for the whole
batch, shape [1]. Without a negative prompt the unconditional text, duration included, is zeros.
"""

from agd_fast.spec import Condition, DenoiserSpec, PipelineSpec, Site

SPECS = {
    "StableAudioDiTModel": DenoiserSpec(
        sample="hidden_states",
        timestep="timestep",
        conditions=(
            Condition("encoder_hidden_states", null=0, width="config.cross_attention_input_dim"),
            Condition("global_hidden_states", null="same", adapt=False),
        ),
        time_embedding=("time_proj", "timestep_proj"),
        timestep_scale=1000.0,
        attention=(Site("transformer_blocks.*.attn2"),),
        feed_forward=(Site("transformer_blocks.*.ff"),),
        modulation=(
            Site("transformer_blocks.*.norm[123]", form="scale"),
            Site("proj_out", form="affine"),
        ),
        adapter_kind="modulation+gated_lora",
        pipeline=PipelineSpec(own_negative=True, pictures=False),
    )
}
