"""The demo's page on Gradio: upload, ask, watch, correct, download. Every handler gives the components that change."""

import collections
import contextlib
import dataclasses
import html
import pathlib
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import gradio as gr
from gradio import processing_utils

from rsagent_jax.agent.correction import kept_turns
from rsagent_jax.report.terminal import describe_ending
from rsagent_jax.runtime.image_files import checksum, read_image
from rsagent_jax.tiny.scenes import unknown_words
from rsagent_jax.types import DataError
from rsagent_jax.web.visit import (
    Visit,
    answer_files,
    check_size,
    find_mask,
    read_places,
    read_upload,
    shown_picture,
    to_original,
    turn_html,
)

if TYPE_CHECKING:
    from rsagent_jax.api import Agent, TurnStream

VISITS = 256  # open pages that have asked; the oldest goes first
ENDED_PER_SLOT = 4  # trajectories kept after their end, with picture and masks; the oldest goes first
MAX_QUERY = 400  # characters
EVERY_S = 0.5  # between two signs of life while the policy is loaded
ADD, REMOVE, NEW, BOX = "Add what I click", "Remove what I click", "New mask of what I click", "Box: two corners"
KNOWS = """**This is a tiny policy** (2 million parameters, trained in minutes on a CPU). It knows six colours (red,
green, blue, yellow, purple, white), four shapes (circle, square, triangle, star), small and large, where they lie
(left of, right of, above, below, leftmost, …) and "every …" of two or three, on synthetic scenes of 112 x 112 pixels.
A picture of your own is shown to it at about that size. Flat, evenly coloured shapes may be found there; it has never
seen a mug, a dog or a photograph of a thing, and takes other words for one of its own, or for nothing. Photographs
need pretrained weights."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """What the visitors may take together, and each of them."""

    slots: int  # trajectories at a time
    waiting: int  # questions in the queue
    per_minute: int  # questions and corrections of one user or address
    max_mb: int  # of a picture's file
    max_megapixels: int  # of a picture


class DemoPage:
    """The handlers and the layout. `agent` may still be loading when the page is there."""

    def __init__(
        self,
        agent: "Future[Agent]",
        limits: Limits,
        folder: pathlib.Path,
        examples: Sequence[tuple[str, str]] = (),
        note: str = "",
    ):
        """folder: of files to download. examples: (picture's file, question). note: Markdown about the policy; with it,
        an answer about another picture, or with other words, than the tiny policy knows says so."""
        self.agent, self.limits, self.folder, self.examples, self.note = agent, limits, folder, examples, note
        self.since = time.monotonic()
        self.known = {checksum(read_image(path)) for path, _ in examples}
        self.visits: dict[str, Visit] = {}  # by Gradio's name of an open page
        self.asked: collections.deque[tuple[float, str]] = collections.deque()  # of the last minute: when, who
        self.lock = threading.Lock()  # handlers run on many threads

    ############################## Handlers ##############################

    def begin(self, file: dict | None, query: str | None, request: gr.Request) -> dict:
        """At once, before the queue: what is missing, what is too much, and that the question was taken."""
        picture, query = file and file["path"], str(query or "")
        if not picture or not query.strip():
            raise _refusal("Give a picture." if not picture else "Say what to segment, such as “the red circle”.")
        self._count(request)
        with _told():
            check_size(picture, self.limits.max_megapixels)
        visit = Visit(asked=(picture, query), counted=True)
        with self.lock:
            pages = list(self.visits)
            ended = [page for page in pages if self.visits[page].ended]
            surplus = {*pages[: 1 - VISITS], *ended[: -ENDED_PER_SLOT * self.limits.slots], request.session_hash}
            left = [self.visits.pop(page) for page in surplus & self.visits.keys()]
            self.visits[request.session_hash] = visit
        for earlier in left:
            earlier.leave()
        return {**self._shown(visit), self.status: _said("Waiting for a free place …")}

    def ask(self, request: gr.Request) -> Iterator[dict]:
        """The page's latest question, whichever it was that waited here."""
        visit = self.visits.get(request.session_hash, Visit())
        picture, query = visit.asked

        def start(agent: "Agent") -> "TurnStream":
            return agent.stream(read_upload(picture), query)

        yield from self._play(visit, start, query)

    def begin_correction(self, places: str, how: str, request: gr.Request) -> str:
        visit = self._open(request)
        if visit.stream is not None:
            raise _refusal("The policy is not done: cancel it, then correct it.")
        with _told():
            if len(read_places(places)) == 2 and how == BOX:
                return _said("Now the opposite corner of the box.")
        self._count(request)
        visit.counted, visit.cancelled = True, False
        return _said("Waiting for a free place …")

    def correct(self, places: str, how: str, mask_id: int, request: gr.Request) -> Iterator[dict]:
        visit = self._open(request)
        state = visit.state
        with _told():
            numbers = read_places(places)
            mask = find_mask(state, mask_id)
        if len(numbers) == 4:
            call = {"box": numbers}
        elif how == BOX:
            return
        else:
            call = {"points": [numbers], "labels": [int(how != REMOVE)]}
            if how != NEW and mask and mask.logits_id:
                call["refine"] = mask.id
        kept = kept_turns(state)
        yield from self._play(visit, lambda agent: agent.correct(state, **call), state.query, kept)

    def cancel(self, request: gr.Request) -> str:
        if visit := self.visits.get(request.session_hash):
            visit.cancel()
        return _said("Cancelled.")

    def leave(self, request: gr.Request) -> None:
        """The page was closed: its slot is free for others."""
        with self.lock:
            visit = self.visits.pop(request.session_hash, None)
        if visit:
            visit.leave()

    def show(self, mask_id: int, request: gr.Request) -> Any:
        with _told():
            return shown_picture(self._open(request).state, mask_id)

    def click(self, places: str, how: str, request: gr.Request, event: gr.SelectData) -> str:
        """Pixels of the picture, in words; the second corner of a box behind the first."""
        x, y = to_original(self._open(request).state, event.index)
        first = places.replace(",", " ").split() if how == BOX else []
        if len(first) != 2:
            return f"{x}, {y}"
        with _told():
            xs, ys = (sorted(pair) for pair in zip(read_places(places), (x, y), strict=True))
        return f"{xs[0]:g}, {ys[0]:g}, {xs[1] + 1:g}, {ys[1] + 1:g}"

    ############################## What they share ##############################

    def _open(self, request: gr.Request) -> Visit:
        visit = self.visits.get(request.session_hash)
        if visit is None or visit.state is None:
            raise _refusal("There is nothing to correct, or no longer: ask first.")
        return visit

    def _count(self, request: gr.Request) -> None:
        """gr.Error where somebody asks too often."""
        now, who = time.monotonic(), request.username or request.client.host
        with self.lock:
            while self.asked and self.asked[0][0] < now - 60:
                self.asked.popleft()
            if sum(by == who for _, by in self.asked) >= self.limits.per_minute:
                raise _refusal(f"{self.limits.per_minute} questions a minute are the most here: wait a little.")
            self.asked.append((now, who))

    def _play(self, visit: Visit, start: Callable, query: str, kept: int | None = None) -> Iterator[dict]:
        """The turns of a stream as they end, then the answer. Once for what `_count` has let in. kept: of a correction,
        turns before those of the user, with which the stream begins."""
        with self.lock:
            counted, visit.counted = visit.counted, False
        if not counted:
            return
        while not self.agent.done():
            if visit.cancelled:
                return
            waited = time.monotonic() - self.since
            yield {self.status: _said(f"The policy is loaded and compiled, once per start: {waited:.0f} s …")}
            time.sleep(EVERY_S)
        try:
            stream = visit.stream = start(self.agent.result())
        except DataError as error:
            yield {self.status: _said("No answer.")}
            raise _refusal(str(error)) from None
        try:
            if visit.cancelled:  # while it waited
                stream.close()
            yield {self.status: _said("The policy looks at the picture …")}
            before, visit.result = time.perf_counter(), None
            for _ in stream:
                if visit.gone:
                    return
                visit.state, now = stream.state, time.perf_counter()
                count, who = len(visit.state.turns), "policy" if kept is None else "you"
                new = range(count - 1 if kept is None else kept, count)
                shown = [turn_html(visit.state, number, now - before, who) for number in new]
                visit.turns, before, kept = [*visit.turns[: new.start], *shown], now, None
                more = f"Turn {count + 1} is under way …" if visit.state.status is None else "Done."
                yield {**self._shown(visit), self.status: _said(more)}
            visit.result = stream.result()
        except Exception as error:
            failed = f"No answer: the agent failed ({type(error).__name__}); the server's log says more. Ask again."
            yield {self.status: _said(failed)}
            raise
        finally:
            stream.close()
            visit.stream = None
        if visit.gone:
            return
        visit.state = visit.result.state
        ending = self._ending(visit, query)
        visit.folder = visit.folder or tempfile.TemporaryDirectory(dir=self.folder)
        files = gr.update(value=answer_files(visit.result, pathlib.Path(visit.folder.name)), visible=True)
        yield {**self._shown(visit), self.status: ending, self.files: files, self.places: ""}

    def _shown(self, visit: Visit) -> dict:
        turns = f'<ol aria-label="Turns">{"".join(visit.turns)}</ol>' if visit.turns else ""
        if visit.state is None:
            hidden = {part: gr.update(visible=False) for part in (self.canvas, self.pool, self.correction, self.files)}
            return {self.turns: turns, self.places: "", **hidden}
        masks, final = len(visit.state.masks), visit.result and visit.result.trajectory.final_mask_id
        mask_id = masks if visit.result is None else final or 0
        pool = gr.Slider(maximum=max(masks, 1), value=mask_id, visible=masks > 0)
        canvas = gr.update(value=shown_picture(visit.state, mask_id), visible=True)
        return {self.turns: turns, self.pool: pool, self.canvas: canvas, self.correction: gr.update(visible=True)}

    def _ending(self, visit: Visit, query: str) -> str:
        """How it ended; of a tiny policy also what it cannot know."""
        t = visit.result.trajectory
        failure, ending = visit.result.failure, describe_ending(visit.state, t.final_mask, t.final_mask_id)
        said = [f"No answer: {failure}" if failure else f"{ending[0].upper()}{ending[1:]}"]
        if self.note and (unknown := unknown_words(query)):
            said.append(unknown)
        if self.note and checksum(visit.state.image) not in self.known:
            said.append(
                "This picture is your own: the tiny policy can find flat, evenly coloured shapes, nothing else."
            )
        return _said(*said)

    ############################## Layout ##############################

    def blocks(self) -> gr.Blocks:
        with gr.Blocks(title="RSAgent-JAX demo", analytics_enabled=False, delete_cache=(3600, 3600)) as blocks:
            gr.Markdown("# RSAgent-JAX demo\nA picture and a sentence become a mask, turn by turn.")
            if self.note:
                gr.Markdown(self.note)
            with gr.Row():
                with gr.Column():
                    self._question()
                with gr.Column():
                    self._answer()
            self._connect(blocks)
        return blocks.queue(max_size=self.limits.waiting)

    def _question(self) -> None:
        sources = ["upload", "clipboard"]
        self.picture = gr.Image(label="Picture", type="filepath", image_mode=None, sources=sources, height=320)
        self.query = gr.Textbox(label="What to segment", placeholder="the red circle", max_length=MAX_QUERY)
        with gr.Row():
            self.ask_button, self.cancel_button = gr.Button("Ask", variant="primary"), gr.Button("Cancel")
        self.status = gr.HTML(_said("Ask about a picture."), elem_classes="status")
        if self.examples:
            gr.Examples([list(example) for example in self.examples], [self.picture, self.query], label="Examples")

    def _answer(self) -> None:
        canvas = dict(label="Picture and mask", alt_text="Picture and mask", format="png", buttons=["fullscreen"])
        self.canvas = gr.Image(**canvas, interactive=False, visible=False)
        self.pool = gr.Slider(0, 1, 0, step=1, label="Mask of the history pool (0: none)", visible=False)
        with gr.Group(visible=False) as self.correction:
            self.how = gr.Radio([ADD, REMOVE, NEW, BOX], value=ADD, label="Correct it: click on the picture")
            self.places = gr.Textbox(label="… or type x, y (or x1, y1, x2, y2) in pixels of the picture, and Enter")
        self.turns = gr.HTML(elem_classes="turns")
        self.files = gr.File(label="Mask, RLE, trajectory", file_count="multiple", interactive=False, visible=False)

    def _connect(self, blocks: gr.Blocks) -> None:
        changed = [self.status, self.turns, self.pool, self.canvas, self.correction, self.places, self.files]
        question, correction, hidden = (
            [self.picture, self.query],
            [self.places, self.how],
            dict(api_visibility="private"),
        )
        plays = dict(concurrency_id="agent", concurrency_limit=self.limits.slots, show_progress_on=[self.status])
        quick = dict(concurrency_limit=None, show_progress="hidden", **hidden)
        # Gradio's preprocessing takes a picture inside of the request, too, and opens it where nothing can be told.
        asked = gr.on(
            [self.ask_button.click, self.query.submit], self.begin, question, changed, preprocess=False, **quick
        )
        # "multiple": while an earlier question runs the browser would drop this one, which has replaced it
        asked.success(self.ask, None, changed, trigger_mode="multiple", **plays, **hidden)
        self.how.input(lambda: "", None, self.places, queue=False, **hidden)  # a place is none for another mode
        clicked = self.canvas.select(self.click, correction, self.places, **quick)
        for given in (clicked.success, self.places.submit):
            taken = given(self.begin_correction, correction, self.status, **quick)
            taken.success(self.correct, [*correction, self.pool], changed, **plays, **hidden)
        self.cancel_button.click(self.cancel, None, self.status, queue=False, **hidden)
        self.pool.input(self.show, self.pool, self.canvas, queue=False, show_progress="hidden", **hidden)
        blocks.unload(self.leave)


async def _no_download(url: str, cache_dir: str) -> str:
    raise _refusal("Upload the picture: no addresses are opened here.")


processing_utils.async_ssrf_protected_download = _no_download  # else Gradio fetches what a visitor names, of any size


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """What is wrong with what the visitor gave is told to the visitor."""
    try:
        yield
    except DataError as error:
        raise _refusal(str(error)) from None


def _said(*lines: str) -> str:
    return f'<p role="status">{"<br>".join(map(html.escape, lines))}</p>'


def _refusal(message: str) -> gr.Error:
    return gr.Error(html.escape(message), print_exception=False)
