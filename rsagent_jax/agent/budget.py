"""How many tokens a trajectory takes, and how many its next turn may have.

A context holds the opening (system prompt, question, first view), the turns, and after every turn but the last an
observation: an overlay with its text, a view with its text, or an error. Images take most of it, and their sizes are
known beforehand. So a config can be checked before it costs anything, and a trajectory under way can be told in time
which turn is its last: `finish` always fits.
"""

import dataclasses
from collections.abc import Callable, Sized
from typing import Protocol, Self

from rsagent_jax.agent import prompts
from rsagent_jax.agent.overlay import overlay_size
from rsagent_jax.agent.tools import Finish, render_call
from rsagent_jax.agent.views import PixelLimits, fit, fixed_size, round_size
from rsagent_jax.config.schema import AgentConfig
from rsagent_jax.types import ParseError

# The typical trajectory, for checking a config (ours): this question about a picture of this size, a mask in every
# turn but the last, turns of agent.typical_turn tokens.
QUERY = "the person in the red jacket who stands second from the left"
TYPICAL_SIZE = (1080, 1920)  # h, w
ANY_SIZE = (99_999, 99_999)  # a view whose size takes as many digits as any

# The longest answers to a call that cannot be read or done; tests/agent/test_budget.py compares them with the sources.
LONGEST_ERRORS = (
    ParseError("zoom_too_small", "the box must be at least 16 image pixels wide and high."),
    ParseError("zoom_too_thin", "the box must not be longer than 20 times its width."),
    ParseError("no_room", "there is no room left for another view; go on in this one, or finish."),
)

Encode = Callable[[str], Sized]  # text -> its tokens


class Room(Protocol):
    """What bounds a trajectory: a SamplingConfig, or a policy."""

    context: int
    max_new_tokens: int


@dataclasses.dataclass(frozen=True)
class Texts:
    """Tokens of what is written around the images: the most that a numeral, an area or an error can make of it."""

    opening: int
    mask: int
    view: int
    error: int
    announcement: int  # what the last observation has more than others
    finish: int  # the shortest turn that ends a trajectory, its terminator included

    @classmethod
    def of(cls, agent: AgentConfig, encode: Encode, size_view=ANY_SIZE, query: str = QUERY) -> Self:
        style, highest = agent.prompt, 10 ** len(str(agent.max_turns)) - 1  # the mask's id

        def observed(text: str, has_image: bool) -> int:
            # without the terminator, which the turn before it has sampled, and the image's place
            return len(encode(prompts.TERMINATOR + prompts.observation_turn(text, has_image))) - 1 - has_image

        areas = (1.0, 0.009)
        masks = [prompts.segment_text(highest, 1.0, area, size_view, style) for area in areas]
        announced = [f"{text} {prompts.last_turn_text(highest, style)}" for text in masks]
        mask = max(observed(text, True) for text in masks)
        question = prompts.user_text(query, size_view, style)
        if agent.announce_last and agent.max_turns == 1:
            question = f"{question} {prompts.last_turn_text(None, style)}"
        return cls(
            opening=len(encode(prompts.opening(prompts.system_prompt(style), question))) - 1,
            mask=mask,
            view=observed(prompts.view_text(size_view, style), True),
            error=max(observed(prompts.error_text(error, style), False) for error in LONGEST_ERRORS),
            announcement=agent.announce_last * (max(observed(text, True) for text in announced) - mask),
            finish=max(len(encode(render_call(Finish(i), "Done."))) for i in (highest, None)) + 1,
        )


