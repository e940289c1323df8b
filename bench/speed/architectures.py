"""Denoisers of public models, built from their configs with random weights: nothing is downloaded.

Sources: the config.json of each model's denoiser on the Hugging Face Hub, and what its pipeline calls it with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Architecture:
    """One denoiser at one size of image or video.

    cls: of diffusers. config: its arguments. parameters: their number in all. sample: shape of x_t without the batch.
    conditions: shapes of the conditioning arguments without the batch, by (dotted) name. masks: the same for masks, all ones.
    labels: number of classes without the null label; 0 where there are none.
    constants: further arguments, for a batch of that size. scheduler: class and config; its timesteps are divided by `time_unit`.
    guided: leading channels that guidance acts on, None for all.
    reference_hidden: width of the reference's adapters, as its code sets it for this kind of denoiser.
    """

    cls: str
    config: Mapping[str, Any]
    parameters: int
    sample: Shape
    scheduler: tuple[str, Mapping[str, Any]]
    conditions: Mapping[str, Shape] = field(default_factory=dict)
    masks: Mapping[str, Shape] = field(default_factory=dict)
    labels: int = 0
    constants: Callable[[int], dict[str, Any]] = lambda batch: {}
    time_unit: float = 1.0
    guided: int | None = None
    reference_hidden: int = 320

    def timesteps(self, steps: int) -> Tensor:
        """The scheduler's timesteps [T], on the CPU."""
        name, config = self.scheduler
        scheduler = getattr(diffusers, name)(**config)
        scheduler.set_timesteps(steps)
        return scheduler.timesteps

    def inputs(self, batch: int, device: torch.device, dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
        """Conditions by (dotted) name, batch first: random, except that labels are the null label for seed 0."""
        random = torch.Generator(device="cpu").manual_seed(seed)
        found = {name: torch.randn(batch, *shape, generator=random).to(device, dtype) for name, shape in self.conditions.items()}
        found |= {name: torch.ones(batch, *shape, dtype=torch.long, device=device) for name, shape in self.masks.items()}
        if self.labels:
            labels = torch.randint(self.labels, (batch,), generator=random) if seed else torch.full((batch,), self.labels)
            found["class_labels"] = labels.to(device)
        return found


def build(architecture: Architecture, device: torch.device, dtype: torch.dtype, seed: int = 0) -> nn.Module:
    """The denoiser in eval mode, in the dtypes that from_pretrained(torch_dtype=dtype) gives it. As with from_pretrained, its
    parameters require gradients, which decides how torch folds a linear on strided tokens.

    On the meta device its weights have no values; elsewhere they are random, scaled so that a layer keeps its input's scale.
    """
    cls = getattr(diffusers, architecture.cls)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # as from_pretrained does: buffers are made in this dtype
    try:
        with init_empty_weights(include_buffers=False):
            denoiser: nn.Module = cls(**architecture.config)
    finally:
        torch.set_default_dtype(default)
    kept = set(getattr(cls, "_keep_in_fp32_modules", None) or ())
    random = None if device.type == "meta" else torch.Generator(device).manual_seed(seed)
    for prefix, module in denoiser.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            parts = {*prefix.split("."), name}
            shape, of = parameter.shape, torch.float32 if kept & parts else dtype
            values = torch.empty(shape, device=device, dtype=of)
            if random is not None:
                _randomise(values, is_gain=name == "weight" and len(shape) == 1, generator=random)
            setattr(module, name, nn.Parameter(values))
    return denoiser.to(device).eval()


def _randomise(values: Tensor, is_gain: bool, generator: torch.Generator) -> None:
    if values.ndim < 2:
        values.normal_(1.0 if is_gain else 0.0, 0.02, generator=generator)
    else:
        values.normal_(0.0, values[0].numel() ** -0.5, generator=generator)


_LINEAR = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}

