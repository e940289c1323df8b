"""StableAudio3DiTModel: Stable Audio 3, text and duration by cross-attention, latents [B, C, T].

Each block adds its own table to one vector, of t and the duration, shared by all blocks, [B, 6·D]. The duration is one more token
after the text's, whose padding is a learned embedding that the base attends to. t is σ in 0 … 1; memory tokens come before the
audio's and are dropped again.
"""

from agd_fast.spec import Condition, DenoiserSpec, PipelineSpec, Site

SPECS = {
    "StableAudio3DiTModel": DenoiserSpec(
        sample="hidden_states",
        timestep="timestep",
        conditions=(
            Condition("encoder_hidden_states", width="config.cond_token_dim", mask="encoder_attention_mask"),
            Condition("global_hidden_states", null="same", adapt=False),
        ),
        time_embedding=("timestep_features", "to_timestep_embed"),
        timestep_scale=1000.0,
        attention=(Site("transformer_blocks.*.cross_attn.to_out"),),
        feed_forward=(Site("transformer_blocks.*.ff", width="proj_out.bias"),),
        modulation=(
            Site("transformer_blocks.*", argument="global_modulation", width="to_scale_shift_gate"),
            Site("proj_out", form="affine"),
        ),
        pipeline=PipelineSpec(pictures=False),
    )
}
