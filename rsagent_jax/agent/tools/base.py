"""What the tools share: checks of arguments, and the proposal that a call becomes in its view."""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, Self

from rsagent_jax.agent.views import View
from rsagent_jax.types import MaskRecord, ParseError, ToolCall
from sam_bridge.types import SegmentRequest

MAX_NUMBER = 1e6  # beyond any picture; keeps arithmetic finite
MAX_POINTS = 16  # and labels
BOX = {
    "type": "array",
    "items": {"type": "number"},
    "minItems": 4,
    "maxItems": 4,
    "description": "[x1, y1, x2, y2] in pixels of the current view",
}


@dataclasses.dataclass(frozen=True)
class Proposal:
    """What a turn asks for, before any tool has run."""

    call: ToolCall | None  # None when malformed
    error: ParseError | None = None  # malformed or refused
    request: SegmentRequest | None = None  # in original pixels; None when no tool is needed
    view: View | None = None  # the view to go to
    clipped: int = 0  # coordinates that were outside the view
    action: Any = None  # equal for equal actions, whatever view they were said in; None when malformed
    text: str = ""  # the turn


class Malformed(Exception):
    """(reason, detail) of a ParseError, on the way out of the nested checks; never leaves `parse`."""


class Tool(ToolCall):
    """The base of all calls: the schema that the policy reads, and the arguments checked and printed by it.

    The fields of the frozen dataclass are the arguments, in the order of `properties`; optional ones have a default.
    """

    description: ClassVar[str]  # for the policy
    properties: ClassVar[dict[str, Any]]  # argument -> JSON schema, of the kinds that `read_value` knows
    required: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def read(cls, arguments: dict[str, Any]) -> Self:
        """The call of JSON arguments whose names are known; raises Malformed."""
        # null means the same as leaving an optional argument out: models write both
        given = [n for n in cls.properties if arguments.get(n) is not None or n in cls.required]
        return cls(**{name: read_value(name, cls.properties[name], arguments[name]) for name in given})

    def arguments(self) -> dict[str, Any]:
        """As JSON has them: whole numbers without a point, optional ones only where they were given."""
        values = {name: _plain(getattr(self, name)) for name in self.properties}
        return {name: value for name, value in values.items() if name in self.required or value not in (None, [])}

    def propose(self, view: View, masks: Sequence[MaskRecord]) -> Proposal:
        """What the call asks for in the current view, with the masks made so far; raises nothing."""
        raise NotImplementedError


def refuse_call(call: ToolCall, error: ParseError, clipped: int = 0) -> Proposal:
    """The proposal of a call that cannot be done."""
    return Proposal(call, error, clipped=clipped, action=("refused", call))


def go_to(call: ToolCall, view: View | ParseError, clipped: int = 0) -> Proposal:
    """The proposal to show `view`, or to refuse it."""
    if isinstance(view, ParseError):
        return refuse_call(call, view, clipped)
    return Proposal(call, view=view, clipped=clipped, action=("view", view))


def unknown_mask(mask_id: int, masks: Sequence[MaskRecord]) -> ParseError | None:
    """The error of a call that names a mask which does not exist; None for one that does."""
    if mask_id <= len(masks):
        return None
    have = f"masks: 1 to {len(masks)}." if masks else "no masks yet."
    return ParseError("unknown_mask", f"no mask {mask_id}; {have}")


def read_value(what: str, schema: dict[str, Any], value: Any) -> Any:
    """A JSON value as its schema has it, lists as tuples; raises Malformed. `what` names the value to the policy."""
    kind = schema["type"]
    if "null" in kind and value is None:
        return None
    if "integer" in kind:
        choices = schema.get("enum", (1, int(MAX_NUMBER)))
        if isinstance(value, bool) or not isinstance(value, int):
            raise Malformed("bad_type", f"{what} must be an integer.")
        if not choices[0] <= value <= choices[-1]:
            raise Malformed("bad_value", f"{what} is out of range.")
        return value
    if "minItems" in schema:
        return _numbers(what, value, schema["minItems"])
    if not isinstance(value, list):
        raise Malformed("bad_type", f"{what} must be a list.")
    if len(value) > (most := schema.get("maxItems", MAX_POINTS)):
        raise Malformed("bad_value", f"at most {most} {what}.")
    return tuple(read_value(f"a {what.removesuffix('s')}", schema["items"], item) for item in value)


def _numbers(what: str, value: Any, count: int) -> tuple[float, ...]:
    """A list of `count` finite numbers."""
    if not isinstance(value, list) or any(isinstance(v, bool) or not isinstance(v, int | float) for v in value):
        raise Malformed("bad_type", f"{what} must be {count} numbers.")
    if len(value) != count:
        raise Malformed("bad_value", f"{what} must be {count} numbers.")
    # compared before float(), which a 400-digit integer overflows; 1e999 is read as inf and fails here too
    if any(abs(v) > MAX_NUMBER for v in value):
        raise Malformed("bad_value", f"{what} has a number out of range.")
    return tuple(float(v) for v in value)


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
