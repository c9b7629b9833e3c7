"""Does a checkpoint's own chat template write what agent/prompts writes? Otherwise it was trained on another layout."""

import pathlib
from typing import Any

from rsagent_jax.agent import prompts
from rsagent_jax.agent.tools import tool_schemas
from rsagent_jax.models.qwen25_vl.config import read_json
from rsagent_jax.types import DataError

_QUESTION = prompts.user_text("the cup", (112, 112), "full")
_ANSWER = '<think>Here.</think>\n<tool_call>\n{"name": "segment", "arguments": {"box": [1, 2, 3, 4]}}\n</tool_call>'
_REPLY = prompts.segment_text(0, 0.9, 0.1, (112, 112), "full")


def own_template(directory: pathlib.Path, tokenizer: Any) -> str | None:
    """The template that transformers' processor takes of a directory: chat_template.jinja's, chat_template.json's, else
    tokenizer_config.json's."""
    legacy = directory / "chat_template.json"
    if legacy.exists() and not (directory / "chat_template.jinja").exists():
        return read_json(legacy).get("chat_template") or tokenizer.chat_template
    return tokenizer.chat_template  # of the .jinja, where there is one


def check_chat_template(directory: pathlib.Path, tokenizer: Any) -> None:
    """Compares one conversation: system prompt with tools, picture and question, a call, its reply with a picture.

    tokenizer: transformers' tokenizer of the directory. A template that takes tools writes the block that describes
    them; for any other (Qwen2.5-VL's own is one) the block is a part of the system's text. A directory without a
    template has nothing to compare. DataError shows both texts where they begin to differ.
    """
    given = own_template(directory, tokenizer)
    if not given:
        return
    system = prompts.system_prompt("full")
    image, reply = {"type": "image"}, f"<tool_response>\n{_REPLY}"
    try:
        takes_tools = "tools" in tokenizer.get_chat_template(given, tools=tool_schemas())
        messages = [
            {"role": "system", "content": system.partition("\n\n# Tools")[0] if takes_tools else system},
            {"role": "user", "content": [image, _text(_QUESTION)]},
            {"role": "assistant", "content": _ANSWER},
            {"role": "user", "content": [_text(reply), image, _text("\n</tool_response>")]},
        ]
        theirs = tokenizer.apply_chat_template(
            messages,
            chat_template=given,
            tools=tool_schemas() if takes_tools else None,
            tokenize=False,
            add_generation_prompt=True,
        )
    except Exception as error:  # a template is a program: it may raise anything
        raise DataError(f"{directory}: its chat template cannot write a conversation with pictures: {error}") from error
    ours = prompts.opening(system, _QUESTION) + _ANSWER + prompts.TERMINATOR + prompts.observation_turn(_REPLY, True)
    if theirs != ours:
        same = next(i for i, (a, b) in enumerate(zip(f"{ours}\0", f"{theirs}\1", strict=False)) if a != b)
        excerpt = slice(max(0, same - 60), same + 120)
        raise DataError(
            f"{directory}: its chat template is not the layout that RSAgent writes, which is Qwen2.5-VL's; such a model"
            f" would be shown what it was not trained on. At character {same}:\n  template: {theirs[excerpt]!r}\n"
            f"  RSAgent:  {ours[excerpt]!r}\nTake weights of Qwen2.5-VL, or mend the template."
        )


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}