@dataclasses.dataclass(frozen=True)
class Budget:
    """Of the trajectories on pictures of one size, all in tokens, images included."""

    opening: int
    mask: int  # an overlay or an error
    view: int  # the largest view that the limits allow
    announcement: int
    finish: int
    context: int  # of a trajectory
    max_new_tokens: int  # of a turn
    max_tokens: int  # of all turns together; 0 = no bound of its own
    max_turns: int
    typical_turn: int  # at most max_new_tokens

    def needs(self, turn: int, turns: int | None = None, views: int = 0) -> int:
        """Tokens of a trajectory whose turns take `turn` each and make a mask, or a view (`views` of them); the last
        turn makes none."""
        turns = self.max_turns if turns is None else turns
        told = self.announcement if turns > 1 else 0
        return self.opening + turns * turn + (turns - 1 - views) * self.mask + views * self.view + told

    def turns_that_fit(self, turn: int) -> int:
        """Turns of `turn` tokens, masks and a finish, at most max_turns."""
        most = self.max_tokens or self.context
        fit = [n for n in range(1, self.max_turns + 1) if self.needs(turn, n) <= self.context and n * turn <= most]
        return max(fit, default=0)

    @property
    def longest_turn(self) -> int:
        """Tokens with which max_turns turns fit, at most max_new_tokens; below 1 when they never do."""
        room = (self.context - self.needs(0)) // self.max_turns
        bound = self.max_tokens // self.max_turns if self.max_tokens else room
        return min(self.max_new_tokens, room, bound)

    @property
    def views_that_fit(self) -> int:
        """How many of a typical trajectory's masks may be views of the largest size instead."""
        spare, more = self.context - self.needs(self.typical_turn), self.view - self.mask
        return self.max_turns - 1 if more <= 0 else max(0, min(self.max_turns - 1, spare // more))

    @property
    def worst(self) -> int:
        """The longest turns and a largest view after each: where it exceeds the context, a last turn is announced."""
        return self.needs(self.max_new_tokens, views=self.max_turns - 1 if self.view > self.mask else 0)

    def next_turn(self, length: int, drawn: int, last: bool) -> tuple[int, bool]:
        """(tokens that the next turn may take, whether it is the last); 0 tokens: not even a finish fits.

        length: of the context so far, what comes before the turn included. drawn: sampled tokens so far. last: it is,
        whatever fits. A turn that is not the last leaves room for a mask's observation (a cut turn's terminator with
        it), the announcement and a finish; one that would be left with less than an ordinary turn is the last.
        """
        room = self.context - length
        left = self.max_tokens - drawn if self.max_tokens else room
        most, finish = min(self.max_new_tokens, room, left), min(self.finish, self.max_new_tokens)
        if most < finish:
            return 0, True
        ordinary = min(most, room - (1 + self.mask + self.announcement + finish), left - finish)
        return (most, True) if last or ordinary < self.typical_turn else (ordinary, False)


def trajectory_budget(
    agent: AgentConfig, room: Room, texts: Texts, size: tuple[int, int], views: PixelLimits, images: PixelLimits
) -> Budget:
    """The budget on a picture of `size` (h, w); `views` are the limits of a view, `images` the image processor's own,
    which overlays are resized to. DataError for a shape that cannot be shown."""
    view, overlay = image_sizes(agent, size, views, images)
    return Budget(
        opening=texts.opening + _tokens(view, views),
        mask=max(texts.error, texts.mask + _tokens(overlay, images)),
        view=texts.view + views.max_pixels // views.factor**2,
        announcement=texts.announcement,
        finish=texts.finish,
        context=room.context,
        max_new_tokens=room.max_new_tokens,
        max_tokens=agent.max_tokens,
        max_turns=agent.max_turns,
        typical_turn=min(agent.typical_turn, room.max_new_tokens),
    )


def image_sizes(
    agent: AgentConfig, size: tuple[int, int], views: PixelLimits, images: PixelLimits
) -> tuple[tuple[int, int], tuple[int, int]]:
    """(h', w') of the first view and of an overlay as the model sees them, for a picture of `size` (h, w)."""
    shown = fit(*size, views)
    overlay = overlay_size(*size, agent.history_size)
    return fixed_size(*size, shown), round_size(*overlay, images.lowered_to(shown))


def typical_size(views: PixelLimits) -> tuple[int, int]:
    """(h, w) of the picture that a config is checked with: a square where only those can be shown."""
    return TYPICAL_SIZE if fit(*TYPICAL_SIZE, views) == views else TYPICAL_SIZE[:1] * 2


def _tokens(size: tuple[int, int], limits: PixelLimits) -> int:
    return (size[0] // limits.factor) * (size[1] // limits.factor)
