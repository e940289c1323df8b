"""AudioLDM2UNet2DConditionModel: AudioLDM 2, a U-Net over latents [B, C, T, F] of spectrograms, conditioned by two texts.

Every layer has a transformer with self-attention only, one with cross-attention to what a language model generates, and one with
cross-attention to an encoder's text. As in the image U-Net, no conditioning projection reaches them: modulation acts on the γ of
norms.
"""

from agd_fast.spec import Condition, DenoiserSpec, PipelineSpec, Site

SPECS = {
    "AudioLDM2UNet2DConditionModel": DenoiserSpec(
        sample="sample",
        timestep="timestep",
        conditions=(
            Condition("encoder_hidden_states", width="config.cross_attention_dim.0.1"),
            Condition("encoder_hidden_states_1", width="config.cross_attention_dim.0.2", mask="encoder_attention_mask_1"),
        ),
        time_embedding=("time_proj", "time_embedding"),
        attention=(Site("*.attn2"),),
        feed_forward=(Site("*.transformer_blocks.*.ff"),),
        convolution=(Site("*.resnets.*.conv[12]", channel_dim=1),),
        modulation=(
            Site("*.resnets.*.norm[12]", form="scale", channel_dim=1),
            Site("*.attentions.*.norm", form="scale", channel_dim=1),
            Site("*.transformer_blocks.*.norm[123]", form="scale"),
            Site("conv_norm_out", form="affine", channel_dim=1),
        ),
        adapter_kind="modulation+gated_lora",
        pipeline=PipelineSpec(components=("unet",), pictures=False),
    )
}
