"""HunyuanDiT2DModel: Hunyuan-DiT, text by cross-attention, latents [B, C, H, W], blocks with long skips.

Text comes from BERT and from T5, each with a mask; padding is replaced by tokens of its own. A block's projection of t gives only
a shift for its first norm, so δ also acts on γ there and on (γ, β) of the other norms. The pipeline drops the learned-sigma half,
then guides.
"""

from agd_fast.spec import Condition, DenoiserSpec, PipelineSpec, Site

SPECS = {
    "HunyuanDiT2DModel": DenoiserSpec(
        sample="hidden_states",
        timestep="timestep",
        conditions=(
            Condition("encoder_hidden_states", width="config.cross_attention_dim", mask="text_embedding_mask"),
            Condition("encoder_hidden_states_t5", width="config.cross_attention_dim_t5", mask="text_embedding_mask_t5"),
            Condition("image_meta_size", null="same", adapt=False),
            Condition("style", null="same", adapt=False),
        ),
        time_embedding=("time_extra_emb.time_proj", "time_extra_emb.timestep_embedder"),
        patch="config.patch_size",
        attention=(Site("blocks.*.attn2"),),
        feed_forward=(Site("blocks.*.ff"),),
        modulation=(
            Site("blocks.*.norm1.linear"),
            Site("blocks.*.norm1.norm", form="scale"),
            Site("blocks.*.norm[23]", form="affine"),
            Site("norm_out.linear"),
            Site("proj_out", form="affine"),
        ),
        batch_dims={"image_rotary_emb.0": None, "image_rotary_emb.1": None},
        guided_channels="config.in_channels",
        pipeline=PipelineSpec(),
    )
}
