"""HunyuanImageTransformer2DModel: HunyuanImage 2.1, two-stream blocks, then single-stream blocks over [image; text], latents
[B, C, H, W].

Text comes from a language model and, for text quoted in a prompt, from ByT5, whose tokens are all masked when nothing is quoted.
Attention returns (image, text) in blocks of either kind. The pipeline's call has no guidance scale: its guiders hold it, one for
prompts with quotes, one for those without, and run one forward per condition. Models with guidance embeddings are refused.
"""

from agd_fast.spec import Condition, DenoiserSpec, PipelineSpec, Site

SPECS = {
    "HunyuanImageTransformer2DModel": DenoiserSpec(
        sample="hidden_states",
        timestep="timestep",
        conditions=(
            Condition("encoder_hidden_states", width="config.text_embed_dim", mask="encoder_attention_mask"),
            Condition("encoder_hidden_states_2", width="config.text_embed_2_dim", mask="encoder_attention_mask_2"),
        ),
        time_embedding=("time_guidance_embed.time_proj", "time_guidance_embed.timestep_embedder"),
        attention=(Site("transformer_blocks.*.attn"), Site("single_transformer_blocks.*.attn")),
        feed_forward=(Site("transformer_blocks.*.ff"),),
        modulation=(
            Site("transformer_blocks.*.norm1.linear"),
            Site("transformer_blocks.*.norm1_context.linear"),
            Site("single_transformer_blocks.*.norm.linear"),
            Site("norm_out.linear"),
            Site("proj_out", form="affine"),
        ),
        pipeline=PipelineSpec(conditional="first", guider=("guider", "ocr_guider")),
    )
}
