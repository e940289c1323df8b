"""How faithfully an adapter reproduces classifier-free guidance, on real images.

python bench/fidelity.py teacher --data digits --model unet
python bench/fidelity.py teacher --data PATH/cifar10_train_jpeg.npz --model dit        # one GPU, 8 minutes
python bench/fidelity.py teacher --data PATH/cifar10_train_jpeg.npz --model unet --size 16   # shrunk, for a CPU
python bench/fidelity.py run --teacher bench/teachers/digits-unet --adapters modulation cross_attention:paper full --seeds 3
python bench/fidelity.py claims --teacher bench/teachers/digits-unet
python bench/fidelity.py report
python bench/fidelity.py photographs --data PATH/cifar10_train_jpeg.npz                # one GPU: the next nine minutes of it
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from agd_fast import TrainConfig
from agd_fast.distillation.presets import PRESETS
from agd_fast.evaluation.explained import SCALES
from quality.arms import Arm, make_arms
from quality.claims import CLAIMS, run_claims
from quality.data import ImageData, load_data
from quality.report import write_report
from quality.run import merge, run_arms
from quality.scoring import Sizes
from quality.teachers import MODELS, TEACHER_NAME, TEACHERS, load_teacher, make_teacher

STANDARD = PRESETS["small"]
RESULTS = Path(__file__).parent / "results" / "fidelity"
INCEPTION = (
    "file of Inception's weights, to measure FID too (needs torch-fidelity); images that are measured already stay as they are"
)
SIZE = "shrink photographs to that side, which a CPU can do; default: as they are"
TEACHER_MINUTES = 7.0  # of training; the classifier and drawing from the data take most of another two


def main() -> None:
    args = make_parser().parse_args()
    args.call(args)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="command")
    teacher = commands.add_parser("teacher", help="train the teacher that an adapter will distil; continues one cut short")
    teacher.add_argument(
        "--data", required=True, help="'digits', or the path of an npz of JPEG files such as cifar10_train_jpeg.npz"
    )
    teacher.add_argument("--model", required=True, choices=MODELS)
    teacher.add_argument("--output", type=Path, help="folder to write to; default bench/teachers/DATA-MODEL")
    teacher.add_argument("--minutes", type=float, help="of training at most; default 8")
    teacher.add_argument("--steps", type=int, help="of training at most")
    teacher.add_argument("--limit", type=int, help="use that many images only")
    teacher.add_argument("--size", type=int, help=SIZE)
    teacher.add_argument("--smoke", action="store_true", help="a tiny model for a few steps, into runs/smoke")
    teacher.set_defaults(call=_teacher)
    run = commands.add_parser("run", help="train arms and score them; one JSON a run, so that it continues where it stopped")
    run.add_argument("--teacher", type=Path, default=TEACHERS / "digits-dit", help="folder of a finished teacher")
    run.add_argument("--data", type=Path, help="what it was trained on, where that is not 'digits'")
    run.add_argument("--size", type=int, help=SIZE)
    run.add_argument(
        "--adapters",
        nargs="+",
        default=["modulation"],
        metavar="KIND[:paper]",
        help="kinds of adapter, several joined by '+'; full (fine-tune) and text_embedding are arms too",
    )
    run.add_argument("--sources", nargs="+", default=["trajectories"], help="of states: trajectories, data, student")
    run.add_argument("--fractions", nargs="+", type=float, default=[0.05], help="most parameters, as a share of the base's")
    run.add_argument("--learning-rates", nargs="+", type=float, help="default: each kind's own")
    run.add_argument("--seeds", type=int, default=1, help="how many, from 0")
    run.add_argument("--steps", type=int, default=TrainConfig.steps, help="of training")
    run.add_argument("--trajectories", type=int, default=STANDARD.trajectories, help="to train on")
    run.add_argument("--keep", type=int, default=STANDARD.keep_steps, help="states of each trajectory; 0 for all")
    run.add_argument("--samples", type=int, default=Sizes.samples, help="images an arm and scale")
    run.add_argument("--scales", nargs="+", type=float, default=list(SCALES), help="guidance scales of the images")
    run.add_argument("--held-out", type=int, default=Sizes.trajectories, help="trajectories for the explained share")
    run.add_argument("--sampling-steps", type=int, default=Sizes.steps)
    run.add_argument("--inception", type=Path, help=INCEPTION)
    run.add_argument("--minutes", type=float, help="start no further run after that long")
    run.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    run.add_argument("--output", type=Path, help="folder of the runs; default runs/fidelity/TEACHER, merged into TEACHER.json")
    run.set_defaults(call=_run)
    claims = commands.add_parser("claims", help="measure the paper's other claims for the default adapter; skips what is there")
    claims.add_argument("--teacher", type=Path, default=TEACHERS / "digits-dit", help="folder of a finished teacher")
    claims.add_argument("--data", type=Path, help="what it was trained on, where that is not 'digits'")
    claims.add_argument("--size", type=int, help=SIZE)
    claims.add_argument("--names", nargs="+", choices=CLAIMS, help="default: all")
    claims.add_argument("--steps", type=int, default=TrainConfig.steps, help="of training")
    claims.add_argument("--trajectories", type=int, default=STANDARD.trajectories, help="to train on")
    claims.add_argument("--samples", type=int, default=Sizes.samples, help="images an arm")
    claims.add_argument("--held-out", type=int, default=Sizes.trajectories, help="trajectories for the explained share")
    claims.add_argument("--sampling-steps", type=int, default=Sizes.steps)
    claims.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    claims.add_argument("--output", type=Path, help="folder of the runs; default runs/fidelity/TEACHER")
    claims.set_defaults(call=_claims)
    photographs = commands.add_parser(
        "photographs", help="teachers and finalists on photographs, as far as the minutes reach; the same command goes on"
    )
    photographs.add_argument("--data", required=True, help="the path of an npz of JPEG files such as cifar10_train_jpeg.npz")
    photographs.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    photographs.add_argument("--adapters", nargs="+", default=["modulation", "modulation+gated_lora", "full"])
    photographs.add_argument("--seeds", type=int, default=3, help="how many, from 0")
    photographs.add_argument("--samples", type=int, default=10_000, help="images an arm and scale")
    photographs.add_argument("--scales", nargs="+", type=float, default=[1.5, 2.0, 3.0], help="guidance scales of the images")
    photographs.add_argument("--minutes", type=float, default=9.0, help="start nothing that would take longer")
    photographs.add_argument(
        "--teacher-minutes", type=float, default=TEACHER_MINUTES, help="of its training; default: %(default)g"
    )
    photographs.add_argument("--inception", type=Path, help=INCEPTION)
    photographs.add_argument("--smoke", action="store_true", help="tiny teachers and runs, to see that all of it works")
    photographs.add_argument("--output", type=Path, default=Path("runs/photographs"), help="folder of teachers and results")
    photographs.set_defaults(call=_photographs)
    report = commands.add_parser("report", help="tables and pictures of merged results")
    report.add_argument("files", type=Path, nargs="*", help="default: all of bench/results/fidelity")
    report.add_argument("--output", type=Path, default=Path("docs"), help="folder to write to")
    report.set_defaults(call=_report)
    return parser


def _teacher(args: argparse.Namespace) -> None:
    make_teacher(
        args.data,
        args.model,
        args.output,
        minutes=args.minutes,
        steps=args.steps,
        limit=args.limit,
        size=args.size,
        smoke=args.smoke,
    )


def _data(args: argparse.Namespace) -> ImageData | None:
    return None if args.data is None else load_data(args.data, size=args.size)


def _run(args: argparse.Namespace) -> None:
    bench = load_teacher(args.teacher, _data(args), args.device, args.inception)
    sizes = Sizes(args.samples, args.held_out, args.sampling_steps)
    output = args.output or Path("runs/fidelity") / args.teacher.name
    merged = run_arms(bench, arms_of(args), output, sizes=sizes, scales=tuple(args.scales), minutes=args.minutes)
    print(f"merged into {merged}")


def arms_of(args: argparse.Namespace) -> list[Arm]:
    """The arms that a run's command line asks for."""
    return make_arms(
        args.adapters,
        args.fractions,
        args.sources,
        list(range(args.seeds)),
        args.steps,
        args.learning_rates,
        args.trajectories,
        args.keep or None,
    )


