import dataclasses

import pytest

from rsagent_jax.config.schema import OptimConfig
from rsagent_jax.fitness.finding import Examined
from tests.rollout import small


@pytest.fixture
def examined(tmp_path):
    config = small.train_config("nowhere", 2, 1, OptimConfig(warmup_steps=1), 2)
    return Examined.of(dataclasses.replace(config, stages=("sft",)), tmp_path)
