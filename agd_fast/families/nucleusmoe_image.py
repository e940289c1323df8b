"""NucleusMoEImageTransformer2DModel: Nucleus-Image, text by keys and values in the image's attention, packed latents [B, N, 4·C].

Most blocks have a mixture of experts for a feed-forward, where every expert chooses its tokens. The guided prediction is rescaled
to the conditional one's norm, token by token, and the pipeline flips its sign. It passes t/1000, which `time_proj` scales back,
and no mask when no prompt of the batch is padded.
"""

from agd_fast.spec import Condition, DenoiserSpec, PipelineSpec, Site

SPECS = {
    "NucleusMoEImageTransformer2DModel": DenoiserSpec(
        sample="hidden_states",
        timestep="timestep",
        conditions=(Condition("encoder_hidden_states", width="config.joint_attention_dim", mask="encoder_hidden_states_mask"),),
        time_embedding=("time_text_embed.time_proj", "time_text_embed.timestep_embedder"),
        timestep_scale=1000.0,
        attention=(Site("transformer_blocks.*.attn"),),
        modulation=(
            Site("transformer_blocks.*.img_mod.1"),
            Site("norm_out.linear"),
            Site("proj_out", form="affine"),
        ),
        pipeline=PipelineSpec(conditional="first"),
    )
}
