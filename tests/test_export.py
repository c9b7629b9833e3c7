"""Exported directories hold the very weights, in the promised dtype, and are read by transformers and by us."""

import dataclasses
import hashlib
import json
import pathlib
import shutil

import huggingface_hub
import jax
import numpy as np
import optax
import pytest
from flax import nnx
from safetensors import SafetensorError, safe_open

import evaluate
from rsagent_jax import collect, export
from rsagent_jax.config.build import to_dict
from rsagent_jax.config.data import MixPart
from rsagent_jax.config.schema import (
    CollectConfig,
    DataConfig,
    EvalConfig,
    GrpoConfig,
    LoraConfig,
    OwnConfig,
    PolicyConfig,
    SftConfig,
    TeacherConfig,
    TrainConfig,
)
from rsagent_jax.data import serving
from rsagent_jax.data.processor import Processor
from rsagent_jax.models.qwen25_vl import convert, tensor_files
from rsagent_jax.models.qwen25_vl.load import load_policy, weights_checksum
from rsagent_jax.report import model_card
from rsagent_jax.runtime.command import run_command
from rsagent_jax.tiny.synthetic import STAMP
from rsagent_jax.train.checkpoint import Checkpoints
from rsagent_jax.train.state import create_state
from rsagent_jax.types import DataError

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
    added = {"README.md", "chat_template.jinja", "generation_config.json"}
    assert {p.name for p in out.iterdir()} == {p.name for p in TINY.iterdir()} | added
    for name in ("tokenizer.json", "preprocessor_config.json"):
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


@pytest.mark.parametrize(
    ("module", "reads", "weights_of", "flags_of"),
    [
        (export, "load_policy", lambda name: name, lambda name: {"checkpoint": name, "out": pathlib.Path(name, "hf")}),
        (evaluate, "play_share", lambda config, *_: config.policy.weights,
         lambda name: {"config": EvalConfig(policy=PolicyConfig(weights=name)), "workdir": f"{name}/w"}),
        (collect, "check_collect", lambda config, *_: config.teacher.own.weights,
         lambda name: {"config": CollectConfig(processor=name, teacher=TeacherConfig(own=OwnConfig(weights=name))),
                       "workdir": f"{name}/w"}),
    ],
)  # fmt: skip
def test_a_step_that_a_training_saves_meanwhile_is_not_read(
    stage, tmp_path, monkeypatch, module, reads, weights_of, flags_of
):
    directory = shutil.copytree(stage[0], tmp_path / "checkpoints/sft")
    seen, pin = [], module.pin_step

    def pin_and_train_on(weights):
        pinned = pin(weights)
        shutil.copytree(directory / "0", directory / "9")
        return pinned

    def read(*args):
        seen.append(weights_of(*args))
        raise DataError("seen")

    monkeypatch.setattr(module, "pin_step", pin_and_train_on)
    monkeypatch.setattr(module, reads, read)
    with pytest.raises(DataError, match="seen"):
        module.main(**flags_of(str(directory)))
    assert seen == [f"{directory}@0"] and "@9" in pin(str(directory))


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


def test_a_disk_that_is_full_while_weights_are_written_is_said(tmp_path, monkeypatch, capsys):
    def full(*_):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(tensor_files, "save_file", full)
    command_line = [f"--checkpoint={TINY}", f"--out={tmp_path / 'hf'}"]
    assert run_command("rsagent_jax.export", command_line) == 74
    assert "hf cannot be written: Error while serializing: I/O error: No space left" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_servers_find_the_template_the_ends_and_no_sampling_but_ours(tmp_path):
    """Qwen2.5-VL's own generation_config.json has a repetition penalty, which servers would apply."""
    source = tmp_path / "base"
    shutil.copytree(TINY, source)
    own = {"bos_token_id": 893, "eos_token_id": [895, 893], "repetition_penalty": 1.05, "temperature": 1e-6}
    (source / "generation_config.json").write_text(json.dumps(own))
    assert run(f"--checkpoint={source}", f"--out={tmp_path / 'hf'}") == 0
    written = {name: json.loads((tmp_path / "hf" / name).read_text()) for name in ("generation_config.json",)}
    kept = {"bos_token_id": 893, "eos_token_id": [893, 895], "do_sample": True, "top_k": 0}
    assert written["generation_config.json"] == kept
    assert Processor.load(tmp_path / "hf").end_ids == Processor.load(source).end_ids == {893, 895}
    theirs = json.loads((TINY / "tokenizer_config.json").read_text())
    settings = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())
    assert settings.pop("response_template") == serving.VERBATIM and settings == theirs
    assert (tmp_path / "hf" / "chat_template.jinja").read_text() == theirs["chat_template"]
    for name in ("tokenizer_config.json", "generation_config.json"):  # weights without a template get Qwen's
        (source / name).write_text("{}")
    serving.write_serving_files(source, tmp_path / "hf")
    assert (tmp_path / "hf" / "chat_template.jinja").read_text() == theirs["chat_template"]


