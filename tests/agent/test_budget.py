"""The budget of a trajectory: by hand, against what the driver really plays, and every preset against its own check."""

import ast
import dataclasses
import importlib
import json
import pathlib

import pytest
from agent_fakes import LIMITS, DiscSegmenter
from hypothesis import given, settings
from hypothesis import strategies as st

from rsagent_jax.agent import budget, prompts
from rsagent_jax.agent.budget import Budget, Texts
from rsagent_jax.agent.views import PixelLimits
from rsagent_jax.config.build import build_config
from rsagent_jax.config.schema import AgentConfig, BatchConfig, CollectConfig, EvalConfig, SegmentConfig, TrainConfig
from rsagent_jax.data.processor import ImageConfig, Processor
from rsagent_jax.models.qwen25_vl.config import size_config
from rsagent_jax.rollout.driver import Driver
from rsagent_jax.rollout.policy import TextPolicy
from rsagent_jax.rollout.startup import check_budget
from rsagent_jax.types import ParseError, Status
from tests.refusals import refused
from tests.rollout import small
from tests.rollout.small import click, finish, zoom

ROOT = pathlib.Path(__file__).parents[2]
COUNTS = json.loads((ROOT / "tests/golden/qwen_counts.json").read_text())  # of the real vocabulary; make_qwen_counts.py
BY_HAND = Budget(1000, 100, 1300, 20, 25, 3000, 200, 0, 4, 150)


def test_arithmetic_by_hand():
    b = BY_HAND
    assert b.needs(150) == 1000 + 4 * 150 + 3 * 100 + 20 == 1920
    assert b.needs(150, turns=1) == 1150  # nothing is announced to the opening's turn
    assert b.needs(150, views=1) == 1920 - 100 + 1300
    assert b.longest_turn == 200 and dataclasses.replace(b, context=2000).longest_turn == (2000 - 1320) // 4 == 170
    assert [dataclasses.replace(b, context=c).turns_that_fit(150) for c in (1149, 1150, 1420, 1669, 1670, 1920)] == [
        *(0, 1, 2, 2, 3, 4)
    ]
    assert b.views_that_fit == 0 and dataclasses.replace(b, context=1920 + 2400).views_that_fit == 2
    assert b.worst == 1000 + 4 * 200 + 3 * 1300 + 20
    short = dataclasses.replace(b, max_tokens=500)
    assert short.longest_turn == 125 and short.turns_that_fit(150) == 3


def test_the_next_turn_by_hand():
    reserve = 100 + 20 + 25 + 1
    assert BY_HAND.next_turn(1000, 0, False) == (200, False)
    assert BY_HAND.next_turn(3000 - reserve - 160, 0, False) == (160, False)
    assert BY_HAND.next_turn(3000 - reserve - 149, 0, False) == (200, True)  # less than an ordinary turn would be left
    assert BY_HAND.next_turn(1000, 0, True) == (200, True)
    assert BY_HAND.next_turn(2975, 0, False) == (25, True) and BY_HAND.next_turn(2976, 0, False) == (0, True)
    short = dataclasses.replace(BY_HAND, max_tokens=500)
    assert short.next_turn(1000, 300, False) == (175, False) and short.next_turn(1000, 340, False) == (160, True)


def play(turns, agent, size, images=None, context=1 << 20):
    """(trajectory, budget) of scripted turns with the real processor of the tiny vocabulary, and other image limits."""
    processor = small.processor()
    if images:
        settings = dataclasses.replace(processor.images, limits=images)
        processor = Processor(processor.tokenizer, settings, processor.config)
    policy = TextPolicy(small.scripted({"s0": turns}), processor, context=context)
    driver = Driver(policy, DiscSegmenter(radius=5), processor, agent, workers=1)
    ((trajectory, _),) = driver.run([small.task(0, h=size[0], w=size[1])])
    texts = Texts.of(agent, processor.encode, query="disc number 0")
    limits = processor.images.limits
    return trajectory, budget.trajectory_budget(agent, policy, texts, size, limits, limits)


