"""How far an adapter's gradients are off, by what is kept for backward, and how many bytes each idea saves.

python bench/gradient_error.py                                   # a small UNet of SDXL's shape, random weights
python bench/gradient_error.py --teacher digits-unet --batch 256 --kind cross_attention --ways 4bit recompute
python bench/gradient_error.py --model stabilityai/stable-diffusion-xl-base-1.0 --resolution 512 --seeds 1

The adapter has had a few steps of distillation towards CFG. On one batch, against plain autograd in float32: the cosine of all
gradients as one vector, and the norm of the difference over their norm; over several seeds the mean, the least, and the root mean
square. The same with outlier channels: 1 % of them times 100, compensated by what reads them. Bytes are those of `--count`, on
the meta device, in bfloat16.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

import agd_fast as agd
from agd_fast.attaching import armed, denoiser_of, require_attachment
from agd_fast.distillation.loss import distillation_loss
from agd_fast.environment import environment
from agd_fast.families import SPECS
from agd_fast.files import write_json
from agd_fast.forward import nest
from agd_fast.memory import MODES
from agd_fast.memory.estimate import count
from agd_fast.memory.twin import first_call
from agd_fast.reporting.tables import rich_table
from agd_fast.sites import config_value
from agd_fast.spec import DenoiserSpec
from memory.ideas import BESIDE, IDEAS, NOT_TAKEN, Way
from memory.outliers import inject_outliers
from memory.students import arguments, student
from nfe_speed import commit
from quality.teachers import TEACHERS, load_teacher
from speed.architectures import ARCHITECTURES, build, find_architecture

Row = dict[str, Any]
SMALL = replace(  # SDXL's blocks and proportions
    ARCHITECTURES["sdxl-1024"],
    config={
        **ARCHITECTURES["sdxl-1024"].config,
        "sample_size": 32,
        "attention_head_dim": [1, 2, 4],
        "block_out_channels": [64, 128, 256],
        "cross_attention_dim": 128,
        "transformer_layers_per_block": [1, 1, 3],
    },
    sample=(4, 32, 32),
    conditions={
        "encoder_hidden_states": (77, 128),
        "added_cond_kwargs.text_embeds": (1280,),
        "added_cond_kwargs.time_ids": (6,),
    },
)


@dataclass(frozen=True)
class Case:
    """An adapted, frozen denoiser in float32, one batch of arguments by (dotted) name, and CFG's prediction for it."""

    denoiser: nn.Module
    spec: DenoiserSpec
    arguments: Mapping[str, Any]
    target: Tensor

    @property
    def parameters(self) -> list[nn.Parameter]:
        return list(require_attachment(self.denoiser).adapter.parameters())

    @property
    def omega(self) -> Tensor:
        return spread_omega(len(self.target))

    def loss(self) -> tuple[Tensor, Tensor]:
        """The loss and the prediction. To be called inside armed(...)."""
        output = self.denoiser(**nest(self.arguments), return_dict=False)[0][:, : self.target.shape[1]]
        return distillation_loss(output, self.target, self.omega, "l2", "omega"), output.detach()

    def train(self, steps: int) -> None:
        optimizer = torch.optim.Adam(self.parameters, 1e-3)
        with armed(require_attachment(self.denoiser), self.omega):
            for _ in range(steps):
                optimizer.zero_grad()
                self.loss()[0].backward()
                optimizer.step()

    def gradient(self, way: Way) -> tuple[Tensor, Tensor]:
        """Gradient [parameters] in float64 and prediction, of the second of two passes: the first plans what the second keeps."""
        with way.scope(self.denoiser, smallest=0), armed(require_attachment(self.denoiser), self.omega):
            for _ in range(2):
                loss, output = self.loss()
                found = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        flat = [torch.zeros(one.numel()) if g is None else g.flatten() for one, g in zip(self.parameters, found, strict=True)]
        return torch.cat(flat).double(), output


