"""A denoiser on the meta device, and the arguments of one call of it, to count memory without its weights or a GPU."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from accelerate.hooks import remove_hook_from_module
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from agd_fast.attaching import attachment_of, component_of, own_call, uncompiled
from agd_fast.attaching.steps import before_forward
from agd_fast.conditioning import condition_width
from agd_fast.forward import forward_parameters
from agd_fast.freezing import frozen
from agd_fast.memory.base_weights import PackedWeight
from agd_fast.memory.streaming import unhooked_after
from agd_fast.memory.weight_codes import Kind, pack_weight
from agd_fast.sites import label_count
from agd_fast.spec import Condition, DenoiserSpec

META = torch.device("meta")
PROMPT_TOKENS = 77  # CLIP's, if nothing else is known
LATENT = 8  # edge, in pixels, of what one latent stands for in VAEs like Stable Diffusion's
_CONFIGURED = {  # channels of a condition without a width, read from a UNet's config
    "added_cond_kwargs.text_embeds": lambda config: (
        config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim,
    ),
    "added_cond_kwargs.time_ids": lambda config: (6,),
}


def meta_twin(denoiser: nn.Module) -> nn.Module:
    """A copy of the denoiser and its adapter with tensors on meta; no weight is copied. Frozen, except for the adapter."""
    attachment = attachment_of(denoiser)
    modules = [*denoiser.modules(), *(() if attachment is None else attachment.adapter.modules())]
    memo: dict[int, Any] = {}
    for module in modules:
        for tensor in (*module._parameters.values(), *module._buffers.values(), *vars(module).values()):
            if isinstance(tensor, Tensor):
                memo.setdefault(id(tensor), _on_meta(tensor))
    engine = vars(denoiser).get("_compiled_call_impl")
    memo[id(engine)] = None  # the twin runs uncompiled
    with unhooked_after([denoiser]):
        for part in denoiser.modules():
            if vars(part).pop("_diffusers_hook", None) is not None:
                vars(part).pop("forward", None)
        twin: nn.Module = remove_hook_from_module(copy.deepcopy(denoiser, memo), recurse=True)
    twin.requires_grad_(False)
    if (copied := attachment_of(twin)) is not None:
        copied.enabled = True
        copied.adapter.requires_grad_(True)
    return twin.eval()


def _on_meta(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device=META)
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def pack_twin(twin: nn.Module, kind: Kind) -> None:
    """Pack the twin's weights as `packed_base` would; that function itself leaves weights on meta alone."""
    for child in twin.modules():
        if isinstance(child, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)) and not isinstance(
            getattr(child, "padding", None), str
        ):
            weight, own = child.weight, kind if isinstance(child, nn.Linear) else "int8"
            if type(weight) is nn.Parameter and weight.is_floating_point() and weight[0].numel() >= 32:
                packed = PackedWeight(*pack_weight(weight.data, own), own, weight.shape, weight.dtype)
                child._parameters["weight"] = nn.Parameter(packed, requires_grad=False)


