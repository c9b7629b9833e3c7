"""The agent from Python: a policy with its tools behind one object, for scripts, notebooks and servers.

  (image, query) -> Task -> turns, one by one: TurnStream -> Result: mask, trajectory, overlay

One thread plays the questions of all threads together; a question waits in a queue until the engine has a slot for it.
"""

import collections
import contextlib
import dataclasses
import io
import itertools
import os
import queue
import re
import sys
import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Any, Self

import numpy as np
import PIL.Image

from rsagent_jax.agent import correction, environment
from rsagent_jax.agent.environment import EnvState
from rsagent_jax.agent.overlay import draw_overlay
from rsagent_jax.agent.prompts import check_query
from rsagent_jax.agent.replay import state_to_json
from rsagent_jax.agent.segmenter import open_segmenter
from rsagent_jax.agent.tools import Segment
from rsagent_jax.agent.tools.base import Malformed
from rsagent_jax.config.build import build_config, build_fields, load_config_file, refuse_config
from rsagent_jax.config.ranges import FUNCTION, Count, NotNegative, Range
from rsagent_jax.config.schema import AgentConfig, SamplingConfig, SegmentConfig, SegmenterConfig
from rsagent_jax.data.processor import Processor
from rsagent_jax.masks import encode_rle
from rsagent_jax.models.qwen25_vl.config import LARGE, load_config
from rsagent_jax.models.qwen25_vl.load import processor_directory
from rsagent_jax.report.strip import draw_strip
from rsagent_jax.report.terminal import describe_ending
from rsagent_jax.rollout.driver import Driver, Run
from rsagent_jax.rollout.open import open_policy
from rsagent_jax.rollout.play import failure_of
from rsagent_jax.rollout.policy import Policy, Task
from rsagent_jax.rollout.startup import check_policy, check_segmenter, check_weights
from rsagent_jax.runtime.image_files import mending, png, read_image
from rsagent_jax.runtime.paths import make_directory, open_path, remove_file, write_whole, writing
from rsagent_jax.types import DataError, Sample, Trajectory, Turn
from sam_bridge import images
from sam_bridge.types import Segmenter

Picture = str | os.PathLike | PIL.Image.Image | np.ndarray  # a file, an opened picture, or its pixels u8[h, w, 3]
FILES = ("mask.png", "overlay.png", "image.png", "trajectory.json")  # what Result.save writes
ADDRESSES = r"[^\s,/]+:\d+(,[^\s,/]+:\d+)*"


@dataclasses.dataclass(frozen=True, eq=False)
class Result:
    """The answer to one question. In a notebook it is shown as the pictures of its turns."""

    state: EnvState  # the picture, the question, every turn and mask, as agent/replay.py plays them again
    trajectory: Trajectory  # the same with its tokens and log-probs, as training reads it

    @property
    def failure(self) -> str:
        """Why there is no answer: the segmenter or the policy is broken. "" where there is one."""
        failure = failure_of(self.state)
        return "" if failure is None else ": ".join(failure)

    @property
    def mask(self) -> np.ndarray:
        """bool[h, w] in the picture's own pixels: the committed mask, else the latest one. Empty where the policy says
        that the target is not there, or made none. DataError where there is a `failure`."""
        if self.failure:
            raise DataError(f"{self.failure}; there is no mask")
        return self.trajectory.final_mask

    @property
    def overlay(self) -> np.ndarray:
        """u8[h, w, 3]: the picture with the mask tinted and outlined. DataError as `mask`."""
        return draw_overlay(self.state.image, self.mask, max(self.mask.shape))

    @property
    def rle(self) -> dict[str, Any]:
        """The mask as COCO's compressed RLE, ready for JSON. DataError as `mask`."""
        return encode_rle(self.mask)

    def save(self, directory: str | os.PathLike) -> None:
        """Writes mask.png (0 or 255), overlay.png, image.png (the very pixels that were segmented) and trajectory.json,
        in place of those of an earlier answer. DataError where they cannot be written, and, when the last two are
        there, as `mask`."""
        out = open_path(directory)
        with writing(out):
            make_directory(out)
            for name in FILES:  # a mask of an earlier question must not stand beside a failure of this one
                remove_file(out / name)
            # Saved, not referred to: plain readers would not turn and flatten the user's file as was done here.
            write_whole(out / "image.png", png(self.state.image))
            write_whole(out / "trajectory.json", state_to_json(self.state, str(out / "image.png")) + "\n")
            write_whole(out / "mask.png", png(self.mask.astype(np.uint8) * 255))
            write_whole(out / "overlay.png", png(self.overlay))

    def show(self) -> None:
        """The turns as pictures: below a notebook's cell, elsewhere in the system's viewer, if it has one."""
        ipython = sys.modules.get("IPython")
        if ipython is not None and hasattr(ipython.get_ipython(), "kernel"):
            ipython.display.display(self)
        else:
            images.load(self._repr_png_()).show(title=self.state.query)

    def _repr_png_(self) -> bytes:
        data = io.BytesIO()
        draw_strip(self.state).savefig(data, format="png", bbox_inches="tight")
        return data.getvalue()

    def __repr__(self) -> str:
        t = self.trajectory
        how = self.failure or describe_ending(self.state, t.final_mask, t.final_mask_id)
        return f"<Result {self.state.query!r}: {how}>"


