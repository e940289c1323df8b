"""The commands that the pages give for the bench exist, take what they are given, and cover what was measured."""

import argparse
import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "bench"))

import fidelity
from quality.results import Result

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands(page):
    """`python bench/NAME.py ...` of a page: names and arguments, without what stands for more of them."""
    text = page.read_text(encoding="utf-8")
    for name, value in re.findall(r'^(\w+)="(python bench/.*?)"', text, flags=re.MULTILINE):
        text = text.replace(f"${name} ", f"{value} ")
    for name, rest in re.findall(r"python bench/(\w+)\.py([^`\n\")]*)", text):
        parts = shlex.split(rest, comments=True)
        yield name, [part for part, before in zip(parts, ["", *parts], strict=False) if part != "…" or before.startswith("--")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_take_what_they_are_given(page, monkeypatch):
    parse = argparse.ArgumentParser.parse_args

    def only_parse(parser, *arguments):
        parse(parser, *arguments)
        sys.exit(0)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", only_parse)
    for name, arguments in commands(page):
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        with pytest.raises(SystemExit) as done:
            importlib.import_module(name).main()
        assert done.value.code == 0


def test_what_docs_fidelity_shows_can_be_run_again():
    parser = fidelity.make_parser()
    given = [parser.parse_args(arguments) for name, arguments in commands(ROOT / "docs" / "measured.md") if name == "fidelity"]
    runs = [args for args in given if args.call is fidelity._run]
    assert runs and all(args.held_out == 50 for args in given if hasattr(args, "held_out"))
    names = {arm.name for args in runs for arm in fidelity.arms_of(args)}
    claims = {}
    for args in [args for args in given if args.call is fidelity._claims]:
        for name in args.names or fidelity.CLAIMS:
            claims.setdefault((args.teacher.name, name), args.trajectories)  # what is there is not done again
    for file in sorted((ROOT / "bench" / "results" / "fidelity").glob("*.json")):
        merged = Result(file).merged
        assert {row["name"] for row in merged["rows"]} <= names
        assert {row["claim"]: row["trajectories"] for row in merged["claims"]}.items() <= {
            claim: count for (teacher, claim), count in claims.items() if teacher == file.stem
        }.items()
