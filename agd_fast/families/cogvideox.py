"""CogVideoXTransformer3DModel: CogVideoX, two streams [text; video] that share their weights, latents [B, F, C, H, W].

Frames come before channels. `use_dynamic_cfg` makes ω a function of t: the scale passed to the pipeline then only sets its
height. The feed-forward sees the text first, then the video.
"""

from agd_fast.spec import Condition, DenoiserSpec, PipelineSpec, Site

SPECS = {
    "CogVideoXTransformer3DModel": DenoiserSpec(
        sample="hidden_states",
        timestep="timestep",
        conditions=(Condition("encoder_hidden_states", width="config.text_embed_dim"),),
        time_embedding=("time_proj", "time_embedding"),
        attention=(Site("transformer_blocks.*.attn1"),),
        feed_forward=(Site("transformer_blocks.*.ff"),),
        modulation=(
            Site("transformer_blocks.*.norm[12].linear"),
            Site("norm_out.linear"),
            Site("proj_out", form="affine"),
        ),
        batch_dims={"image_rotary_emb": None},
        pipeline=PipelineSpec(),
    )
}
