"""`make quickstart`: the whole recipe with the tiny policy on synthetic scenes. 8 to 10 minutes on 2 cores, no GPU.

  python -m rsagent_jax.reproduce --config=configs/reproduce_quickstart.py --workdir=runs/quickstart

What each stage does and what it was measured to give stands in its own config and in docs/quickstart.md.
"""

from ml_collections import ConfigDict

from rsagent_jax.config.build import template
from rsagent_jax.config.import_path import shipped
from rsagent_jax.config.recipe import RecipeConfig

BENCHMARK = "synthetic scenes, test"
# More than half of the questions are for a pair of a kind, which takes two clicks.
SCENES = ("--train=1000", "--val=150", "--test=150", "--several=2.0", "--most=2", "--refs_per_image=1")


def stage(command: str, *arguments: str, **more) -> dict:
    return dict(command=command, arguments=arguments, **more)


def get_config():
    config = template(RecipeConfig)
    config.title = "RSAgent-JAX: base, SFT, GRPO"
    config.weights = shipped("assets/tiny-base")
    stages = dict(
        data=stage("rsagent_jax.tiny.synthetic", "--out={data}", "--seed={seed}", *SCENES),
        collect=stage(
            "rsagent_jax.collect", "--config=configs/collect_quickstart.py", "--workdir={collect}",
            "--config.data.root={data}", "--config.seed={seed}",
        ),
        train=stage(
            "train.py", "--config=configs/quickstart.py", "--workdir={train}", "--config.sft.trajectories={collect}",
            "--config.grpo.data.root={data}", "--config.seed={seed}",
        ),
    )  # fmt: skip
    for row, weights in dict(base="{weights}", sft="{train}/checkpoints/sft", grpo="{train}/checkpoints/grpo").items():
        stages[f"eval-{row}"] = stage(
            "evaluate.py", "--config=configs/eval_quickstart.py", f"--workdir={{eval-{row}}}", f"--weights={weights}",
            "--config.data.root={data}", benchmark=BENCHMARK, row=row,
        )  # fmt: skip
    config.stages = ConfigDict(stages, sort_keys=False)  # else by name
    return config
