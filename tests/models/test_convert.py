"""Hugging Face -> ours -> Hugging Face bit-identical; everything wrong with a directory is one error that lists it."""

import dataclasses
import functools
import json
import struct

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rsagent_jax.models.qwen25_vl import convert, tensor_files
from rsagent_jax.models.qwen25_vl.config import Qwen25VLConfig, load_config
from rsagent_jax.types import DataError

from . import tiny

SMALL = tiny.Case("small", ((1, 4, 6),), depth=2, fullatt=(0,), layers=2)
TIED = dataclasses.replace(SMALL, name="small tied", tied=True)
HEAD, EMBED = "lm_head.weight", "model.embed_tokens.weight"
QKV_BIAS = "visual.blocks.1.attn.qkv.bias"


def load(directory):
    return convert.load_model(directory, load_config(directory))


def saved(directory, case=SMALL, change=lambda tensors: None, dtype="float32"):
    """A valid directory whose tensors `change` has edited in place."""
    tiny.write(case, directory, dtype=dtype)
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")
    return directory


def refusal(directory):
    with pytest.raises(DataError) as error:
        load(directory)
    return str(error.value)


def tensors_of(directory):
    return {name: value for path in directory.glob("*.safetensors") for name, value in load_file(path).items()}


def assert_same_bytes(got, want):
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert got[name].dtype == value.dtype and got[name].shape == value.shape, name
        assert got[name].tobytes() == value.tobytes(), name


def shard(directory, parts):
    """Splits model.safetensors by `parts`: shard name -> predicate of a tensor's name; writes the index."""
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    weight_map = {}
    for file, belongs in parts.items():
        mine = {name: value for name, value in tensors.items() if belongs(name)}
        save_file(mine, directory / file)
        weight_map |= dict.fromkeys(mine, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def raw_file(path, tensors):
    """A safetensors file written by hand: fp32 (name, values) in this order, and a name may come twice."""
    entries, data = [], b""
    for name, value in tensors:
        offsets = [len(data), len(data) + value.nbytes]
        entries.append(f'"{name}":' + json.dumps({"dtype": "F32", "shape": value.shape, "data_offsets": offsets}))
        data += value.tobytes()
    header = ("{" + ",".join(entries) + "}").encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)