@pytest.mark.parametrize("turn", ["<think>a</think>\n<tool_call>\n{broken\n</tool_call>", " <think>\n", "b\n\n"])
def test_transformers_server_leaves_a_turn_as_it_was_written(turn):
    chat_parsing = pytest.importorskip("transformers.utils.chat_parsing")
    prefix = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    for end in ("<|im_end|>", "<|endoftext|>", ""):
        assert chat_parsing.parse_response(turn + end, serving.VERBATIM, prefix=prefix) == {"content": turn}


############################## The model card ##############################


def card(out) -> tuple[huggingface_hub.ModelCardData, str]:
    made = huggingface_hub.ModelCard.load(out / "README.md")
    return made.data, " ".join(made.text.split())


def test_the_card_of_bare_weights_says_that_nothing_is_known(tmp_path):
    shutil.copytree(TINY, tmp_path / "base")
    assert run(f"--checkpoint={tmp_path / 'base'}", f"--out={tmp_path / 'hf'}") == 0
    data, text = card(tmp_path / "hf")
    assert data.library_name == "transformers" and data.license is None and data.base_model is None
    assert "Not known: the weights do not lie in a run" in text and "no results of these weights" in text
    assert "Not known here. These weights are made from `base`" in text and "`<|image_pad|>`" in text
    assert str(tmp_path) not in text
    assert run(f"--checkpoint={TINY}", f"--out={tmp_path / 'tiny'}", "--license=mit") == 0
    assert card(tmp_path / "tiny")[0].license == "mit"
    rounded = lambda name, dtype: model_card.model_card(str(tmp_path / name), name, dtype, "", [])  # noqa: E731
    assert "Weights are bfloat16." in rounded("base", "bfloat16")  # as they were
    assert "Weights are float32." in rounded("base", "float32")
    assert "Weights are float16, rounded from bfloat16." in rounded("base", "float16")