class TurnStream(Iterator[Turn]):
    """The turns of one question as they end. Closing it, or dropping it, ends the trajectory and frees its slot.

    One thread reads it; any may close it. What the policy raises, such as for want of memory, is raised to the reader.
    """

    def __init__(self, agent: "Agent", run: Run):
        self.state: EnvState | None = None  # after the turn that was given last: its masks, views and replies
        self._agent, self._task, self._end = agent, run.task, None
        self._events = agent._submit(run)

    def __next__(self) -> Turn:
        if self._end is None:
            event = self._events.get()
            if isinstance(event, EnvState):
                self.state = event
                return event.turns[-1]
            self._end = event
        if isinstance(self._end, BaseException):
            raise self._end
        raise StopIteration

    def result(self) -> Result:
        """Waits for the end. Of a stream that was closed before it, status CANCELLED with the masks so far."""
        collections.deque(self, 0)
        return self._end

    def close(self) -> None:
        self._agent._driver.cancel(self._task)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    __del__ = close


class Agent(contextlib.AbstractContextManager):
    """A policy with its tools, ready to be asked by any number of threads. `close`, or a `with` block, ends its
    side-car and frees the engine's memory; so does dropping it."""

    def __init__(
        self,
        policy: Policy,
        segmenter: Segmenter,
        processor: Processor,
        config: AgentConfig,
        *,
        temperature: float = 0.0,
        workers: int = 1,
        resources: contextlib.ExitStack | None = None,
    ):
        """Of parts that are there; `load` opens them. temperature: where a question gives none. workers: tool calls at
        a time. resources: closed with the agent."""
        self._events: dict[Task, queue.SimpleQueue] = {}  # of questions without an end
        self._waiting: collections.deque[Run] = collections.deque()  # those of them that no slot has
        self._lock, self._thread, self._closed = threading.Lock(), None, False
        self._numbers, self._temperature, events = itertools.count(), temperature, self._events
        # Not by way of self: an agent is freed as soon as it is dropped.
        tell = lambda task, state: events[task].put(state)  # noqa: E731
        self._driver = Driver(policy, segmenter, processor, config, workers=workers, on_turn=tell)
        self.is_tiny = processor.config.text.hidden_size < LARGE  # of scenes, not of a published size
        self._release = weakref.finalize(self, (resources or contextlib.ExitStack()).close)

    @classmethod
    def load(
        cls,
        weights: str | os.PathLike | None = None,
        *,
        segmenter: str | SegmenterConfig | Segmenter | None = None,
        config: str | SegmentConfig = "",
        slots: int = 4,
        warm_up: bool = False,
    ) -> Self:
        """An agent of a policy and a segmenter.

        Args:
          weights: a Hugging Face directory, a hub's org/name[@revision], or checkpoints/<stage>[@best] of a run; None:
            the tiny policy that comes with the package, which knows flat shapes of six colours (docs/demo.md).
          segmenter: "grabcut" in this process; "host:port" of a side-car that runs, several with commas; SAM 2's
            checkpoint (a .pt file or a hub's org/name) for a side-car of its own on the CPU; module:factory or
            file.py:factory; a SegmenterConfig for everything else; or an object with a segment method. None: the
            config's, else "grabcut".
          config: a file such as configs/segment.py:full, or what is in it. "": that one for policies of the published
            sizes, configs/segment.py for tiny ones.
          slots: trajectories at a time.
          warm_up: compile all programs now, so that no question waits for that.

        Raises:
          DataError: something of this is not there, or does not go together.
        """
        own = bool(config)
        if not own:
            large = weights is not None and load_config(processor_directory(str(weights))).text.hidden_size >= LARGE
            config = "configs/segment.py:full" if large else "configs/segment.py"
        if not isinstance(config, SegmentConfig):
            config = build_config(SegmentConfig, load_config_file(config))
        weights = config.policy.weights if weights is None else str(weights)
        segmenter = (config.segmenter if own else "grabcut") if segmenter is None else segmenter
        warmth = config.sampling.temperature
        # The programs can draw, so that a question may; each says whether it does.
        sampling = vars(config.sampling) | {"slots": slots, "temperature": warmth or 1.0}
        sampling = build_config(SamplingConfig, sampling)
        policy = dataclasses.replace(config.policy, weights=weights)
        check_policy(policy, config.agent, sampling)
        opened = segmenter if hasattr(segmenter, "segment") else None
        tools = config.segmenter if opened else _segmenter_config(segmenter)
        if not opened:
            check_segmenter(tools)
        if policy.backend == "engine":
            check_weights(weights)
        processor = Processor.load(processor_directory(weights))
        with contextlib.ExitStack() as stack:
            opened_policy = open_policy(policy, processor, sampling, config.agent, config.seed)
            stack.callback(opened_policy.release_memory)
            if warm_up:
                opened_policy.warm_up()
            opened = opened or stack.enter_context(open_segmenter(tools))
            options = dict(temperature=warmth, workers=tools.workers, resources=stack.pop_all())
            return cls(opened_policy, opened, processor, config.agent, **options)

    def segment(
        self,
        image: Picture,
        query: str,
        *,
        max_turns: int | None = None,
        temperature: float | None = None,
        seed: int = 0,
    ) -> Result:
        """Plays one trajectory to its end. Interrupted (Ctrl-C, a notebook's stop button), it is broken off.

        Args:
          image: a picture's file, an opened picture (both turned upright, by EXIF), or its pixels u8[h, w, 3], RGB.
          query: what to segment, such as "the red circle".
          max_turns: None: as the config says.
          temperature: of drawing a token; 0 takes the likeliest. None: as the config says, which is 0.
          seed: another one draws other tokens, where the temperature is not 0.

        Raises:
          DataError: the picture cannot be read or shown, the query is empty, or an option is out of range. A tool that
            fails is no exception: `Result.failure` has it.
        """
        with self.stream(image, query, max_turns=max_turns, temperature=temperature, seed=seed) as turns:
            return turns.result()

    def segment_many(
        self,
        questions: Iterable[tuple[Picture, str]],
        *,
        max_turns: int | None = None,
        temperature: float | None = None,
        seed: int = 0,
    ) -> list[Result]:
        """The answers to (image, query) in their order, each as `segment` gives it; as many at a time as there are
        slots. All are looked at before the first is played, so a DataError comes at once."""
        tasks = [self._task(image, query, max_turns, temperature, seed) for image, query in questions]
        with contextlib.ExitStack() as stack:
            streams = [stack.enter_context(TurnStream(self, Run(task))) for task in tasks]
            return [stream.result() for stream in streams]

    def stream(
        self,
        image: Picture,
        query: str,
        *,
        max_turns: int | None = None,
        temperature: float | None = None,
        seed: int = 0,
    ) -> TurnStream:
        """The turns as they end; then `result()` has what `segment` returns. Arguments and errors as there."""
        return TurnStream(self, Run(self._task(image, query, max_turns, temperature, seed)))

    def correct(
        self,
        answer: Result | EnvState,
        *,
        points: Sequence[Sequence[float]] = (),
        labels: Sequence[int] = (),
        box: Sequence[float] | None = None,
        refine: int | None = None,
        max_turns: int | None = None,
        temperature: float | None = None,
        seed: int = 0,
    ) -> TurnStream:
        """A `segment` call of the user, from which the policy goes on: the trajectory up to its latest mask, then this
        call as a turn, the first that the stream gives, then the policy's own turns. What went before is read again;
        nothing of it counts as sampled (`Trajectory.loss_mask`).

        Args:
          answer: what is corrected, whether it has ended or was broken off: a result, or a stream's state.
          points: [(x, y), …], pixels of the picture; labels: one per point, 1 object, 0 background (all 1 without).
          box: (x1, y1, x2, y2), pixels of the picture.
          refine: the id of the mask to start from; it needs a segmenter that keeps logits, as SAM 2 and GrabCut do.
          max_turns: of the policy, from here on.

        Raises:
          DataError: the call is none, or lies outside of the picture; else as `segment`.
        """
        arguments = {"points": points, "labels": list(labels) or None, "box": box, "refine": refine}
        arguments = {name: _listed(value) for name, value in arguments.items()}
        try:
            call = Segment.read(arguments)
        except Malformed as error:
            raise DataError(f"the correction cannot be made: {error.args[1]}") from None
        state = answer.state if isinstance(answer, Result) else answer
        task = self._task(state.image, state.query, max_turns, temperature, seed)
        state, text = correction.correct(state, call, max_turns or self._driver.agent.max_turns)
        return TurnStream(self, self._driver.go_on(task, state, text))

    def close(self) -> None:
        """Breaks off what is under way, which ends as CANCELLED. May be called more than once, from any thread."""
        with self._lock:
            self._closed, thread = True, self._thread
        for task in list(self._events):
            self._driver.cancel(task)
        if thread is not None:
            thread.join()
        self._release()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _task(self, image: Picture, query: str, max_turns: int | None, temperature: float | None, seed: int) -> Task:
        values, problems = {"max_turns": max_turns, "temperature": temperature, "seed": seed}, []
        build_fields(_Options, values, "", problems)
        refuse_config("the question", problems)
        if not isinstance(query, str):
            raise DataError(f"the query is a {type(query).__name__}; say what to segment, such as 'the red circle'")
        check_query(query)
        pixels, query = _pixels(image), query.strip()
        environment.reset(pixels, query, self._driver.agent, self._driver.limits)  # refuses what cannot be shown
        unknown = np.zeros(pixels.shape[:2], bool)  # nobody knows the true mask, and playing does not look at it
        sample, number = Sample("image", pixels, query, unknown), next(self._numbers)
        return Task(
            sample, number, seed or 0, max_turns or 0, self._temperature if temperature is None else temperature
        )

    def _submit(self, run: Run) -> queue.SimpleQueue:
        """Where the task's states and, last, its Result or an exception arrive."""
        with self._lock:
            if self._closed:
                raise DataError("the agent is closed; load another one")
            events = self._events[run.task] = queue.SimpleQueue()
            self._waiting.append(run)
            if self._thread is None:
                thread = threading.Thread(target=self._play, name="rsagent_jax.Agent")
                thread.start()
                self._thread = thread  # it needs the lock to end
        return events

    def _play(self) -> None:
        """Until there is nothing left to play: an agent that waits has no thread, which would keep it alive."""
        while True:
            try:
                for task, trajectory, state in self._driver.play(self._arrivals()):
                    self._events.pop(task).put(Result(state, trajectory))
            except BaseException as error:  # noqa: BLE001 - raised again to whoever waits for an answer
                with self._lock:
                    taken = self._events.keys() - {run.task for run in self._waiting}
                    if not taken and self._waiting:  # it failed before it took one
                        taken = {self._waiting.popleft().task}
                    for task in taken:
                        self._events.pop(task).put(error)
            with self._lock:
                if not self._waiting:
                    self._thread = None
                    return

    def _arrivals(self) -> Iterator[Run | None]:
        while True:
            yield self._waiting.popleft() if self._waiting else None


