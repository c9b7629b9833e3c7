"""The recipes of docs/extend.md do what they say: their code is taken from the page and run."""

import json
import pathlib
import re
import typing

import numpy as np
import pytest
from agent_fakes import make_image, run, same_states

from rsagent_jax.agent import prompts
from rsagent_jax.agent.replay import replay, state_to_json
from rsagent_jax.agent.segmenter import open_segmenter
from rsagent_jax.agent.tools import TOOLS, parse, render_call, tool_schemas
from rsagent_jax.agent.tools.zoom import Zoom
from rsagent_jax.config.import_path import import_path
from rsagent_jax.config.reward import RewardGroup, RewardTerm
from rsagent_jax.config.schema import ADVANTAGES, GrpoConfig, SegmenterConfig
from rsagent_jax.rewards import call_cost, make_scorer, novel_action
from rsagent_jax.runtime.loggers import open_loggers
from rsagent_jax.train import advantages
from rsagent_jax.types import Sample, Status, Trajectory
from sam_bridge.types import SegmentRequest

PAGE = (pathlib.Path(__file__).parents[1] / "docs/extend.md").read_text(encoding="utf-8")


@pytest.fixture
def recipe(tmp_path):
    """Writes the Python of a section to a file, and gives its path."""

    def write(heading: str) -> str:
        section = PAGE.split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
        file = tmp_path / "recipe.py"
        file.write_text(re.search(r"^```python\n(.*?)^```", section, re.DOTALL | re.MULTILINE)[1])
        return str(file)

    return write


def trajectory(turns=(), status=Status.FINISHED) -> Trajectory:
    none = np.zeros(0)
    return Trajectory("s", 0, "it", turns, (), np.ones((8, 8), bool), None, status, none, none, none, none, none, ())


def test_a_reward_term(recipe):
    term = RewardTerm(f"{recipe('A reward term')}:found_early", 0.5, (("turns", 1),))
    score = make_scorer((RewardGroup("mine", 2.0, (term,)),))
    sample = Sample("s", np.zeros((8, 8, 3), np.uint8), "it", np.ones((8, 8), bool))
    assert [r.total for r in score([[trajectory(), trajectory(status=Status.MAX_TURNS)]], [sample])] == [1.0, 0.0]


def test_a_logger(recipe, tmp_path):
    (logger,) = open_loggers((f"{recipe('A logger')}:Chat",), tmp_path, {})
    logger.write("grpo", 0, {"val/giou": 0.25})
    logger.write("grpo", 1, {"loss": 0.5})
    logger.close()
    assert (tmp_path / "chat.txt").read_text() == "grpo 0: gIoU 0.250\n"


def test_a_tool(recipe, monkeypatch):
    tool = import_path(f"{recipe('A tool')}:ZoomOut")
    monkeypatch.setitem(TOOLS, tool.name, tool)
    assert parse(render_call(tool(2))) == tool(2) and parse(render_call(tool(5))).reason == "bad_value"
    assert tool_schemas()[-1]["function"]["name"] == "zoom_out"
    assert json.dumps(tool_schemas()[-1]) in prompts.system_prompt("full")
    assert "finish(mask_id) or zoom_out(factor)." in prompts.system_prompt("brief")
    image = make_image(224, 224)
    texts = [render_call(call) for call in (Zoom((112, 56, 168, 112)), tool(3), tool(2), tool(2))]
    state = run(texts, image=image)
    # 56 wide: 56 more on each side, then to the whole image, which cannot be widened
    assert [turn.observation.text for turn in state.turns] == ["View 56x56.", "View 168x168.", *["View 224x224."] * 2]
    np.testing.assert_array_equal(state.turns[1].observation.image, image[:168, 56:224])
    assert [turn.repeated for turn in state.turns] == [False, False, False, True]
    same_states(state, replay(state_to_json(state), image))
    played = trajectory(state.turns)
    assert call_cost(played, None) == 4 and novel_action(played, None) == 3 / 4


def test_an_advantage(recipe, monkeypatch):
    exec(pathlib.Path(recipe("An advantage")).read_text(), vars(advantages))  # the function stands in that file
    monkeypatch.setitem(ADVANTAGES, "rank", "rank_centred")
    rewards = np.array([[0, 1, 5, np.nan], [2, 2, 2, 2]], np.float32)
    given = advantages.advantage_function("rank")(rewards, ~np.isnan(rewards))
    np.testing.assert_array_equal(given, [[-1, 0, 1, 0], [0, 0, 0, 0]])
    del advantages.rank_centred


def test_the_config_takes_what_the_table_of_advantages_has():
    assert typing.get_args(typing.get_type_hints(GrpoConfig)["advantage"]) == tuple(ADVANTAGES)
    assert all(hasattr(advantages, function) for function in ADVANTAGES.values())


@pytest.mark.parametrize("mode", ["inprocess", "spawn"])
def test_a_segmenter_back_end(recipe, mode):
    image = np.zeros((20, 30, 3), np.uint8)
    image[5:15, 5:15] = (200, 30, 30)
    backend = f"{recipe('A segmenter back end')}:SameColour"
    with open_segmenter(SegmenterConfig(mode=mode, backend=backend)) as segmenter:
        for request in (SegmentRequest(points=((7, 9),), labels=(1,)), SegmentRequest(box=(4, 4, 16, 16))):
            np.testing.assert_array_equal(segmenter.segment(image, request).mask, image[..., 0] > 0)
        assert segmenter.about.backend == "same_colour"