def spread_omega(batch: int) -> Tensor:
    return torch.linspace(2.0, 5.0, batch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--model", help="Hub id or folder of a diffusers pipeline")
    what.add_argument("--teacher", choices=("digits-dit", "digits-unet"))
    parser.add_argument("--resolution", type=int, help="of the pipeline's pictures")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--kind", help="of adapter; default: the backbone's")
    parser.add_argument("--ways", nargs="+", choices=list(MODES), help="only these modes; default: one idea after another")
    parser.add_argument("--seeds", type=int, default=3, help="batches, and adapters to begin with")
    parser.add_argument("--steps", type=int, default=5, help="of training before gradients are compared")
    parser.add_argument("--count", default="sdxl-1024", help=f"whose bytes: {', '.join(ARCHITECTURES)}; 'none' for nobody's")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    args = parser.parse_args()
    try:
        counted = None if args.count == "none" else find_architecture(args.count)
    except ValueError as error:
        parser.error(str(error))
    cases = [load(args, seed) for seed in range(args.seeds)]
    ways = {mode: Way(MODES[mode]) for mode in args.ways} if args.ways else {**IDEAS, **NOT_TAKEN, **BESIDE}
    rows = measure(cases, ways)
    if counted is not None:
        add_bytes(rows, args.count, ways)
    print_rows(rows, args.count)
    if args.json:
        about = {"model": args.model or args.teacher or "small SDXL, random weights", "counted": args.count}
        about |= {"batch": args.batch, "seeds": args.seeds, "steps": args.steps}
        adapter = require_attachment(cases[0].denoiser).adapter.config.to_dict()
        write_json(args.json, {"environment": environment(), "commit": commit(), **about, "adapter": adapter, "rows": rows})


def load(args: argparse.Namespace, seed: int = 0) -> Case:
    random = torch.Generator().manual_seed(seed)
    if args.teacher:
        bench = load_teacher(TEACHERS / args.teacher)
        denoiser, spec = bench.teacher.denoiser, bench.teacher.spec
        rows = torch.randint(len(bench.row_labels), (args.batch,), generator=random)
        conditions = {name: table[rows] for name, table in bench.table.items()}
        x = torch.randn(args.batch, *bench.teacher.sample_shape, generator=random)
        found = {spec.sample: x, spec.timestep: torch.linspace(100, 900, args.batch), **conditions}
        null = {**found, **bench.teacher.null(conditions)}
    elif args.model:
        from diffusers import DiffusionPipeline

        pipe = DiffusionPipeline.from_pretrained(args.model).to(torch.float32)
        denoiser, spec = denoiser_of(pipe), agd.attaching.spec_of(pipe)
        torch.manual_seed(seed)
        found = first_call(pipe, spec, args.resolution, args.batch, {})
        null = {**first_call(pipe, spec, args.resolution, args.batch, no_prompt(denoiser, spec, args.batch))}
        null |= {name: found[name] for name in (spec.sample, spec.timestep)}
    else:
        denoiser = build(SMALL, torch.device("cpu"), torch.float32)
        spec = SPECS[SMALL.cls]
        found = arguments(SMALL, args.batch, torch.device("cpu"), torch.float32, seed)
        null = {name: torch.zeros_like(value) if "embeds" in name or "states" in name else value for name, value in found.items()}
    denoiser.requires_grad_(False).eval()
    target = guided_prediction(denoiser, found, null)
    torch.manual_seed(seed)
    agd.attach(denoiser, agd.AdapterConfig(args.kind), spec=spec)
    case = Case(denoiser, spec, found, target)
    case.train(args.steps)
    return case


def no_prompt(denoiser: nn.Module, spec: DenoiserSpec, batch: int) -> dict[str, Any]:
    """What the pipeline is called with for the unconditional prediction."""
    labels = [one.null for one in spec.conditions if one.argument == "class_labels"]
    return {"class_labels": [config_value(denoiser, labels[0])] * batch} if labels else {"prompt": [""] * batch}


@torch.no_grad()
def guided_prediction(denoiser: nn.Module, found: Mapping[str, Any], null: Mapping[str, Any]) -> Tensor:
    """CFG's prediction [B, C, ...], by a denoiser without an adapter."""
    cond, uncond = (denoiser(**nest(one), return_dict=False)[0] for one in (found, null))
    omega = spread_omega(len(cond)).view(-1, *[1] * (cond.ndim - 1))
    return uncond + omega * (cond - uncond)


def measure(cases: Sequence[Case], ways: Mapping[str, Way]) -> list[Row]:
    """One row per way. Entries that begin with "outliers" are the same for copies with outlier channels."""
    others = [replace(case, denoiser=copy.deepcopy(case.denoiser)) for case in cases]
    for other in others:
        inject_outliers(other.denoiser)
    kinds = {"": cases, "outliers_": others}
    exact = {prefix: [case.gradient(Way()) for case in some] for prefix, some in kinds.items()}
    rows = []
    for name, way in ways.items():
        row: Row = {"way": name, "saved_bytes": None}
        for prefix, some in kinds.items():
            cosines, errors, same = [], [], []
            for case, (reference, expected) in zip(some, exact[prefix], strict=True):
                gradient, output = case.gradient(way)
                cosines.append(float(torch.cosine_similarity(gradient, reference, dim=0)))
                errors.append(float((gradient - reference).norm() / reference.norm()))
                same.append(bool(torch.equal(output, expected)))
            row |= {f"{prefix}cosine": mean(cosines), f"{prefix}least_cosine": min(cosines)}
            row |= {f"{prefix}relative_error": mean(error**2 for error in errors) ** 0.5, f"{prefix}same_output": all(same)}
        rows.append(row)
        print(f"{name}: cosine {row['cosine']:.6f}, with outliers {row['outliers_cosine']:.6f}", flush=True)
    return rows


def add_bytes(rows: list[Row], name: str, ways: Mapping[str, Way]) -> None:
    """Adds the bytes that a forward of a published model keeps, for the ways that change them."""
    architecture, meta = find_architecture(name), torch.device("meta")
    denoiser = student(architecture, "default", meta, torch.bfloat16)
    call = arguments(architecture, 1, meta, torch.bfloat16)
    spec = require_attachment(denoiser).spec
    for row in rows:
        way = ways[row["way"]]
        if row["way"] not in BESIDE:
            row["saved_bytes"] = sum(count(denoiser, spec, call, way.scope)[0].values())


def print_rows(rows: list[Row], counted: str) -> None:
    header = ("", f"kept, {counted}, GiB", "cosine", "least", "relative error", "cosine, outliers", "relative error, outliers")
    cells = [
        (
            row["way"],
            "–" if row["saved_bytes"] is None else f"{row['saved_bytes'] / 2**30:.3f}",
            f"{row['cosine']:.6f}",
            f"{row['least_cosine']:.6f}",
            f"{row['relative_error']:.5f}",
            f"{row['outliers_cosine']:.6f}",
            f"{row['outliers_relative_error']:.5f}",
        )
        for row in rows
    ]
    Console(width=150).print(rich_table("gradients of the adapter", header, cells))


if __name__ == "__main__":
    main()
