"""Trajectories for the quickstart's SFT: an oracle teacher on the training scenes. Ten seconds on 2 cores.

  python -m rsagent_jax.collect --config=configs/collect_quickstart.py --workdir=runs/x/collect \
      --config.data.root=runs/x/data
"""

from rsagent_jax.config.build import template
from rsagent_jax.config.import_path import shipped
from rsagent_jax.config.schema import CollectConfig


def get_config():
    config = template(CollectConfig)
    config.processor = shipped("assets/tiny-base")
    config.data.dataset, config.data.split_by = "grefcoco", "unc"  # the scenes with absent targets
    config.limit = 200  # with 900, SFT reaches what GRPO cannot better in its minutes (README)
    config.filter.repeats = True  # the recipe was measured with them
    config.teacher.box = 0.0
    config.teacher.wrong_first = 0.4
    config.teacher.good = config.filter.min_iou = 0.8
    config.agent.prompt = "brief"
    config.agent.history_size = 112
    config.agent.typical_turn = 48
    return config
