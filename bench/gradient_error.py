"""How far the gradients of an adapter are off, by what is kept for backward, and what each idea gives in bytes.

python bench/gradient_error.py                                   # a small UNet of SDXL's shape, random weights
python bench/gradient_error.py --teacher digits-unet --json out.json
python bench/gradient_error.py --model stabilityai/stable-diffusion-xl-base-1.0 --resolution 512

Against plain autograd in float32, on one batch: cosine of all gradients of the adapter as one vector, and the norm of the
difference over their norm. Again with outlier channels: 1 % of them times 100, compensated by what reads them. Bytes are those
of `--count`, on the meta device, in bfloat16.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

import agd_fast as agd
from agd_fast.attaching import armed, denoiser_of, require_attachment
from agd_fast.distillation.loss import distillation_loss
from agd_fast.environment import environment
from agd_fast.files import write_json
from agd_fast.memory.estimate import count
from agd_fast.memory.twin import first_call
from agd_fast.reporting.tables import rich_table
from agd_fast.spec import DenoiserSpec, nest
from memory.ideas import BESIDE, IDEAS, NOT_TAKEN, Way
from memory.outliers import inject_outliers
from memory.students import arguments, student
from nfe_speed import commit
from quality.teachers import TEACHERS, load_teacher
from speed.architectures import ARCHITECTURES, find_architecture
from speed.arms import randomise_zeros

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
    """An adapted, frozen denoiser in float32, one batch of arguments by (dotted) name, and what its prediction is to be."""

    denoiser: nn.Module
    spec: DenoiserSpec
    arguments: Mapping[str, Any]
    target: Tensor

    def gradient(self, way: Way) -> tuple[Tensor, Tensor]:
        """Of the second of two passes, as the first plans what the second keeps: [parameters] float64, and its prediction."""
        attachment = require_attachment(self.denoiser)
        parameters = list(attachment.adapter.parameters())
        omega = torch.linspace(2.0, 5.0, len(self.target))
        with way.scope(self.denoiser, smallest=0), armed(attachment, omega):
            for _ in range(2):
                output = self.denoiser(**nest(self.arguments), return_dict=False)[0][:, : self.target.shape[1]]
                loss = distillation_loss(output, self.target, omega, "l2", "omega")
                found = torch.autograd.grad(loss, parameters, allow_unused=True)
        flat = [torch.zeros(one.numel()) if g is None else g.flatten() for one, g in zip(parameters, found, strict=True)]
        return torch.cat(flat).double(), output.detach()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--model", help="Hub id or folder of a diffusers pipeline")
    what.add_argument("--teacher", choices=("digits-dit", "digits-unet"))
    parser.add_argument("--resolution", type=int, help="of the pipeline's pictures")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--kind", help="of adapter; default: the backbone's")
    parser.add_argument("--count", default="sdxl-1024", help=f"whose bytes: {', '.join(ARCHITECTURES)}; 'none' for nobody's")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    args = parser.parse_args()
    try:
        counted = None if args.count == "none" else find_architecture(args.count)
    except ValueError as error:
        parser.error(str(error))
    case = load(args)
    rows = measure(case)
    if counted is not None:
        add_bytes(rows, args.count)
    print_rows(rows, args.count)
    if args.json:
        about = {"model": args.model or args.teacher or "small SDXL, random weights", "batch": args.batch, "counted": args.count}
        adapter = require_attachment(case.denoiser).adapter.config.to_dict()
        write_json(args.json, {"environment": environment(), "commit": commit(), **about, "adapter": adapter, "rows": rows})


def load(args: argparse.Namespace) -> Case:
    random = torch.Generator().manual_seed(0)
    if args.teacher:
        bench = load_teacher(TEACHERS / args.teacher)
        denoiser, spec = bench.teacher.denoiser, bench.teacher.spec
        rows = torch.arange(args.batch) % len(bench.row_labels)
        x = torch.randn(args.batch, *bench.teacher.sample_shape, generator=random)
        times = torch.linspace(100, 900, args.batch)
        found = {spec.sample: x, spec.timestep: times, **{name: table[rows] for name, table in bench.table.items()}}
    elif args.model:
        from diffusers import DiffusionPipeline

        pipe = DiffusionPipeline.from_pretrained(args.model, torch_dtype=torch.float32)
        denoiser, spec = denoiser_of(pipe), agd.attaching.spec_of(pipe)
        found = first_call(pipe, spec, args.resolution, args.batch, {})
        x = found[spec.sample]
    else:
        denoiser = student(SMALL, "default", torch.device("cpu"), torch.float32)
        spec = require_attachment(denoiser).spec
        agd.unload(denoiser)  # for an adapter of the kind that is asked for
        found = arguments(SMALL, args.batch, torch.device("cpu"), torch.float32)
        x = found[spec.sample]
    denoiser.requires_grad_(False).eval()
    torch.manual_seed(0)
    randomise_zeros(agd.attach(denoiser, agd.AdapterConfig(args.kind), spec=spec))
    return Case(denoiser, spec, found, torch.randn(x.shape, generator=random))


def measure(case: Case, ways: Mapping[str, Way] | None = None) -> list[Row]:
    """A row a way. Entries with "outliers" before them: the same of a copy that has them."""
    ways = ways or {**IDEAS, **NOT_TAKEN, **BESIDE}
    other = replace(case, denoiser=copy.deepcopy(case.denoiser))
    inject_outliers(other.denoiser)
    exact = {"": case.gradient(Way()), "outliers_": other.gradient(Way())}
    rows = []
    for name, way in ways.items():
        row: Row = {"way": name, "saved_bytes": None}
        for prefix, one in (("", case), ("outliers_", other)):
            gradient, output = one.gradient(way)
            reference, expected = exact[prefix]
            row[f"{prefix}cosine"] = float(torch.cosine_similarity(gradient, reference, dim=0))
            row[f"{prefix}relative_error"] = float((gradient - reference).norm() / reference.norm())
            row[f"{prefix}same_output"] = bool(torch.equal(output, expected))
        rows.append(row)
        print(f"{name}: cosine {row['cosine']:.6f}, with outliers {row['outliers_cosine']:.6f}", flush=True)
    return rows


def add_bytes(rows: list[Row], name: str) -> None:
    """What a forward of a published model keeps, of those ways that are about that."""
    architecture, meta = find_architecture(name), torch.device("meta")
    denoiser = student(architecture, "default", meta, torch.bfloat16)
    call = arguments(architecture, 1, meta, torch.bfloat16)
    spec = require_attachment(denoiser).spec
    for row in rows:
        way = (IDEAS | NOT_TAKEN).get(row["way"])
        if way is not None:
            row["saved_bytes"] = sum(count(denoiser, spec, call, way.scope)[0].values())


def print_rows(rows: list[Row], counted: str) -> None:
    header = ("", f"kept, {counted}, GiB", "cosine", "relative error", "cosine, outliers", "relative error, outliers")
    cells = [
        (
            row["way"],
            "–" if row["saved_bytes"] is None else f"{row['saved_bytes'] / 2**30:.3f}",
            f"{row['cosine']:.6f}",
            f"{row['relative_error']:.5f}",
            f"{row['outliers_cosine']:.6f}",
            f"{row['outliers_relative_error']:.5f}",
        )
        for row in rows
    ]
    Console(width=150).print(rich_table("gradients of the adapter", header, cells))


if __name__ == "__main__":
    main()
