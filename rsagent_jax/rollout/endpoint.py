"""A client of an OpenAI-compatible endpoint: of a served policy, of a teacher, of whoever writes or judges.

Requests of many threads run side by side, at most `concurrent` at a time and `per_minute` a minute. What the server
refuses for now, fails at, answers too slowly or by half is asked again with growing pauses; tokens, retries and costs
are counted. What is never going to work (a wrong key, an unknown model) ends the command with one clear error.
"""

import asyncio
import base64
import dataclasses
import json
import os
import re
import threading
import time
from typing import Any, Self

import cachetools
import numpy as np
import openai
from openai.types.chat import ChatCompletionMessage

from rsagent_jax.agent.environment import EnvState, conversation
from rsagent_jax.config.endpoint import EndpointConfig
from rsagent_jax.rollout.policy import PolicyFailure
from rsagent_jax.runtime.image_files import png
from rsagent_jax.types import DataError

_FATAL = (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError)
_AGAIN = {  # asked again; the first that fits names the kind
    openai.RateLimitError: "rate_limit",
    openai.APITimeoutError: "timeout",
    openai.APIConnectionError: "connection",
    openai.InternalServerError: "server",
}
_HALF = (TypeError, KeyError, AttributeError, IndexError)  # an answer that lacks what it must have
TEACHER = "teacher.remote"  # the config group
_URL = re.compile(r"https?://[^/?#@\s]+([/?#]\S*)?", re.IGNORECASE)


class NoText(ValueError):
    """An answer as it should be, but without text."""


@dataclasses.dataclass
class Usage:
    """What the endpoint was asked so far, failed requests included."""

    requests: int = 0
    retries: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    waited_s: float = 0.0  # for our own limit and between retries


@dataclasses.dataclass(frozen=True)
class Answer:
    text: str
    cut: bool = False  # by max_tokens
    prompt_tokens: int = 0  # that the server read; 0 = it does not say


def check_endpoint(config: EndpointConfig, name: str = TEACHER) -> None:
    """DataError for a config without an endpoint, or with a URL that is none. `name`: of the config group."""
    if not config.url or not config.model:
        raise DataError(f"{name}.url and {name}.model are needed, such as http://host:8000/v1")
    if "@" in config.url.partition("//")[2].partition("/")[0]:  # not shown: it may hold a password
        raise DataError(
            f"{name}.url holds a user or a password, which would stand in results.json; put the server's key into the"
            f" environment variable that {name}.key_variable names, {config.key_variable}"
        )
    if not _URL.fullmatch(config.url):
        raise DataError(f"{name}.url must be like http://host:8000/v1, with http:// or https://, got {config.url!r}")


