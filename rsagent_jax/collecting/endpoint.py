"""A teacher behind an OpenAI-compatible endpoint: it reads what the policy reads, and its text is taken as a turn."""

import numpy as np

from rsagent_jax.agent import prompts
from rsagent_jax.agent.environment import EnvState
from rsagent_jax.config.schema import TeacherConfig
from rsagent_jax.rollout.endpoint import Endpoint, chat_messages


class Remote:
    """One per trajectory, as `Oracle`; the true mask is not shown to it."""

    def __init__(self, config: TeacherConfig, rng: np.random.Generator):
        self.config = config.remote  # the endpoint draws its own random numbers

    def act(self, state: EnvState, gt_mask: np.ndarray) -> str:
        text = Endpoint.shared(self.config).complete(chat_messages(state)).text
        # Without its terminator, and without anything that would be read as a special token.
        return text.removesuffix(prompts.TERMINATOR).strip().replace("<|", "(|")
