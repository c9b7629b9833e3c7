"""Whether a config lets a typical trajectory reach its last turn: asked before anything is compiled."""

from __future__ import annotations

import dataclasses

from rsagent_jax.agent.budget import Budget, Texts, image_sizes, trajectory_budget, typical_size
from rsagent_jax.agent.views import fixed_size
from rsagent_jax.config.schema import AgentConfig, BatchConfig, SamplingConfig
from rsagent_jax.data.processor import Processor
from rsagent_jax.models.qwen25_vl.positions import padded_patches
from rsagent_jax.rollout.driver import pixel_limits
from rsagent_jax.types import DataError


def check_budget(
    agent: AgentConfig,
    processor: Processor,
    sampling: SamplingConfig | None = None,
    batch: BatchConfig | None = None,
    name: str = "",
) -> str:
    """The budget of a trajectory as a line for people. DataError when a typical one cannot reach agent.max_turns.

    sampling: of whoever plays; None in SFT, which reads trajectories and bounds them by a row of `batch`. name: of the
    stage in the config, "" where the groups stand at its root.
    """
    views, prefix = pixel_limits(agent, processor), name and f"{name}."
    size, images = typical_size(views), processor.images.limits
    texts = Texts.of(agent, processor.encode, fixed_size(*size, views)[::-1])
    room = sampling or dataclasses.replace(SamplingConfig(), context=batch.tokens)
    budget = trajectory_budget(agent, room, texts, size, views, images)
    turn, turns = budget.typical_turn, budget.max_turns
    needed = budget.needs(turn)
    image = f"{size[1]}x{size[0]} picture"
    typical = f"a typical trajectory ({image}, {turns} turns of {turn} tokens, the last one finish)"
    takes = (
        f"the opening takes {budget.opening} tokens, a mask's overlay {budget.mask}, a view at most {budget.view},"
        f" finish {budget.finish}"
    )
    if budget.max_new_tokens < budget.finish:
        raise DataError(f"{prefix}sampling.max_new_tokens = {budget.max_new_tokens}, but {takes}")
    if budget.longest_turn < turn:
        field = "sampling.context" if sampling else "batch.tokens"
        raise DataError(
            f"{prefix}{field} = {room.context}: {typical} would end in turn {budget.turns_that_fit(turn) + 1};"
            f" {takes}. {_advice(budget, needed)}"
        )
    patch = processor.images.patch_size
    shown = [(1, h // patch, w // patch) for h, w in image_sizes(agent, size, views, images)]
    view, overlay = (padded_patches((grid,), processor.config.vision) for grid in shown)
    for field, have, need in (
        ("sampling.patches", sampling and sampling.patches, max(view, overlay)),
        ("batch.patches", batch and batch.patches, view + (turns - 1) * overlay),
        ("batch.tokens", batch and batch.tokens, needed),
    ):
        if have is not None and have < need:
            raise DataError(f"{prefix}{field} = {have}, but {typical} takes {need}")
    worst = "fits" if budget.worst <= budget.context else "does not, so it is told its last turn"
    return (
        f"{prefix}budget of {room.context} tokens: {takes}. {turns} turns of up to {budget.longest_turn} tokens fit;"
        f" {typical} takes {needed}, with room for {budget.views_that_fit} views in place of masks; the worst case,"
        f" {budget.worst}, {worst}"
    )


def _advice(budget: Budget, needed: int) -> str:
    drawn = budget.max_turns * budget.typical_turn
    if budget.max_tokens and budget.max_tokens < drawn:
        return f"Raise agent.max_tokens to {drawn} or more, or lower agent.max_turns or agent.typical_turn"
    return f"Raise it to {needed} or more, or lower agent.max_turns, agent.max_pixels or agent.typical_turn"
