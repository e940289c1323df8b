"""agd_fast.files: whole files or none."""

import json
import os
import stat

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from agd_fast.files import (
    append_text,
    differences,
    fingerprint,
    read_json,
    read_tensors,
    remove_partial,
    replacing,
    sha256,
    without_nan,
    write_json,
    write_tensors,
)
from helpers_distillation import assert_same_tensors

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text("abc", max_size=3) | st.lists(st.integers(), max_size=2),
    lambda values: st.dictionaries(st.text("xyz", min_size=1, max_size=2), values, max_size=3),
    max_leaves=6,
)


def test_replacing_creates_folders_and_replaces(tmp_path):
    path = tmp_path / "new" / "folder" / "file"
    for text in ("first", "second"):
        with replacing(path) as partial:
            partial.write_text(text)
        assert path.read_text() == text
    assert os.listdir(path.parent) == ["file"]


def test_replacing_gives_the_permissions_of_the_umask(tmp_path):
    previous = os.umask(0o027)
    try:
        write_tensors(tmp_path / "file", {"a": torch.zeros(1)})
    finally:
        os.umask(previous)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, ValueError, OSError])
def test_replacing_interrupted_leaves_the_old_file(tmp_path, interruption):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(interruption), replacing(path) as partial:
        partial.write_text("half of the new")
        raise interruption("stop")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_replacing_names_the_file_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(OSError, match=f"{tmp_path}/file/inside"), replacing(tmp_path / "file" / "inside"):
        pass


def test_replacing_refuses_a_writer_that_wrote_nothing(tmp_path):
    with pytest.raises(OSError, match="could not write"), replacing(tmp_path / "file"):
        pass
    assert os.listdir(tmp_path) == []


def test_append_text_names_the_file(tmp_path):
    append_text(tmp_path / "log", "a\n")
    append_text(tmp_path / "log", "b\n")
    assert (tmp_path / "log").read_text() == "a\nb\n"
    with pytest.raises(OSError, match=f"could not write {tmp_path}"):
        append_text(tmp_path, "a")


def test_remove_partial_removes_nothing_else(tmp_path):
    for name in (".a.partial", ".hidden", "b.partial", "c"):
        (tmp_path / name).touch()
    remove_partial(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".hidden", "b.partial", "c"]


@given(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=3), st.integers(1, 3))
def test_write_tensors_round_trip(tmp_path_factory, dtype, shape, stride):
    path = tmp_path_factory.mktemp("tensors") / "file"
    sliced = torch.randint(0, 2, (*shape, 2 * stride)).to(dtype)[..., ::stride]
    tensors = {"sliced": sliced, "offset": sliced.clone()[..., 1:], "scalar": torch.ones((), dtype=dtype)}
    write_tensors(path, tensors, {"step": "3"})
    found, metadata = read_tensors(path)
    assert_same_tensors(found, tensors)
    assert metadata == {"step": "3"}
    assert {name: value.dtype for name, value in found.items()} == dict.fromkeys(tensors, dtype)


def test_write_tensors_gives_the_same_bytes(tmp_path):
    metadata = {letter: letter for letter in "abcdefgh"}
    for name in ("first", "second"):
        write_tensors(tmp_path / name, {"b": torch.ones(2), "a": torch.zeros(1)}, metadata)
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()


@pytest.mark.parametrize("damage", [lambda b: b"", lambda b: b[:4], lambda b: b[:-1], lambda b: b"\xff" * 64, lambda b: b + b"x"])
def test_read_tensors_names_a_damaged_file(tmp_path, damage):
    path = tmp_path / "file"
    write_tensors(path, {"a": torch.zeros(10)})
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=f"{path} is truncated or not a safetensors file"):
        read_tensors(path)


@pytest.mark.parametrize("metadata", ["{", "[]", "3"])
def test_read_tensors_names_a_file_of_other_metadata(tmp_path, metadata):
    save_file({"a": torch.zeros(10)}, path := tmp_path / "file", {"agd_fast": metadata})
    with pytest.raises(ValueError, match=f"{path} is damaged"):
        read_tensors(path)


def test_read_tensors_compares_what_was_sealed(tmp_path):
    """In every bit of it, names and metadata too."""
    tensors, metadata = {"a": torch.tensor(1.0), "b": torch.zeros(2, dtype=torch.bfloat16)}, {"step": "3"}
    write_tensors(path := tmp_path / "file", tensors, metadata, sealed=True)
    found, entries = read_tensors(path)
    assert (found.keys(), entries) == (tensors.keys(), metadata)
    content = path.read_bytes()
    for changed in (content[-1:], b'"a"', b"BF16", b"step", b"3"):
        place = content.rindex(changed) if changed == content[-1:] else content.index(changed)
        damaged = bytearray(content)
        damaged[place + len(changed) // 2] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"{path} is (damaged|truncated or not)"):
            read_tensors(path)


def test_read_tensors_names_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        read_tensors(tmp_path / "file")


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b""])
def test_read_json_names_a_damaged_file(tmp_path, content):
    path = tmp_path / "file.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{path} is not valid JSON"):
        read_json(path)


@given(JSON)
def test_write_json_round_trip(tmp_path_factory, value):
    path = tmp_path_factory.mktemp("json") / "file.json"
    write_json(path, value)
    assert read_json(path) == value


def test_sha256_sees_every_byte(tmp_path):
    path = tmp_path / "file"
    content = bytes(range(256)) * (1 << 13)  # two blocks
    path.write_bytes(content)
    whole = sha256(path)
    path.write_bytes(content[:-1] + b"\0")
    assert sha256(path) != whole


def test_fingerprint_sees_names_shapes_dtypes_and_values():
    x = torch.arange(6.0).view(2, 3)
    others = [{"b": x}, {"a": x.view(3, 2)}, {"a": x.long()}, {"a": x + 1}, {"a": x, "b": x}, {"a": -x * 0}]
    assert len({fingerprint(tensors) for tensors in [{"a": x}, *others]}) == 7
    assert fingerprint({"a": x.t().contiguous().t()}) == fingerprint({"a": x})
    assert fingerprint({"a": x, "b": x}) == fingerprint({"b": x, "a": x})


@given(st.dictionaries(st.text("xyz", min_size=1, max_size=2), JSON, max_size=4))
def test_differences_of_equal_objects_are_none(value):
    assert differences(value, json.loads(json.dumps(value))) == ""


def test_numbers_that_json_has_not_are_none():
    assert without_nan({"a": [1.0, float("nan")], "b": (float("inf"), "c")}) == {"a": [1.0, None], "b": [None, "c"]}


def test_differences_name_nested_entries():
    text = differences({"a": {"b": 1, "c": 2}, "d": 0}, {"a": {"b": 1, "c": 3}, "e": 0})
    assert text == "a.c: expected 2, found 3; d: expected 0, found '(absent)'; e: expected '(absent)', found 0"
