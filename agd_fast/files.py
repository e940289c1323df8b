"""Writing files so that a reader never meets half of one."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

_METADATA, _SEAL = "agd_fast", "seal"
PARTIAL = ".partial"  # ending of a file that is still being written


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a path beside `path` to write to; rename it over `path` once it is whole.

    Raises: OSError naming `path` when it cannot be written (disk full, read-only directory); what
    stood at `path` before is then untouched and nothing new is left behind.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}{PARTIAL}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        os.chmod(partial, 0o666 & ~_umask())  # safetensors writes files that nobody else may read
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):  # when the directory itself is out of reach nothing was written either
            partial.unlink(missing_ok=True)
        raise OSError(f"could not write {path}: {error}; nothing was left half-written") from error
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def append_text(path: str | os.PathLike[str], text: str) -> None:
    """Raises: OSError naming `path`."""
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise OSError(f"could not write {path}: {error}") from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def remove_partial(directory: Path) -> None:
    """Remove what a killed writer left in `directory`."""
    for leftover in directory.glob(f".*{PARTIAL}"):
        leftover.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    write_text(path, to_json(value))


def without_nan(value: Any) -> Any:
    """`value` with None in place of NaN and infinities, for which JSON has no numbers."""
    if isinstance(value, Mapping):
        return {name: without_nan(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def to_json(value: Any) -> str:
    return json.dumps(value, indent=2) + "\n"


def read_lines(path: str | os.PathLike[str]) -> list[str]:
    """The lines of a text file, without the byte order mark that Windows editors put first; a line may hold U+2028.

    Raises: ValueError naming `path` when it is not UTF-8.
    """
    try:
        return Path(path).read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text in UTF-8: {error}") from error


def read_json(path: str | os.PathLike[str]) -> Any:
    """Raises: ValueError naming `path` when it is not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error


def write_tensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str] | None = None,
    *,
    sealed: bool = False,
) -> None:
    with replacing(path) as partial:
        save_tensors(partial, tensors, metadata, sealed=sealed)


def save_tensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str] | None = None,
    *,
    sealed: bool = False,
) -> None:
    """Write to a path from `replacing`. The same content gives the same bytes: all metadata is one entry, since safetensors
    orders several at random. sealed: add a hash of the content, which `read_tensors` checks."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    entries = dict(metadata or {})
    if sealed:
        entries[_SEAL] = _seal(contiguous, entries)
    save_file(contiguous, path, {_METADATA: json.dumps(entries, sort_keys=True)})


def read_tensors(
    path: str | os.PathLike[str],
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors (memory-mapped) and metadata of a safetensors file.

    Raises: FileNotFoundError, PermissionError; ValueError naming `path` when it is truncated, not safetensors, or differs
    from the content that was sealed.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"expected a safetensors file at {path}, found none")
    if not os.access(path, os.R_OK):  # safetensors would say that it does not exist
        raise PermissionError(f"{path} may not be read by this user")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = json.loads((file.metadata() or {}).get(_METADATA, "{}"))
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or not a safetensors file ({error}); expected one written by agd_fast") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged: its metadata is not valid JSON ({error})") from error
    if not isinstance(metadata, dict):
        raise ValueError(f"{path} is damaged: expected an object as its metadata, found {metadata!r}")
    seal = metadata.pop(_SEAL, None)
    if seal is not None and seal != (found := _seal(tensors, metadata)):
        raise ValueError(f"{path} is damaged: expected a content with the hash {seal}, found {found}")
    return tensors, metadata


def _seal(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> str:
    text = fingerprint(tensors) + json.dumps(metadata, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def sha256(path: str | os.PathLike[str]) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def fingerprint(tensors: Mapping[str, torch.Tensor]) -> str:
    """A hash of names, shapes, dtypes and values, the same on every device. A tensor that is made of others (a quantised
    weight) is hashed by these."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        if is_traceable_wrapper_subclass(tensors[name]):
            parts, _ = tensors[name].__tensor_flatten__()  # type: ignore[attr-defined]
            digest.update(f"{name}{fingerprint({part: getattr(tensors[name], part) for part in parts})}".encode())
            continue
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def differences(expected: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """The entries, nested ones by dotted name, in which two JSON objects differ; empty when they are the same."""
    ours, theirs = _flat(expected), _flat(found)
    names = [name for name in sorted(ours.keys() | theirs.keys()) if ours.get(name, _ABSENT) != theirs.get(name, _ABSENT)]
    return "; ".join(f"{name}: expected {ours.get(name, _ABSENT)!r}, found {theirs.get(name, _ABSENT)!r}" for name in names)


_ABSENT = "(absent)"


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, entry in value.items():
        flat |= _flat(entry, f"{prefix}{name}.") if isinstance(entry, Mapping) else {f"{prefix}{name}": entry}
    return flat
