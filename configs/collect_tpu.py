"""Trajectories for SFT of a policy of full size, as the paper's: problems (configs/problems.py), a teacher behind an
endpoint that acts with the real tools, the paper's filter.

Not run here: it needs such a teacher, SAM 2 and pictures.

  python -m rsagent_jax.collect --config=configs/collect_tpu.py --workdir=DIR --config.data.root=PROBLEMS \
      --config.teacher.remote.url=http://host:8000/v1 --config.teacher.remote.model=Qwen/Qwen2.5-VL-72B-Instruct
"""

from rsagent_jax.config.build import template
from rsagent_jax.config.schema import CollectConfig


def get_config():
    config = template(CollectConfig)
    config.processor = "Qwen/Qwen2.5-VL-7B-Instruct"  # of the policy that will be trained
    config.teacher.function = "rsagent_jax.collecting.endpoint:Remote"
    config.data.dataset = "folder"
    config.agent.max_pixels = 1_003_520  # as configs/sft_tpu.py
    config.segmenter.mode = "connect"
    config.segmenter.addresses = ("127.0.0.1:50051",)
    config.segmenter.workers = 8
    return config
