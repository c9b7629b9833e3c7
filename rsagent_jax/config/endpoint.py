"""Where a model behind an OpenAI-compatible endpoint is, and how it is asked."""

from __future__ import annotations

import dataclasses

from rsagent_jax.config.ranges import Count, CountOrZero, NotNegative, Positive


@dataclasses.dataclass(frozen=True, kw_only=True)
class EndpointConfig:
    """An OpenAI-compatible endpoint."""

    url: str = ""  # such as http://host:8000/v1
    model: str = ""  # its name there
    key_variable: str = "OPENAI_API_KEY"  # the environment variable that holds the key; may be unset
    timeout_s: Positive = 120.0  # of one request, however slowly it trickles in
    retries: CountOrZero = 5  # after a refusal, an error of the server, a time-out or half an answer
    backoff_s: NotNegative = 1.0  # before the first retry, doubled for each; a Retry-After of the server counts instead
    concurrent: Count = 16  # requests at a time
    per_minute: NotNegative = 0.0  # requests; 0 = no limit of our own
    price_in: NotNegative = 0.0  # per million tokens, for the count of costs
    price_out: NotNegative = 0.0  # the same of what it writes

    @property
    def options(self) -> dict[str, float]:
        """Of every request."""
        return {}

    @property
    def slowest_answer_s(self) -> float:
        """Seconds after which an answer is given up: all tries, the pauses before them, and others' turns."""
        turns_s = 60.0 * self.concurrent / self.per_minute if self.per_minute else 0.0
        pauses_s = sum(max(60.0, self.backoff_s * 2**k) for k in range(self.retries))
        return (self.retries + 1) * (self.timeout_s + turns_s) + pauses_s


@dataclasses.dataclass(frozen=True, kw_only=True)
class RemoteConfig(EndpointConfig):
    """A teacher, a writer or a judge there, such as Qwen2.5-VL-72B behind vLLM."""

    temperature: NotNegative = 0.7  # of its sampling
    max_tokens: Count = 512  # per turn

    @property
    def options(self) -> dict[str, float]:
        return {"temperature": self.temperature, "max_tokens": self.max_tokens}
