"""The benchmarks by name, for policies of full size; LISA's rules: every sentence, ReasonSeg's first text.

  python evaluate.py --config=configs/eval.py:refcoco-testA --workdir=DIR --weights=HF_DIR_OR_CHECKPOINT \
      --config.data.root=REFER

Names: refcoco-val, refcoco-testA, refcoco-testB, refcoco+-val, refcoco+-testA, refcoco+-testB, refcocog-val,
refcocog-test (UMD), grefcoco-val, grefcoco-testA, grefcoco-testB, reasonseg-val, reasonseg-test; refcoco_m-val (the
sentences of RefCOCO val, masks drawn anew); muse-val, muse-test_less, muse-test_many; mmr-val, mmr-test_mixed,
mmr-test_obj_only, mmr-test_part_only; gseval-all, or a kind: -stuff, -part, -multi, -single; and folder-SPLIT for
<root>/<SPLIT>.jsonl of your own. Masks come from a side-car at 127.0.0.1:50051 (docs/sidecar.md).

Rows that bound the truth, on the same samples: --config.bound.row=box|best_of_three|clicks (no weights needed), and
--config.bound.row=untrained with the weights that training started from. docs/evaluation.md says what they are.

Not run here on the real files, which could not be had; on small ones in their formats (tests/test_benchmark_configs).
"""

from rsagent_jax.config.build import template
from rsagent_jax.config.schema import EvalConfig

# data set -> (split_by, splits)
SETS = {
    "refcoco": ("unc", ("val", "testA", "testB")),
    "refcoco+": ("unc", ("val", "testA", "testB")),
    "refcocog": ("umd", ("val", "test")),
    "grefcoco": ("unc", ("val", "testA", "testB")),
    "reasonseg": ("", ("val", "test")),
    "refcoco_m": ("", ("val",)),
    "muse": ("", ("val", "test_less", "test_many")),
    "mmr": ("", ("val", "test_mixed", "test_obj_only", "test_part_only")),
    "gseval": ("", ("all", "stuff", "part", "multi", "single")),
    "folder": ("", ()),  # any split
}
NAMES = tuple(f"{name}-{split}" for name, (_, splits) in SETS.items() for split in splits)


def get_config(benchmark: str = "refcocog-val"):
    name, _, split = benchmark.partition("-")
    if name not in SETS or not split or (name != "folder" and benchmark not in NAMES):
        raise ValueError(f"{benchmark!r} is unknown; there are {', '.join(NAMES)} and folder-SPLIT")
    config = template(EvalConfig)
    config.data.dataset, config.data.split = name, split
    config.data.split_by = SETS[name][0] or config.data.split_by
    config.policy.weights = "Qwen/Qwen2.5-VL-7B-Instruct"
    config.policy.remat = "none"
    config.agent.max_pixels = 1_003_520  # as configs/sft_tpu.py and grpo_tpu.py
    config.segmenter.mode = "connect"
    config.segmenter.addresses = ("127.0.0.1:50051",)
    config.segmenter.workers = 8
    config.sampling.context = 6144  # as in training
    config.sampling.patches = 6144
    config.sampling.tensor = 0  # devices that share a slot, and slots: as the device says (config/slices.py)
    config.sampling.slots = 0
    return config