def arguments_of(
    model: Any,
    spec: DenoiserSpec,
    *,
    resolution: int | tuple[int, int] | None,
    batch_size: int,
    inputs: Mapping[str, Any] | None,
    call: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Arguments of the denoiser's call by (dotted) name, tensors on meta: as given by `inputs`, as the pipeline passes them, or
    of the shapes that a config gives.

    Raises: ValueError for an argument whose shape cannot be determined.
    """
    denoiser = component_of(model)
    dtype = next(denoiser.parameters()).dtype
    if inputs is not None:
        found = {name: _as_meta(value, dtype) for name, value in inputs.items()}
    elif hasattr(model, "scheduler") and not isinstance(model, nn.Module) and hasattr(model, "components"):
        found = _of_pipeline(model, spec, resolution, batch_size, call or {})
    else:
        found = _of_config(model, spec, resolution, batch_size, dtype)
    if spec.sample not in found:
        raise ValueError(f"inputs need {spec.sample!r}, what the denoiser is called with; found {list(found)}")
    size = len(found[spec.sample])
    found |= {name: [found[name][0]] * size for name in spec.repeated if name in found}
    found.setdefault(spec.timestep, torch.zeros(size, device=META))
    return found


def _as_meta(value: Any, dtype: torch.dtype) -> Any:
    """The value with its tensors on meta; a shape stands for a tensor of the denoiser's dtype."""
    if isinstance(value, (tuple, torch.Size)) and value and all(isinstance(size, int) for size in value):
        return torch.empty(tuple(value), device=META, dtype=dtype)
    return tree_map(lambda leaf: torch.empty_like(leaf, device=META) if isinstance(leaf, Tensor) else leaf, value)


class _Called(Exception):  # noqa: N818 (no error)
    """Carries the arguments of the denoiser's first call out of a pipeline's call."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        self.arguments = arguments


def first_call(
    pipe: Any, spec: DenoiserSpec, resolution: int | tuple[int, int] | None, batch: int, call: Mapping[str, Any]
) -> dict[str, Any]:
    """Arguments of the denoiser's first call, by name, in a run without guidance that is stopped there: text encoders run, the
    denoiser does not. call: further arguments of the pipeline's call.

    Raises: ValueError for a pipeline that never calls its denoiser.
    """
    component = component_of(pipe)
    parameters = forward_parameters(uncompiled(component))
    pipeline_call = own_call(pipe, spec)
    accepted = inspect.signature(pipeline_call).parameters
    arguments = {"num_inference_steps": 2, spec.pipeline.omega_arguments[0]: spec.pipeline.cfg_off_value, **call}
    if not any(name.startswith("prompt") for name in call) and "class_labels" not in call:
        arguments |= {"prompt": ["a photo"] * batch} if "prompt" in accepted else {"class_labels": [0] * batch}
    if resolution is not None and {"height", "width"} <= set(accepted):
        arguments["height"], arguments["width"] = _edges(resolution)
    if "output_type" in accepted:
        arguments.setdefault("output_type", "latent")

    def stop(args: tuple[Any, ...], kwargs: dict[str, Any]) -> NoReturn:
        raise _Called({**dict(zip(parameters, args, strict=False)), **kwargs})

    with frozen(uncompiled(component)), torch.no_grad(), before_forward(component, stop):
        try:
            pipeline_call(**arguments)
        except _Called as stopped:
            found = stopped.arguments
        else:
            raise ValueError(f"{type(pipe).__name__} never called its denoiser; expected inputs={{argument: tensor or shape}}")
    found.pop("return_dict", None)
    timestep = torch.as_tensor(found[spec.timestep])
    found[spec.timestep] = timestep if timestep.ndim > 1 else timestep.reshape(-1).expand(batch)
    return found


def _of_pipeline(
    pipe: Any, spec: DenoiserSpec, resolution: int | tuple[int, int] | None, batch_size: int, call: Mapping[str, Any]
) -> dict[str, Any]:
    batch = min(batch_size, 2)  # further rows are like the second
    found = first_call(pipe, spec, resolution, batch, call)
    for name in spec.listed:
        found[name] = [found[name][0]] * batch_size
    return tree_map(lambda leaf: _repeated(leaf, batch, batch_size) if isinstance(leaf, Tensor) else leaf, found)


def _repeated(tensor: Tensor, batch: int, size: int) -> Tensor:
    """The tensor on meta, with `size` rows if it has `batch`."""
    sizes = [size if index == 0 and length == batch else length for index, length in enumerate(tensor.shape)]
    return torch.empty(sizes, device=META, dtype=tensor.dtype)


def _of_config(
    model: Any, spec: DenoiserSpec, resolution: int | tuple[int, int] | None, batch_size: int, dtype: torch.dtype
) -> dict[str, Any]:
    denoiser = uncompiled(component_of(model))
    config: Any = getattr(denoiser, "config", None)
    shape = tuple(getattr(model, "sample_shape", ()))
    if not shape:
        channels, edge = getattr(config, "in_channels", None), getattr(config, "sample_size", None)
        if channels is None or edge is None:
            _unknown(spec.sample, denoiser)
        shape = (channels, *(edge if isinstance(edge, (tuple, list)) else (edge, edge)))
    if resolution is not None:
        unit = LATENT if shape[0] >= 4 else 1  # fewer channels mean pixels
        shape = (*shape[:-2], *(edge // unit for edge in _edges(resolution)))
    found: dict[str, Any] = {spec.sample: torch.empty(batch_size, *shape, device=META, dtype=dtype)}
    for condition in spec.conditions:
        value = _condition(denoiser, condition, config, batch_size, dtype)
        if value is not None:
            found[condition.argument] = value
    return found


def _condition(denoiser: nn.Module, condition: Condition, config: Any, batch_size: int, dtype: torch.dtype) -> Tensor | None:
    name = condition.argument
    if label_count(denoiser, condition) is not None or (condition.embedding and condition.width is None):
        return torch.zeros(batch_size, dtype=torch.long, device=META)
    if condition.width is None:
        if not condition.adapt and not _is_needed(name, config):
            return None
        if name not in _CONFIGURED:
            _unknown(name, denoiser)
        return torch.empty(batch_size, *_CONFIGURED[name](config), device=META, dtype=dtype)
    width = condition_width(denoiser, condition)
    one = "pooled" in name or "embeds" in name.rpartition(".")[2]
    return torch.empty(batch_size, *(() if one else (PROMPT_TOKENS,)), width, device=META, dtype=dtype)


def _is_needed(name: str, config: Any) -> bool:
    return name.startswith("added_cond_kwargs.") and getattr(config, "addition_embed_type", None) == "text_time"


def _unknown(name: str, denoiser: nn.Module) -> NoReturn:
    raise ValueError(
        f"the shape of {name!r} cannot be read off the config of a {type(denoiser).__name__}; "
        f"expected inputs={{{name!r}: a tensor or its shape with the batch, ...}}"
    )


def _edges(resolution: int | tuple[int, int]) -> tuple[int, int]:
    """Height and width."""
    return (resolution, resolution) if isinstance(resolution, int) else resolution
