"""UNet3DConditionModel: ModelScope's and Zeroscope's text to video, latents [B, C, F, H, W].

Frames are batch entries everywhere except in the temporal convolutions and attentions, where pixels are. As in the image U-Net,
no conditioning projection reaches the blocks: modulation acts on the γ of the norms of single frames. The pipelines hand their
scheduler the frames of all videos as one batch.
"""

from agd_fast.spec import Condition, DenoiserSpec, PipelineSpec, Site

SPECS = {
    "UNet3DConditionModel": DenoiserSpec(
        sample="sample",
        timestep="timestep",
        conditions=(Condition("encoder_hidden_states", width="config.cross_attention_dim"),),
        time_embedding=("time_proj", "time_embedding"),
        attention=(Site("*.attentions.*.attn2"),),
        feed_forward=(Site("*.attentions.*.ff"),),
        convolution=(Site("*.resnets.*.conv[12]", channel_dim=1),),
        modulation=(
            Site("*.resnets.*.norm[12]", form="scale", channel_dim=1),
            Site("*.attentions.*.norm", form="scale", channel_dim=1),
            Site("*.attentions.*.norm[123]", form="scale"),
            Site("conv_norm_out", form="affine", channel_dim=1),
        ),
        adapter_kind="modulation+gated_lora",
        pipeline=PipelineSpec(components=("unet",)),
    )
}
