"""The adapters of the paper's public code (github.com/cristianpjensen/agd), from a local clone, on diffusers' denoisers."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from agd_fast.conditioning import condition_width, embed_time
from agd_fast.sites import apply_modules, label_count, resolve_sites
from agd_fast.spec import DenoiserSpec

TOKENS = 250  # that its positional encoding has room for, including ω and t


class ReferenceAdapters:
    """The reference's adapter classes. repo: a checkout.

    Raises: FileNotFoundError when it is not one.
    """

    def __init__(self, repo: Path) -> None:
        if not (repo / "agd" / "models" / "attention.py").is_file():
            raise FileNotFoundError(
                f"expected a clone of github.com/cristianpjensen/agd at {repo}, found no agd/models/attention.py"
            )
        sys.path.insert(0, str(repo))
        try:
            self.adapters, self.models = import_module("agd.adapters"), import_module("agd.models")
        finally:
            sys.path.remove(str(repo))

    def inject(
        self, denoiser: nn.Module, spec: DenoiserSpec, conditions: Mapping[str, Tensor], kind: str | None, hidden: int
    ) -> Injected:
        """Put an adapter at each attention site of a denoiser, as the reference's code does for its models.

        kind: "offset" takes its additive adapter, anything else its cross-attention.
        Raises: ValueError for a model that its classes do not support.
        """
        condition = spec.adapted[0]
        labels = label_count(denoiser, condition)
        if labels is None and conditions[condition.argument].shape[1] + 2 > TOKENS:
            raise ValueError(
                f"the reference's adapters take at most {TOKENS - 2} tokens of a prompt; "
                f"{type(denoiser).__name__} is called with {conditions[condition.argument].shape[1]}"
            )
        parameter = next(denoiser.parameters())
        width = condition_width(denoiser, condition)
        with torch.no_grad():
            time_width = embed_time(denoiser, spec, torch.zeros(1, device=parameter.device)).shape[-1]
        seen: dict[str, Any] = {"use_prompt": True, "prompt_dim": width}
        if labels is not None:
            embed = lambda label: apply_modules(denoiser, condition.embedding, label)  # noqa: E731
            seen = {"use_class_label": True, "class_embedder": embed, "class_dim": width}
        common = {
            "hidden_dim": hidden,
            "use_timestep": True,
            "timestep_embedder": lambda t: embed_time(denoiser, spec, t),
            "timestep_dim": time_width,
            **seen,
        }
        cls = self.models.ADAPTER_MODELS["additive" if kind == "offset" else "attention"]
        sites = resolve_sites(denoiser, spec.attention)
        with torch.device(parameter.device):
            configs = {site.path: self.adapters.AdapterConfig(cls, {"input_dim": site.width, **common}) for site in sites}
            model = self.adapters.inject_adapters(denoiser, configs)
        for site in sites:
            adapter = denoiser.get_submodule(site.path).to(parameter.dtype).eval()
            for module in adapter.modules():
                if type(module).__name__ == "FourierEncoding":  # it computes in float32, whatever follows
                    module.register_forward_hook(lambda _, args, output: output.to(parameter.dtype))
        return Injected(model, condition.argument, "class_label" if labels is not None else "encoder_hidden_states")


class Injected:
    """A denoiser with the reference's adapters. argument, name: the denoiser's and the adapters' name of the condition."""

    def __init__(self, model: Any, argument: str, name: str) -> None:
        self.model, self.argument, self.name = model, argument, name

    def condition(self, omega: Tensor, conditions: Mapping[str, Tensor]) -> None:
        """Tell all adapters ω [B] and c."""
        self.model.set_adapter_kwargs(guidance_scale=omega, **{self.name: conditions[self.argument]})

    def at(self, timestep: Tensor) -> None:
        """Tell all adapters t [B]."""
        self.model.update_adapter_kwargs(timestep=timestep)
