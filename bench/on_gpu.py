"""All that waits for a GPU, in order of value, with one command that ends in time.

python bench/on_gpu.py                               # each task into its own JSON; those that are there are left alone
python bench/on_gpu.py --minutes 9 --output OUT --tar OUT/gpu.tar.gz
python bench/on_gpu.py --names 'checks/*' 'nfe_speed/dit*' --minutes 4
python bench/on_gpu.py --photographs PATH/cifar10_train_jpeg.npz --minutes 9.5      # by itself: a teacher takes most of that
python bench/on_gpu.py --list                        # the tasks, in order; an empty line where times wait for those before

On a bare machine: bench/gpu_session.sh. Same command, once more: it goes on. A figure that was taken before a change to what it
measures is to be taken again: move its JSON out of the way.

First what the library is for, SDXL's and DiT's steps, then distillation in little memory, bandwidth, kernels, other models.
Checks (kernels in every configuration and three dtypes, compute-sanitizer, tiny denoisers compiled and as one CUDA graph a step)
are against float64: off by no more than twice what PyTorch is in that dtype; those of training with passes as CUDA graphs are
against training without. They run beside what depends on them; until they are green its figures lie in `unchecked/`, and where
one is red they stay there, and the exit code is 1.

Tasks run at the same time, since most of each is compilation. While one of them takes times, the processes of all others are
stopped. At the end of the minutes all that runs is killed; what was written by then is whole. JSON that says it is not complete
holds what there was: rows with times tell of how many rounds. Its task is taken again, and leaves it until there is as much.

In 15 minutes of an H200 with 16 CPUs, 35 seconds of which are gone before it runs anything, by commands of at most 10 minutes:

    bash bench/gpu_session.sh OUT 6.5    # SDXL at 1 and 16, DiT at 1, checks of the engine and of graphed passes
    bash bench/gpu_session.sh OUT 4.5    # at once: DiT at 16 and 4, SDXL at 4, distillation in 4 and 8 bits, images a second
    bash bench/gpu_session.sh OUT 2.5    # bandwidth, DiT with the kernels that win; what is left comes first another time

With 17 processes at once DiT's arms were made in 2 minutes and SDXL's in 4; SDXL then took 35 seconds of times a batch. What the
end of a command kills goes on in the next with what was compiled.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from fnmatch import fnmatch
from pathlib import Path

import torch

from session.results import Results
from session.running import Session
from session.tasks import all_stages, photographs

RESULTS = Path(__file__).parent / "results" / "gpu"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", nargs="+", default=["*"], metavar="GLOB", help="of tasks; default: all")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="after which what still runs is ended")
    parser.add_argument("--jobs", type=int, default=3 * (os.cpu_count() or 1) // 2, help="processes at the same time; 1.5 a CPU")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder to write to; what %(default)s holds is done, too")
    parser.add_argument("--tar", type=Path, help="keep all of the output in this one file as well, after every task")
    parser.add_argument(
        "--photographs",
        type=Path,
        metavar="NPZ",
        help="nothing but fidelity.py photographs on these; goes on in OUTPUT/photographs, for which 9.5 minutes are needed",
    )
    parser.add_argument("--together", action="store_true", help="no stages: times are taken of whatever is ready first")
    parser.add_argument("--list", action="store_true", help="only say which tasks there are")
    args = parser.parse_args()
    deadline = time.monotonic() + 60 * args.minutes
    stages = photographs(args.photographs) if args.photographs else all_stages()
    stages = [[task for task in stage if any(fnmatch(task.name, name) for name in args.names)] for stage in stages]
    if args.together:
        stages = [[task for stage in stages for task in stage]]
    if args.list:
        print("\n\n".join("\n".join(task.name for task in stage) for stage in stages if stage))
        return
    if not torch.cuda.is_available():
        parser.error("expected a CUDA device, found none")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    results = Results(args.output.resolve(), RESULTS)
    if args.photographs:
        results.bring("photographs")
    session = Session(stages, results, deadline, args.jobs, args.tar)
    session.run()
    sys.exit(report(session))


def report(session: Session) -> int:
    """Says what is left and what is wrong; the exit code."""
    if session.left:
        print(f"left for another time: {', '.join(session.left)}")
    for name in session.failed:
        print(f"failed: {name}, see logs/{name}.log")
    for task in (task for _, task in session.tasks if session.results.waits(task.name)):
        print(f"unchecked: {task.name} counts for nothing until all of it is green: {', '.join(task.needs)}")
    red = session.results.red()
    for name, row in red.items():
        print(f"red: {name}, first {str(row)[:300]}; delete its JSON to check again")
    return int(bool(red or session.failed))


if __name__ == "__main__":
    main()