ARCHITECTURES: dict[str, Architecture] = {
    "dit-xl2-256": Architecture(
        cls="DiTTransformer2DModel",
        config={
            "num_attention_heads": 16,
            "attention_head_dim": 72,
            "in_channels": 4,
            "out_channels": 8,
            "num_layers": 28,
            "sample_size": 32,
            "patch_size": 2,
            "attention_bias": True,
            "activation_fn": "gelu-approximate",
            "num_embeds_ada_norm": 1000,
            "norm_type": "ada_norm_zero",
            "norm_elementwise_affine": False,
        },
        parameters=749_826_464,
        sample=(4, 32, 32),
        scheduler=("DDIMScheduler", {"clip_sample": False}),
        labels=1000,
        guided=4,
        reference_hidden=256,
    ),
    "pixart-sigma-1024": Architecture(
        cls="PixArtTransformer2DModel",
        config={
            "num_attention_heads": 16,
            "attention_head_dim": 72,
            "in_channels": 4,
            "out_channels": 8,
            "num_layers": 28,
            "cross_attention_dim": 1152,
            "caption_channels": 4096,
            "sample_size": 128,
            "patch_size": 2,
            "interpolation_scale": 2,
            "attention_bias": True,
            "activation_fn": "gelu-approximate",
            "num_embeds_ada_norm": 1000,
            "norm_type": "ada_norm_single",
            "norm_elementwise_affine": False,
            "norm_eps": 1e-6,
            "use_additional_conditions": False,
        },
        parameters=610_856_096,
        sample=(4, 128, 128),
        scheduler=("DPMSolverMultistepScheduler", {}),
        conditions={"encoder_hidden_states": (300, 4096)},
        masks={"encoder_attention_mask": (300,)},
        constants=lambda batch: {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}},
    ),
    "qwen-image": Architecture(  # 1024², a prompt of 128 tokens
        cls="QwenImageTransformer2DModel",
        config={
            "patch_size": 2,
            "in_channels": 64,
            "out_channels": 16,
            "num_layers": 60,
            "attention_head_dim": 128,
            "num_attention_heads": 24,
            "joint_attention_dim": 3584,
            "axes_dims_rope": (16, 56, 56),
        },
        parameters=20_430_401_088,
        sample=(4096, 64),
        scheduler=("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
        conditions={"encoder_hidden_states": (128, 3584)},
        constants=lambda batch: {"encoder_hidden_states_mask": None, "img_shapes": [[(1, 64, 64)]] * batch},
        time_unit=1000.0,
    ),
    "sd21-768": Architecture(
        cls="UNet2DConditionModel",
        config={
            "sample_size": 96,
            "attention_head_dim": [5, 10, 20, 20],
            "block_out_channels": [320, 640, 1280, 1280],
            "cross_attention_dim": 1024,
            "use_linear_projection": True,
        },
        parameters=865_910_724,
        sample=(4, 96, 96),
        scheduler=("DDIMScheduler", {**_LINEAR, "clip_sample": False, "prediction_type": "v_prediction"}),
        conditions={"encoder_hidden_states": (77, 1024)},
    ),
    "sd3-medium-1024": Architecture(
        cls="SD3Transformer2DModel",
        config={
            "sample_size": 128,
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 16,
            "num_layers": 24,
            "attention_head_dim": 64,
            "num_attention_heads": 24,
            "joint_attention_dim": 4096,
            "caption_projection_dim": 1536,
            "pooled_projection_dim": 2048,
            "pos_embed_max_size": 192,
        },
        parameters=2_028_328_000,
        sample=(16, 128, 128),
        scheduler=("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
        conditions={"encoder_hidden_states": (333, 4096), "pooled_projections": (2048,)},  # 77 of CLIP, 256 of T5
    ),
    "sdxl-1024": Architecture(
        cls="UNet2DConditionModel",
        config={
            "sample_size": 128,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "attention_head_dim": [5, 10, 20],
            "block_out_channels": [320, 640, 1280],
            "cross_attention_dim": 2048,
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "projection_class_embeddings_input_dim": 2816,
            "transformer_layers_per_block": [1, 2, 10],
            "use_linear_projection": True,
        },
        parameters=2_567_463_684,
        sample=(4, 128, 128),
        scheduler=("EulerDiscreteScheduler", {**_LINEAR, "timestep_spacing": "leading"}),
        conditions={
            "encoder_hidden_states": (77, 2048),
            "added_cond_kwargs.text_embeds": (1280,),
            "added_cond_kwargs.time_ids": (6,),
        },
    ),
    "wan-1.3b": Architecture(  # Wan 2.1, 81 frames of 832×480
        cls="WanTransformer3DModel",
        config={
            "patch_size": (1, 2, 2),
            "num_attention_heads": 12,
            "attention_head_dim": 128,
            "in_channels": 16,
            "out_channels": 16,
            "text_dim": 4096,
            "freq_dim": 256,
            "ffn_dim": 8960,
            "num_layers": 30,
            "cross_attn_norm": True,
            "qk_norm": "rms_norm_across_heads",
            "eps": 1e-6,
            "rope_max_seq_len": 1024,
        },
        parameters=1_418_996_800,
        sample=(16, 21, 60, 104),
        scheduler=(
            "UniPCMultistepScheduler",
            {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0},
        ),
        conditions={"encoder_hidden_states": (512, 4096)},
    ),
}


def find_architecture(name: str) -> Architecture:
    """Raises: ValueError that lists the known names."""
    if name not in ARCHITECTURES:
        raise ValueError(f"expected a model of {', '.join(ARCHITECTURES)}; found {name!r}")
    return ARCHITECTURES[name]
