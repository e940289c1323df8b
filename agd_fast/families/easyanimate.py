"""EasyAnimateTransformer3DModel: EasyAnimate 5.1, streams of video and text in joint attention, latents [B, C, F, H, W].

`attn1` returns (video, text), and a block's norms make shift, scale and gate of both streams. Text is padded, and the denoiser
gets no mask. The pipeline guides only with a negative prompt; guidance may be rescaled (guidance_rescale).
"""

from agd_fast.spec import Condition, DenoiserSpec, PipelineSpec, Site

SPECS = {
    "EasyAnimateTransformer3DModel": DenoiserSpec(
        sample="hidden_states",
        timestep="timestep",
        conditions=(Condition("encoder_hidden_states", width="config.text_embed_dim"),),
        time_embedding=("time_proj", "time_embedding"),
        attention=(Site("transformer_blocks.*.attn1"),),
        modulation=(
            Site("transformer_blocks.*.norm[12].linear"),
            Site("norm_out.linear"),
            Site("proj_out", form="affine"),
        ),
        pipeline=PipelineSpec(negative_prompt=""),
    )
}
