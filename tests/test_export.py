"""Exported directories hold the very weights, in the promised dtype, and are read by transformers and by us."""

import hashlib
import json
import pathlib
import shutil

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from safetensors import safe_open

from rsagent_jax import export
from rsagent_jax.data.processor import Processor
from rsagent_jax.models.qwen25_vl import convert
from rsagent_jax.models.qwen25_vl.load import load_policy
from rsagent_jax.runtime.command import run_command
from rsagent_jax.train.checkpoint import Checkpoints
from rsagent_jax.train.state import create_state

TINY = pathlib.Path(__file__).parents[1] / "assets" / "tiny-base"


def run(*argv) -> int:
    return run_command("rsagent_jax.export", [str(a) for a in argv])


def tensors(directory) -> dict[str, np.ndarray]:
    with safe_open(directory / "model.safetensors", framework="np") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 -- safe_open is no dict


def assert_same_tensors(one, other) -> dict[str, np.ndarray]:
    """Those of the directories, to the bit."""
    before, after = tensors(one), tensors(other)
    assert before.keys() == after.keys()
    for name in before:
        assert before[name].dtype == after[name].dtype and before[name].tobytes() == after[name].tobytes()
    return before


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    """checkpoints/sft of a run whose training added a thousandth to every parameter, and those parameters."""
    directory = tmp_path_factory.mktemp("run") / "checkpoints" / "sft"
    model = load_policy(str(TINY))
    params = jax.tree.map(lambda p: p + 1e-3, nnx.state(model, nnx.Param))
    state = create_state(params, optax.sgd(0.1))
    checkpoints = Checkpoints(directory, TINY)
    checkpoints.save(state, {"position": 0})
    checkpoints.close()
    nnx.update(model, params)
    return directory, {name: np.asarray(v) for name, v in convert.flat_params(model).items()}


def test_a_hugging_face_directory_comes_back_bit_for_bit(tmp_path, capsys):
    out = tmp_path / "new" / "hf"
    assert run(f"--checkpoint={TINY}", f"--out={out}") == 0
    before = assert_same_tensors(TINY, out)
    assert {p.name for p in out.iterdir()} == {p.name for p in TINY.iterdir()}
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        assert (out / name).read_bytes() == (TINY / name).read_bytes()
    assert json.loads((out / "config.json").read_text()) == json.loads((TINY / "config.json").read_text())
    file = (out / "model.safetensors").read_bytes()
    said = capsys.readouterr().out
    assert f"{len(before)} tensors" in said and f"{len(file)} bytes" in said
    assert hashlib.sha256(file).hexdigest() in said
    assert (out / "model.safetensors").stat().st_mode & 0o044 == (out / "config.json").stat().st_mode & 0o044
    assert [p.name for p in out.parent.iterdir()] == ["hf"]  # nothing half-written is left beside it


def test_a_stage_is_exported_exactly_in_float32_and_rounded_once_in_bfloat16(stage, tmp_path, capsys):
    directory, params = stage
    assert run(f"--checkpoint={directory}", f"--out={tmp_path / 'exact'}", "--dtype=float32") == 0
    assert json.loads((tmp_path / "exact" / "config.json").read_text())["torch_dtype"] == "float32"
    again = convert.flat_params(load_policy(str(tmp_path / "exact")))
    assert again.keys() == params.keys()
    for name, value in again.items():
        np.testing.assert_array_equal(np.asarray(value), params[name])

    assert run(f"--checkpoint={directory}", f"--out={tmp_path / 'narrow'}") == 0
    assert "bfloat16" in capsys.readouterr().out.splitlines()[-1]
    rounded = convert.flat_params(load_policy(str(tmp_path / "narrow")))
    for name, value in rounded.items():
        expected = params[name].astype(convert.DTYPES["bfloat16"]).astype(np.float32)
        np.testing.assert_array_equal(np.asarray(value), expected)
    Processor.load(tmp_path / "narrow")


