"""UNet2DConditionModel as AudioLDM 1 and MusicLDM have it: conditioned by one embedding of the whole text, beside that of t.

All its attention is self-attention over the spectrogram, so cross_attention_dim is the blocks' width; the embedding, [B, D], is
passed as class labels.
"""

from dataclasses import replace

from agd_fast.families.unet import SPECS as UNET
from agd_fast.spec import Condition, PipelineSpec

VARIANTS = {
    name: {
        "cross_attention_dim=config.block_out_channels": replace(
            spec,
            conditions=(Condition("class_labels", width="config.projection_class_embeddings_input_dim"),),
            pipeline=PipelineSpec(components=("unet",), pictures=False),
        )
    }
    for name, spec in UNET.items()
}