@pytest.mark.parametrize("style", ["full", "brief"])
def test_a_real_trajectory_is_as_long_as_predicted(style):
    agent = AgentConfig(prompt=style, history_size=224, max_turns=3)
    turns = (click(30, 40), click(60, 40), finish(1))
    trajectory, bounds = play(turns, agent, (150, 300), LIMITS)
    assert trajectory.status is Status.FINISHED
    said = sum(len(small.processor().encode(turn)) + 1 for turn in turns)
    assert trajectory.loss_mask.sum() == said
    digits = 0 if style == "brief" else 2  # of 308x140 in each of two masks, where five-digit sides are allowed for
    wide = trajectory_texts(agent, (308, 140))
    assert len(trajectory.tokens) == bounds.needs(0) + said - (bounds.opening - wide[0]) - 2 * (bounds.mask - wide[1])
    assert (bounds.mask - wide[1] > 0) == bool(digits)


def trajectory_texts(agent, size_view):
    """(opening, mask) in tokens of a picture of 150 x 300: 11 x 5 merged patches, overlays of 8 x 4."""
    texts = Texts.of(agent, small.processor().encode, size_view, "disc number 0")
    return texts.opening + 11 * 5, texts.mask + 8 * 4


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(0, 3), min_size=5, max_size=5),
    st.tuples(st.integers(40, 260), st.integers(40, 260)),
    st.sampled_from(["full", "brief"]),
    st.integers(56, 200),
)
def test_nothing_a_policy_does_takes_more_than_predicted(kinds, size, style, history):
    agent = AgentConfig(prompt=style, history_size=history, max_turns=6, max_invalid=9, max_repeats=9)
    h, w = size
    turns = [[click(w / 2, h / 2 + i), zoom(0, 0, w - i, h), "nothing", click(1, 1, 9)][k] for i, k in enumerate(kinds)]
    trajectory, bounds = play([*turns, finish(None)], agent, size, LIMITS)
    said, views = int(trajectory.loss_mask.sum()), sum(k == 1 for k in kinds)
    assert len(trajectory.tokens) <= bounds.needs(0, views=views) + said


def test_the_longest_errors_are_the_longest():
    """Every detail that stands in the sources, its placeholders filled with what they may hold."""
    details, encode = [], small.processor().encode
    for path in set((ROOT / "rsagent_jax/agent").rglob("*.py")) - {pathlib.Path(budget.__file__)}:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("ParseError", "Malformed"):
                reason, detail = node.args
                reason = reason.value if isinstance(reason, ast.Constant) else "invalid_prompt"
                if isinstance(detail, ast.Constant):
                    details.append(ParseError(reason, detail.value))
    assert len(details) >= 20
    details += [
        ParseError("unknown_mask", "no mask 1000000; masks: 1 to 8."),
        ParseError("bad_type", "quarter_turns must be an integer."),
    ]
    for style in prompts.STYLES:
        most = max(len(encode(prompts.error_text(e, style))) for e in budget.LONGEST_ERRORS)
        assert all(len(encode(prompts.error_text(error, style))) <= most for error in details)


# --- The check, and the presets ---


class Real:
    """A processor of full size of which only counts are known."""

    images = ImageConfig(14, 2, 2, PixelLimits(28, 3136, 12_845_056), (0.5,) * 3, (0.5,) * 3)
    config = size_config("7b")

    def encode(self, text: str) -> range:
        return range(COUNTS["tokens"][text])


def preset(name: str, schema, *arguments):
    return build_config(schema, importlib.import_module(f"configs.{name}").get_config(*arguments))


def sft_line(config: TrainConfig, processor) -> str:
    return check_budget(config.agent, processor, batch=config.sft.batch, name="sft")


def grpo_line(config: TrainConfig, processor) -> str:
    return check_budget(config.agent, processor, config.grpo.sampling, config.grpo.batch, "grpo")


