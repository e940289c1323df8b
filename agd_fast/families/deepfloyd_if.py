"""UNet2DConditionModel as DeepFloyd IF has it: pixels, and attention to the image and the prompt at once.

Each attention normalises its input with a group norm of its own, over [B, C, H·W]; there is no feed-forward. The pipelines guide
the first half of the channels and take the learned sigma from the conditional pass.
"""

from dataclasses import replace

from agd_fast.families.unet import SPECS as UNET
from agd_fast.spec import Site

VARIANTS = {
    name: {
        "addition_embed_type=text": replace(
            spec,
            attention=(Site("*.attentions.*.to_out.0"),),
            feed_forward=(),
            modulation=(
                Site("*.resnets.*.norm[12]", form="scale", channel_dim=1),
                Site("*.attentions.*.group_norm", form="scale", channel_dim=1),
                Site("conv_norm_out", form="affine", channel_dim=1),
            ),
        )
    }
    for name, spec in UNET.items()
}
