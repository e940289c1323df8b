"""Writes what the paper's public reference code computes on tiny models, for tests/test_reference.py. None of its code is kept.

python bench/make_reference_fixtures.py --reference PATH_TO_CLONE --dit PATH_TO_CLONE

--reference: a checkout of github.com/cristianpjensen/agd; --dit: of github.com/facebookresearch/DiT, its submodule.
Writes tests/assets/reference/<base>.safetensors, a base in diffusers' form, and one folder per case: config.yaml and <step>.pt as
the reference's training scripts write them, and calls.safetensors with inputs, ω and the reference's outputs.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import yaml
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

OUTPUT = Path(__file__).parent.parent / "tests/assets/reference"
STEP = "0005000.pt"
# like SDXL: several transformer layers, one more attention in up blocks than in down blocks, and added conditions
UNET: dict[str, Any] = {
    "sample_size": 4,
    "in_channels": 2,
    "out_channels": 2,
    "block_out_channels": (4, 8),
    "norm_num_groups": 2,
    "layers_per_block": 1,
    "transformer_layers_per_block": (1, 2),
    "attention_head_dim": 4,
    "cross_attention_dim": 6,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 2,
    "projection_class_embeddings_input_dim": 3 + 6 * 2,
}
DIT = {"input_size": 4, "patch_size": 2, "in_channels": 2, "hidden_size": 8, "depth": 2, "num_heads": 2, "num_classes": 5}
CASES: dict[str, dict[str, Any]] = {
    "unet-attention": {"arch": "attention", "use_timestep": True, "use_prompt": True},
    "unet-attention-prompt": {"arch": "attention", "use_timestep": False, "use_prompt": True},
    "unet-additive": {"arch": "additive", "use_timestep": True, "use_prompt": True},
    "dit-attention": {"arch": "attention", "use_timestep": True, "use_class_label": True, "cfg_mult": 1000},
    "dit-additive": {"arch": "additive", "use_timestep": True, "use_class_label": True, "cfg_mult": 1000},
    "dit-additive-omega": {"arch": "additive", "use_timestep": False, "use_class_label": False, "cfg_mult": 1.0},
}


class _PatchEmbed(nn.Module):  # stand-ins for what facebook's DiT takes from timm
    def __init__(self, size: int, patch: int, channels: int, width: int, bias: bool = True) -> None:
        super().__init__()
        self.patch_size, self.num_patches = (patch, patch), (size // patch) ** 2
        self.proj = nn.Conv2d(channels, width, patch, patch, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).mT


class _Attention(nn.Module):
    def __init__(self, width: int, num_heads: int, qkv_bias: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias=qkv_bias), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # [B, heads, T, ·]
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class _Mlp(nn.Module):
    def __init__(self, in_features: int, hidden_features: int, act_layer: Any, drop: float) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = (
            nn.Linear(in_features, hidden_features),
            act_layer(),
            nn.Linear(hidden_features, in_features),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


def import_reference(reference: Path, dit: Path) -> SimpleNamespace:
    def module(name: str, **members: Any) -> ModuleType:
        sys.modules[name] = made = ModuleType(name)
        vars(made).update(members)
        return made

    sys.path.insert(0, str(reference))
    module("timm"), module("timm.models")
    module("timm.models.vision_transformer", PatchEmbed=_PatchEmbed, Attention=_Attention, Mlp=_Mlp)
    module("torchvision"), module("torchvision.datasets"), module("torchvision.datasets.utils", download_url=None)
    import agd.dit

    module("agd.dit.DiT", __path__=[str(dit)])
    import agd.dit.adapter
    import agd.sd.adapter
    from agd.utils.training_loop import save_checkpoint, save_config

    return SimpleNamespace(dit=agd.dit.adapter, sd=agd.sd.adapter, save_checkpoint=save_checkpoint, save_config=save_config)


def randomise(parameters: dict[str, Tensor]) -> None:
    """Random values, so that every parameter matters: many are initialised to zero."""
    for name, parameter in parameters.items():
        centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        scale = 0.2 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
        parameter.copy_(centre + scale * torch.randn(parameter.shape))


def make_unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**UNET).eval()
    randomise(dict(unet.named_parameters()))
    return unet


def make_dit(dit: Any) -> nn.Module:
    torch.manual_seed(0)
    model = dit.DiT(**DIT).eval()
    randomise({name: parameter for name, parameter in model.named_parameters() if name != "pos_embed"})
    return model


def dit_in_diffusers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """facebook's DiT in the names of DiTTransformer2DModel, which has the embedders in every block."""
    renamed = {f"pos_embed.proj.{kind}": state[f"x_embedder.proj.{kind}"] for kind in ("weight", "bias")}
    for kind in ("weight", "bias"):
        renamed[f"proj_out_1.{kind}"] = state[f"final_layer.adaLN_modulation.1.{kind}"]
        renamed[f"proj_out_2.{kind}"] = state[f"final_layer.linear.{kind}"]
        for index in range(DIT["depth"]):
            here, there = f"transformer_blocks.{index}.", f"blocks.{index}."
            embedder = f"{here}norm1.emb."
            renamed[f"{embedder}timestep_embedder.linear_1.{kind}"] = state[f"t_embedder.mlp.0.{kind}"]
            renamed[f"{embedder}timestep_embedder.linear_2.{kind}"] = state[f"t_embedder.mlp.2.{kind}"]
            renamed[f"{embedder}class_embedder.embedding_table.weight"] = state["y_embedder.embedding_table.weight"]
            renamed[f"{here}norm1.linear.{kind}"] = state[f"{there}adaLN_modulation.1.{kind}"]
            for name, part in zip("qkv", state[f"{there}attn.qkv.{kind}"].chunk(3), strict=True):
                renamed[f"{here}attn1.to_{name}.{kind}"] = part
            renamed[f"{here}attn1.to_out.0.{kind}"] = state[f"{there}attn.proj.{kind}"]
            renamed[f"{here}ff.net.0.proj.{kind}"] = state[f"{there}mlp.fc1.{kind}"]
            renamed[f"{here}ff.net.2.{kind}"] = state[f"{there}mlp.fc2.{kind}"]
    return {name: tensor.clone().contiguous() for name, tensor in renamed.items()}


