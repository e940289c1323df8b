"""Where an op runs on its Triton kernel and where in torch: the one place that decides.

"never" and "always" fix the choice; "auto" takes the kernel on CUDA where it was measured to beat torch, eager and compiled, for
those shapes on that card. What was measured is kept on disk.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from importlib import util
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from agd_fast.ops.measuring import Verdicts, key_of, measure, measure_join, measure_library
from agd_fast.ops.registry import NAMESPACE, OPS, Op, tensors_of
from agd_fast.warning import described, warn

Kernels = Literal["auto", "always", "never"]
VARIABLE = "AGD_FAST_KERNELS"
EPILOGUE = {"cuda": "tanh", "cpu": "none"}  # the gelu approximation that torch._addmm_activation uses there
OLDEST = (8, 0)  # oldest compute capability that the kernels are compiled for
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_failed: dict[str, str] = {}  # ops whose kernel did not run in this process, and why


def default_policy() -> Kernels:
    """The policy that the environment sets, "auto" where it sets none. Raises: ValueError for an unknown one."""
    return checked_policy(os.environ.get(VARIABLE) or "auto", f"the environment variable {VARIABLE}")


def checked_policy(found: Any, name: str = "kernels") -> Kernels:
    """`found`, if it is a policy. Raises: ValueError naming the known policies."""
    if found not in get_args(Kernels):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, get_args(Kernels)))}; found {found!r}")
    return found


@functools.cache
def missing() -> str:
    """Why no kernel can run in this process; empty when they can."""
    for package in ("triton", NAMESPACE):
        if util.find_spec(package) is None:
            return f"{package} is not installed"
    if not torch.cuda.is_available():
        return "no CUDA device"
    found = torch.cuda.get_device_capability()
    return "" if found >= OLDEST else f"{torch.cuda.get_device_name()} has compute capability {found}, older than {OLDEST}"


def refusal(op: Op, args: tuple[Any, ...], policy: Kernels) -> str:
    """Why an op with these arguments (fake tensors will do) is left to torch; empty where its kernel is to run."""
    args = op.complete(args)
    device = tensors_of(args)[0].device
    if policy == "never":
        return "kernels are switched off"
    if reason := _limit(op, args) or _failed.get(op.name, ""):
        return reason
    if policy == "always":
        return ""
    if device.type != "cuda":
        return f"tensors on {device.type}"
    if reason := missing():
        return reason
    with torch.cuda.device(device):
        return _lost(_verdict(key_of(op.name, args), functools.partial(measure, op, args)))


def _limit(op: Op, args: tuple[Any, ...]) -> str:
    """Why no kernel takes these arguments."""
    dtype = next((str(tensor.dtype) for tensor in tensors_of(args) if tensor.dtype not in _DTYPES), "")
    return op.limit(*args) or (f"{dtype} tensors" if dtype else "")


def refusal_of_join(x: Tensor, thin: Tensor, wide: Tensor, policy: Kernels) -> str:
    """Why x·thinᵀ and x·wideᵀ stay two products; empty where they are to be one product with both weights."""
    if policy != "auto":
        return "" if policy == "always" else "kernels are switched off"
    if not x.is_cuda:
        return f"tensors on {x.device.type}"
    if reason := missing():
        return reason
    with torch.cuda.device(x.device):
        key, race = key_of("joined_projections", (x, thin, wide)), functools.partial(measure_join, x, thin, wide)
        return _lost(_verdict(key, race))


def refusal_of_epilogue(x: Tensor, weight: Tensor, bias: Tensor, approximate: str, policy: Kernels) -> str:
    """Why the gelu of x·weightᵀ + bias stays a pass of its own; empty where the library's product is to end with it.

    x: [T, K]; weight: [N, K]; bias: [N].
    """
    if EPILOGUE.get(x.device.type) != approximate:
        return f"products on {x.device.type} do not end with a gelu of approximate={approximate!r}"
    if policy != "auto":
        return "" if policy == "always" else "it is switched off"
    if x.device.type != "cuda":
        return f"tensors on {x.device.type}"
    if reason := missing():
        return reason
    with torch.cuda.device(x.device):
        key, args = key_of("gelu_epilogue", (x, weight, bias)), (x, weight, bias, "gelu_tanh")
        return _lost(_verdict(key, functools.partial(measure_library, OPS["activated_linear"], args)))


def _verdict(key: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What was measured on this card, now or before; empty where nothing can be measured now."""
    verdicts = Verdicts.of_this_card()
    if torch.cuda.is_current_stream_capturing():
        return dict(verdicts.get(key, {}))
    return measured(verdicts, key, measure)


def measured(verdicts: Verdicts, key: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The verdict kept under a key; where there is none, it is measured now."""
    found = verdicts.get(key)
    if found is None:
        try:
            found = measure()
        except Exception as error:  # perhaps out of memory: measured another time
            return {"wins": False, "reason": f"could not be measured ({described(error)})"}
        if {"eager", "compiled"} <= found["milliseconds"].keys():  # else torch did not fully compete
            verdicts.put(key, found)
    return found


def _lost(verdict: dict[str, Any]) -> str:
    return "" if verdict.get("wins") else str(verdict.get("reason", "not measured: a CUDA graph was being recorded"))


def call(op: Op, *args: Any) -> Any:
    """Run an op in code that is not captured: on its kernel where that wins, else by its reference."""
    if torch.compiler.is_compiling() or refusal(op, args, default_policy()):
        return op.reference(*args)
    return op.overload(*args)


def run(op: Op, args: tuple[Any, ...]) -> Any:
    """What an opaque operator does."""
    if op.name in _failed or not tensors_of(args)[0].is_cuda or missing() or _limit(op, args):
        return op.reference(*args)
    return launched(op, args)


def launched(op: Op, args: tuple[Any, ...]) -> Any:
    """The kernel's result."""

    def kernel() -> Any:
        config = Verdicts.of_this_card().get(key_of(op.name, args), {}).get("config")
        return op.kernel()(*args, config=config)

    return or_reference(op.name, kernel, lambda: op.reference(*args), tensors_of(args)[0])


def or_reference(name: str, kernel: Callable[[], Any], reference: Callable[[], Any], like: Tensor) -> Any:
    """A kernel's result, on the device of `like`. If it does not compile or start, the reference is used from then on."""
    if name in _failed:
        return reference()
    try:
        with torch.cuda.device_of(like):  # Triton launches on the current device
            return kernel()
    except (ValueError, torch.OutOfMemoryError):  # wrong arguments, which the reference reports too, or no memory now
        return reference()
    except Exception as error:
        _failed[name] = f"its kernel failed ({described(error)})"
        warn(f"{name} runs in torch: {_failed[name]}")
        return reference()


def kernels_info() -> dict[str, Any]:
    """For display. policy: as the environment sets it. missing: why no kernel can run here. failed: ops whose kernel failed, and
    why. ops: all of them. measured: number of verdicts on this card, which are kept in the file `kept`."""
    found: dict[str, Any] = {"policy": default_policy(), "missing": missing(), "failed": dict(_failed), "ops": sorted(OPS)}
    if not missing():
        verdicts = Verdicts.of_this_card()
        found |= {"measured": len(verdicts.found), "kept": str(verdicts.path)}
    return found
