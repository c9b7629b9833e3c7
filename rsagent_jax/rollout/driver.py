"""Plays trajectories: turns from a policy, tool calls on host threads, observations back. Knows no model and no device.

Turn-synchronous: every running trajectory takes its turn, then all tool calls run side by side, then the next turn. The
ids, log-probs and the sampled mark of every token go into the Trajectory as they were; text is never encoded twice.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import time
from collections.abc import Callable, Sequence

import numpy as np

from rsagent_jax.agent import environment, prompts
from rsagent_jax.agent.environment import EnvState
from rsagent_jax.agent.views import PixelLimits
from rsagent_jax.config import AgentConfig
from rsagent_jax.data.processor import Processor
from rsagent_jax.models.qwen25_vl.positions import padded_patches
from rsagent_jax.rollout.policy import Policy, Request, Task
from rsagent_jax.types import Completion, DataError, Prompt, Status, Trajectory
from sam_bridge.types import Segmenter


@dataclasses.dataclass
class _Run:
    """One trajectory under way: its state and the context so far, in pieces."""

    task: Task
    slot: int
    state: EnvState
    pending: Prompt  # appended to the context with the next turn
    position: int  # of the next token
    tokens: list[np.ndarray]
    positions: list[np.ndarray]
    sampled: list[np.ndarray]
    logprobs: list[np.ndarray]
    patches: list[np.ndarray]
    grids: list[tuple[int, int, int]]
    skip: int = 0  # tokens at the head of `pending` that are in the context already: a sampled terminator
    policy_seconds: float = 0.0

    @property
    def length(self) -> int:
        return sum(map(len, self.tokens))


class Driver:
    def __init__(
        self,
        policy: Policy,
        segmenter: Segmenter,
        processor: Processor,
        agent: AgentConfig,
        *,
        workers: int = 4,
        on_turn: Callable[[Task, EnvState], None] = lambda task, state: None,
    ):
        """`on_turn` is told of every finished turn; `workers` tool calls run at a time."""
        self.policy, self.segmenter, self.processor, self.agent = policy, segmenter, processor, agent
        self.limits = pixel_limits(agent, processor)
        self.workers, self.on_turn = workers, on_turn

    def run(self, tasks: Sequence[Task]) -> list[tuple[Trajectory, EnvState]]:
        """All tasks' trajectories in their order, with the final states (for replay records)."""
        done: list[tuple[Trajectory, EnvState]] = []
        with concurrent.futures.ThreadPoolExecutor(self.workers) as pool:
            for i in range(0, len(tasks), self.policy.slots):
                self.policy.begin()
                runs = [self._start(task, slot) for slot, task in enumerate(tasks[i : i + self.policy.slots])]
                while running := [r for r in runs if r.state.status is None]:
                    self._turn(running, pool)
                done += [(self._finish(r), r.state) for r in runs]
        return done

    def _start(self, task: Task, slot: int) -> _Run:
        state = environment.reset(task.sample.image, task.sample.query, self.agent, self.limits)
        opening = environment.opening_observation(state)
        text = prompts.opening(prompts.system_prompt(self.agent.prompt), opening.text)
        prompt, position = self.processor.prompt(text, [opening.image])
        run = _Run(task, slot, state, prompt, position, [], [], [], [], [], [])
        return self._check_room(run)

    def _turn(self, runs: list[_Run], pool: concurrent.futures.Executor) -> None:
        requests = [Request(r.slot, r.pending, r.position, r.state, r.task, len(r.state.turns)) for r in runs]
        start = time.perf_counter()
        completions = self.policy.turn(requests)
        seconds = time.perf_counter() - start
        calls = []
        for run, completion in zip(runs, completions, strict=True):
            run.policy_seconds += seconds
            text = self._add(run, completion)
            proposal = environment.propose(run.state, text)
            calls.append((proposal, pool.submit(environment.run_tool, self.segmenter, run.state, proposal)))
        for run, completion, (proposal, call) in zip(runs, completions, calls, strict=True):
            run.state = environment.resolve(run.state, proposal, call.result())
            self.on_turn(run.task, run.state)
            if run.state.status is None:
                self._observe(run, completion)

    def _add(self, run: _Run, completion: Completion) -> str:
        """Appends the pending prompt and the sampled turn to the context; returns the turn's text."""
        pending, skip, n = run.pending, run.skip, len(completion.tokens)
        forced = np.zeros(len(pending.tokens) - skip)
        turn_positions = np.broadcast_to(run.position + np.arange(n), (3, n)).astype(np.int32)
        run.tokens += [pending.tokens[skip:], completion.tokens]
        run.positions += [pending.positions[:, skip:], turn_positions]
        run.sampled += [forced.astype(bool), np.ones(n, bool)]
        run.logprobs += [forced.astype(np.float32), completion.logprobs]
        run.patches.append(pending.patches)
        run.grids += pending.grids
        run.position += n
        return self.processor.decode(completion.tokens[:-1] if completion.finished else completion.tokens)

    def _observe(self, run: _Run, completion: Completion) -> None:
        """Prepares what is appended next: the turn's end, then the observation.

        A policy leaves a sampled terminator out of its cache, so that both kinds of turn are continued in the same way:
        by a terminator. After a finished turn it is already part of the trajectory, as a sampled token.
        """
        observation = run.state.turns[-1].observation
        text = prompts.TERMINATOR + prompts.observation_turn(observation.text, observation.image is not None)
        images = [] if observation.image is None else [observation.image]
        run.skip = int(completion.finished)
        run.pending, run.position = self.processor.prompt(text, images, run.position - run.skip)
        self._check_room(run)

    def _check_room(self, run: _Run) -> _Run:
        """Ends a trajectory whose next turn may not fit into its slot or whose images are too large."""
        need = run.length + len(run.pending.tokens) + self.policy.max_new_tokens + 1
        patches = padded_patches(run.pending.grids, self.processor.config.vision)
        if need > self.policy.context or patches > self.policy.patches:
            run.state = environment.abort(run.state, Status.MAX_CONTEXT)
        return run

    def _finish(self, run: _Run) -> Trajectory:
        mask, mask_id = environment.final_mask(run.state)
        join = lambda parts, empty, axis=0: np.concatenate(parts, axis) if parts else empty  # noqa: E731
        return Trajectory(
            sample_id=run.task.sample.id,
            group_id=run.task.group_id,
            query=run.state.query,
            turns=run.state.turns,
            masks=run.state.masks,
            final_mask=mask,
            final_mask_id=mask_id,
            status=run.state.status,
            tokens=join(run.tokens, np.zeros(0, np.int32)),
            positions=join(run.positions, np.zeros((3, 0), np.int32), 1),
            sampled=join(run.sampled, np.zeros(0, bool)),
            logprobs=join(run.logprobs, np.zeros(0, np.float32)),
            patches=join(run.patches, self.processor.no_patches()),
            grids=tuple(run.grids),
            seconds={"tool": run.state.tool_seconds, "policy": run.policy_seconds},
        )


def pixel_limits(agent: AgentConfig, processor: Processor) -> PixelLimits:
    """The weights' own limits with the config's overrides (0 = keep), which may only narrow them.

    A view outside the weights' limits would be resized again on its way to the model, and the policy's pixels would no
    longer be the view's: DataError.
    """
    limits = processor.images.limits
    if 0 < agent.min_pixels < limits.min_pixels or agent.max_pixels > limits.max_pixels:
        raise DataError(
            f"agent.min_pixels {agent.min_pixels} and agent.max_pixels {agent.max_pixels} must lie within the weights'"
            f" own {limits.min_pixels} to {limits.max_pixels}; to go beyond, edit the weights' preprocessor_config.json"
        )
    return dataclasses.replace(
        limits,
        min_pixels=agent.min_pixels or limits.min_pixels,
        max_pixels=agent.max_pixels or limits.max_pixels,
    )