def test_what_transformers_5_saved_is_read_exported_and_read_by_transformers_again(tmp_path):
    """It saves image settings in processor_config.json, and the chat template in a file of its own."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    model = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(TINY)
    model.save_pretrained(tmp_path / "saved")
    transformers.AutoProcessor.from_pretrained(TINY).save_pretrained(tmp_path / "saved")
    assert run(f"--checkpoint={tmp_path / 'saved'}", f"--out={tmp_path / 'hf'}") == 0
    assert_same_tensors(TINY, tmp_path / "hf")
    assert Processor.load(tmp_path / "hf").images == Processor.load(TINY).images
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "hf")
    assert processor.chat_template == json.loads((TINY / "tokenizer_config.json").read_text())["chat_template"]
    assert processor.image_processor.size.longest_edge == Processor.load(TINY).images.limits.max_pixels
    again = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "hf")
    assert all(a.equal(b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_transformers_reads_an_export(stage, tmp_path):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    directory, params = stage
    assert run(f"--checkpoint={directory}", f"--out={tmp_path / 'hf'}", "--dtype=float32") == 0
    model, report = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(
        tmp_path / "hf", dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    np.testing.assert_array_equal(model.get_input_embeddings().weight.detach().numpy(), params["decoder.embed"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    text = "<|im_start|>user\nthe red circle at 12, 34<|im_end|>"
    assert tokenizer.encode(text, add_special_tokens=False) == Processor.load(TINY).encode(text).tolist()


def test_large_weights_are_split_and_read_back_bit_for_bit(tmp_path, capsys):
    out = tmp_path / "hf"
    assert run(f"--checkpoint={TINY}", f"--out={out}", "--max_shard_gb=0.001") == 0
    shards = sorted(out.glob("model-*-of-*.safetensors"))
    assert len(shards) > 3 and not (out / "model.safetensors").exists()
    first, *rest = capsys.readouterr().out.splitlines()
    assert f"{len(tensors(TINY))} tensors" in first and f"in {len(shards)} shards" in first
    assert [line.split("sha256 ")[1].split()[0] for line in rest] == [
        hashlib.sha256(path.read_bytes()).hexdigest() for path in shards
    ]
    assert {path.stat().st_mode & 0o044 for path in out.iterdir()} == {(out / "config.json").stat().st_mode & 0o044}
    (tmp_path / "again").mkdir()  # an empty directory may be filled
    assert run(f"--checkpoint={out}", f"--out={tmp_path / 'again'}") == 0
    assert_same_tensors(TINY, tmp_path / "again")
    assert run(f"--checkpoint={TINY}", f"--out={tmp_path / 'x'}", "--max_shard_gb=0") == 2


def test_a_dtype_is_replaced_wherever_it_stands():
    raw = {"dtype": "bfloat16", "text_config": {"dtype": "bfloat16", "hidden_size": 8}, "vision_config": {"depth": 2}}
    assert export.with_dtype(raw, "float32") == {
        "torch_dtype": "float32",
        "dtype": "float32",
        "text_config": {"dtype": "float32", "hidden_size": 8},
        "vision_config": {"depth": 2},
    }


def refused(capsys, *argv) -> str:
    """The one line on stderr of a refused export."""
    assert run(*argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


def test_what_cannot_be_exported_is_one_line(stage, tmp_path, capsys):
    directory, _ = stage
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("precious")
    assert "not an empty directory" in refused(capsys, f"--checkpoint={TINY}", f"--out={full}")
    assert [p.name for p in full.iterdir()] == ["mine.txt"]
    assert "not an empty directory" in refused(capsys, f"--checkpoint={TINY}", f"--out={full / 'mine.txt'}")
    assert "cannot be written" in refused(capsys, f"--checkpoint={TINY}", f"--out={full / 'mine.txt' / 'hf'}")
    assert "does not exist" in refused(capsys, f"--checkpoint={tmp_path / 'no'}", f"--out={tmp_path / 'a'}")

    unfinished = tmp_path / "unfinished"
    shutil.copytree(directory / "policy", unfinished / "policy")
    assert "no finished checkpoint" in refused(capsys, f"--checkpoint={unfinished}", f"--out={tmp_path / 'b'}")
    assert not any((tmp_path / name).exists() for name in "ab")
