"""The policy behind an OpenAI-compatible endpoint: what rsagent_jax.export wrote, in vLLM or transformers' own server.

It reads the very ids that our engine reads, and every answer is checked for that by their number. Its text becomes
tokens again here: a turn is stored as the tokenizer writes it, without log-probs, so it is played with, not trained on.
"""

import asyncio

import numpy as np

from rsagent_jax.agent.environment import EnvState, read_before
from rsagent_jax.config.endpoint import EndpointConfig
from rsagent_jax.config.schema import PolicyConfig, SamplingConfig
from rsagent_jax.data.processor import TERMINATOR, Processor
from rsagent_jax.data.serving import PLACEHOLDERS
from rsagent_jax.rollout.endpoint import Endpoint, chat_messages, check_endpoint
from rsagent_jax.rollout.policy import PolicyFailure, Request, TextPolicy
from rsagent_jax.types import Completion, DataError

GROUP = "policy.remote"  # of the config
NEVER = -100.0  # the API's lowest bias: such a token is not drawn. transformers' server takes no whole number


def check_served(config: EndpointConfig, processor: Processor) -> None:
    """DataError unless the model answers there."""
    check_endpoint(config, GROUP)
    Endpoint.shared(config, GROUP).probe(temperature=0.0, logit_bias=placeholder_bias(processor))


def placeholder_bias(processor: Processor) -> dict[str, float]:
    """`logit_bias` of a request."""
    ids = map(processor.tokenizer.token_to_id, PLACEHOLDERS)
    return {str(token): NEVER for token in ids if token is not None}


class ServedPolicy(TextPolicy):
    """As many trajectories at a time as `sampling.slots`, or 0: as requests, `policy.remote.concurrent`."""

    def __init__(self, policy: PolicyConfig, processor: Processor, sampling: SamplingConfig, seed: int):
        self.endpoint, self.weights = Endpoint.shared(policy.remote, GROUP), policy.weights
        slots = sampling.slots or policy.remote.concurrent
        super().__init__(lambda task, state: "", processor, slots=slots, threads=slots, context=sampling.context)
        self.max_new_tokens, self.sampling, self.seed = sampling.max_new_tokens, sampling, seed
        self.bias = placeholder_bias(processor)

    def warm_up(self) -> None:
        """Nothing is compiled."""

    def release_memory(self) -> None:
        self.begin()

    def submit(self, request: Request) -> None:
        """A task of the endpoint's loop, not a thread that waits: `release` ends the request itself."""
        self.turns[request.slot] = request, asyncio.run_coroutine_threadsafe(self._ask(request), self.endpoint.loop)

    async def _ask(self, request: Request) -> Completion:
        task, budget = request.task, request.budget or self.max_new_tokens
        temperature = self.sampling.temperature if task.temperature is None else task.temperature
        options = {"temperature": temperature, "max_tokens": budget, "logit_bias": self.bias}
        if temperature:
            rng = np.random.default_rng((self.seed, task.uid, request.turn))
            options |= {"top_p": self.sampling.top_p, "seed": int(rng.integers(2**31))}
        messages = await asyncio.to_thread(chat_messages, request.state)  # the loop is everybody's
        answer = await self.endpoint.complete_async(messages, empty=True, **options)
        await asyncio.to_thread(self._check_prompt, request.state, answer.prompt_tokens)
        text = answer.text.removesuffix(TERMINATOR)
        for token in PLACEHOLDERS:  # spelt out, it would be one in the next prompt
            text = text.replace(token, f"({token[1:]}")
        return self._complete(text, budget, answer.cut)

    def _check_prompt(self, state: EnvState, read: int) -> None:
        """DataError where the server reads another number of tokens, 0 = it does not say; PolicyFailure where that is
        the picture's shape, which the weights' own image settings cannot show (views.fit)."""
        if not read or read == (wanted := self._prompt_tokens(state)):
            return
        said = f"{self.endpoint.config.url} reads a prompt of {read} tokens where the policy reads {wanted}"
        if state.limits.min_pixels < self.processor.images.limits.min_pixels:
            h, w = state.image.shape[:2]
            raise PolicyFailure("endpoint, picture", f"{said}: it enlarges a view of a picture of {w}x{h} pixels")
        raise DataError(
            f"{said}: its chat template or image settings are not those of {self.weights}; serve the directory that"
            " rsagent_jax.export wrote, and name it as policy.weights (docs/serving.md)"
        )

    def _prompt_tokens(self, state: EnvState) -> int:
        """Of all that was said and shown, encoded at once as a server does."""
        before = [read_before(state, turn) for turn in range(len(state.turns) + 1)]
        said = "".join(turn.text + text for turn, (text, _) in zip(state.turns, before[1:], strict=True))
        images = [image for _, shown in before for image in shown]
        return len(self.processor.prompt(before[0][0] + said, images, 0, state.limits)[0].tokens)