@dataclasses.dataclass(frozen=True)
class _Options:
    """What a question may say."""

    max_turns: Count = 1
    temperature: NotNegative = 0.0
    seed: Annotated[int, Range(low=0, high=2**31 - 1)] = 0


def _pixels(image: Picture) -> np.ndarray:
    """u8[h, w, 3], nobody else's."""
    if isinstance(image, str | os.PathLike):
        return read_image(os.fspath(image), "name a picture file", upright=True)
    if isinstance(image, PIL.Image.Image):
        with mending("the picture", "open another one"):
            return images.from_pillow(image)
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        what = f"{image.dtype}{list(image.shape)}" if isinstance(image, np.ndarray) else type(image).__name__
        raise DataError(f"image must be a file, a PIL.Image, or uint8[height, width, 3] of RGB in 0..255, got {what}")
    return image.copy()


def _listed(value: Any) -> Any:
    """As JSON has it, of tuples and arrays."""
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    return [_listed(item) for item in value] if isinstance(value, list | tuple) else value


def _segmenter_config(given: str | SegmenterConfig) -> SegmenterConfig:
    if isinstance(given, SegmenterConfig):
        return given
    if not isinstance(given, str) or not given:
        raise DataError(f"segmenter must be text, a SegmenterConfig or have a segment method, got {given!r}")
    if re.fullmatch(ADDRESSES, given):
        values = {"mode": "connect", "addresses": tuple(given.split(","))}
    elif given == "grabcut" or re.fullmatch(FUNCTION, given):
        values = {"mode": "inprocess", "backend": given}
    else:
        values = {"mode": "spawn", "backend": "sam2", "checkpoint": given}
    return build_config(SegmenterConfig, values)