def test_every_preset_of_full_size_passes_its_own_check_with_one_limit():
    line = sft_line(preset("sft_tpu", TrainConfig), Real())
    lines = [grpo_line(preset(name, TrainConfig), Real()) for name in ("grpo_tpu", "grpo_mix_tpu")]
    played = (preset("eval", EvalConfig), preset("segment", SegmentConfig, "full"))
    lines += [check_budget(config.agent, Real(), config.sampling) for config in played]
    assert "opening takes 2060 tokens" in line and "1 views" in line
    assert len({text.split("budget of ")[1] for text in [line, *lines]}) == 1
    assert "budget of 6144 tokens" in line and "turns of up to 358 tokens" in line


def test_the_contexts_of_the_table():
    """Longest turns of a 1920x1080, a 2000x2000 and a 640x480 picture; docs/training.md has the same table."""
    agent, limits = preset("grpo_tpu", TrainConfig).agent, PixelLimits(28, 3136, 1_003_520)
    texts = Texts.of(agent, Real().encode, (1316, 728))
    table = {}
    for context in (4096, 5120, 6144, 8192):
        room = dataclasses.replace(preset("eval", EvalConfig).sampling, context=context)
        table[context] = [
            budget.trajectory_budget(agent, room, texts, size, limits, Real.images.limits).longest_turn
            for size in ((1080, 1920), (2000, 2000), (480, 640))
        ]
    assert table == {4096: [102, 28, 181], 5120: [230, 156, 309], 6144: [358, 284, 437], 8192: [512, 512, 512]}


def test_every_preset_of_the_tiny_policy_passes_its_own_check_with_one_limit():
    tiny = Processor.load(ROOT / "assets/tiny-base")
    contexts = set()
    for name in ("quickstart", "debug"):
        config = preset(name, TrainConfig)
        assert "8 turns of" in sft_line(config, tiny) and "8 turns of" in grpo_line(config, tiny)
        contexts |= {config.grpo.sampling.context, config.sft.batch.tokens, config.grpo.batch.tokens}
    for config in (preset("eval_quickstart", EvalConfig), preset("segment", SegmentConfig)):
        check_budget(config.agent, tiny, config.sampling)
        contexts.add(config.sampling.context)
    assert contexts == {896}
    assert preset("collect_quickstart", CollectConfig).agent == preset("quickstart", TrainConfig).agent


@pytest.mark.parametrize(
    ("agent", "sampling", "batch", "words"),
    [
        ({}, {"context": 4096}, {}, "sampling.context = 4096: .* would end in turn 7; .* Raise it to 4477"),
        ({"max_turns": 4}, {"context": 4096}, {}, None),
        ({"max_tokens": 1000}, {}, {}, "agent.max_tokens to 1200"),
        ({}, {"max_new_tokens": 20}, {}, "max_new_tokens = 20, but .* finish 27"),
        ({}, {"patches": 4096}, {}, "sampling.patches = 4096, but .* takes 4992"),
        ({}, {}, {"patches": 5120}, "grpo.batch.patches = 5120, but .* takes "),
        ({}, {}, {"tokens": 4096}, "grpo.batch.tokens = 4096, but .* takes 4477"),
    ],
)
def test_what_does_not_let_a_typical_trajectory_end_is_refused_with_the_figure_that_would(
    agent, sampling, batch, words
):
    config = preset("grpo_tpu", TrainConfig)
    change = dataclasses.replace
    arguments = (
        change(config.agent, **agent), Real(), change(config.grpo.sampling, **sampling),
        change(config.grpo.batch, **batch), "grpo",
    )  # fmt: skip
    if words is None:
        assert "4 turns of up to" in check_budget(*arguments)
    else:
        refused(words, check_budget, *arguments)
    short = BatchConfig(tokens=2048, patches=16384)
    refused(r"sft.batch.tokens = 2048", check_budget, config.agent, Real(), batch=short, name="sft")
