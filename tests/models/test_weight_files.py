"""Shards and their index: split, replaced atomically, read by transformers; every broken file is one clear error."""

import dataclasses
import json
import os
import shutil
import struct

import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from rsagent_jax.models.qwen25_vl import convert, tensor_files
from rsagent_jax.models.qwen25_vl.config import load_config
from rsagent_jax.types import DataError

from . import tiny

SMALL = tiny.Case("small", ((1, 4, 6),), depth=2, fullatt=(0,), layers=11)
SHORT = dataclasses.replace(SMALL, name="short", layers=2)
LIMIT = 40_000  # bytes; the largest tensor has 32 768


def save(directory, seed=0, limit=LIMIT, dtype="bfloat16", case=SMALL):
    model = tiny.random_model(case, seed)
    convert.save_model(model, directory, case.raw_config() | {"dtype": dtype}, limit)
    return tiny.to_hub(model, dtype)


def load(directory):
    return tiny.to_hub(convert.load_model(directory, load_config(directory)), "bfloat16")


def same(got, want):
    return got.keys() == want.keys() and all(got[name].tobytes() == want[name].tobytes() for name in want)


def refusal(directory):
    with pytest.raises(DataError) as error:
        convert.load_model(directory, load_config(directory))
    return str(error.value)


# --- what is written ---


def test_shards_keep_the_limit_the_index_is_whole_and_layers_stand_together(tmp_path):
    want = save(tmp_path)
    shards = sorted(tmp_path.glob("*.safetensors"))
    n = len(shards)
    assert n > 4
    assert [p.name for p in shards] == [f"model-{i:05d}-of-{n:05d}.safetensors" for i in range(1, n + 1)]
    assert {p.name for p in tmp_path.iterdir()} == {p.name for p in shards} | {"config.json", tensor_files.INDEX}
    index = json.loads((tmp_path / tensor_files.INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(v.nbytes for v in want.values())
    found = {}
    for path in shards:
        tensors = load_file(path)
        assert sum(v.nbytes for v in tensors.values()) <= LIMIT
        assert {index["weight_map"][name] for name in tensors} == {path.name}
        with safe_open(path, framework="np") as file:
            assert file.metadata() == {"format": "pt"}
        found |= tensors
    assert same(found, want) and index["weight_map"].keys() == want.keys()
    layers = [int(name.split(".")[2]) for name in index["weight_map"] if name.startswith("model.layers.")]
    assert layers == sorted(layers)  # 2 before 10
    assert same(load(tmp_path), want)


def test_a_tensor_above_the_limit_has_a_shard_of_its_own(tmp_path):
    want = save(tmp_path, limit=1)
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) == len(want)
    assert same(load(tmp_path), want)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_transformers_reads_the_shards_as_it_reads_the_single_file(dtype, tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import Qwen2_5_VLForConditionalGeneration

    save(tmp_path / "shards", dtype=dtype)
    save(tmp_path / "single", limit=10**9, dtype=dtype)
    assert (tmp_path / "single/model.safetensors").exists() and not (tmp_path / "shards/model.safetensors").exists()
    models = []
    for folder in ("shards", "single"):
        model, report = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            tmp_path / folder, attn_implementation="eager", output_loading_info=True
        )
        assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
        models.append(model.eval())
    for (name, a), b in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b), name
    assert models[0].dtype == getattr(torch, dtype)
    with torch.no_grad():
        inputs = tiny.hf_inputs(tiny.sequence(SMALL, 1))
        logits = [m(**inputs).logits for m in models]
    assert torch.equal(*logits)


# --- what stood there before ---


@pytest.mark.parametrize("second", [10**9, 40_000, 80_000], ids=["single", "same shards", "fewer shards"])
@pytest.mark.parametrize("first", [10**9, 40_000], ids=["from single", "from shards"])
def test_a_later_export_replaces_an_earlier_one_whole(first, second, tmp_path):
    save(tmp_path, seed=1, limit=first)
    (tmp_path / "notes.safetensors").write_bytes(b"mine")
    want = save(tmp_path, seed=2, limit=second)
    assert same(load(tmp_path), want)
    files = {p.name for p in tensor_files.find(tmp_path)[0]}
    left = {"config.json", "notes.safetensors"} | files | ({tensor_files.INDEX} if len(files) > 1 else set())
    assert {p.name for p in tmp_path.iterdir()} == left


