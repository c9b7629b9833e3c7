"""A reward term that asks a model behind an OpenAI-compatible endpoint how well a mask answers the question.

    config.grpo.reward.judge = ConfigDict({"weight": 0.5, "terms": {"judge": {
        "function": "rsagent_jax.collecting.judge:judge_mask", "deadline_s": 120.0,
        "arguments": {"url": "http://host:8000/v1", "model": "Qwen2.5-VL-72B"}}}})

The judge sees the picture as it is and with the final mask drawn on it, and the question; never the true mask. All
trajectories of a step are asked about side by side. What the server refuses for now or fails at is asked again until
the term's deadline; an answer without a score is an error of the term (grpo.on_reward_error).
"""

import functools
import re

from rsagent_jax.agent.overlay import draw_overlay
from rsagent_jax.config.build import build_config
from rsagent_jax.config.schema import RemoteConfig
from rsagent_jax.rollout.endpoint import Endpoint, check_endpoint, message_part
from rsagent_jax.types import Sample, Trajectory

NAME = "the judge's arguments"
BEST = 10  # the highest score that is asked for
QUESTION = (
    "The first image is a picture, the second is the same picture with a region tinted blue and outlined in yellow.\n"
    "Does the region cover all of what is asked for, and nothing else? Asked for: {query}\n"
    f"Answer in one line that ends with `SCORE: n`, n from 0 (something else, or no region) to {BEST} (exactly it)."
)


async def judge_mask(
    trajectory: Trajectory, sample: Sample, url: str, model: str, size: int = 448, question: str = QUESTION, **remote
) -> float:
    """The judge's score of the final mask, in [0, 1].

    url, model, remote: as teacher.remote has them (retries, timeout_s, concurrent, key_variable, …). size: of the
    longer side of both images, pixels. question: with {query} in it; the answer must end with `SCORE: n`.

    Raises:
      PolicyFailure: the endpoint gave no answer.
      ValueError: its answer has no score from 0 to 10.
    """
    endpoint = Endpoint.shared(_remote(url=url, model=model, **remote), NAME)
    shown = draw_overlay(sample.image, trajectory.final_mask, size)
    plain = draw_overlay(sample.image, trajectory.final_mask & False, size)
    parts = [plain, shown, question.replace("{query}", sample.query)]
    answer = await endpoint.complete_async([{"role": "user", "content": [*map(message_part, parts)]}])
    return read_score(answer.text)


def _check_arguments(size: int = 0, question: str = "", **remote) -> None:
    """DataError for what is no argument of an endpoint, before a step is played."""
    check_endpoint(_remote(**remote), NAME)


judge_mask.check_arguments = _check_arguments  # which rewards.Term calls


def read_score(answer: str) -> float:
    """The last `SCORE: n` of an answer, as a share of BEST. ValueError where there is none in the range."""
    found = re.findall(r"SCORE:\W*(\d+(?:\.\d+)?)", answer, re.IGNORECASE)
    if not found or float(found[-1]) > BEST:
        raise ValueError(f"no `SCORE: n` from 0 to {BEST} in the judge's answer {answer[-80:]!r}")
    return float(found[-1]) / BEST


@functools.cache
def _remote(**arguments) -> RemoteConfig:
    """DataError naming an argument that is unknown or out of its range."""
    return build_config(RemoteConfig, {"temperature": 0.0, "max_tokens": 256, **arguments})
