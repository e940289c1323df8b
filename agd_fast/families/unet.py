"""UNet2DConditionModel: Stable Diffusion 1.x, 2.x, XL and their like, conditioned by cross-attention to a prompt.

It has no conditioning projection that reaches the transformer blocks, so modulation moves the (γ, β) of its norms.
"""

from diffusers import UNet2DConditionModel

from agd_fast.spec import Condition, DenoiserSpec, Site

SPECS = {
    UNet2DConditionModel: DenoiserSpec(
        sample="sample",
        timestep="timestep",
        conditions=(
            Condition("encoder_hidden_states", width="config.cross_attention_dim"),
            Condition("class_labels", adapt=False),
            Condition("added_cond_kwargs.text_embeds", adapt=False),
            Condition("added_cond_kwargs.time_ids", null="same", adapt=False),
        ),
        time_embedding=("time_proj", "time_embedding"),
        attention=(Site("*.attn2"),),
        feed_forward=(Site("*.transformer_blocks.*.ff"),),
        convolution=(Site("*.resnets.*.conv[12]", channel_dim=1),),
        modulation=(
            Site("*.resnets.*.norm1", form="affine", channel_dim=1),
            Site("*.resnets.*.norm2", form="affine", channel_dim=1),
            Site("*.attentions.*.norm", form="affine", channel_dim=1),
            Site("*.transformer_blocks.*.norm[123]", form="affine"),
            Site("conv_norm_out", form="affine", channel_dim=1),
        ),
    )
}
