"""What tasks have written: what is complete, what is green, what counts; and all of it as one tar."""

from __future__ import annotations

import io
import shutil
import tarfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from agd_fast.distillation.checkpoint import CHECKPOINT_NAME
from agd_fast.files import PARTIAL, read_json, replacing

Content = dict[str, Any]
UNCHECKED = "unchecked"
DTYPES = ("_bfloat16", "_float16", "_float32")


class Results:
    """JSON files by task name. output: the folder that is written to. earlier: the folder of earlier measurements."""

    def __init__(self, output: Path, earlier: Path) -> None:
        self.output, self.earlier = output, earlier

    def whole(self, name: str) -> Content | None:
        """What a task wrote, if it need not run again."""
        found = self._read(name)
        return found if found is not None and found.get("complete", not found.get("red")) else None

    def green(self, name: str) -> bool:
        """Whether a check has finished and found nothing wrong."""
        found = self.whole(name)
        return found is not None and not wrong(found)

    def place(self, name: str, needs: Sequence[str]) -> Path:
        """The file that a task is to write: in `unchecked/`, unless all that it needs is green. It begins as a copy of
        earlier results, if there are any."""
        path = self.output / f"{name}.json"
        if not all(map(self.green, needs)):
            path = self._unchecked(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        begun = (self.output / f"{name}.json", self.earlier / f"{name}.json")
        if not path.exists() and (own := next((one for one in begun if one.exists()), None)):
            shutil.copyfile(own, path)
        return path

    def bring(self, name: str) -> None:
        """Copies the folder that a task continues with, if only an earlier session has it."""
        if not (self.output / name).exists() and (self.earlier / name).exists():
            shutil.copytree(self.earlier / name, self.output / name)

    def waits(self, name: str) -> bool:
        """Whether its result is complete and waits only for the checks that it needs."""
        path = self._unchecked(name)
        return path.exists() and bool(read_json(path).get("complete", True))

    def publish(self, name: str, needs: Sequence[str]) -> None:
        """Moves a result out of `unchecked/` once its checks are green: it counts from then on."""
        if all(map(self.green, needs)):
            folder = (self.output / name).parent
            folder.mkdir(parents=True, exist_ok=True)
            for file in self._unchecked(name).parent.glob(f"{Path(name).name}.*"):
                if not file.name.endswith(PARTIAL):  # a task that still runs is about to rename it
                    file.replace(folder / file.name)

    def red(self) -> dict[str, Content]:
        """The first wrong row of each check, by name."""
        names = {path.relative_to(folder).with_suffix("").as_posix() for folder in self._folders for path in _judging(folder)}
        found = {name: wrong(content) for name in sorted(names) if (content := self._read(name))}
        return {name: rows[0] for name, rows in found.items() if rows}

    def pack(self, tar: Path) -> None:
        """All of the output in one file, except for checkpoints."""
        with replacing(tar) as partial, tarfile.open(partial, "w:gz", compresslevel=1) as file:
            for path in sorted(self.output.rglob("*")):
                if path.is_file() and not path.name.endswith(PARTIAL) and path.name not in (CHECKPOINT_NAME, "lock"):
                    with suppress(FileNotFoundError):  # its task is still writing
                        content = path.read_bytes()
                        entry = tarfile.TarInfo(path.relative_to(self.output).as_posix())
                        entry.size, entry.mtime = len(content), int(time.time())
                        file.addfile(entry, io.BytesIO(content))

    @property
    def _folders(self) -> tuple[Path, ...]:
        return tuple(dict.fromkeys((self.output, self.earlier)))

    def _unchecked(self, name: str) -> Path:
        return self.output / UNCHECKED / f"{name}.json"

    def _read(self, name: str) -> Content | None:
        for spelling in _spellings(name):
            for folder in self._folders:
                if (path := folder / f"{spelling}.json").exists():
                    return read_json(path)
        return None


def wrong(content: Content) -> list[Content]:
    """The rows of a check that are not ok."""
    return [*content.get("red", ()), *(row for row in content.get("rows", ()) if not row.get("ok", True))]


def _judging(folder: Path) -> Iterator[Path]:
    yield from folder.glob("checks/*.json")
    yield from folder.glob("packing_kernels.json")


def _spellings(name: str) -> Iterator[str]:
    """The name, and for kernels the older one: earlier sessions checked all dtypes at once."""
    yield name
    if name.startswith("checks/kernel_") and (ending := next((one for one in DTYPES if name.endswith(one)), "")):
        yield name.removesuffix(ending)
