"""UNet2DConditionModel as Kandinsky 2.1 and 2.2 have it: the blocks of DeepFloyd IF, conditioned on an embedding of a picture.

A prior makes that embedding from a prompt; 2.1 gets the prompt as well, and 2.2's ControlNet gets a hint that its first
convolution sees. Half of the channels are a learned sigma, taken from the conditional pass; 2.2 hands it to the scheduler, 2.1
does not.
"""

from dataclasses import replace

from agd_fast.families.deepfloyd_if import VARIANTS as DEEPFLOYD_IF
from agd_fast.spec import Condition

_IF = DEEPFLOYD_IF["UNet2DConditionModel"]["addition_embed_type=text"]
_PICTURE = Condition("added_cond_kwargs.image_embeds", width="config.encoder_hid_dim")
_PROMPT = (
    Condition("encoder_hidden_states", width="config.encoder_hid_dim"),
    Condition("added_cond_kwargs.text_embeds", adapt=False),
    Condition("added_cond_kwargs.image_embeds", adapt=False),
)

VARIANTS = {
    "UNet2DConditionModel": {
        "addition_embed_type=image": replace(_IF, conditions=(_PICTURE,)),
        "addition_embed_type=image_hint": replace(_IF, conditions=(_PICTURE, Condition("added_cond_kwargs.hint", adapt=False))),
        "addition_embed_type=text_image": replace(_IF, conditions=_PROMPT, guided_channels=4),  # latents; inpainting sees more
    }
}