@pytest.mark.parametrize("second", [10**9, 40_000, 80_000], ids=["single", "same shards", "fewer shards"])
@pytest.mark.parametrize("first", [10**9, 40_000], ids=["from single", "from shards"])
def test_an_export_stopped_anywhere_leaves_the_old_the_new_or_a_refusal_never_a_mixture(
    first, second, tmp_path, monkeypatch
):
    """Stopped after k steps that touch the folder, for every k; then exported again."""
    steps = {"left": 0}

    class Stopped(BaseException):
        pass

    def limited(real):
        def call(*args, **kwargs):
            if steps["left"] == 0:
                raise Stopped
            steps["left"] -= 1
            return real(*args, **kwargs)

        return call

    old = save(tmp_path / "old", seed=1, limit=first, case=SHORT)
    new = save(tmp_path / "new", seed=2, limit=second, case=SHORT)
    model = convert.load_model(tmp_path / "new", load_config(tmp_path / "new"))
    raw = tiny.read_raw(tmp_path / "new")
    outcomes = []
    for k in range(60):
        folder = tmp_path / str(k)
        shutil.copytree(tmp_path / "old", folder)
        steps["left"] = k
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", limited(os.replace))
            patch.setattr(type(folder), "unlink", limited(type(folder).unlink))
            patch.setattr(tensor_files, "write", limited(tensor_files.write))
            try:
                convert.save_model(model, folder, raw, second)
                finished = True
            except Stopped:
                finished = False
        try:
            got = load(folder)
            outcomes.append("old" if same(got, old) else "new" if same(got, new) else "mixture")
        except DataError:
            outcomes.append("refused")
        if finished:
            break
        assert not (folder / ".partial").exists()
    convert.save_model(model, tmp_path / "3", raw, second)  # goes on from a stopped one
    assert same(load(tmp_path / "3"), new)
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


def spoilt(directory, change):
    """A valid model.safetensors whose header `change` has edited."""
    save(directory, limit=10**9)
    path = directory / "model.safetensors"
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    data = raw[8 + length :]
    data = change(header, data) or data
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return directory


def shifted(header, _):
    header["model.norm.weight"]["data_offsets"][1] += 2


def overlapping(header, _):
    first, second = (header[f"model.layers.{i}.mlp.up_proj.weight"] for i in (0, 1))
    second["data_offsets"] = first["data_offsets"]


def beyond(header, data):
    end = max(e["data_offsets"][1] for e in header.values() if "data_offsets" in e)
    last = next(e for e in header.values() if e.get("data_offsets", [0, 0])[1] == end)
    last["data_offsets"] = [end, end + end - last["data_offsets"][0]]


def larger_than_its_bytes(header, _):
    header["model.norm.weight"]["shape"] = [64]


def negative(header, _):
    header["model.norm.weight"]["data_offsets"] = [-64, 0]


def no_dtype(header, _):
    del header["model.norm.weight"]["dtype"]


def trailing(_, data):
    return data + bytes(8)


@pytest.mark.parametrize(
    "change",
    [shifted, overlapping, beyond, larger_than_its_bytes, negative, no_dtype, trailing, lambda h, d: d[:-1]],
    ids=lambda f: f.__name__.replace("<lambda>", "a byte short"),
)
def test_a_header_that_lies_about_its_data_is_one_readable_error(change, tmp_path):
    message = refusal(spoilt(tmp_path, change))
    assert "model.safetensors is not a readable safetensors file" in message and "\n" not in message


@pytest.mark.parametrize("length", [2**63, 2**40, 0, 3])
def test_a_header_of_an_impossible_length_is_one_readable_error(length, tmp_path):
    save(tmp_path, limit=10**9)
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])
    assert "is not a readable safetensors file" in refusal(tmp_path)


def test_a_file_cut_after_its_header_was_checked_is_one_readable_error(tmp_path, monkeypatch):
    save(tmp_path, limit=10**9)
    path, real = tmp_path / "model.safetensors", tensor_files.safetensors_header

    def cut_afterwards(file):
        found = real(file)
        os.truncate(path, path.stat().st_size // 2)
        return found

    monkeypatch.setattr(tensor_files, "safetensors_header", cut_afterwards)
    assert "it was cut while it was read" in refusal(tmp_path)


def test_an_index_that_names_a_missing_shard_says_which(tmp_path):
    save(tmp_path)
    gone = sorted(tmp_path.glob("model-*-of-*.safetensors"))[1]
    gone.unlink()
    assert f"lacks {gone.name}" in refusal(tmp_path)


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
