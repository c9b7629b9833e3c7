"""Shards and their index: split, replaced atomically; every broken file is one clear error."""

import dataclasses
import json
import os
import shutil
import struct

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from rsagent_jax.models.qwen25_vl import convert, tensor_files
from rsagent_jax.types import DataError

from . import tiny
from .test_convert import EMBED, HEAD, QKV_BIAS, load, raw_file, refusal, saved, shard, tensors_of

SMALL = tiny.Case("small", ((1, 4, 6),), depth=2, fullatt=(0,), layers=11)
SHORT = dataclasses.replace(SMALL, name="short", layers=2)
LIMIT = 40_000  # bytes; the largest tensor has 32 768


def save(directory, seed=0, limit=LIMIT, case=SMALL):
    """What is written, by the hub's names."""
    return tiny.to_hub(tiny.write(case, directory, seed, "bfloat16", limit), "bfloat16")


def same(got, want):
    return got.keys() == want.keys() and all(got[name].tobytes() == want[name].tobytes() for name in want)


def read(directory):
    return tiny.to_hub(load(directory), "bfloat16")


# --- what is written ---


@pytest.mark.parametrize("limit", [LIMIT, 1])
def test_shards_keep_the_limit_the_index_is_whole_and_layers_stand_together(limit, tmp_path):
    """A tensor above the limit has a shard of its own."""
    want = save(tmp_path, limit=limit)
    shards = sorted(tmp_path.glob("*.safetensors"))
    n = len(shards)
    assert n > 4 if limit > 1 else n == len(want)
    assert [p.name for p in shards] == [f"model-{i:05d}-of-{n:05d}.safetensors" for i in range(1, n + 1)]
    assert {p.name for p in tmp_path.iterdir()} == {p.name for p in shards} | {"config.json", tensor_files.INDEX}
    index = json.loads((tmp_path / tensor_files.INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(v.nbytes for v in want.values())
    for path in shards:
        tensors = load_file(path)
        assert len(tensors) == 1 or sum(v.nbytes for v in tensors.values()) <= limit
        assert {index["weight_map"][name] for name in tensors} == {path.name}
        with safe_open(path, framework="np") as file:
            assert file.metadata() == {"format": "pt"}
    assert same(tensors_of(tmp_path), want) and index["weight_map"].keys() == want.keys()
    layers = [int(name.split(".")[2]) for name in index["weight_map"] if name.startswith("model.layers.")]
    assert layers == sorted(layers)  # 2 before 10
    assert same(read(tmp_path), want)


# --- what stood there before ---


@pytest.mark.parametrize("second", [10**9, 40_000, 80_000], ids=["single", "same shards", "fewer shards"])
@pytest.mark.parametrize("first", [10**9, 40_000], ids=["from single", "from shards"])
def test_a_later_export_replaces_an_earlier_one_whole(first, second, tmp_path):
    save(tmp_path, seed=1, limit=first)
    (tmp_path / "notes.safetensors").write_bytes(b"mine")
    want = save(tmp_path, seed=2, limit=second)
    assert same(read(tmp_path), want)
    files = {p.name for p in tensor_files.find(tmp_path)[0]}
    left = {"config.json", "notes.safetensors"} | files | ({tensor_files.INDEX} if len(files) > 1 else set())
    assert {p.name for p in tmp_path.iterdir()} == left


@pytest.mark.parametrize("second", [10**9, 40_000, 80_000], ids=["single", "same shards", "fewer shards"])
@pytest.mark.parametrize("first", [10**9, 40_000], ids=["from single", "from shards"])
def test_an_export_stopped_anywhere_leaves_the_old_the_new_or_a_refusal_never_a_mixture(
    first, second, tmp_path, monkeypatch
):
    """Stopped after k steps that touch the folder, for every k; then exported again."""
    steps, write = {"left": 0}, tensor_files.write

    class Stopped(BaseException):
        pass

    def limited(real):
        def call(*args, **kwargs):
            if steps["left"] == 0:
                if real is write:
                    args[0].write_bytes(b"half")
                raise Stopped
            steps["left"] -= 1
            return real(*args, **kwargs)

        return call

    old = save(tmp_path / "old", seed=1, limit=first, case=SHORT)
    new = save(tmp_path / "new", seed=2, limit=second, case=SHORT)
    model = load(tmp_path / "new")
    raw = tiny.read_raw(tmp_path / "new")
    outcomes = []
    for k in range(60):
        folder = tmp_path / str(k)
        shutil.copytree(tmp_path / "old", folder)
        steps["left"] = k
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", limited(os.replace))
            patch.setattr(type(folder), "unlink", limited(type(folder).unlink))
            patch.setattr(tensor_files, "write", limited(write))
            try:
                convert.save_model(model, folder, raw, second)
                finished = True
            except Stopped:
                finished = False
        try:
            got = read(folder)
            outcomes.append("old" if same(got, old) else "new" if same(got, new) else "mixture")
        except DataError:
            outcomes.append("refused")
        if finished:
            break
        assert not (folder / ".partial").exists()
    convert.save_model(model, tmp_path / "3", raw, second)  # goes on from a stopped one
    assert same(read(tmp_path / "3"), new)
    assert finished and outcomes[-1] == "new" and "mixture" not in outcomes
    written = len(tensor_files.find(tmp_path / "new")[0])
    assert outcomes[: written + 1] == ["old"] * (written + 1)  # the long part
    assert sorted(outcomes, key=["old", "refused", "new"].index) == outcomes
    if (first, second) != (40_000, 40_000):
        assert "refused" not in outcomes


def test_what_a_killed_export_left_behind_goes_with_the_next(tmp_path):
    (tmp_path / ".partial").mkdir()
    (tmp_path / ".partial" / "model-00001-of-00009.safetensors").write_bytes(b"half")
    save(tmp_path)
    assert not (tmp_path / ".partial").exists()


# --- what can be wrong with the files ---


def header(edit):
    """The change of a file's bytes that edits one tensor's entry in the header."""

    def change(raw):
        end = 8 + struct.unpack("<Q", raw[:8])[0]
        entries = json.loads(raw[8:end])
        entries["model.norm.weight"] = edit(entries["model.norm.weight"])
        text = json.dumps(entries).encode()
        return struct.pack("<Q", len(text)) + text + raw[end:]

    return change


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (header(lambda e: e | {"data_offsets": [e["data_offsets"][0], e["data_offsets"][1] + 2]}), "not a readable"),
        (header(lambda e: e | {"data_offsets": [0, 64]}), "not a readable"),  # those of another tensor
        (header(lambda e: e | {"data_offsets": [10**9, 10**9 + 64]}), "not a readable"),  # beyond the end
        (header(lambda e: e | {"data_offsets": [-64, 0]}), "not a readable"),
        (header(lambda e: e | {"shape": [64]}), "not a readable"),  # larger than its bytes
        (header(lambda e: {key: e[key] for key in ("shape", "data_offsets")}), "not a readable"),  # no dtype
        *((lambda raw, n=n: struct.pack("<Q", n) + raw[8:], "not a readable") for n in (2**63, 2**40, 0, 3)),
        *((lambda raw, keep=keep: raw[:keep], "not a readable") for keep in (4, 200, -1)),
        (lambda raw: raw + bytes(8), "not a readable"),
        (lambda raw: b"", "not a readable"),
        (lambda raw: b"weights" * 20, "not a readable"),
        (lambda raw: b"<html>not found</html>" * 20, "an HTML page"),
        (lambda raw: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n", "a Git-LFS pointer"),
    ],
)
def test_a_file_that_is_no_safetensors_or_lies_about_its_data_is_one_readable_error(content, said, tmp_path):
    path = saved(tmp_path, SHORT, dtype="bfloat16") / "model.safetensors"
    path.write_bytes(content(path.read_bytes()))
    message = refusal(tmp_path)
    assert f"model.safetensors is {said}" in message and "\n" not in message
    assert ("a readable safetensors file" in message) == (said == "not a readable")
    assert ("git lfs pull" in message) == ("LFS" in said)


def test_a_file_cut_after_its_header_was_checked_is_one_readable_error(tmp_path, monkeypatch):
    save(tmp_path, limit=10**9)
    path, real = tmp_path / "model.safetensors", tensor_files.safetensors_header

    def cut_afterwards(file):
        found = real(file)
        os.truncate(path, path.stat().st_size // 2)
        return found

    monkeypatch.setattr(tensor_files, "safetensors_header", cut_afterwards)
    assert "it was cut while it was read" in refusal(tmp_path)


@pytest.mark.parametrize("zeros", [4100, 10_000, 32_768, 65_536, 123_456, "all"])
def test_a_file_whose_end_was_never_downloaded_is_refused(zeros, tmp_path):
    file = saved(tmp_path) / "model.safetensors"
    data = file.read_bytes()
    count = len(data) - 8 - int.from_bytes(data[:8], "little") if zeros == "all" else zeros
    file.write_bytes(data[:-count] + bytes(count))
    assert f"model.safetensors ends in {count} zero bytes" in (said := refusal(tmp_path)), said
    assert "its download was not finished" in said


def test_weights_that_are_zero_on_purpose_are_read(tmp_path):
    """At the very end of a file: padding rows of the vocabulary, a new layer's projection, a bias."""
    file = saved(tmp_path) / "model.safetensors"
    stored = load_file(file)
    for name, rows in ((HEAD, 90), (EMBED, 90), ("model.layers.1.self_attn.o_proj.weight", 0), (QKV_BIAS, 0)):
        tensors = {n: v.copy() for n, v in stored.items()}
        tensors[name][rows:] = 0
        raw_file(file, sorted(tensors.items(), key=lambda item, name=name: item[0] == name))  # it is the last
        np.testing.assert_array_equal(tiny.to_hub(load(tmp_path), "float32")[name], tensors[name])
    stored[HEAD][:] = 0
    raw_file(file, sorted(stored.items(), key=lambda item: item[0] == HEAD))
    assert f"{HEAD} among them" in refusal(tmp_path)  # a head without a row that is not zero


def test_missing_files_are_all_named(tmp_path):
    saved(tmp_path)
    shard(tmp_path, {f"{c}.safetensors": lambda n, i=i: len(n) % 3 == i for i, c in enumerate("abc")})
    (tmp_path / "a.safetensors").unlink()
    (tmp_path / "c.safetensors").unlink()
    assert "lacks a.safetensors, c.safetensors" in refusal(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    assert "lacks model.safetensors" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("index", "said"),
    [
        *(({"weight_map": {EMBED: name}}, "outside its directory")
          for name in ("../b/model.safetensors", "/etc/passwd", "sub/x.safetensors", "..", ".")),
        *((index, "no weight_map")
          for index in ({}, {"weight_map": [1]}, {"weight_map": {EMBED: 3}}, {"weight_map": {EMBED: ["x"]}})),
    ],
    ids=str,
)  # fmt: skip
def test_an_index_that_is_none_or_names_files_outside_its_directory_is_refused(index, said, tmp_path):
    saved(tmp_path / "b")
    (saved(tmp_path / "a") / "model.safetensors").unlink()
    (tmp_path / "a/model.safetensors.index.json").write_text(json.dumps(index))
    assert said in refusal(tmp_path / "a")


def test_an_index_that_maps_tensors_to_the_wrong_files_lists_each(tmp_path):
    save(tmp_path)
    path = tmp_path / tensor_files.INDEX
    index = json.loads(path.read_text())
    files = sorted(set(index["weight_map"].values()))
    moved = [name for name, file in index["weight_map"].items() if file == files[0]][:2]
    index["weight_map"] |= dict.fromkeys(moved, files[1])
    path.write_text(json.dumps(index))
    message = refusal(tmp_path)
    assert len(message.splitlines()) == 3
    for name in moved:
        assert f"  - {name} is in {files[0]}, the index says {files[1]}" in message


def test_nothing_is_read_but_headers_before_all_tensors_are_checked(tmp_path, monkeypatch):
    save(tmp_path)
    last = sorted(tmp_path.glob("model-*-of-*.safetensors"))[-1]
    tensors = load_file(last)
    tensors.pop(sorted(tensors)[-1])
    save_file(tensors, last)
    monkeypatch.setattr(tensor_files, "opened", None)
    assert "missing visual." in refusal(tmp_path)
