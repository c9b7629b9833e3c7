"""What the shipped ablations share: the quickstart's data, its SFT, and how a variant is trained and evaluated.

Variants are evaluated on the validation scenes: an ablation is a choice, and the test scenes are for what was chosen.
"""

from ml_collections import ConfigDict

from configs.reproduce_quickstart import SCENES
from rsagent_jax.config.ablation import AblationConfig
from rsagent_jax.config.build import template
from rsagent_jax.config.import_path import shipped

SFT = "{sft}/checkpoints/sft"
NEEDED = ("--config.sft.trajectories={collect}", "--config.grpo.data.root={data}", "--config.seed={seed}")


def ablation(title: str, variants: dict[str, dict]) -> ConfigDict:
    """GRPO of each variant from one SFT. variants: the fields of AblationVariant by name, the first is the base."""
    config = template(AblationConfig)
    config.title, config.benchmark = title, "synthetic scenes, val"
    config.weights = shipped("assets/tiny-base")
    collect = (
        "--config=configs/collect_quickstart.py", "--workdir={collect}", "--config.data.root={data}",
        "--config.seed={seed}",
    )  # fmt: skip
    train = ("--config=configs/quickstart.py", *NEEDED)
    stages = dict(
        data=dict(command="rsagent_jax.tiny.synthetic", arguments=("--out={data}", "--seed={seed}", *SCENES)),
        collect=dict(command="rsagent_jax.collect", arguments=collect),
        sft=dict(command="train.py", arguments=(*train, "--workdir={sft}", "--config.stages=('sft',)")),
    )
    config.stages = ConfigDict(stages, sort_keys=False)
    config.train = (*train, "--workdir={train}", "--config.stages=('grpo',)", f"--config.policy.weights={SFT}")
    config.evaluate = (
        "--config=configs/eval_quickstart.py", "--workdir={eval}", "--config.data.root={data}",
        "--config.data.split=val", "--config.benchmark=synthetic scenes, val",
    )  # fmt: skip
    config.variants = ConfigDict(variants, sort_keys=False)
    return config
