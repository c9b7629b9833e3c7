"""Plays trajectories: turns from a policy, tool calls on host threads, observations back. Knows no model and no device.

Every trajectory goes its own pace: while one waits for its tool the policy works on the others, and a slot that is free
takes the next task. The ids, log-probs and the sampled mark of every token go into the Trajectory as they were; text is
never encoded twice.
"""

import collections
import dataclasses
import functools
import itertools
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence

import cachetools
import numpy as np

from rsagent_jax.agent import budget, environment
from rsagent_jax.agent.environment import EnvState, SegmentFailure
from rsagent_jax.agent.views import PixelLimits
from rsagent_jax.config.schema import AgentConfig
from rsagent_jax.data.processor import Processor
from rsagent_jax.models.qwen25_vl.positions import padded_patches
from rsagent_jax.rollout.jobs import Jobs, Overdue
from rsagent_jax.rollout.policy import Policy, PolicyFailure, Request, Task
from rsagent_jax.runtime import preemption
from rsagent_jax.runtime.progress import PROGRESS
from rsagent_jax.types import Completion, DataError, Prompt, Status, Trajectory
from sam_bridge.types import FailureKind, Segmenter


@dataclasses.dataclass(frozen=True)
class _Next:
    """What a host thread hands back: the state after a turn (or before the first), and what the policy reads next."""

    state: EnvState
    pending: Prompt | None = None  # None when the trajectory has ended
    position: int = 0  # of the token after `pending`
    skip: int = 0  # tokens at the head of `pending` that are in the context already: a sampled terminator
    budget: int = 0  # tokens that the next turn may have


# tokens, positions, loss_mask, log-probs and versions of a part of the context
Part = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]
NO_TOKENS = (*(np.zeros(shape, np.int32) for shape in (0, (3, 0))), np.zeros(0, bool), np.zeros(0, np.float32))


