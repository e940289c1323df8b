"""Sampling speed: unguided, CFG and AGD, plain and optimized, interleaved, on whatever device is there.

python bench/nfe_speed.py                                 # the digits teacher that ships
python bench/nfe_speed.py --batch 1 16 64 --json out.json
python bench/nfe_speed.py --teacher bench/teachers/digits-unet
python bench/nfe_speed.py --model sdxl-1024 --batch 1 4 --dtype bf16 --json out.json    # random weights, nothing to download
python bench/nfe_speed.py --model sdxl-1024 --device meta                               # FLOPs and launches, without a GPU
"""

from __future__ import annotations

import argparse
import math
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

import torch

from agd_fast.environment import environment
from agd_fast.files import read_json
from agd_fast.ops import default_policy
from quality.teachers import TEACHERS, load_teacher
from speed.architectures import ARCHITECTURES, find_architecture
from speed.arms import ARMS, require_arms
from speed.digits import measure_teacher
from speed.hardware import gpu_state
from speed.kept import Kept
from speed.measure import Row
from speed.models import LATE, Settings, measure_model
from speed.reference import ReferenceAdapters

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
OF_MODELS = tuple(name for name in ARMS if name != "agd_engine_whole")
OF_DIGITS = tuple(name for name in OF_MODELS if name != "cfg_compiled")  # compiling takes longer than all the rest


def main() -> None:
    parser = _parser()
    args = parser.parse_args()
    try:
        names, settings = args.model or [], _settings(args)
        for name in names:
            find_architecture(name)
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    kept = Kept(args.json, partial(_about, settings))
    rows: list[Row] = []

    def keep(own: list[Row]) -> None:
        kept([*rows, *own])

    for name in names:
        rows += measure_model(name, args.batch or [1], settings, keep=keep)
    if not names:
        bench = load_teacher(args.teacher, device=settings.device)
        bench.teacher.denoiser.to(settings.dtype)
        for batch in args.batch or [1, 16, 64]:
            rows += measure_teacher(bench.teacher, bench.table, batch, settings, keep)
    _report(rows, settings, args)
    kept(rows, not any(LATE in (row["note"] or "") for row in rows))


def _parser() -> argparse.ArgumentParser:
    arms = "; ".join(f"{name}: {kind.what}" for name, kind in ARMS.items())
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", metavar="MODEL", help=f"one or several of {', '.join(ARCHITECTURES)}")
    parser.add_argument("--teacher", type=Path, default=TEACHERS / "digits-dit", help="folder of a finished teacher")
    parser.add_argument("--batch", type=int, nargs="+", help="default: 1 for a model, 1 16 64 for a teacher")
    parser.add_argument("--steps", type=int, help="of the schedule; default: 30 for a model, 25 for a teacher")
    parser.add_argument("--eager-steps", type=int, help="of the schedule's last, for a model's arms that compute nothing ahead")
    parser.add_argument("--rounds", type=int, help="that are timed; default: 10 for a model, 30 for a teacher")
    parser.add_argument("--kind", help="of adapter, several joined by '+'; default: the backbone's")
    parser.add_argument(
        "--arms", nargs="+", metavar="ARM", help=f"default: {', '.join(OF_MODELS)}; of a teacher without cfg_compiled. {arms}"
    )
    parser.add_argument("--guidance-scale", type=float, default=4.0)
    parser.add_argument("--dtype", choices=DTYPES, help="default: bf16 for a model, fp32 for a teacher")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="meta: count only")
    parser.add_argument("--reference-repo", type=Path, help="clone of github.com/cristianpjensen/agd, for agd_naive on a model")
    parser.add_argument("--counts", type=Path, nargs="+", default=[], help="JSON of runs with --device meta, to count nothing")
    parser.add_argument("--processes", action="store_true", help="a process for each of a model's arms, all at once")
    parser.add_argument("--patience", type=float, default=math.inf, metavar="SECONDS", help="then such an arm is left out")
    parser.add_argument("--profile", action="store_true", help="of a model's arms on CUDA: print what takes longest")
    parser.add_argument("--no-compile", action="store_true", help="record the engine's steps as they are, which takes seconds")
    parser.add_argument("--lock", type=Path, help="see on_gpu.py: others on the card stand still while times are taken")
    parser.add_argument("--json", type=Path, help="also write the rows to this file, with every round")
    parser.add_argument("--plot", type=Path, help="of a picture; default: beside the JSON")
    return parser


def _settings(args: argparse.Namespace) -> Settings:
    """Raises: ValueError for options that do not go together, FileNotFoundError for missing files."""
    require_arms(args.arms or ())
    of_models = {"--device meta": args.device == "meta", "--reference-repo": args.reference_repo, "--processes": args.processes}
    of_models |= {"--eager-steps": args.eager_steps, "--profile": args.profile}
    if not args.model and any(of_models.values()):
        found = next(name for name, given in of_models.items() if given)
        raise ValueError(f"{found} goes with --model; expected one or several of {', '.join(ARCHITECTURES)}, found none")
    return Settings(
        arms=args.arms or (OF_MODELS if args.model else OF_DIGITS),
        steps=args.steps or (30 if args.model else 25),
        rounds=args.rounds or (10 if args.model else 30),
        dtype=DTYPES[args.dtype or ("bf16" if args.model else "fp32")],
        device=torch.device(args.device),
        guidance_scale=args.guidance_scale,
        kind=args.kind,
        reference=ReferenceAdapters(args.reference_repo) if args.reference_repo else None,
        counts=[row for path in args.counts for row in read_json(path)["rows"]],
        eager_steps=args.eager_steps,
        profile=args.profile,
        compiled=not args.no_compile,
        processes=args.processes,
        patience=args.patience,
        lock=args.lock,
    )


def _about(settings: Settings) -> dict[str, Any]:
    """What is written beside the rows. rounds: how many are to be timed; a row with times says how many it has."""
    where = {**environment(), **({"device": "meta"} if settings.device.type == "meta" else gpu_state())}
    where["kernels"] = f"{where['kernels']}; {default_policy()}"
    return {"environment": where, "commit": commit(), "compiled": settings.compiled, "rounds": settings.rounds}


def _report(rows: list[Row], settings: Settings, args: argparse.Namespace) -> None:
    from speed.report import print_rows, save_bars  # needs matplotlib

    device = "counted" if settings.device.type == "meta" else f"{settings.rounds} interleaved rounds, {environment()['device']}"
    for model in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == model]
        kinds = [f"{row['adapter']['kind']} adapter" for row in own if row["adapter"] and row["arm"] != "agd_naive"]
        how = [*kinds[:1], *([] if settings.compiled else ["engine not compiled"]), f"{settings.steps} steps", device]
        title = ", ".join([model, own[0]["dtype"], *how])
        print_rows(own, title)
        path = args.plot or (args.json.with_suffix(".png") if args.json else None)
        if path:
            save_bars(path if len(rows) == len(own) else path.with_stem(f"{path.stem}-{model}"), own, title)


def commit() -> str:
    """The commit that is measured, marked if the working tree differs from it."""
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    return found.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
