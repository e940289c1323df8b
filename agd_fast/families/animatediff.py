"""UNetMotionModel: AnimateDiff on Stable Diffusion 1.5 and XL, their U-Net with motion modules, latents [B, C, F, H, W].

Frames are batch entries everywhere except in the motion modules, where pixels are; the pipelines repeat the prompt for each
frame. As in the image U-Net, no conditioning projection reaches the blocks: modulation acts on the γ of norms, including those of
the motion modules.
"""

from agd_fast.spec import Condition, DenoiserSpec, PipelineSpec, Site

SPECS = {
    "UNetMotionModel": DenoiserSpec(
        sample="sample",
        timestep="timestep",
        conditions=(
            Condition("encoder_hidden_states", width="config.cross_attention_dim", grouped=True),
            Condition("added_cond_kwargs.text_embeds", adapt=False),
            Condition("added_cond_kwargs.time_ids", null="same", adapt=False),
        ),
        time_embedding=("time_proj", "time_embedding"),
        attention=(Site("*.attentions.*.attn2"),),
        feed_forward=(Site("*.transformer_blocks.*.ff"),),
        convolution=(Site("*.resnets.*.conv[12]", channel_dim=1),),
        modulation=(
            Site("*.resnets.*.norm[12]", form="scale", channel_dim=1),
            Site("*.attentions.*.norm", form="scale", channel_dim=1),
            Site("*.motion_modules.*.norm", form="scale", channel_dim=1),
            Site("*.transformer_blocks.*.norm[123]", form="scale"),
            Site("conv_norm_out", form="affine", channel_dim=1),
        ),
        adapter_kind="modulation+gated_lora",
        pipeline=PipelineSpec(components=("unet",), own_negative=("config.force_zeros_for_empty_prompt",)),
    )
}
