"""The tiny base's recipe: runs at a small size, and its losses against plain numpy."""

import dataclasses
import functools
import json

import numpy as np
import pytest

from configs import tiny_base
from rsagent_jax.config.build import build_config
from rsagent_jax.data.processor import Processor
from rsagent_jax.models.qwen25_vl.load import load_policy
from rsagent_jax.tiny import grounding, pretrain
from rsagent_jax.tiny.grounding import MAX_OBJECTS, WORDS, SceneRows
from tests.refusals import refused

pytestmark = pytest.mark.slow


def small_config() -> pretrain.PretrainConfig:
    config = tiny_base.get_config()
    config.update(hidden=32, layers=2, mlp=48, vision_hidden=32, vision_layers=2, vision_mlp=48, look_layer=1)
    config.see.update(steps=50, rows=2, warmup=5)
    config.ground.update(steps=50, rows=2, warmup=5)
    config.eval_scenes = 4
    return build_config(pretrain.PretrainConfig, config)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    work = tmp_path_factory.mktemp("pretrain")
    pretrain.pretrain(small_config(), work, work / "out")
    return work


def test_a_run_leaves_its_log_and_a_policy_in_the_hub_format(trained):
    see, ground, end = (json.loads(line) for line in (trained / "pretrain.jsonl").read_text().splitlines())
    assert (see["stage"], see["step"], ground["stage"], ground["step"]) == ("see", 50, "ground", 50)
    assert {"aux", "corners", "names"} <= set(see)
    assert {"lm", "look", "words"} <= set(ground)
    assert {"stage", "click_attribute", "iou_attribute", "absent_told", "present_told"} <= set(end)
    assert all(np.isfinite(v) for r in (see, ground, end) for k, v in r.items() if k != "stage")
    assert load_policy(trained / "out").config.text.hidden_size == 32


def test_the_losses_on_words_and_looks_are_those_of_numpy(trained):
    model, processor = load_policy(trained / "out"), Processor.load(trained / "out")
    maker = SceneRows(processor, 0.4, 0.25, list_share=1.0)
    rows = maker.make(2, (1,), rows=3, tokens=208)
    config = dataclasses.replace(small_config(), aux_weight=0.0, corner_weight=0.0)
    image_at = int(np.flatnonzero(rows.tokens[0] == processor.image_id)[0])
    _, merged, look = pretrain._hidden(model, rows, config.look_layer, image_at)
    merged, look = np.asarray(merged, np.float64), np.asarray(look, np.float64)

    normed = merged / np.sqrt((merged**2).mean(-1, keepdims=True) + 1e-6) * np.asarray(model.decoder.norm.scale[...])
    logits = normed @ np.asarray(model.decoder.head_VD)[maker.words].T
    expected = 0.0
    for k, group in enumerate((slice(0, 6), slice(6, 10), slice(10, 12))):
        said = [
            np.log(np.exp(logits[b, m, group]).sum()) - logits[b, m, rows.names[b, m, k]]
            for b, m in zip(*np.nonzero(rows.names[..., 0] >= 0), strict=True)
        ]
        expected += np.mean(said)
    found = float(pretrain.name_loss(model, merged.astype(np.float32), rows, maker.words))
    assert found == pytest.approx(expected, rel=1e-4) and len(WORDS) == 12

    np.testing.assert_allclose(np.exp(look).sum(-1), 1, rtol=1e-5)
    parts = {"objects": [], "words": []}
    for b, t in zip(*np.nonzero(rows.target), strict=True):
        cells = rows.cells[b, rows.target[b, t] - 1]
        parts["objects" if rows.target[b, t] <= MAX_OBJECTS else "words"].append(-(cells * look[b, t - 1]).sum())
    head = pretrain.Head(32, pretrain.nnx.Rngs(0))
    targets = np.asarray(pretrain.number_targets(maker.numbers, 1024, 1.2))
    _, metrics = pretrain.ground_loss(model, head, rows, targets, config, maker.numbers, maker.words, image_at)
    assert float(metrics["look"]) == pytest.approx(np.mean(parts["objects"]), rel=1e-4)
    assert float(metrics["words"]) == pytest.approx(np.mean(parts["words"]), rel=1e-4)


