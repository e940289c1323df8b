"""What a folder of trajectories holds, and the check that it holds just that."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from agd_fast.files import differences, read_json, read_tensors, sha256, write_json

MANIFEST_NAME = "manifest.json"
FORMAT_VERSION = 2


@dataclass(frozen=True)
class Plan:
    """Everything that decides the states, so that one plan gives one set of files.

    source: "trajectories" (guided by the teacher), "data" (noised samples) or "student" (driven by `adapter`).
    steps: lowest and highest number of steps of a schedule; each shard draws one. calls: number of calls of the denoiser for
        each of these numbers of steps; some schedulers make more than one per step.
    keep: states kept of each trajectory; None keeps all. shard_size: trajectories per shard.
    guidance: name of the rule that made the targets. model, scheduler, conditions, data, adapter: what they are and a hash of
        what they hold; adapter is None if none took part.
    """

    source: str
    trajectories: int
    shard_size: int
    steps: tuple[int, int]
    calls: tuple[int, ...]
    keep: int | None
    guidance_range: tuple[float, float]
    seed: int
    dtype: str
    sample_shape: tuple[int, ...]
    guided_channels: int
    prediction_type: str
    guidance: str
    model: dict[str, str]
    scheduler: dict[str, Any]
    conditions: dict[str, str]
    null_condition: dict[str, Any]
    data: str | None
    adapter: dict[str, Any] | None

    @property
    def id(self) -> str:
        return _id_of(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        return as_json(asdict(self))

    @property
    def shards(self) -> list[Shard]:
        """The shards in order; each knows its own random numbers, so any can be made alone."""
        starts = range(0, self.trajectories, self.shard_size)
        return [Shard(self, index, start, min(self.shard_size, self.trajectories - start)) for index, start in enumerate(starts)]

    @property
    def states(self) -> int:
        return sum(shard.states for shard in self.shards)

    @property
    def bytes(self) -> int:
        """Size of the states, without their conditions."""
        values = torch.Size(self.sample_shape).numel() + self.guided_channels * torch.Size(self.sample_shape[1:]).numel()
        return self.states * (values * getattr(torch, self.dtype).itemsize + 2 * 8 + 2 * 4)  # t, condition; ω, step


@dataclass(frozen=True)
class Shard:
    """The trajectories start … start + count − 1 of a plan; they share one schedule."""

    plan: Plan
    index: int
    start: int
    count: int

    @property
    def name(self) -> str:
        return f"shard-{self.index:05d}.safetensors"

    @property
    def steps(self) -> int:
        low, high = self.plan.steps
        return int(torch.randint(low, high + 1, (1,), generator=self.generator()))

    @property
    def calls(self) -> int:
        return self.plan.calls[self.steps - self.plan.steps[0]]

    @property
    def kept(self) -> int:
        return self.calls if self.plan.keep is None else min(self.plan.keep, self.calls)

    @property
    def states(self) -> int:
        return self.count * self.kept

    def generator(self, stream: int = 0) -> torch.Generator:
        """Random numbers of this shard; streams are independent of each other."""
        key = hashlib.sha256(f"{self.plan.seed}/{self.index}/{stream}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(key[:7], "big"))


@dataclass
class Manifest:
    """A plan and the files that are whole: name → rows, bytes, sha256."""

    directory: Path
    plan: dict[str, Any]
    plan_id: str
    files: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        return self.directory / MANIFEST_NAME

    @classmethod
    def read(cls, directory: Path) -> Manifest:
        """Raises: FileNotFoundError; ValueError when it is not a manifest, damaged or of another format version."""
        path = directory / MANIFEST_NAME
        if not path.is_file():
            raise FileNotFoundError(f"expected a {MANIFEST_NAME} in {directory}, found none")
        content = read_json(path)
        version = content.get("format_version") if isinstance(content, dict) else None
        if version != FORMAT_VERSION:
            raise ValueError(f"{path} has format_version {version!r}; expected {FORMAT_VERSION}")
        missing = sorted({"plan", "plan_id", "files"} - set(content))
        if missing:
            raise ValueError(f"{path} lacks the entries {missing}")
        advice = "remove it to collect again"
        plan, plan_id, files = (content[name] for name in ("plan", "plan_id", "files"))
        if not isinstance(plan, dict) or _id_of(plan) != plan_id:
            raise ValueError(f"{path} is damaged: expected a plan with the id {plan_id!r}, found {_short(plan)}; {advice}")
        if not isinstance(files, dict) or not all(_is_file(name, entry) for name, entry in files.items()):
            raise ValueError(f"{path} is damaged: expected files with rows, bytes and sha256, found {_short(files)}; {advice}")
        return cls(directory, plan, plan_id, files)

    def write(self) -> None:
        content = {"format_version": FORMAT_VERSION, "plan_id": self.plan_id, "plan": self.plan, "files": self.files}
        write_json(self.path, content)

    def add(self, name: str, rows: int) -> None:
        path = self.directory / name
        self.files[name] = {"rows": rows, "bytes": path.stat().st_size, "sha256": sha256(path)}
        self.write()

    def require_plan(self, plan: Plan) -> None:
        """Raises: ValueError naming each entry in which this folder's plan differs."""
        if differing := differences(plan.to_dict(), self.plan):
            raise ValueError(f"{self.directory} holds other trajectories ({differing}); give another folder or remove this one")

    def check_file(self, name: str, verify: bool = True) -> None:
        """Raises: ValueError naming a file that is missing, truncated or changed."""
        path, entry = self.directory / name, self.files[name]
        if not path.is_file():
            raise ValueError(f"{path} is listed in {MANIFEST_NAME} but missing")
        size = path.stat().st_size
        if size != entry["bytes"]:
            raise ValueError(f"{path} is corrupted: expected {entry['bytes']:,} bytes, found {size:,}")
        if verify and (found := sha256(path)) != entry["sha256"]:
            raise ValueError(f"{path} is corrupted: expected sha256 {entry['sha256'][:16]}…, found {found[:16]}…")

    def check_foreign(self) -> None:
        """Raises: ValueError naming a shard of another plan that lies in the folder."""
        for path in sorted(self.directory.glob("shard-*.safetensors")):
            if path.name in self.files:
                continue
            try:
                _, metadata = read_tensors(path)
            except ValueError:
                continue  # unreadable, and not in use
            if metadata.get("plan_id") != self.plan_id:
                raise ValueError(
                    f"{path} is foreign: expected a file of plan {self.plan_id}, found {metadata.get('plan_id', 'no plan')}"
                )


def as_json(value: Any) -> Any:
    """A value as it is read back from the manifest."""
    return json.loads(json.dumps(value, default=str))


def _id_of(plan: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()[:16]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


def _is_file(name: str, entry: Any) -> bool:
    types = {key: type(value) for key, value in entry.items()} if isinstance(entry, dict) else {}
    return Path(name).name == name and types == {"rows": int, "bytes": int, "sha256": str}
