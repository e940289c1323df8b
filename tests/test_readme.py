"""The README's Python runs as it stands, at a reduced number of steps."""

import re
from pathlib import Path

import pytest

import agd_fast as agd
from agd_fast.families import SPECS

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"


def test_readme(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    defaults = agd.distill.__kwdefaults__
    monkeypatch.setitem(defaults, "train_config", agd.TrainConfig(steps=2))
    monkeypatch.setitem(defaults, "trajectories", 10)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) == 4
    exec(compile("\n".join(blocks), "README.md", "exec"), {"__name__": "readme"})


@pytest.mark.parametrize("page", ["README.md", "CHANGELOG.md"])
def test_as_many_denoisers_are_said_to_be_known_as_are(page):
    said = re.findall(r"known, of (\d+) classes|(\d+) denoiser classes are known", (ROOT / page).read_text(encoding="utf-8"))
    assert ["".join(one) for one in said] == [str(len(SPECS))]