def make_calls(unet: bool) -> dict[str, Tensor]:
    torch.manual_seed(1)
    calls = {"sample": torch.randn(3, 2, 4, 4), "timestep": torch.tensor([3, 500, 999]), "omega": torch.tensor([1.0, 3.7, 11.3])}
    if not unet:
        return {**calls, "class_labels": torch.tensor([0, 3, 5])}
    prompt, pooled, sizes = torch.randn(3, 5, 6), torch.randn(3, 3), torch.randint(9, (3, 6))
    return {**calls, "encoder_hidden_states": prompt, "text_embeds": pooled, "time_ids": sizes}


def run_unet(model: nn.Module, calls: dict[str, Tensor]) -> Tensor:
    added = {name: calls[name] for name in ("text_embeds", "time_ids")}
    prompt = calls["encoder_hidden_states"]
    return model(calls["sample"], timestep=calls["timestep"], encoder_hidden_states=prompt, added_cond_kwargs=added).sample


def run_dit(model: nn.Module, calls: dict[str, Tensor]) -> Tensor:
    return model(calls["sample"], calls["timestep"], calls["class_labels"])


def make_case(reference: SimpleNamespace, name: str) -> None:
    settings, unet = CASES[name], name.startswith("unet")
    common = {"hidden_dim": 4, "dropout": 0.0, "zero_init": False}
    base = make_unet() if unet else make_dit(reference.dit)
    run, calls, config = (run_unet if unet else run_dit), make_calls(unet), {**common, **settings}
    calls["base"] = run(base, calls)
    if unet:
        config["base_model"] = "stabilityai/stable-diffusion-xl-base-1.0"
        reference.sd.UNet2DConditionModel = SimpleNamespace(from_pretrained=lambda *args, **kwargs: base)
        model = reference.sd.get_untrained_adapter(config["base_model"], **common, **settings)
    else:
        config["image_size"] = 256
        reference.dit.get_pretrained_dit = lambda image_size: base
        attention = reference.sd.ADAPTER_MODELS["attention"]  # its class does not take the cfg_mult that the DiT script passes
        models = {"attention": lambda block, cfg_mult, **kwargs: attention(block, **kwargs)}
        reference.dit.ADAPTER_MODELS = {**reference.sd.ADAPTER_MODELS, **models}
        model = reference.dit.get_untrained_adapter_dit(256, **common, **settings)
    torch.manual_seed(2)
    randomise(dict(model.named_adapter_parameters()))
    model.eval()
    model.set_adapter_kwargs(
        guidance_scale=calls["omega"],
        timestep=calls["timestep"],
        class_label=calls.get("class_labels"),
        encoder_hidden_states=calls.get("encoder_hidden_states"),
    )
    calls["output"] = run(model, calls)
    folder = OUTPUT / name
    folder.mkdir(parents=True, exist_ok=True)
    trained = {"global_batch_size": 64, "lr": 1e-4, "num_steps": 5000, "seed": None, "data_path": "trajectories"}
    reference.save_config({**config, **trained}, folder)
    reference.save_checkpoint(model.adapter_state_dicts(), folder / STEP)
    save_file(calls, folder / "calls.safetensors")
    print(f"{name}: the adapters move the output by {(calls['output'] - calls['base']).abs().max():.3g}")


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", type=Path, required=True, help="clone of cristianpjensen/agd")
    parser.add_argument("--dit", type=Path, required=True, help="clone of facebookresearch/DiT")
    arguments = parser.parse_args()
    reference = import_reference(arguments.reference, arguments.dit)
    OUTPUT.mkdir(parents=True, exist_ok=True)
    save_file(make_unet().state_dict(), OUTPUT / "unet.safetensors")
    (OUTPUT / "unet.yaml").write_text(yaml.safe_dump({name: _plain(value) for name, value in UNET.items()}))
    save_file(dit_in_diffusers(make_dit(reference.dit).state_dict()), OUTPUT / "dit.safetensors")
    for name in CASES:
        make_case(reference, name)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


if __name__ == "__main__":
    main()
