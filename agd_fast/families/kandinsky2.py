"""UNet2DConditionModel as Kandinsky 2.1 and 2.2 have it: the blocks of DeepFloyd IF, conditioned on an embedding of a picture.

A prior makes that embedding of a prompt; 2.1 has the prompt beside it, 2.2's ControlNet a hint that its first convolution sees.
Half of the channels are a learned sigma: the conditional pass's, which 2.2's scheduler is handed and 2.1's is not.
"""

from dataclasses import replace

from agd_fast.families.deepfloyd_if import VARIANTS as DEEPFLOYD_IF
from agd_fast.spec import Condition

_PICTURE = Condition("added_cond_kwargs.image_embeds", width="config.encoder_hid_dim")
_PROMPT = (
    Condition("encoder_hidden_states", width="config.encoder_hid_dim"),
    Condition("added_cond_kwargs.text_embeds", adapt=False),
    Condition("added_cond_kwargs.image_embeds", adapt=False),
)

VARIANTS = {
    name: {
        "addition_embed_type=image": replace(spec, conditions=(_PICTURE,)),
        "addition_embed_type=image_hint": replace(spec, conditions=(_PICTURE, Condition("added_cond_kwargs.hint", adapt=False))),
        "addition_embed_type=text_image": replace(spec, conditions=_PROMPT, guided_channels="config.in_channels"),
    }
    for name, variants in DEEPFLOYD_IF.items()
    for spec in variants.values()
}
