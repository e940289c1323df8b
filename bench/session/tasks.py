"""What waits for a GPU, in order of value."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from agd_fast.ops import OPS
from memory.graph_checks import WAYS
from speed.arms import ARMS
from speed.engine_checks import FAMILIES, SETTINGS

RESULTS = Path(__file__).parents[1] / "results"
COUNTS = sorted(map(str, RESULTS.glob("nfe_speed_meta*.json")))
SHORT = ("--steps", "30", "--eager-steps", "8", "--rounds", "6")
SHORTER = {  # where a step takes long on the card, or on a host that is not relieved of its work
    ("sdxl-1024", 1): ("--steps", "30", "--eager-steps", "4", "--rounds", "6"),
    ("sdxl-1024", 4): ("--steps", "10", "--eager-steps", "3", "--rounds", "4"),
    ("sdxl-1024", 16): ("--steps", "6", "--eager-steps", "2", "--rounds", "3"),
}
NFE = ("unguided", "cfg", "agd", "cfg_compiled", "unguided_engine", "agd_engine")
AT_ONE = ("agd_naive", "cfg_engine")  # only at batch 1
CHOSEN = ("unguided", "agd", "unguided_engine", "agd_engine")
MODELS = {  # family of the tiny denoiser that the engine is checked on
    "sdxl-1024": "sdxl",
    "dit-xl2-256": "dit",
    "sd21-768": "sd15",
    "sd3-medium-1024": "sd3",
    "pixart-sigma-1024": "pixart",
    "wan-1.3b": "wan",
    "qwen-image": "qwenimage",
}
FIRST = (("sdxl-1024", 1), ("sdxl-1024", 16), ("dit-xl2-256", 1))
SECOND = (("dit-xl2-256", 16), ("dit-xl2-256", 4), ("sdxl-1024", 4))
LAST = tuple((model, 1) for model in MODELS if model not in ("sdxl-1024", "dit-xl2-256"))
OURS = ("recompute", "blocks", "4bit", "8bit", "exact")
MEMORY = {  # options for distilling SDXL at 1024²
    "cap8": ("--cap", "8GiB", "--modes", *OURS),
    "int8_cap6": ("--cap", "6GiB", "--base", "int8", "--modes", *OURS[:2]),
    "whole_cap8": ("--cap", "8GiB", "--whole", "--modes", "blocks"),
    "whole_int8_cap6": ("--cap", "6GiB", "--base", "int8", "--whole", "--modes", "blocks"),
    "uncapped": ("--modes", "eager", "checkpointing"),
    "graphed_packed_cap8": ("--cap", "8GiB", "--graphed", "--modes", "4bit", "8bit"),
    "graphed_cap8": ("--cap", "8GiB", "--graphed", "--modes", "recompute", "4bit", "blocks"),
    "graphed": ("--graphed", "--modes", "eager", "checkpointing"),
    "images_at_24": ("--images-per-second", "--budget", "24GiB"),
    "images_at_24_graphed": ("--images-per-second", "--budget", "24GiB", "--graphed"),
}
DTYPES = ("bfloat16", "float16", "float32")
UNSEEN = ("activated_linear", "projection_mix", "projection_scores", "residual_norm", "gated_lora")  # on a card, by themselves
PACKING, GRAPHED = "checks/packing", "checks/graphed_passes"


@dataclass(frozen=True)
class Task:
    """A Python command that writes the JSON at its name. {json}, {lock}, {output}, {minutes} and {patience} stand for its
    file, the session's lock and folder, the minutes that are left, and the seconds after which none are left for taking times.

    needs: names of checks. Until they are all green, what it writes does not count.
    times: whether it takes times, for which it stops all others (see `speed.hardware.quiet`).
    processes: how many it keeps busy at the same time. least: with fewer seconds left it is not started, by experience.
    settings: environment variables.
    """

    name: str
    command: Sequence[str]
    needs: Sequence[str] = ()
    times: bool = False
    processes: int = 1
    least: float = 20
    settings: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_check(self) -> bool:
        return self.name.startswith("checks/")


Stage = list[Task]  # its times are taken before those of the next stage


def all_stages() -> list[Stage]:
    products = [name for name in sorted(OPS) if name not in UNSEEN]
    return [
        [of_engine("sdxl"), of_engine("dit"), *(speed(*one) for one in FIRST), graphed_passes()],
        [packing_check(), memory("graphed_packed_cap8"), *(speed(*one) for one in SECOND), memory("images_at_24_graphed")],
        [Task("packing_kernels", alone("packing_kernels.py"), times=True)],
        [*(check for op in (*UNSEEN, *products) for check in of_kernel(op)), chosen_kernels("dit-xl2-256")],
        [memory(name) for name in ("graphed_cap8", "graphed", "images_at_24", "cap8", "int8_cap6", "uncapped")],
        [kernel_speed(op) for op in (*UNSEEN, *products)],
        [chosen_kernels("sdxl-1024"), memory("whole_int8_cap6"), memory("whole_cap8")],
        [*(memory(name, "cross_attention") for name in ("cap8", "int8_cap6", "uncapped")), memory("uncapped", "reference")],
        [of_engine("sd15"), *sanitizer(), *(of_engine(name) for name in FAMILIES if name not in ("sdxl", "dit", "sd15"))],
        *([speed(*one)] for one in LAST),
    ]


def photographs(data: Path) -> list[Stage]:
    """A session of its own: a teacher is trained by the clock, so that nothing may run beside it."""
    command = ["fidelity.py", "photographs", "--data", str(data.resolve()), "--output", "{output}/photographs"]
    command += ["--minutes", "{minutes}", "--teacher-minutes", "6"]  # in time, with everything before and after it
    return [[Task("photographs", command, settings={"OMP_NUM_THREADS": "8"})]]


def of_engine(family: str) -> Task:
    own = ["-m", "speed.engine_checks", "--family", family, "--json", "{json}"]
    one = {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
    return Task(f"checks/engine_{family}", own, processes=len(SETTINGS), least=40, settings=one)


def of_kernel(op: str) -> list[Task]:
    """One task per dtype, the longest first."""
    own = ["-m", "speed.kernel_checks", "--op", op, "--json", "{json}", "--dtype"]
    return [Task(f"checks/kernel_{op}_{dtype}", [*own, dtype]) for dtype in reversed(DTYPES)]


def kernel_speed(op: str) -> Task:
    own = ["-m", "speed.kernel_speeds", "--op", op, "--json", "{json}", "--lock", "{lock}"]
    return Task(f"kernels/{op}", own, [task.name for task in of_kernel(op)], times=True)


def speed(model: str, batch: int) -> Task:
    """Speed without our kernels: whether they win can only be measured on an otherwise idle card."""
    arms = [*NFE, *(AT_ONE if batch == 1 else ())]
    command = [*nfe(model, batch), *arms, "--lock", "{lock}"]
    processes = sum(ARMS[arm].compiled for arm in arms) + 1
    if model == "qwen-image":  # no card can hold it four times
        processes = 1
    else:
        command += ["--processes", "--patience", "{patience}"]
    threads = "2" if model.startswith("dit") else "4"
    own = {"AGD_FAST_KERNELS": "never", "TORCHINDUCTOR_COMPILE_THREADS": threads}
    return Task(f"nfe_speed/{model}_{batch}", command, [engine_of(model)], True, processes, least=110, settings=own)


def chosen_kernels(model: str) -> Task:
    """Speed with the kernels that win here, as measured in the run."""
    needs = [engine_of(model), *(task.name for op in sorted(OPS) for task in of_kernel(op))]
    own = {"AGD_FAST_KERNELS": "auto", "TORCHINDUCTOR_COMPILE_THREADS": "8"}
    return Task(f"nfe_speed_kernels/{model}_1", alone(*nfe(model, 1), *CHOSEN), needs, True, least=90, settings=own)


def nfe(model: str, batch: int) -> list[str]:
    command = [
        "nfe_speed.py",
        "--model",
        model,
        "--batch",
        str(batch),
        "--dtype",
        "bf16",
        *SHORTER.get((model, batch), SHORT),
        "--profile",
        "--counts",
        *COUNTS,
    ]
    return [*command, "--json", "{json}", "--arms"]


def engine_of(model: str) -> str:
    return f"checks/engine_{MODELS[model]}"


def memory(name: str, adapter: str = "default") -> Task:
    """Where only one image at a time fits, the optimizer steps after 8 images, not 32; its share of a time is then larger."""
    needs = [PACKING, *([GRAPHED] if "--graphed" in MEMORY[name] else [])]
    times = "--whole" not in MEMORY[name]  # for --whole, only its use of the card counts
    own = [
        "distill_memory.py",
        "--model",
        "sdxl-1024",
        *MEMORY[name],
        "--json",
        "{json}",
        *(("--lock", "{lock}") if times else ()),
    ]
    images = () if name.startswith("images_at") else ("--images", "8", "--adapter", adapter)
    full = f"distill_memory/{name}" + ("" if adapter == "default" else f"_{adapter}")
    return Task(full, [*own, *images, "--minutes", "{minutes}"], needs, times=times, least=45)


def graphed_passes() -> Task:
    return Task(GRAPHED, ["-m", "memory.graph_checks", "--json", "{json}"], processes=len(WAYS), least=40)


def packing_check() -> Task:
    return Task(PACKING, judged("--", "packing_kernels.py", "--check-only"))


def sanitizer() -> list[Task]:
    """Checks every kernel at small shapes for accesses outside of allocated memory."""
    checked = {"packing": ("packing_kernels.py", "--check-only"), "kernels": ("-m", "speed.kernel_checks", "--odd")}
    return [Task(f"checks/sanitizer_{name}", judged("--sanitizer", "--", *command)) for name, command in checked.items()]


def judged(*command: str) -> list[str]:
    return ["-m", "session.judged", "--json", "{json}", *command]


def alone(*command: str) -> list[str]:
    """A command that takes times from beginning to end."""
    own = command if "--json" in command else (*command, "--json", "{json}")
    return ["-m", "session.alone", "{lock}", sys.executable, *own]
