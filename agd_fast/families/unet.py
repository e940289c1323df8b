"""UNet2DConditionModel: Stable Diffusion 1.x, 2.x, XL and similar models, conditioned by cross-attention to a prompt.

It has no conditioning projection that reaches the transformer blocks, so modulation acts on the γ of its norms: at the same
number of parameters γ alone, at twice the rank, measured better than (γ, β). The output norm has both.
"""

from agd_fast.spec import Condition, DenoiserSpec, PipelineSpec, Site

SPECS = {
    "UNet2DConditionModel": DenoiserSpec(
        sample="sample",
        timestep="timestep",
        conditions=(
            Condition("encoder_hidden_states", width=("config.encoder_hid_dim", "config.cross_attention_dim")),
            Condition("class_labels", adapt=False),
            Condition("added_cond_kwargs.text_embeds", adapt=False),
            Condition("added_cond_kwargs.time_ids", null="same", adapt=False),
        ),
        time_embedding=("time_proj", "time_embedding"),
        attention=(Site("*.attn2"),),
        feed_forward=(Site("*.transformer_blocks.*.ff"),),
        convolution=(Site("*.resnets.*.conv[12]", channel_dim=1),),
        modulation=(
            Site("*.resnets.*.norm1", form="scale", channel_dim=1),
            Site("*.resnets.*.norm2", form="scale", channel_dim=1),
            Site("*.attentions.*.norm", form="scale", channel_dim=1),
            Site("*.transformer_blocks.*.norm[123]", form="scale"),
            Site("conv_norm_out", form="affine", channel_dim=1),
        ),
        adapter_kind="modulation+gated_lora",
        pipeline=PipelineSpec(components=("unet",), own_negative=("config.force_zeros_for_empty_prompt",)),
    )
}
