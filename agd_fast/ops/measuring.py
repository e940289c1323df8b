"""Is an op faster on its kernel than in torch, for these shapes on this card? Measured once and kept on disk."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import tempfile
import types
from collections.abc import Callable, Mapping, Sequence
from importlib import util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from agd_fast.files import read_json, write_json
from agd_fast.ops.exactness import off
from agd_fast.ops.registry import NAMESPACE, Op
from agd_fast.warning import described, warn

WARMUP_MS, MEASURED_MS = 10, 50


def cache_dir() -> Path:
    """AGD_FAST_CACHE, or agd_fast in the user's cache folder."""
    if own := os.environ.get("AGD_FAST_CACHE"):
        return Path(own)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "agd_fast"
    except RuntimeError:  # a user without a home, as in containers
        return Path(tempfile.gettempdir()) / "agd_fast"


def key_of(name: str, args: tuple[Any, ...]) -> str:
    """The op with the shapes, strides and dtypes of its arguments."""
    return f"{name}({', '.join(_text(argument) for argument in args)})"


def _text(argument: Any) -> str:
    if not isinstance(argument, Tensor):
        return repr(argument)
    strides = "" if argument.is_contiguous() else f"@{'x'.join(map(str, argument.stride()))}"
    return f"{str(argument.dtype).removeprefix('torch.')}[{'x'.join(map(str, argument.shape))}]{strides}"


class Verdicts:
    """What was measured on one card with one version of torch, Triton and the kernels, by key; kept in the file `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[str, dict[str, Any]] = self._read()

    @staticmethod
    def of_this_card() -> Verdicts:
        """The verdicts on the current device."""
        return _verdicts_on(torch.cuda.current_device())

    def get(self, key: str, default: Any = None) -> Any:
        return self.found.get(key, default)

    def put(self, key: str, verdict: dict[str, Any]) -> None:
        """Keep it, beside what other processes wrote meanwhile. If the disk cannot be written to, it will be measured again."""
        self.found = {**self._read(), **self.found, key: verdict}
        try:
            write_json(self.path, self.found)
        except OSError as error:
            warn(f"what was measured of kernels is kept for this process only: {error}")

    def _read(self) -> dict[str, dict[str, Any]]:
        try:
            found = read_json(self.path)
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except (OSError, ValueError) as error:
            warn(f"what was measured of kernels is measured again: {self.path} cannot be read ({error})")
            return {}
        return {key: one for key, one in found.items() if isinstance(one, dict)} if isinstance(found, dict) else {}


@functools.cache
def _verdicts_on(device: int) -> Verdicts:
    import triton

    major, minor = torch.cuda.get_device_capability(device)
    parts = [torch.cuda.get_device_name(device), f"sm{major}{minor}", torch.__version__, triton.__version__, _sources()]
    name = "_".join(part.replace(" ", "-").replace("/", "-") for part in parts)
    return Verdicts(cache_dir() / "kernels" / f"{name}.json")


def _sources() -> str:
    """A digest of the kernels' code: other code must be measured anew."""
    spec = util.find_spec(NAMESPACE)
    folder = Path(next(iter(spec.submodule_search_locations)))  # type: ignore[union-attr, arg-type]
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def measure(op: Op, args: tuple[Any, ...]) -> dict[str, Any]:
    """The verdict on an op: its kernel in each configuration against the reference, eager and compiled."""
    given = [_random(one) for one in args]
    kernels = {json.dumps(config, sort_keys=True): config for config in op.configs()}
    launchers = {name: functools.partial(op.kernel(), config=config) for name, config in kernels.items()}
    return _race(op.reference, launchers, given, op.in_double(given), kernels, op.library)


def measure_join(x: Tensor, thin: Tensor, wide: Tensor) -> dict[str, Any]:
    """The verdict on one product with both weights together in place of two."""
    given = [_random(one) for one in (x, thin, wide)]
    both = torch.cat(given[1:])

    def two(x: Tensor, thin: Tensor, wide: Tensor) -> tuple[Tensor, Tensor]:
        return F.linear(x, thin), F.linear(x, wide)

    def one(x: Tensor, thin: Tensor, wide: Tensor) -> tuple[Tensor, ...]:
        return F.linear(x, both).split([len(thin), len(wide)], dim=-1)

    return _race(two, {"joined": one}, given, [one.double() for one in given], {"joined": None})


def measure_library(op: Op, args: tuple[Any, ...]) -> dict[str, Any]:
    """The verdict on a library's form of an op, against the reference."""
    assert op.library is not None
    given = [_random(one) for one in args]
    return _race(op.reference, {"library": op.library}, given, op.in_double(given), {"library": None})


def _race(
    reference: Callable[..., Any],
    ours: Mapping[str, Callable[..., Any]],
    given: Sequence[Any],
    exact: Sequence[Any],
    configs: dict[str, Any],
    library: Callable[..., Any] | None = None,
) -> dict[str, Any]:
    """Milliseconds of the reference, eager and compiled, of a library's form of it, and of ours, on random data.

    wins: whether one of ours is right and faster than all others. config: that of the fastest, if so. reason: why not, else.
    """
    from triton.testing import do_bench

    true, plain = reference(*exact), reference(*given)
    times: dict[str, float] = {}
    reasons: list[str] = []
    torch_ways = {"eager": reference, "compiled": torch.compile(_anew(reference), fullgraph=True, dynamic=False)}
    for name, function in {**torch_ways, **({"library": library} if library else {}), **ours}.items():
        try:
            if reason := off(function(*given), plain, true):
                reasons.append(f"{name} is off the reference ({reason})")
                continue
            run = functools.partial(function, *given)
            times[name] = do_bench(run, warmup=WARMUP_MS, rep=MEASURED_MS, return_mode="median")
        except Exception as error:  # whatever a compiler may raise: then it is no contender
            reasons.append(f"{name} failed ({described(error)})")
    return verdict_of(times, configs, reasons)


def _anew(function: Any) -> Callable[..., Any]:
    """The function with a code object of its own: torch compiles the same one for eight shapes, and then no more."""
    code = function.__code__.replace()
    return types.FunctionType(code, function.__globals__, function.__name__, function.__defaults__, function.__closure__)


def verdict_of(times: dict[str, float], configs: dict[str, Any], reasons: list[str]) -> dict[str, Any]:
    """times: milliseconds of what ran and gave right results; those of the kernel have the names in `configs`. reasons: why
    others are not among them."""
    torch_ms = min((ms for name, ms in times.items() if name not in configs), default=float("inf"))
    best = min((name for name in times if name in configs), key=times.__getitem__, default=None)
    verdict: dict[str, Any] = {"milliseconds": times}
    if best is None or "compiled" not in times:
        return {**verdict, "wins": False, "reason": "; ".join(reasons)}
    if times[best] >= torch_ms:
        return {**verdict, "wins": False, "reason": f"torch takes {torch_ms:.3g} ms, its kernel {times[best]:.3g} ms"}
    return {**verdict, "wins": True, "config": configs[best]}


def _random(leaf: Any) -> Any:
    """Random values in the strides of the argument, small enough not to overflow in float16."""
    if not isinstance(leaf, Tensor):
        return leaf
    size = 1 + sum((length - 1) * stride for length, stride in zip(leaf.shape, leaf.stride(), strict=True))
    own = torch.Generator(leaf.device).manual_seed(size)  # the user's random numbers must not depend on what is measured
    values = torch.randn(size if leaf.numel() else 0, generator=own, device=leaf.device).to(leaf.dtype)
    return values.as_strided(leaf.shape, leaf.stride())
