"""Kandinsky3UNet: Kandinsky 3, a U-Net whose group norms are modulated by t and the pooled prompt, latents [B, C, H, W].

The pipeline writes c + g·(c − u), the standard combination at ω = g + 1, but guides only for g > 1: ω from 1 to 2 has no target.
Without a negative prompt the unconditional text is zeros. The pipeline cuts a batch of prompts to the longest one and pools over
the padding, so a prompt in a batch does not give quite what it gives alone.
"""

from agd_fast.spec import Condition, DenoiserSpec, PipelineSpec, Site

SPECS = {
    "Kandinsky3UNet": DenoiserSpec(
        sample="sample",
        timestep="timestep",
        conditions=(Condition("encoder_hidden_states", width="config.encoder_hid_dim", mask="encoder_attention_mask"),),
        time_embedding=("time_proj", "time_embedding"),
        attention=(Site("*_blocks.*.attentions.[1-9].attention"),),
        feed_forward=(Site("*_blocks.*.attentions.[1-9].feed_forward.2", channel_dim=1),),
        convolution=(Site("*.resnet_blocks.[12].projection", channel_dim=1),),
        modulation=(Site("*.context_mlp.1"), Site("conv_norm_out", form="affine", channel_dim=1)),
        adapter_kind="modulation+gated_lora",
        omega_offset=1.0,
        pipeline=PipelineSpec(components=("unet",), own_negative=True),
    )
}
