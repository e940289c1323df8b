"""Cases of the paper's reference code, kept by bench/make_reference_fixtures.py: bases, checkpoints, outputs."""

from pathlib import Path

import torch
import yaml
from diffusers import DiTTransformer2DModel, UNet2DConditionModel

from agd_fast.files import read_tensors
from agd_fast.reference import convert

ASSETS = Path(__file__).parent / "assets" / "reference"
STEP = "0005000.pt"
UP, DOWN = "up_blocks.0.attentions.0.transformer_blocks.1.attn2", "down_blocks.1.attentions.0.transformer_blocks.0.attn2"


def make_base(name):
    """The base of a case. DiT's has the frequencies of t and the ε of norms that facebook's model has."""
    if name.startswith("unet"):
        base = UNet2DConditionModel(**yaml.safe_load((ASSETS / "unet.yaml").read_text())).eval()
        base.load_state_dict(read_tensors(ASSETS / "unet.safetensors")[0])
        return base
    shape = {"num_attention_heads": 2, "attention_head_dim": 4, "num_layers": 2, "sample_size": 4, "patch_size": 2}
    shape |= {"in_channels": 2, "out_channels": 4, "num_embeds_ada_norm": 5, "norm_num_groups": 2}
    base = DiTTransformer2DModel(**shape, norm_eps=1e-6).eval()
    lacking = base.load_state_dict(read_tensors(ASSETS / "dit.safetensors")[0], strict=False)
    assert not lacking.unexpected_keys and not [key for key in lacking.missing_keys if "pos_embed" not in key]
    for block in base.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    return base


def calls_of(name):
    return read_tensors(ASSETS / name / "calls.safetensors")[0]


def run(base, calls):
    if "class_labels" in calls:
        return base(calls["sample"], timestep=calls["timestep"], class_labels=calls["class_labels"]).sample
    added = {name: calls[name] for name in ("text_embeds", "time_ids")}
    prompt = calls["encoder_hidden_states"]
    return base(calls["sample"], calls["timestep"], encoder_hidden_states=prompt, added_cond_kwargs=added).sample


def converted(name, base, output_dir, **options):
    return convert(ASSETS / name / STEP, config=ASSETS / name / "config.yaml", base=base, output_dir=output_dir, **options)


def changed(name, change, folder):
    """The checkpoint of a case after a change to its layers, written to a folder."""
    content = torch.load(ASSETS / name / STEP, weights_only=True)
    change(content["model"])
    torch.save(content, folder / "changed.pt")
    return folder / "changed.pt"


def config_of(name, **changes):
    return {**yaml.safe_load((ASSETS / name / "config.yaml").read_text()), **changes}