class Endpoint:
    """One client for all threads of a command; its requests run on an event loop of its own."""

    def __init__(self, config: EndpointConfig, name: str = TEACHER):
        """`name`: of the config group, for messages."""
        check_endpoint(config, name)
        self.name = name
        key = os.environ.get(config.key_variable) or "none"
        # Retries are ours, so that they are counted.
        self.client = openai.AsyncOpenAI(base_url=config.url, api_key=key, timeout=config.timeout_s, max_retries=0)
        self.config, self.usage = config, Usage()
        self.slots, self.next_start = asyncio.Semaphore(config.concurrent), 0.0
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()

    @classmethod
    @cachetools.cached({}, lambda cls, config, name=TEACHER: (config, name), condition=threading.Condition())
    def shared(cls, config: EndpointConfig, name: str = TEACHER) -> Self:
        """The one of this process; threads that ask for it at the same time get the same."""
        return cls(config, name)

    def complete(self, messages: list[dict], **options: Any) -> Answer:
        """Waits for the answer. `options`: of the request, such as temperature, and `empty`: whether an answer may be
        empty. PolicyFailure when it is given up on, DataError where asking again is of no use."""
        return asyncio.run_coroutine_threadsafe(self._complete(messages, options), self.loop).result()

    async def complete_async(self, messages: list[dict], **options: Any) -> Answer:
        """The same on any event loop; the request ends with its waiter."""
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(self._complete(messages, options), self.loop))

    def probe(self, **options: Any) -> None:
        """DataError unless the model answers a word, asked once."""
        asked = self._ask([{"role": "user", "content": "?"}], {"max_tokens": 1, **options})
        try:
            asyncio.run_coroutine_threadsafe(asked, self.loop).result()
        except NoText:
            pass  # a token without text is an answer, too
        except (openai.OpenAIError, TimeoutError, ValueError, *_HALF) as error:
            c = self.config
            raise DataError(f"{c.url} does not serve {c.model!r} ({_reason(error)}); see {self.name}") from None

    def told(self) -> dict[str, float]:
        """The usage so far and what it cost, for people."""
        c, u = self.config, self.usage
        return vars(u) | {"cost": (u.tokens_in * c.price_in + u.tokens_out * c.price_out) / 1e6}

    async def _complete(self, messages: list[dict], options: dict[str, Any]) -> Answer:
        for attempt in range(self.config.retries + 1):
            try:
                return await self._ask(messages, options)
            except _FATAL as error:
                c = self.config
                raise DataError(f"{c.url} refuses {c.model!r} ({_reason(error)}); see {self.name}") from None
            except tuple(_AGAIN) as error:
                kind = next(kind for cls, kind in _AGAIN.items() if isinstance(error, cls))
                detail, pause = _reason(error), _retry_after(error)
            except TimeoutError:
                kind, detail, pause = "timeout", f"no whole answer within {self.config.timeout_s} s", None
            except openai.APIStatusError as error:  # 400, 422: this request is at fault, such as a context too long
                raise PolicyFailure("endpoint, refused", _reason(error)) from None
            except (openai.OpenAIError, ValueError, *_HALF) as error:
                kind, detail, pause = "malformed", _reason(error), None
            if attempt < self.config.retries:
                self.usage.retries += 1
                await self._wait(self.config.backoff_s * 2**attempt if pause is None else pause)
        said = f"{detail}, after {self.config.retries + 1} tries of {self.config.url}"
        raise PolicyFailure(f"endpoint, {kind}", said)

    async def _ask(self, messages: list[dict], options: dict[str, Any]) -> Answer:
        c, options = self.config, dict(options)
        empty = options.pop("empty", False)
        async with self.slots:
            if c.per_minute:
                now = time.monotonic()
                start = self.next_start = max(now, self.next_start + 60 / c.per_minute)
                await self._wait(start - now)
            self.usage.requests += 1
            asked = self.client.chat.completions.create(model=c.model, messages=messages, **c.options | options)
            answer = await asyncio.wait_for(asked, c.timeout_s)  # the client's own limit is per chunk of bytes
        if answer.usage is not None:
            self.usage.tokens_in += answer.usage.prompt_tokens
            self.usage.tokens_out += answer.usage.completion_tokens
        choice, read = answer.choices[0], answer.usage and answer.usage.prompt_tokens
        text = _text(choice.message)
        # A policy may end its turn at once; no content at all is half an answer.
        if not text.strip() and not (empty and choice.finish_reason == "stop" and choice.message.content is not None):
            raise NoText("an answer without text")
        return Answer(text, choice.finish_reason == "length", read or 0)

    async def _wait(self, seconds: float) -> None:
        self.usage.waited_s += max(0.0, seconds)
        await asyncio.sleep(max(0.0, seconds))


def chat_messages(state: EnvState) -> list[dict]:
    """The trajectory so far as the API has it: what a tool shows travels in a user's message."""
    messages = []
    for m in conversation(state):  # parts for users only: some servers take none of others
        content = [*map(message_part, m.parts)] if m.role == "user" else m.parts[0]
        messages.append({"role": m.role, "content": content})
    return messages


def message_part(value: str | np.ndarray) -> dict:
    """A text, or u8[h, w, 3], as a part of a message."""
    if isinstance(value, str):
        return {"type": "text", "text": value}
    url = "data:image/png;base64," + base64.b64encode(png(value)).decode("ascii")
    return {"type": "image_url", "image_url": {"url": url}}


def _text(message: ChatCompletionMessage) -> str:
    """As the model wrote it, where a server took thought and calls out of it (Qwen's layout)."""
    more = message.model_extra or {}
    thought = more.get("reasoning_content") or more.get("reasoning")
    calls = [
        f'{{"name": {json.dumps(call.function.name)}, "arguments": {call.function.arguments}}}'
        for call in message.tool_calls or ()
    ]
    parts = [thought and f"<think>{thought}</think>", message.content]
    return "\n".join(filter(None, [*parts, *(f"<tool_call>\n{call}\n</tool_call>" for call in calls)]))


def _retry_after(error: openai.OpenAIError) -> float | None:
    """Seconds that the server asks to wait, at most a minute."""
    response = getattr(error, "response", None)
    try:
        return min(60.0, max(0.0, float(response.headers["retry-after"])))
    except (AttributeError, KeyError, TypeError, ValueError):
        return None


def _reason(error: Exception) -> str:
    body = getattr(error, "body", None)
    detail = body.get("detail", "") if isinstance(body, dict) else ""  # FastAPI's word, which the client leaves out
    return " ".join(f"{error} {detail}".split())[:200] or type(error).__name__