@dataclasses.dataclass
class Run:
    """One trajectory under way: its state and the context so far, in pieces."""

    task: Task
    slot: int = -1
    state: EnvState | None = None
    next: _Next | None = None
    text: str = ""  # of the turn whose tool runs
    acts: Callable[[], _Next] | None = None  # running that tool
    known: bool = True  # the slot has read the context; not one in which a trajectory that was broken off goes on
    begun: Completion | None = None  # what its turn had so far
    versions: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int32))  # of those tokens
    position: int = 0  # of the next token
    length: int = 0  # tokens of the context
    drawn: int = 0  # of them sampled
    parts: list[Part] = dataclasses.field(default_factory=lambda: [(*NO_TOKENS, np.zeros(0, np.int32))])
    patches: list[np.ndarray] = dataclasses.field(default_factory=list)  # of each prompt
    grids: list[tuple[tuple[int, int, int], ...]] = dataclasses.field(default_factory=list)
    asked: float = 0.0  # when the policy got the turn under way
    policy_seconds: float = 0.0


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
        self.cancelled: weakref.WeakSet[Task] = weakref.WeakSet()
        self.version = 0  # of the policy's weights, as whoever loads them counts
        self.broken_off: list[Run] = []  # by the end of the last `play`, for the next one to go on with
        self.stats: dict[str, float] = {}
        # The tasks of a sample share its opening; no more samples than slots are played at a time. What is kept holds
        # the image, so that no other one gets its id().
        self.openings = cachetools.LRUCache(policy.slots)
        # (h, w) of a picture, and the state's config -> its budget. Not by way of self: an engine is freed as soon as
        # its driver is dropped.
        limits, texts = self.limits, functools.cache(lambda agent: budget.Texts.of(agent, processor.encode))
        self.budget_of = functools.cache(
            lambda size, agent=agent: budget.trajectory_budget(
                agent, policy, texts(agent), size, limits, processor.images.limits
            )
        )

    def run(
        self,
        tasks: Sequence[Task],
        unfinished: Sequence[Run] = (),
        ended: dict[Task, tuple[Trajectory, EnvState]] | None = None,
    ) -> list[tuple[Trajectory, EnvState]]:
        """All tasks' trajectories in their order, with the final states (for replay records).

        unfinished: how far some of them have come; ended: gets each as it ends, for whoever is stopped by Preempted.
        """
        ended, begun = {} if ended is None else ended, {run.task for run in unfinished}
        for task, trajectory, state in self.play([task for task in tasks if task not in begun], unfinished):
            ended[task] = trajectory, state
        return [ended[task] for task in tasks]

    def cancel(self, task: Task) -> None:
        """Ends a trajectory as CANCELLED, at the driver's next round; from any thread. One that has not begun yet ends
        so before its first turn."""
        self.cancelled.add(task)

    def play(
        self, tasks: Iterable[Task | Run | None], unfinished: Iterable[Run] = ()
    ) -> Iterator[tuple[Task, Trajectory, EnvState]]:
        """(task, trajectory, final state) as they end; a task is taken when there is a slot for it.

        `tasks` may give None where it has none for now, as a queue has: while others play it is asked again. It may
        give a Run, of `go_on`.
        Closing the iterator breaks off what is under way: `broken_off` has it, for another `play` to go on with as
        `unfinished`, before the tasks; what was not taken of `tasks` is still the caller's. A turn goes on where it
        was, its tokens and their log-probs as they were drawn; the policy reads the context anew; a tool call that is
        running goes on meanwhile. The same where Preempted is raised.
        """
        PROGRESS.enter_part("rollout")
        self.policy.begin()
        self.broken_off = []
        self.openings.clear()
        key = lambda task: (id(task.sample.image), task.sample.query, task.max_turns)  # noqa: E731
        shared_opening = cachetools.cached(self.openings, key, condition=threading.Condition())(self._opening)
        unfinished, new = iter(unfinished), (Run(task) if isinstance(task, Task) else task for task in tasks)
        free, runs, asked = set(range(self.policy.slots)), {}, set()
        jobs = Jobs(self.workers, self.agent.tool_deadline_s)
        start, stats = time.perf_counter(), collections.Counter()
        try:
            while True:
                preemption.check()
                PROGRESS.get_on()
                while free and (run := next(unfinished, None) or next(new, None)):
                    slot = run.slot = self.policy.pick(run.task, sorted(free))
                    free.remove(slot)
                    runs[slot] = run
                    if run.state is None:
                        jobs.submit(slot, functools.partial(shared_opening, run.task))
                    elif run.acts:
                        jobs.submit(slot, run.acts)
                    elif run.state.status is None:
                        self.policy.submit(self._request(run))
                        asked.add(slot)
                if not runs:
                    break
                before = time.perf_counter()
                for slot, completion in self.policy.step() if asked else ():
                    asked.remove(slot)
                    run = runs[slot]
                    if isinstance(completion, PolicyFailure):
                        run.state = dataclasses.replace(run.state, status=Status.POLICY_FAILED, failure=completion)
                        continue
                    stats["tokens"] += len(completion.tokens)
                    run.text = self._add(run, completion)
                    so_far = run.position, run.length, run.drawn, int(completion.finished)
                    run.acts = functools.partial(self._act, run.state, run.text, *so_far)
                    jobs.submit(slot, run.acts)
                stats["device"] += time.perf_counter() - before
                before, idle = time.perf_counter(), not asked and any(r.state is not None for r in runs.values())
                ended = jobs.take(wait=not asked)
                stats["waiting" if idle else "host"] += time.perf_counter() - before
                for slot, result in ended:
                    run = runs[slot]
                    opened = run.state is not None
                    run.next = self._overdue(run, result) if isinstance(result, Overdue) else result
                    run.state, run.acts = run.next.state, None
                    if opened:
                        self.on_turn(run.task, run.state)
                    if run.state.status is None:
                        self.policy.submit(self._request(run))
                        asked.add(slot)
                for run in runs.values():
                    if run.task in self.cancelled and run.state is not None and run.state.status is None:
                        run.state = environment.abort(run.state, Status.CANCELLED)
                for slot in [s for s, r in runs.items() if r.state is not None and r.state.status is not None]:
                    run = runs.pop(slot)
                    jobs.drop(slot)
                    self.policy.release(slot)
                    asked.discard(slot)
                    free.add(slot)
                    yield run.task, self._finish(run), run.state
        except (GeneratorExit, preemption.Preempted):
            for slot, run in runs.items():
                run.acts = run.acts and (jobs.running(slot) or run.acts)
            self.broken_off = [*(self._break_off(run) for run in runs.values()), *unfinished]
            raise
        finally:
            jobs.drop(*runs)
            for slot in runs:
                self.policy.release(slot)
            self.stats = dict(stats) | {"seconds": time.perf_counter() - start}

    def metrics(self) -> dict[str, float]:
        """Of what was played last: shares of the time, tokens, how full the slots were.

        `prefill` and `decode` split the device's share: calls that also read a piece of a prompt, and calls that only
        sample.
        """
        s, p = self.stats, getattr(self.policy, "stats", {})
        out = {
            "rollout/seconds": s["seconds"],
            "rollout/tokens_per_s": s.get("tokens", 0.0) / s["seconds"],  # sampled ones, over the whole time
            "rollout/tool_wait": s.get("waiting", 0.0) / s["seconds"],  # nothing to do but to wait for tools
            "rollout/device": s.get("device", 0.0) / s["seconds"],
        }
        if p:
            out |= {f"rollout/{name}": float(p[name]) for name in ("prefill_tokens", "copied_tokens", "decode_tokens")}
            out |= {f"rollout/{name}": p[f"{name}_seconds"] / s["seconds"] for name in ("prefill", "decode")}
            out["rollout/occupancy"] = p["decode_tokens"] / max(p["slot_steps"], 1)  # of the slots, by sampled tokens
            out["rollout/weights_seconds"] = self.policy.seconds["weights"]
            out["rollout/kv_mib"] = self.policy.cache_bytes / 2**20
        return out

    ############################## On host threads ##############################

    def _opening(self, task: Task) -> _Next:
        """The state before the first turn, and what the policy reads before it."""
        agent = dataclasses.replace(self.agent, max_turns=task.max_turns) if task.max_turns else self.agent
        start = functools.partial(environment.reset, task.sample.image, task.sample.query, agent, self.limits)
        return self._ahead(start(), lambda: start(last=True), 0, 0, 0, 0)

    def _act(self, state: EnvState, text: str, position: int, length: int, drawn: int, skip: int) -> _Next:
        """Runs the turn's tool and prepares what is appended next: the turn's end, then the observation.

        A policy leaves a sampled terminator out of its cache, so that both kinds of turn are continued in the same way:
        by a terminator. After a finished turn (skip = 1) it is already part of the trajectory, as a sampled token.
        """
        proposal = environment.propose(state, text)
        reply = environment.run_tool(self.segmenter, state, proposal)

        def after(proposal: environment.Proposal) -> _Next:
            step = functools.partial(environment.apply_reply, state, proposal, reply)
            result = step()
            if state.last and result.status is None:  # said to be the last for want of room, and not finished
                return _Next(environment.abort(result, Status.MAX_CONTEXT))
            return self._ahead(result, lambda: step(last=True), position, length, drawn, skip)

        result = after(proposal)
        if proposal.view is not None and result.state.status is Status.MAX_CONTEXT and not state.last:
            result = after(environment.refuse_view(proposal))
        return result

    def _ahead(
        self, state: EnvState, as_last: Callable[[], EnvState], position: int, length: int, drawn: int, skip: int
    ) -> _Next:
        """What the policy reads before its next turn, and how many tokens that may have.

        as_last: the same state with the next turn announced as the last. It ends here when not even a finish fits, or
        when an image has more patches than the policy takes.
        """

        def read(state: EnvState) -> tuple[Prompt, int]:
            text, images = environment.read_before(state, len(state.turns))
            return self.processor.prompt(text, images, position - skip, state.limits)

        if state.status is not None:
            return _Next(state)
        (prompt, end), bounds = read(state), self.budget_of(state.image.shape[:2], state.config)
        tokens, last = bounds.next_turn(length - skip + len(prompt.tokens), drawn, state.last)
        if tokens and last and self.agent.announce_last and not state.last:
            state = as_last()
            prompt, end = read(state)
            tokens, _ = bounds.next_turn(length - skip + len(prompt.tokens), drawn, last)
        patches = padded_patches(prompt.grids, self.processor.config.vision) if prompt.grids else 0
        if not tokens or patches > self.policy.patches:
            return _Next(environment.abort(state, Status.MAX_CONTEXT))
        return _Next(state, prompt, end, skip, tokens)

    ############################## On the driver's thread ##############################

    def _overdue(self, run: Run, overdue: Overdue) -> _Next:
        """What a tool's silence is answered with. Raises that of an opening, which no tool has a part in."""
        if run.state is None:
            raise overdue
        proposal = environment.propose(run.state, run.text)
        failure = SegmentFailure(FailureKind.TIMEOUT, str(overdue), self.agent.tool_deadline_s)
        if proposal.request is None:
            return _Next(dataclasses.replace(run.state, status=Status.ENV_FAILED, failure=failure))
        return _Next(environment.apply_reply(run.state, proposal, failure))

    def _request(self, run: Run) -> Request:
        run.asked, run.position = time.perf_counter(), run.next.position
        turn, pending, context = len(run.state.turns), run.next.pending, ()
        if not run.known:
            context, skip, run.known = self._context(run), run.next.skip, True
            pending = dataclasses.replace(pending, tokens=pending.tokens[skip:], positions=pending.positions[:, skip:])
        asks = run.slot, pending, run.position, run.state, run.task, turn, run.next.budget
        return Request(*asks, context=context, begun=run.begun)

    def _context(self, run: Run) -> tuple[Prompt, ...]:
        """All that the slot knew: prompts with their images, and turns, which are text whatever was sampled."""
        read, images = [], zip(run.patches, run.grids, strict=True)
        for tokens, positions, sampled, *_ in run.parts:
            if len(tokens):
                patches, grids = (self.processor.no_patches(), ()) if sampled[0] else next(images)
                read.append(Prompt(tokens, positions, patches, grids))
        return tuple(read)

    def _break_off(self, run: Run) -> Run:
        """The same for another `play`, in whatever slot and under whatever weights."""
        asked = run.state is not None and run.state.status is None and run.acts is None
        begun = self.policy.begun(run.slot) if asked else None
        if begun is not None:
            new = np.full(len(begun.tokens) - len(run.versions), self.version, np.int32)
            run.versions = np.append(run.versions, new)
        run.begun, run.known = begun, not run.parts[1:]
        return run

    def take_up(self, run: Run) -> Run:
        """Ready for `play`, of a run with nothing but its task, its state and the parts of its context: with `begun`
        and its versions where a turn was under way. Where the parts end with a turn that the state does not have yet,
        its tool is called."""
        state, drawn = run.state, [part for part in run.parts if part[2].any()]
        for turn in range(len(drawn)):
            seen = self.processor.prompt(*environment.read_before(state, turn), 0, state.limits)[0]
            run.patches.append(seen.patches)
            run.grids.append(seen.grids)
        run.length, run.drawn = sum(len(p[0]) for p in run.parts), sum(len(p[0]) for p in drawn)
        run.position, run.known = int(drawn[-1][1].max()) + 1 if drawn else 0, not drawn
        skip = int(bool(drawn) and int(drawn[-1][0][-1]) == self.processor.terminator_id)
        so_far = run.position, run.length, run.drawn, skip
        if len(drawn) > len(state.turns):
            run.text = self._text(drawn[-1][0])
            run.acts = functools.partial(self._act, state, run.text, *so_far)
        elif state.status is None:
            run.acts = functools.partial(self._ahead, state, lambda: state, *so_far)
        return run

    def go_on(self, task: Task, state: EnvState, text: str) -> Run:
        """A trajectory for `play` that goes on from an open state with a turn that somebody else wrote. Its tool is
        called, then the policy reads it all and has the next turn. Nothing of it counts as sampled."""
        run = Run(task, state=state, text=text, known=False)
        for turn, said in enumerate((*(turn.text for turn in state.turns), text)):
            seen, at = self.processor.prompt(*environment.read_before(state, turn), run.position, state.limits)
            # No terminator: it is at the head of what is read next, as behind a turn that was cut.
            ids = np.array(self.processor.encode(said), np.int32)
            places = np.broadcast_to(at + np.arange(len(ids)), (3, len(ids))).astype(np.int32)
            run.position = at + len(ids)
            for part in (seen, Prompt(ids, places, self.processor.no_patches(), ())):
                n = len(part.tokens)
                forced = np.zeros(n, bool), np.zeros(n, np.float32), np.full(n, self.version, np.int32)
                run.parts.append((part.tokens, part.positions, *forced))
                if n:  # `_context` takes an entry for each part with tokens, and an empty turn has none
                    run.patches.append(part.patches)
                    run.grids.append(part.grids)
                run.length += n
        run.acts = functools.partial(self._act, state, text, run.position, run.length, 0, 0)
        return run

    def _add(self, run: Run, completion: Completion) -> str:
        """Appends the pending prompt and the sampled turn to the context; returns the turn's text."""
        pending, skip, n = run.next.pending, run.next.skip, len(completion.tokens)
        forced = np.zeros(len(pending.tokens) - skip, np.float32)
        turn_positions = np.broadcast_to(run.position + np.arange(n), (3, n)).astype(np.int32)
        versions = np.full(len(forced) + n, self.version, np.int32)
        versions[len(forced) : len(forced) + len(run.versions)] = run.versions
        by_part = np.split(versions, [len(forced)])
        run.parts.append((pending.tokens[skip:], pending.positions[:, skip:], forced.astype(bool), forced, by_part[0]))
        run.parts.append((completion.tokens, turn_positions, np.ones(n, bool), completion.logprobs, by_part[1]))
        run.begun, run.versions = None, np.zeros(0, np.int32)
        run.patches.append(pending.patches)
        run.grids.append(pending.grids)
        run.position += n
        run.length += len(forced) + n
        run.drawn += n
        run.policy_seconds += time.perf_counter() - run.asked
        return self._text(completion.tokens)

    def _text(self, tokens: np.ndarray) -> str:
        ended = len(tokens) > 0 and int(tokens[-1]) in self.processor.end_ids  # which is no text
        return self.processor.decode(tokens[:-1] if ended else tokens)

    def _finish(self, run: Run) -> Trajectory:
        mask, mask_id = environment.final_mask(run.state)
        whole = (np.concatenate(part, -1) for part in zip(*run.parts, strict=True))
        tokens, positions, loss_mask, logprobs, versions = whole
        return Trajectory(
            sample_id=run.task.sample.id,
            group_id=run.task.group_id,
            query=run.state.query,
            turns=run.state.turns,
            masks=run.state.masks,
            final_mask=mask,
            final_mask_id=mask_id,
            status=run.state.status,
            tokens=tokens,
            positions=positions,
            loss_mask=loss_mask,
            logprobs=logprobs,
            patches=np.concatenate([self.processor.no_patches(), *run.patches]),
            grids=tuple(itertools.chain(*run.grids)),
            versions=versions,
            seconds={"tool": run.state.tool_seconds, "policy": run.policy_seconds},
        )


def pixel_limits(agent: AgentConfig, processor: Processor) -> PixelLimits:
    """The weights' own limits with the config's overrides (0 = keep), which may only narrow them.

    A view outside the weights' limits would be resized again on its way to the model, and the policy's pixels would no
    longer be the view's: DataError.
    """
    limits = processor.images.limits
    low, high = agent.min_pixels or limits.min_pixels, agent.max_pixels or limits.max_pixels
    if low < limits.min_pixels or high > limits.max_pixels:
        raise DataError(
            f"agent.min_pixels {agent.min_pixels} and agent.max_pixels {agent.max_pixels} must lie within the weights'"
            f" own {limits.min_pixels} to {limits.max_pixels}: the config is for weights of another size."
            " Set both to 0, the weights' own, or take a config of their size: for the tiny policies configs/debug.py,"
            " collect_quickstart.py and eval_quickstart.py"
        )
    return dataclasses.replace(limits, min_pixels=low, max_pixels=high)
