"""Trajectories for the quickstart's SFT: an oracle teacher on the training scenes. Half a minute on 2 cores.

  python -m rsagent_jax.collect --config=configs/collect_quickstart.py --workdir=runs/mine-collect

It reads the scenes that `make quickstart` left behind.
"""

from rsagent_jax.config.build import template
from rsagent_jax.config.import_path import shipped
from rsagent_jax.config.schema import CollectConfig


def get_config():
    config = template(CollectConfig)
    config.processor = shipped("assets/tiny-base")
    config.data.root = "runs/quickstart/data"
    config.data.dataset, config.data.split_by = "grefcoco", "unc"  # the scenes with absent targets
    config.limit = 1400
    config.filter.repeats = True  # the recipe was measured with them
    config.teacher.box = 0.0
    config.teacher.wrong_first = 0.4
    config.teacher.good = 0.8
    config.teacher.hasty = 0.65  # of all things asked for it has one and stops: docs/quickstart.md
    config.teacher.enough = config.filter.min_iou = 0.25
    config.agent.prompt = "brief"
    config.agent.history_size = 112
    config.agent.typical_turn = 48
    return config