# --- the way there and back ---


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("case", [SMALL, TIED], ids=lambda case: case.name)
def test_a_directory_goes_back_bit_identical(case, dtype, tmp_path):
    """Random bits of `dtype`, not values of ours: subnormals, zeros of both signs and large numbers included."""
    rng = np.random.default_rng(0)

    def random_bits(tensors):
        for name, value in tensors.items():
            bits = rng.integers(0, 256, value.nbytes, np.uint8).view(value.dtype).reshape(value.shape)
            with np.errstate(invalid="ignore"):
                tensors[name] = np.where(np.isfinite(bits), bits, value).astype(value.dtype)

    saved(tmp_path / "a", case, random_bits, dtype)
    convert.save_model(load(tmp_path / "a"), tmp_path / "b", tiny.read_raw(tmp_path / "a"))
    assert_same_bytes(load_file(tmp_path / "b/model.safetensors"), load_file(tmp_path / "a/model.safetensors"))
    assert tiny.read_raw(tmp_path / "a") == tiny.read_raw(tmp_path / "b")
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("limit", [10**9, 40_000], ids=["a single file", "shards"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_what_transformers_saved_goes_back_bit_identical_and_transformers_reads_it(tied, dtype, limit, tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import Qwen2_5_VLForConditionalGeneration

    hf = tiny.build_hf(TIED if tied else SMALL).to(getattr(torch, dtype))
    hf.save_pretrained(tmp_path / "hf", max_shard_size="40KB")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 2
    convert.save_model(load(tmp_path / "hf"), tmp_path / "ours", tiny.read_raw(tmp_path / "hf"), limit)
    assert (tmp_path / "ours/model.safetensors").exists() == (limit > 40_000)
    assert_same_bytes(tensors_of(tmp_path / "ours"), tensors_of(tmp_path / "hf"))
    # both read from files: .to(bfloat16) above has also rounded hf's rotary frequencies, which no file holds
    load_theirs = functools.partial(
        Qwen2_5_VLForConditionalGeneration.from_pretrained, attn_implementation="eager", output_loading_info=True
    )
    (first, _), (again, report) = (load_theirs(tmp_path / folder) for folder in ("hf", "ours"))
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert again.dtype == hf.dtype
    assert (again.lm_head.weight is again.model.language_model.embed_tokens.weight) == tied
    with torch.no_grad():
        inputs = tiny.hf_inputs(tiny.sequence(SMALL, 1))
        assert torch.equal(again.eval()(**inputs).logits, first.eval()(**inputs).logits)


def test_both_layouts_of_names_are_read(tmp_path):
    def module_names(tensors):
        for name in list(tensors):
            tensors[tiny.hf_name(name)] = tensors.pop(name)

    saved(tmp_path / "hub")
    saved(tmp_path / "modules", change=module_names)
    names = load_file(tmp_path / "modules/model.safetensors")
    assert "model.visual.merger.ln_q.weight" in names and "model.language_model.norm.weight" in names
    assert_same_bytes(*(tiny.to_hub(load(tmp_path / d), "float32") for d in ("modules", "hub")))


def test_shards_are_read_as_one_and_a_single_file_goes_before_an_index(tmp_path):
    saved(tmp_path)
    want = load_file(tmp_path / "model.safetensors")
    shard(tmp_path, {"a-1.safetensors": lambda n: "layers" in n, "a-2.safetensors": lambda n: "layers" not in n})
    assert [f.name for f in tensor_files.find(tmp_path)[0]] == ["a-1.safetensors", "a-2.safetensors"]
    assert_same_bytes(tiny.to_hub(load(tmp_path), "float32"), want)
    tiny.write(SMALL, tmp_path, seed=5)  # an export into the same folder
    assert_same_bytes(tiny.to_hub(load(tmp_path), "float32"), load_file(tmp_path / "model.safetensors"))


# --- everything that can be wrong with the tensors ---


def test_one_error_lists_all_unknown_missing_misshapen_duplicate_and_ill_typed_tensors(tmp_path):
    def spoil(t):
        t["visual.merger.extra.weight"] = np.zeros(3, np.float32)
        t["model.layers.2.mlp.up_proj.weight"] = t["model.layers.1.mlp.up_proj.weight"]  # a third layer
        del t["model.layers.0.self_attn.k_proj.bias"], t["visual.blocks.1.norm2.weight"]
        t["model.layers.1.mlp.down_proj.weight"] = t["model.layers.1.mlp.down_proj.weight"].T.copy()
        pixels = t["visual.patch_embed.proj.weight"]
        t["visual.patch_embed.proj.weight"] = pixels.swapaxes(1, 2).copy()  # as many numbers
        t["model.norm.weight"] = np.ones((), np.float32)
        t["model.language_model.embed_tokens.weight"] = t[EMBED]
        t["visual.merger.ln_q.weight"] = t["visual.merger.ln_q.weight"].astype(np.int32)
        t[HEAD] = t[HEAD].astype(np.float64)

    message = refusal(saved(tmp_path, change=spoil))
    lines = message.splitlines()
    assert str(tmp_path) in lines[0]
    assert sorted(line.removeprefix("  - ") for line in lines[1:]) == sorted(
        [
            "unknown visual.merger.extra.weight in model.safetensors",
            "unknown model.layers.2.mlp.up_proj.weight in model.safetensors",
            "missing model.layers.0.self_attn.k_proj.bias",
            "missing visual.blocks.1.norm2.weight",
            "misshapen model.layers.1.mlp.down_proj.weight: [48, 32], the config wants [32, 48]",
            "misshapen visual.patch_embed.proj.weight: [32, 2, 3, 4, 4], the config wants [32, 3, 2, 4, 4]",
            "misshapen model.norm.weight: [], the config wants [32]",
            # the header's order says which of the two comes first
            next(line.removeprefix("  - ") for line in lines if "duplicate" in line and "embed_tokens" in line),
            "dtype of visual.merger.ln_q.weight: I32, only F32, F16, BF16 can be read",
            "dtype of lm_head.weight: F64, only F32, F16, BF16 can be read",
        ]
    )


def test_the_list_of_problems_is_whole_however_long_it_is(tmp_path):
    names = [n for n in tiny.to_hub(tiny.random_model(SMALL), "float32") if "layers" in n]
    message = refusal(saved(tmp_path, change=lambda t: [t.pop(n) for n in names]))
    assert len(names) > 20
    assert all(f"missing {name}" in message for name in names)


def test_a_tensor_in_two_shards_is_a_duplicate_even_if_both_are_equal(tmp_path):
    saved(tmp_path)
    shard(
        tmp_path,
        {"a.safetensors": lambda n: "norm" in n or "layers" in n, "b.safetensors": lambda n: "layers" not in n},
    )
    assert "duplicate model.norm.weight (in b.safetensors and a.safetensors)" in refusal(tmp_path)


def test_a_name_that_stands_twice_in_one_header_is_a_duplicate(tmp_path):
    saved(tmp_path)
    raw_file(tmp_path / "model.safetensors", [("model.norm.weight", np.zeros(n, np.float32)) for n in (0, 1)])
    assert "duplicate model.norm.weight" in refusal(tmp_path)


@pytest.mark.parametrize("head_first", [True, False], ids=["head first", "embedding first"])
def test_the_head_of_a_tied_model_may_be_present_if_it_is_equal_wherever_it_stands(head_first, tmp_path):
    for folder, other in (("same", 0), ("different", 1)):
        saved(tmp_path / folder, TIED, lambda t, other=other: t.update({HEAD: t[EMBED] + np.float32(other)}))
        first, second = (HEAD, EMBED) if head_first else (EMBED, HEAD)
        shard(
            tmp_path / folder, {"a.safetensors": lambda n, f=first: n == f, "b.safetensors": lambda n, f=first: n != f}
        )
        assert second not in load_file(tmp_path / folder / "a.safetensors")
    assert load(tmp_path / "same").decoder.lm_head is None
    assert "lm_head.weight differs from the embedding" in refusal(tmp_path / "different")


@pytest.mark.parametrize(
    ("case", "change", "said"),
    [
        (
            TIED,
            lambda t: t.update({HEAD: t[EMBED][:-1].copy()}),
            "misshapen lm_head.weight: [95, 32], the config wants [96, 32]",
        ),
        (TIED, lambda t: t.update({HEAD: t.pop(EMBED)}), "missing model.embed_tokens.weight"),
        (SMALL, lambda t: t.pop(HEAD), "missing lm_head.weight"),
    ],
)
def test_the_head_is_checked_as_strictly_as_any_tensor(case, change, said, tmp_path):
    assert said in refusal(saved(tmp_path, case, change))


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_value_that_is_not_finite_is_refused_with_the_names_of_tensor_and_file(dtype, bad, tmp_path):
    names = ["model.layers.1.mlp.up_proj.weight", "visual.blocks.0.attn.qkv.bias", EMBED]
    for name in names:

        def spoil(tensors, name=name):
            tensors[name].reshape(-1)[-3] = bad

        said = refusal(saved(tmp_path, TIED, spoil, dtype))
        assert said.startswith(f"{name} in {tmp_path / 'model.safetensors'} holds NaN or infinite values"), said


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_largest_the_smallest_and_both_zeros_are_finite(dtype, tmp_path):
    limits = ml_dtypes.finfo(dtype)
    values = [limits.max, limits.min, limits.smallest_subnormal, -0.0, 0.0]

    def change(tensors):
        tensors["model.norm.weight"][:5] = values

    got = np.asarray(load(saved(tmp_path, SMALL, change, dtype)).decoder.norm.scale.get_value())
    np.testing.assert_array_equal(got[:5], np.array(values).astype(limits.dtype).astype(np.float32))


# --- config.json ---


def spoilt_config(tmp_path, change):
    raw = SMALL.raw_config()
    change(raw)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(DataError) as error:
        load_config(tmp_path)
    return str(error.value)


def test_the_nested_config_that_transformers_saves_reads_as_the_flat_one_of_the_hub(tmp_path):
    from transformers import Qwen2_5_VLConfig

    for case in tiny.CASES:
        Qwen2_5_VLConfig(**case.raw_config()).save_pretrained(tmp_path / "hf")
        assert "text_config" in tiny.read_raw(tmp_path / "hf") and "text_config" not in case.raw_config()
        assert load_config(tmp_path / "hf") == Qwen25VLConfig.from_hf(case.raw_config())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda raw: raw.update(model_type="llama"), ["llama", "qwen2_5_vl"]),
        (lambda raw: (raw.update(model_type="llama"), raw.pop("vision_config")), ["not a Qwen2.5-VL", "llama"]),
        (
            lambda raw: (raw.pop("image_token_id"), raw["vision_config"].pop("hidden_size")),
            ["image_token_id", "vision_config.hidden_size"],
        ),
        (lambda raw: raw["vision_config"].pop("intermediate_size"), ["vision_config.intermediate_size is missing"]),
        (lambda raw: raw.pop("eos_token_id"), ["eos_token_id is missing"]),
        (lambda raw: raw.update(use_sliding_window=True), ["use_sliding_window"]),
        (lambda raw: raw.update(hidden_act="gelu"), ["hidden_act", "gelu"]),
        (lambda raw: raw["rope_scaling"].update(type="yarn"), ["rope", "yarn"]),
        (lambda raw: raw["vision_config"].update(rope_parameters={"rope_theta": 5.0}), ["rope_theta", "5.0"]),
        (lambda raw: raw.update(hidden_size="32"), ["hidden_size", "'32'", "expected int"]),
        (
            lambda raw: (
                raw.update(num_key_value_heads=3),
                raw["vision_config"].update(out_hidden_size=8),
            ),
            ["key/value heads", "out_hidden_size"],
        ),
    ],
)
def test_the_config_of_another_model_is_one_error_that_names_what_is_wrong(change, words, tmp_path):
    message = spoilt_config(tmp_path, change)
    assert str(tmp_path) in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize("text", ["", "{", "[1]", "\xff"])
def test_a_config_that_is_no_json_object_is_one_readable_error(text, tmp_path):
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match="config.json"):
        load_config(tmp_path)


def test_an_export_of_a_dtype_we_do_not_have_is_refused_before_anything_is_written(tmp_path):
    raw = SMALL.raw_config() | {"dtype": "int8"}
    with pytest.raises(DataError, match="int8"):
        convert.save_model(tiny.random_model(SMALL), tmp_path / "out", raw)
    assert not list((tmp_path / "out").glob("*"))
