"""CosmosTransformer3DModel: Cosmos 2.5 (Predict), text by cross-attention, latents [B, C, F, H, W].

t is σ, one per frame. In each block, a low-rank pair of linears projects it to shift, scale and gate, added to a shared vector.
The states of all layers of the text encoder are one condition, 100,352 channels wide: adapters see what the base itself makes of
it. The pipeline writes c + g·(c − u), the standard combination at ω = g + 1, but guides only for g > 1: ω from 1 to 2 has no
target. Its default negative prompt is not empty. Input pictures and videos replace a part of the prediction, and are refused.
"""

from agd_fast.spec import Condition, DenoiserSpec, PipelineSpec, Site

SPECS = {
    "CosmosTransformer3DModel": DenoiserSpec(
        sample="hidden_states",
        timestep="timestep",
        conditions=(
            Condition("encoder_hidden_states", embedding=("crossattn_proj",), width="config.encoder_hidden_states_channels"),
        ),
        time_embedding=("time_embed.time_proj", "time_embed.t_embedder"),
        timestep_scale=1000.0,
        attention=(Site("transformer_blocks.*.attn2"),),
        feed_forward=(Site("transformer_blocks.*.ff"),),
        modulation=(
            Site("transformer_blocks.*.norm[123].linear_2"),
            Site("norm_out.linear_2"),
            Site("proj_out", form="affine"),
        ),
        batch_dims={"padding_mask": None},
        omega_offset=1.0,
        pipeline=PipelineSpec(conditional="first", own_negative=True),
    )
}
