"""WanVACETransformer3DModel: Wan 2.1 and 2.2 VACE, Wan's blocks with control blocks beside them, latents [B, C, F, H, W].

Video, mask and reference pictures are one input of the control blocks, the same at every step; adapters act on the main blocks,
as in Wan. The pipeline takes one prompt per call.
"""

from dataclasses import replace

from agd_fast.families.wan import SPECS as WAN

_SPEC = WAN["WanTransformer3DModel"]

SPECS = {
    "WanVACETransformer3DModel": replace(
        _SPEC, batch_dims={"control_hidden_states_scale": None}, pipeline=replace(_SPEC.pipeline, batched=False)
    )
}
