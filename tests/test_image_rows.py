"""Rows of prompts and pictures, read from a file."""

import json

import numpy as np
import pytest
from PIL import ExifTags, Image
from typer.testing import CliRunner

from agd_fast.cli import app
from agd_fast.datasets import read_inputs, read_prompts
from agd_fast.distillation.preview import grid_of
from agd_fast.pipelines.inputs import described
from helpers_pipeline_teacher import states_in
from tiny import sd15
from tiny.images import SIBLINGS, images
from tiny.text import prompts


@pytest.fixture
def rows(tmp_path):
    """A file of two rows, whose pictures lie beside it."""
    lines = []
    for row, prompt in enumerate(prompts(2)):
        sd15.image(row).save(tmp_path / f"{row}.png")
        lines.append(json.dumps({"prompt": prompt, "image": f"{row}.png"}))
    (tmp_path / "rows.jsonl").write_text("\n".join([*lines, ""]))
    return tmp_path / "rows.jsonl"


def test_rows_are_read_with_their_pictures(rows):
    assert described(read_inputs(rows)) == described(images(2))
    rows.write_text(json.dumps({"prompt": "cat.png", "image": ["0.png", "1.png"], "noise_level": 20}))
    found = read_inputs(rows)
    assert (found["prompt"], found["noise_level"]) == (["cat.png"], [20])
    assert described(found["image"]) == described([[sd15.image(0), sd15.image(1)]])


@pytest.mark.parametrize("read", [read_prompts, lambda path: read_inputs(path)["prompt"]], ids=["prompts", "inputs"])
def test_lines_are_what_an_editor_shows(read, tmp_path):
    """With the mark and the ends of lines of Windows; a line separator of Unicode's within a prompt is a part of it."""
    file, texts = tmp_path / "lines.txt", ["a cat", "a\u2028dog\u0085", "ein Mädchen"]
    as_rows = [json.dumps({"prompt": text}, ensure_ascii=False) for text in texts]
    lines = texts if read is read_prompts else as_rows
    file.write_bytes(("\ufeff" + "\r\n".join([*lines, "", ""])).encode())
    assert read(file) == [text.strip() if read is read_prompts else text for text in texts]
    file.write_text("\n".join(lines), encoding="latin-1", errors="replace")
    with pytest.raises(ValueError, match=r"lines.txt is not a text in UTF-8: .* byte 0x"):
        read(file)


def test_a_file_without_prompts_is_named(tmp_path):
    (file := tmp_path / "none.txt").write_text("\n \n")
    with pytest.raises(ValueError, match=r"expected at least one prompt in .*none.txt, found none"):
        read_prompts(file)


def test_pictures_of_rows_are_as_one_sees_them(rows):
    turned = Image.new("RGB", (8, 4))
    exif = turned.getexif()
    exif[ExifTags.Base.Orientation] = 6
    turned.save(rows.with_name("turned.jpg"), exif=exif)
    rows.write_text(json.dumps({"prompt": "a\u2028cat", "image": "turned.jpg"}, ensure_ascii=False), encoding="utf-8")
    found = read_inputs(rows)
    assert (found["prompt"], found["image"][0].size) == (["a\u2028cat"], (4, 8))
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(rows.with_name("depth.png"))
    rows.write_text(json.dumps({"image": "depth.png"}))
    with pytest.raises(ValueError, match="line 1: expected a picture of 8 bits a channel, found mode I;16 in .*depth.png"):
        read_inputs(rows)


def test_pictures_with_palettes_are_told_apart():
    red, blue = (Image.new("P", (2, 2)) for _ in range(2))
    red.putpalette([255, 0, 0])
    blue.putpalette([0, 0, 255])
    assert described(red) != described(blue)


def test_pictures_of_several_sizes_make_a_grid():
    small, large = Image.new("RGB", (2, 4), "red"), Image.new("RGB", (3, 2), "blue")
    grid = grid_of([[large, small], [small, large]])
    assert grid.size == (6, 8)
    assert [grid.getpixel(at) for at in ((2, 1), (3, 3), (5, 3), (1, 7), (3, 4))] == [
        (0, 0, 255),
        (255, 0, 0),
        (0, 0, 0),
        (255, 0, 0),
        (0, 0, 255),
    ]


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        (None, FileNotFoundError, "one JSON object a line, found no file"),
        ("", ValueError, "expected at least one line"),
        ("a red cat", ValueError, "line 1: expected a JSON object, found 'a red cat'"),
        ("[1]", ValueError, r"line 1: expected a JSON object, found '\[1\]'"),
        ('{"prompt": "a"}\n\n{"image": 1}', ValueError, r"line 3: expected \['prompt'\] as before, found \['image'\]"),
        ('{"image": "none.png"}', FileNotFoundError, "line 1: found no picture .*none.png"),
    ],
)
def test_rows_that_cannot_be_read_are_named(tmp_path, text, error, message):
    if text is not None:
        (tmp_path / "rows.jsonl").write_text(text)
    with pytest.raises(error, match=message):
        read_inputs(tmp_path / "rows.jsonl")


def test_the_command_line_takes_rows_of_pictures(rows, tmp_path, monkeypatch):
    family = SIBLINGS["sdxl_img2img"]
    for command in ("distill", "sample"):
        monkeypatch.setattr(f"agd_fast.cli.{command}.load_model", lambda *_, **__: family.pipeline())
    common = ["--model", "tiny", "--inputs", rows, "--call", '{"strength": 1.0}']
    sizes = ["--trajectories", 2, "--sampling-steps", 2, 2, "--steps", 1, "--batch-size", 1, "--hidden", 2, "--validation", 0]
    commands = [
        ["distill", "--output", tmp_path / "run", *common, *sizes, "--quiet"],
        ["sample", tmp_path / "run", "--output", tmp_path / "grid.png", *common, "--steps", 2],
    ]
    for command in commands:
        done = CliRunner().invoke(app, list(map(str, command)))
        assert done.exit_code == 0, done.output
    assert len(states_in(tmp_path / "run")) == 2
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.size == (32, 16)
    done = CliRunner().invoke(app, list(map(str, [*commands[1], "--prompt", "a"])), env={"COLUMNS": "300"})
    assert done.exit_code == 2 and "expected one of --prompt, --inputs, --labels; found --prompt and --inputs" in done.output
