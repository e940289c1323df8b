"""What a forward keeps for backward, counted when it is over, and what no counter may miss."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

import agd_fast as agd
from agd_fast.attaching import armed, require_attachment
from agd_fast.datasets import digits_teacher
from agd_fast.memory import MODES, Mode, frozen_backward
from agd_fast.memory.counting import _Names
from agd_fast.memory.modes import WITHIN_BLOCKS
from helpers_distillation import tiny_teacher
from helpers_families import attach_trained, denoisers, run, watched
from tiny import TinyFamily

TEACHERS = Path(__file__).parents[1] / "bench" / "teachers"


class _Holder:
    def __init__(self, tensor: Tensor, name: str) -> None:
        self.tensor, self.name = tensor, name


@dataclass
class Kept:
    """Bytes that live for backward, each storage once, without those of the modules; by the function of torch that kept them."""

    left_out: set[int]
    holders: list[Any] = field(default_factory=list)

    def alive(self) -> list[_Holder]:
        return [holder for reference in self.holders if (holder := reference()) is not None]

    def by_op(self) -> Counter[str]:
        found: Counter[str] = Counter()
        seen = set(self.left_out)
        for holder in self.alive():
            storage = holder.tensor.untyped_storage()
            if storage._cdata not in seen:
                seen.add(storage._cdata)
                found[holder.name] += storage.nbytes()
        return found

    @property
    def total(self) -> int:
        return self.by_op().total()


@contextmanager
def keeping(*modules: nn.Module) -> Iterator[Kept]:
    """Counts what the forwards inside keep, as long as their graphs live."""
    tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    kept, names = Kept({tensor.untyped_storage()._cdata for tensor in tensors}), _Names()

    def pack(tensor: Tensor) -> _Holder:
        holder = _Holder(tensor, names.current)
        kept.holders.append(weakref.ref(holder))
        return holder

    with names, names.of_classes(), torch.autograd.graph.saved_tensors_hooks(pack, lambda holder: holder.tensor):
        yield kept


def nodes(output: Tensor) -> list[Any]:
    """The functions of the graph behind a tensor."""
    found, waiting = {}, [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found[node] = None
            waiting.extend(parent for parent, _ in node.next_functions)
    return [*found]


def tensors_in(value: Any, depth: int = 12) -> list[Tensor]:
    """Tensors that an object of ours holds, through attributes, containers, partials and closures."""
    if isinstance(value, Tensor):
        return [value]
    if depth == 0 or isinstance(value, (str, bytes, int, float, torch.dtype, type, type(None))):
        return []
    if isinstance(value, dict):
        inner: list[Any] = [*value.values()]
    elif isinstance(value, (tuple, list, set, frozenset)):
        inner = [*value]
    elif isinstance(value, (nn.Module,)):
        return []
    else:
        inner = [*vars(value).values()] if hasattr(value, "__dict__") else []
        inner += [getattr(value, name, None) for name in ("func", "args", "keywords")]
        inner += [cell.cell_contents for cell in getattr(value, "__closure__", None) or ()]
    return [tensor for one in inner for tensor in tensors_in(one, depth - 1)]


_EVERY = {**MODES, "blocks": WITHIN_BLOCKS}
SMALLEST = {name: replace(mode, smallest=0) for name, mode in _EVERY.items()}  # tiny models have nothing but small tensors


@dataclass
class Problem:
    """A denoiser with an adapter that has an effect, and one call of it."""

    denoiser: nn.Module
    arguments: dict[str, Any]
    omega: Tensor = field(default_factory=lambda: torch.tensor([3.0]))
    target: Tensor | float = 0.0

    @property
    def adapter(self) -> nn.Module:
        return require_attachment(self.denoiser).adapter

    def output(self) -> Tensor:
        with armed(require_attachment(self.denoiser), self.omega):
            output = self.denoiser(**self.arguments)
        found = output if isinstance(output, Tensor) else output[0]
        return torch.stack(found) if isinstance(found, list) else found

    def gradient(self, mode: str | Mode | None = None, *, forwards: int = 2) -> tuple[Tensor, Tensor]:
        """The output and all gradients of the adapter in a row, of the last of so many forwards; mode: None is autograd alone."""
        chosen = SMALLEST.get(mode, mode) if isinstance(mode, str) else mode
        with nullcontext() if chosen is None else frozen_backward(self.denoiser, chosen):
            for _ in range(forwards):
                output = self.output()
                parameters = [one for one in self.adapter.parameters() if one.requires_grad]
                loss = (output - self.target).square().mean()
                found = torch.autograd.grad(loss, parameters, allow_unused=True)
        rows = [torch.zeros_like(one) if grad is None else grad for one, grad in zip(parameters, found, strict=True)]
        return output.detach(), torch.cat([row.flatten() for row in rows])


def problem_of(family: TinyFamily, **config: Any) -> Problem:
    """The second forward of a call of a tiny pipeline."""
    pipe = family.pipeline()
    with watched(pipe) as seen:
        run(pipe, family, **family.off)
    forward = seen.steps[1][0]
    attach_trained(pipe, **config)
    return Problem(denoisers(pipe)[forward.component].requires_grad_(False), forward.arguments)


def digits_problem(name: str, kind: str | None, outliers: float = 1.0) -> Problem:
    """A small denoiser with trained weights, its adapter after a few steps towards CFG's prediction.

    name: "dit" or "unet". outliers: what some channels are larger by, and what reads them compensates.
    """
    torch.manual_seed(0)
    teacher = digits_teacher().denoiser if name == "dit" else UNet2DConditionModel.from_pretrained(TEACHERS / "digits-unet")
    denoiser = teacher.eval().requires_grad_(False)
    enlarge_channels(denoiser, outliers)
    agd.attach(denoiser, agd.AdapterConfig(kind=kind, hidden=8))
    batch = 256  # 4,096 tokens of 4 × 4, as many as SDXL has of one picture of 1024²
    random = torch.Generator().manual_seed(1)
    condition, null = torch.randint(10, (batch,), generator=random), torch.full((batch,), 10)
    if name == "unet":
        condition, null = torch.randn(batch, 7, 32, generator=random), torch.zeros(batch, 7, 32)
    x, t = torch.randn(batch, 1, 8, 8, generator=random), torch.randint(1000, (batch,), generator=random)
    argument = "class_labels" if name == "dit" else "encoder_hidden_states"
    arguments = {"hidden_states" if name == "dit" else "sample": x, "timestep": t, argument: condition}
    omega = 1.5 + 4 * torch.rand(batch, generator=random)
    problem = Problem(denoiser, arguments, omega)
    with torch.no_grad():
        cond, uncond = (denoiser(**{**arguments, argument: one}).sample for one in (condition, null))
        problem.target = uncond + omega.view(-1, 1, 1, 1) * (cond - uncond)
    optimizer = torch.optim.Adam(problem.adapter.parameters(), 1e-3)
    for _ in range(5):
        optimizer.zero_grad()
        (problem.output() - problem.target).square().mean().backward()
        optimizer.step()
    return problem


def wide_teacher() -> agd.Teacher:
    """With activations that are large enough to be packed."""
    return tiny_teacher(width=64)


@torch.no_grad()
def enlarge_channels(denoiser: nn.Module, factor: float) -> None:
    """One channel in a hundred, at least one, of q, of v and of what feed-forwards gate, times `factor`; k and the outputs'
    projections divide by it, so that the denoiser gives what it gave."""
    random = torch.Generator().manual_seed(5)

    def scale(up: Any, count: int) -> Tensor:
        rows = torch.randperm(count, generator=random)[: max(1, count // 100)]
        up.weight[rows] *= factor
        if up.bias is not None:
            up.bias[rows] *= factor
        return rows

    for module in denoiser.modules():
        if isinstance(module, Attention):
            rows = scale(module.to_q, len(module.to_q.weight))
            module.to_k.weight[rows] /= factor
            if module.to_k.bias is not None:
                module.to_k.bias[rows] /= factor
            module.to_out[0].weight[:, scale(module.to_v, len(module.to_v.weight))] /= factor
        elif isinstance(module, FeedForward) and len(module.net[0].proj.weight) == 2 * module.net[2].weight.shape[1]:
            inner = module.net[2].weight.shape[1]
            module.net[2].weight[:, scale(module.net[0].proj, inner)] /= factor
