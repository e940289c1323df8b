"""DiTTransformer2DModel (Peebles & Xie, arXiv 2212.09748), class-conditional, adaLN-Zero.

Every block has its own embedder of t and of the class; block 0's also feeds the output layer, and is the one
reused for e_t and e_c. DiTPipeline guides the ε channels only and drops the learned-sigma half: so do we.
"""

from agd_fast.spec import Condition, DenoiserSpec, PipelineSpec, Site

_EMBEDDER = "transformer_blocks.0.norm1.emb"

SPECS = {
    "DiTTransformer2DModel": DenoiserSpec(
        sample="hidden_states",
        timestep="timestep",
        conditions=(Condition("class_labels", embedding=(f"{_EMBEDDER}.class_embedder",), null="config.num_embeds_ada_norm"),),
        time_embedding=(f"{_EMBEDDER}.time_proj", f"{_EMBEDDER}.timestep_embedder"),
        attention=(Site("transformer_blocks.*.attn1"),),
        feed_forward=(Site("transformer_blocks.*.ff"),),
        modulation=(
            Site("transformer_blocks.*.norm1.linear"),
            Site("proj_out_1"),
            Site("proj_out_2", form="affine"),
        ),
        guided_channels="config.in_channels",
        pipeline=PipelineSpec(conditional="first"),
    )
}