def test_a_path_of_another_run_is_no_name_of_a_hub_and_no_stamp_is_sought_where_no_root_is(tmp_path, monkeypatch):
    for name, said in (
        ("checkpoints/sft", "sft"),
        ("train/grpo", "grpo"),
        ("checkpoints/grpo@best", "grpo@best"),
        ("a/b", "a/b"),
        ("Qwen/Qwen2.5-VL-7B-Instruct@main", "Qwen/Qwen2.5-VL-7B-Instruct@main"),
        ("assets/tiny-base", "assets/tiny-base"),
    ):
        assert model_card._name(name) == said
    (tmp_path / STAMP).write_text("{}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(model_card, "find_step", lambda path, step: 7)
    rows = dict(model_card._training(TrainConfig(policy=PolicyConfig(weights="a/b")), tmp_path / "grpo", "last"))
    assert "scenes made" not in rows["GRPO data"]
    parts = [MixPart(name=name, weight=w, data=DataConfig(dataset=name, **c)) for name, w, c in (
        ("refcoco", 2.0, dict(split_by="unc", limit=9)), ("reasonseg", 0.5, dict(texts="all", split="val"))
    )]  # fmt: skip
    mix = DataConfig(mix=tuple(parts), exclude=("refcoco/unc/val", "reasonseg/test"))
    assert model_card._data_set(to_dict(mix), False) == (
        "2 x (refcoco, unc, train, limit 9) + 0.5 x (reasonseg, val, texts all),"
        " without the pictures of refcoco/unc/val and reasonseg/test"
    )


def test_the_card_tells_of_the_run_and_of_evaluations_of_these_very_weights(stage, tmp_path, capsys):
    checkpoint = tmp_path / "run" / "checkpoints" / "grpo"
    shutil.copytree(stage[0], checkpoint)
    policy = PolicyConfig(weights="Qwen/Qwen2.5-VL-7B-Instruct", lora=LoraConfig(rank=8))
    config = TrainConfig(policy=policy, sft=SftConfig(trajectories=str(tmp_path / "set")), seed=5)
    config = dataclasses.replace(
        config, grpo=GrpoConfig(data=DataConfig(root=str(tmp_path), dataset="refcoco", limit=9))
    )
    (tmp_path / "run" / "config.json").write_text(json.dumps(to_dict(config)))
    (tmp_path / "set").mkdir()
    teacher = {"function": "a:b", "remote": {"model": "big"}}
    stored = {"records": 12, "filter": {"min_iou": 0.9}, "config": {"teacher": teacher, "data": to_dict(DataConfig())}}
    (tmp_path / "set" / "collect.json").write_text(json.dumps(stored))
    results = {"benchmark": "B val", "n": 7, "giou": 0.5, "giou_ci95": [0.25, 0.75], "ciou": 0.4, "mean_turns": 2.0}
    results |= {"tool_error_rate": 0.1, "segmenter": {"identity": "discs"}, "weights_sha256": None}
    mine, bound = {"weights_sha256": weights_checksum(str(checkpoint))}, {"row": "bound: untrained policy"}
    settings = {"data": {"limit": 3, "raw": True}, "agent": {"max_turns": 4, "max_pixels": 784}}
    settings["agent"] |= {"prompt": "brief", "announce_last": False, "tool_deadline_s": 5.0}
    settings |= {"sampling": {"temperature": 0.5, "kv_dtype": "int8", "weights_dtype": "int8", "slots": 4}}
    settings |= {"metric": {"unit": "sentence", "texts": "all", "empty_policy": "dropped"}}
    few = {"n": 3, "settings": settings}
    made = {"near": mine, "other": {"weights_sha256": "abc"}, "few": mine | few, "untrained": mine | bound}
    for name, more in made.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps(results | more))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "results.json").write_text('{"benchm')
    text = model_card.model_card(str(checkpoint), "mine", "bfloat16", "", [])
    data, text = huggingface_hub.ModelCard(text).data, " ".join(text.split())
    assert data.base_model == "Qwen/Qwen2.5-VL-7B-Instruct" and data.license is None
    assert [(r.dataset_name, r.metric_type, r.metric_value) for r in data.eval_results] == [
        ("B val", "giou", 0.5),
        ("B val", "ciou", 0.4),
    ] * 2
    for words in (
        "`grpo`, update 0, seed 5",
        "12 trajectories on refcocog, umd, train, by `a:b (big)`, of final IoU >= 0.9",
        "GRPO data | refcoco, umd, train, limit 9 |",
        "100 steps planned, of 16 prompts x 4 samples and 1 updates, ratio grpo",
        "1 final + 0.5 process + 0.2 format",
        "LoRA | rank 8, merged",
        "| B val | 7 | 0.500 [0.250, 0.750] | 0.400 | 2.00 | 10.0 % | discs | LISA's rules |",
        "| B val | 3 | 0.500 [0.250, 0.750] |",
        "| discs | at most 4 turns, temperature 0.5, views of at most 784 pixels, prompt brief,",
        "prompt brief, announce_last False, kv_dtype int8, weights_dtype int8, texts as written, limit 3, LISA's",
        "limit 3, LISA's rules, unit sentence, texts all, empty_policy dropped |",
        "Weights are bfloat16, rounded from float32",
        "made from `Qwen/Qwen2.5-VL-7B-Instruct`; their licence holds",
    ):
        assert words in text, (words, text)
    assert str(tmp_path) not in text
    assert "leaves out what lies beside the run: " in capsys.readouterr().out
    (tmp_path / "set" / "collect.json").unlink()
    (tmp_path / "near" / "results.json").rename(tmp_path / "near" / "kept")
    shutil.rmtree(tmp_path / "few")
    text = " ".join(model_card.model_card(str(checkpoint), "mine", "bfloat16", "", []).split())
    assert "trajectories of `set`, of which nothing is known" in text and "no results of these weights" in text
    (tmp_path / "near" / "kept").rename(tmp_path / "near" / "results.json")
    (tmp_path / "run" / "config.json").write_text('{"gone": 1}')
    assert "Not known: the weights do not lie" in model_card.model_card(str(checkpoint), "mine", "bfloat16", "", [])
    assert "note: the model card tells nothing of the training" in capsys.readouterr().out
    given = lambda name: (f"--checkpoint={checkpoint}", f"--out={tmp_path / 'hf'}", f"--evaluation={tmp_path / name}")  # noqa: E731
    assert "other/results.json is not an evaluation of" in refused(capsys, *given("other"))
    assert "gone/results.json does not exist" in refused(capsys, *given("gone"))
    assert "its row 'bound: untrained policy'" in refused(capsys, *given("untrained"))
    assert "broken/results.json cannot be read as JSON" in refused(capsys, *given("broken"))
    assert not (tmp_path / "hf").exists() and run(*given("near")) == 0
    assert card(tmp_path / "hf")[1].count("B val |") == 1
