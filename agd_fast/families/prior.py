"""PriorTransformer: the priors of Kandinsky 2.1 and 2.2, from a prompt to the embedding of a picture, [B, D].

Text, t and x_t are tokens of one sequence, so no conditioning projection reaches the blocks: as in the UNet, modulation acts on
the γ of their norms. The tokens at all sites are [text; prompt; t; x_t; prediction]; the output is read at the last one. For a
negative prompt, even an empty one, the pipelines make a second embedding; without one they take a black picture's.
"""

from agd_fast.spec import Condition, DenoiserSpec, PipelineSpec, Site

SPECS = {
    "PriorTransformer": DenoiserSpec(
        sample="hidden_states",
        timestep="timestep",
        conditions=(
            Condition("proj_embedding", width=("config.embedding_proj_dim", "config.embedding_dim")),
            Condition("encoder_hidden_states", adapt=False),
        ),
        time_embedding=("time_proj", "time_embedding"),
        attention=(Site("transformer_blocks.*.attn1"),),
        feed_forward=(Site("transformer_blocks.*.ff"),),
        modulation=(
            Site("transformer_blocks.*.norm[13]", form="scale"),
            Site("norm_out", form="affine"),
            Site("proj_to_clip_embeddings", form="affine"),
        ),
        adapter_kind="modulation+gated_lora",
        pipeline=PipelineSpec(components=("prior",), own_negative=True, pictures=False),
    )
}
