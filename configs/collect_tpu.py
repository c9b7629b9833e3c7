"""Trajectories for SFT at full size, from a teacher behind an endpoint or from the policy itself (rejection sampling).

  python -m rsagent_jax.problems --config=configs/problems.py --workdir=PROBLEMS --config.data.root=REFER \
      --config.writer.url=http://host:8000/v1 --config.writer.model=Qwen/Qwen2.5-VL-72B-Instruct
  python -m rsagent_jax.collect --config=configs/collect_tpu.py --workdir=DIR --config.data.root=PROBLEMS \
      --config.teacher.remote.url=http://host:8000/v1
  python -m rsagent_jax.collect --config=configs/collect_tpu.py:self --workdir=DIR --config.data.root=PROBLEMS
  python -m rsagent_jax.collect --config=configs/collect_tpu.py:self --aot=v6e-8

From the paper: queries written by a vision-language model, a teacher that plays with the tools, trajectories kept whose
final IoU is at least 0.9 within 8 turns. Ours: which teacher, how many tries, everything else. Prompt, overlays and
pixel limits are those of configs/sft_tpu.py, which refuses others. Not run here: it needs weights.
"""

from rsagent_jax.config.build import template
from rsagent_jax.config.schema import CollectConfig


def get_config(teacher: str = "remote"):
    if teacher not in ("remote", "self"):
        raise ValueError(f"{teacher!r} is unknown; use configs/collect_tpu.py or configs/collect_tpu.py:self")
    config = template(CollectConfig)
    config.processor = "Qwen/Qwen2.5-VL-7B-Instruct"
    config.agent.max_pixels = 1_003_520
    config.segmenter.mode = "connect"
    config.segmenter.addresses = ("127.0.0.1:50051",)
    config.segmenter.workers = 8
    config.data.dataset = "folder"  # what rsagent_jax.problems wrote
    config.concurrent = 64
    if teacher == "remote":
        config.teacher.function = "rsagent_jax.collecting.endpoint:Remote"
        config.teacher.remote.model = "Qwen/Qwen2.5-VL-72B-Instruct"
        config.teacher.remote.concurrent = 64
    else:
        config.teacher.own.weights = config.processor
        config.teacher.own.sampling.context = 6144  # as in training
        config.teacher.own.sampling.patches = 6144
        config.teacher.own.sampling.tensor = 0  # this and the slots: as the device says (config/slices.py)
        config.teacher.own.sampling.slots = 0
    return config
