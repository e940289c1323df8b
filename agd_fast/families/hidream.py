"""HiDreamImageTransformer2DModel: HiDream-I1, two-stream blocks, then single-stream blocks over [image; text], latents
[B, C, H, W].

Every block reads a layer of a language model, `encoder_hidden_states_llama3` [layers, B, L, D], whose batch is not first:
adapters see the T5 tokens and the pooled embedding. The pipeline flips the prediction's sign. In eval mode the mixture of experts
in the feed-forward of images runs under no_grad.
"""

from agd_fast.spec import Condition, DenoiserSpec, PipelineSpec, Site

SPECS = {
    "HiDreamImageTransformer2DModel": DenoiserSpec(
        sample="hidden_states",
        timestep="timesteps",
        conditions=(
            Condition("encoder_hidden_states_t5", width="config.caption_channels"),
            Condition("pooled_embeds", width="config.text_emb_dim"),
        ),
        time_embedding=("t_embedder.time_proj", "t_embedder.timestep_embedder"),
        patch="config.patch_size",
        attention=(
            Site("double_stream_blocks.*.block.attn1"),
            Site("single_stream_blocks.*.block.attn1", tokens="first"),
        ),
        modulation=(
            Site("*_stream_blocks.*.block.adaLN_modulation.1"),
            Site("final_layer.adaLN_modulation.1"),
            Site("final_layer.linear", form="affine"),
        ),
        train_mode=("*_stream_blocks.*.block.ff_i",),
        batch_dims={"encoder_hidden_states_llama3": 1},
        pipeline=PipelineSpec(),
    )
}