def test_coordinates_are_read_with_the_policys_own_before_them(trained):
    maker = SceneRows(Processor.load(trained / "out"), 0.4, 0.25)
    rows = [maker._row(np.random.default_rng(seed), 208, True) for seed in (1, 3)]
    first, second = (row.tokens.copy() for row in rows)
    answers = pretrain.read_answers(
        lambda r: r.tokens + 5, rows, [[9, 12, 13], [20]]
    )  # it says: the last one plus five
    assert answers == [[first[8] + 5, first[11] + 5, first[11] + 10], [second[19] + 5]]
    np.testing.assert_array_equal([row.tokens for row in rows], [first, second])


def test_no_steps_only_evaluate(trained, tmp_path, capsys):
    config = small_config()
    none = dict(init=str(trained / "out"), see=dataclasses.replace(config.see, steps=0))
    pretrain.pretrain(dataclasses.replace(config, ground=none["see"], **none), tmp_path, tmp_path / "out")
    printed = json.loads(capsys.readouterr().out)
    assert printed.pop("stage") == "end" and set(printed) >= {"click_attribute", "iou_attribute"}
    assert all(0 <= v <= 1 for v in printed.values())
    for name in ("model.safetensors", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (trained / "out" / name).read_bytes()


def test_a_stage_without_room_for_its_warm_up_is_one_error():
    short = pretrain.StageConfig(steps=5, rows=1, lr=1e-3, warmup=5, tokens=64)
    refused("lower warmup", pretrain.optimizer, short, 0.0)


def test_what_is_there_is_told_by_the_word_after_is(trained):
    """A policy that always says " not" is right of all that is absent and of nothing else."""
    maker = SceneRows(Processor.load(trained / "out"), 0.4, 0.25)
    no = maker.processor.encode(" not here.")[0]
    rng = np.random.default_rng(0)
    seen = [maker.scene(rng) for _ in range(6)]
    for word, absent, present in ((no, 1.0, 0.0), (no + 1, 0.0, 1.0)):
        told = pretrain._presence(lambda rows, word=word: np.full_like(rows.tokens, word), maker, rng, seen)
        assert set(told["absent_told"]) == {absent} and set(told["present_told"]) == {present}
        assert len(told["absent_told"]) == len(told["present_told"]) == 6
    # and it is the word after "is" that is read, of the answer and not of the question
    row = maker.row(seen[0], [grounding.presence_question("the star")[0]], 128)
    at = np.flatnonzero(row.loss_mask)[-1] - 1
    assert maker.processor.decode(row.tokens[at : at + 2]) == " is<|im_end|>"


def test_masks_and_several_things_are_read_where_they_are_told(trained):
    """A policy that knows the right tokens is right everywhere, one that says something else nowhere."""
    maker = SceneRows(Processor.load(trained / "out"), 0.4, 0.25)
    seen = [maker.scene(np.random.default_rng(k)) for k in range(8)]

    def knows(rows, shift=0):
        return np.roll(rows.tokens, -1, axis=1) + shift

    for shift, right in ((0, 1.0), (1, 0.0)):
        said = functools.partial(knows, shift=shift)
        for told in (
            pretrain._masks(said, maker, np.random.default_rng(1), seen),
            pretrain._several(said, maker, np.random.default_rng(1), seen),
        ):
            assert all(set(values) == {right} for values in told.values()) and all(told.values())


def test_the_parts_on_absent_things_go_on_from_the_base():
    first, then = (build_config(pretrain.PretrainConfig, tiny_base.get_config(part)) for part in ("", "absent"))
    assert (first.absent_share, first.init, then.see.steps) == (0.0, "", 0) and then.absent_share > 0 and then.init
    assert dataclasses.asdict(first)["hidden"] == then.hidden
    last = build_config(pretrain.PretrainConfig, tiny_base.get_config("several"))
    assert last.marked_share > first.marked_share == 0 and last.init == "runs/absent/base"
    with pytest.raises(ValueError, match="tiny_base.py:absent"):
        tiny_base.get_config("absnt")
