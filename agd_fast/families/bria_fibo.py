"""BriaFiboTransformer2DModel: Bria FIBO, two-stream blocks, then single-stream blocks over [text; image], packed latents
[B, N, C].

Every block reads a layer of the language model, `text_encoder_layers`, a list of [B, L, D]: adapters see the last two, of which
`encoder_hidden_states` is made. The mask covers the text and, behind it, the image; it is passed where a prompt of the batch is
padded.
"""

from agd_fast.spec import Condition, DenoiserSpec, PipelineSpec, Site

SPECS = {
    "BriaFiboTransformer2DModel": DenoiserSpec(
        sample="hidden_states",
        timestep="timestep",
        conditions=(
            Condition(
                "encoder_hidden_states",
                width="config.joint_attention_dim",
                mask="joint_attention_kwargs.attention_mask",
            ),
        ),
        time_embedding=("time_embed.time_proj", "time_embed.timestep_embedder"),
        attention=(Site("transformer_blocks.*.attn"), Site("single_transformer_blocks.*.attn", tokens="last")),
        feed_forward=(Site("transformer_blocks.*.ff"),),
        modulation=(
            Site("transformer_blocks.*.norm1.linear"),
            Site("transformer_blocks.*.norm1_context.linear"),
            Site("single_transformer_blocks.*.norm.linear"),
            Site("norm_out.linear"),
            Site("proj_out", form="affine"),
        ),
        batch_dims={"img_ids": None, "txt_ids": None},
        pipeline=PipelineSpec(),
    )
}
