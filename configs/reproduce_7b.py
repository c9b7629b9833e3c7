"""The paper's table with Qwen2.5-VL-7B: data check, problems and trajectories, SFT, GRPO, every benchmark before and
after, and the oracles that bound it. Not run here: it needs weights, data, a TPU slice, SAM 2 and a teacher.

  python -m rsagent_jax.reproduce --config=configs/reproduce_7b.py --workdir=DIR --config.slice=v6e-8 \
      --config.refer=REFER --config.reasonseg=REASONSEG --config.sidecars="('127.0.0.1:50051',)" \
      --config.endpoint=http://host:8000/v1 --config.endpoint_model=Qwen/Qwen2.5-VL-72B-Instruct

Trajectories that are there already take the place of the endpoint: --config.stages.collect.given=COLLECTED.
"""

from ml_collections import ConfigDict

from configs import eval as benchmarks
from configs.reproduce_quickstart import stage
from rsagent_jax.config.build import template
from rsagent_jax.config.recipe import RecipeConfig

# The paper's. ReasonSeg first: the page shows trajectories of the first, and it is small.
SETS = ("reasonseg", "refcoco", "refcoco+", "refcocog")
NAMES = tuple(f"{name}-{split}" for name in SETS for split in benchmarks.SETS[name][1])
WEIGHTS = dict(base="{weights}", sft="{sft}/checkpoints/sft", grpo="{grpo}/checkpoints/grpo")
TRAINING_DATA = ("--config.grpo.data.root={refer}", "--config.grpo.data.mix.reasonseg.data.root={reasonseg}")
TEACHER = "url={endpoint}", "model={endpoint_model}"
SIDECARS = "--config.segmenter.addresses={sidecars}"


def get_config():
    config = template(RecipeConfig)
    config.title = "RSAgent-7B: the paper's figures and ours"
    config.weights = "Qwen/Qwen2.5-VL-7B-Instruct"
    config.slice = "v6e-8"
    config.sidecars = ("127.0.0.1:50051",)
    stages = {"check-train": stage(
        "rsagent_jax.data_check", "--config=configs/grpo_mix_tpu.py", "--out={check-train}", *TRAINING_DATA
    )}  # fmt: skip
    for name in NAMES:
        stages[f"check-{name}"] = stage(
            "rsagent_jax.data_check", f"--config=configs/eval.py:{name}", f"--out={{check-{name}}}", root_of(name)
        )
    stages |= dict(
        problems=stage(
            "rsagent_jax.problems", "--config=configs/problems.py", "--workdir={problems}",
            "--config.data.root={refer}", *(f"--config.writer.{text}" for text in TEACHER), "--config.seed={seed}",
            needs=("check-train",),
        ),
        collect=stage(
            "rsagent_jax.collect", "--config=configs/collect_tpu.py", "--workdir={collect}",
            "--config.data.root={problems}", *(f"--config.teacher.remote.{text}" for text in TEACHER),
            "--config.processor={weights}", SIDECARS, "--config.seed={seed}",
        ),
        sft=stage(
            "train.py", "--config=configs/sft_tpu.py", "--workdir={sft}", "--config.slice={slice}",
            "--config.policy.weights={weights}", "--config.sft.trajectories={collect}", SIDECARS,
            "--config.seed={seed}",
        ),
        grpo=stage(
            "train.py", "--config=configs/grpo_mix_tpu.py", "--workdir={grpo}", "--config.slice={slice}",
            "--config.policy.weights={sft}/checkpoints/sft", *TRAINING_DATA, SIDECARS, "--config.seed={seed}",
            needs=("check-train",),
        ),
    )  # fmt: skip
    for name in NAMES:
        data_set, split = name.split("-")
        benchmark = "/".join(filter(None, (data_set, benchmarks.SETS[data_set][0], split)))  # as its samples are called
        players = {row: (f"--weights={weights}",) for row, weights in WEIGHTS.items()}
        players |= {row: (f"--config.bound.row={row}",) for row in ("box", "best_of_three")}
        for row, arguments in players.items():
            here = f"eval-{row}-{name}"
            stages[here] = stage(
                "evaluate.py", f"--config=configs/eval.py:{name}", f"--workdir={{{here}}}", *arguments, root_of(name),
                SIDECARS, benchmark=benchmark, row=row,
            )  # fmt: skip
    config.stages = ConfigDict(stages, sort_keys=False)  # else by name
    return config


def root_of(name: str) -> str:
    return "--config.data.root={reasonseg}" if name.startswith("reasonseg") else "--config.data.root={refer}"