def _claims(args: argparse.Namespace) -> None:
    bench = load_teacher(args.teacher, _data(args), args.device)
    sizes = Sizes(args.samples, args.held_out, args.sampling_steps)
    output = args.output or Path("runs/fidelity") / args.teacher.name
    run_claims(bench, output, sizes, names=args.names, steps=args.steps, trajectories=args.trajectories)
    print(f"merged into {merge(bench, output, sizes)}")


def _photographs(args: argparse.Namespace) -> None:
    start, device = time.monotonic(), "cuda" if torch.cuda.is_available() else "cpu"
    data = load_data(args.data)
    for model in args.models:
        directory = args.output / "teachers" / f"{data.name}-{model}"
        left = args.minutes - (time.monotonic() - start) / 60
        if not (directory / TEACHER_NAME).is_file() and left < args.teacher_minutes + 1 and not args.smoke:
            print(f"stopped before the {model}; the same command goes on")
            return
        make_teacher(args.data, model, directory, minutes=args.teacher_minutes, smoke=args.smoke)
        steps, trajectories = (2, 10) if args.smoke else (TrainConfig.steps, STANDARD.trajectories)
        sizes = Sizes(20, 4, 2) if args.smoke else Sizes(args.samples)
        arms = make_arms(
            args.adapters, [0.05], ["trajectories"], list(range(args.seeds)), steps, None, trajectories, STANDARD.keep_steps
        )
        bench = load_teacher(directory, data, device, args.inception)
        left = args.minutes - (time.monotonic() - start) / 60
        merged = run_arms(bench, arms, args.output / directory.name, sizes=sizes, scales=tuple(args.scales), minutes=left)
        print(f"merged into {merged}")


def _report(args: argparse.Namespace) -> None:
    write_report(args.files or sorted(RESULTS.glob("*.json")), args.output)


if __name__ == "__main__":
    main()
