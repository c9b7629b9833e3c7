"""The benchmarks by name, for policies of full size; LISA's rules: every sentence, ReasonSeg's first text.

  python evaluate.py --config=configs/eval.py:refcoco-testA --workdir=DIR --weights=HF_DIR_OR_CHECKPOINT \
      --config.data.root=REFER

Names: refcoco-val, refcoco-testA, refcoco-testB, refcoco+-val, refcoco+-testA, refcoco+-testB, refcocog-val,
refcocog-test (UMD), grefcoco-val, grefcoco-testA, grefcoco-testB, reasonseg-val, reasonseg-test, and folder-SPLIT for
<root>/<SPLIT>.jsonl of your own. Masks come from a side-car at 127.0.0.1:50051 (docs/sidecar.md).

Rows that bound the truth, on the same samples: --config.bound.row=box|best_of_three|clicks (no weights needed), and
--config.bound.row=untrained with the weights that training started from. docs/evaluation.md says what they are.

Not run here on the real files, which could not be had; on small ones in their formats (tests/test_benchmark_configs).
"""

from rsagent_jax.config.build import template
from rsagent_jax.config.schema import EvalConfig

# name -> (what results.json calls it, dataset, split_by, splits)
SETS = {
    "refcoco": ("RefCOCO", "refcoco", "unc", ("val", "testA", "testB")),
    "refcoco+": ("RefCOCO+", "refcoco+", "unc", ("val", "testA", "testB")),
    "refcocog": ("RefCOCOg (UMD)", "refcocog", "umd", ("val", "test")),
    "grefcoco": ("gRefCOCO", "grefcoco", "unc", ("val", "testA", "testB")),
    "reasonseg": ("ReasonSeg", "reasonseg", "", ("val", "test")),
    "folder": ("folder", "folder", "", ()),  # any split
}
NAMES = tuple(f"{name}-{split}" for name, (*_, splits) in SETS.items() for split in splits)


def get_config(benchmark: str = "refcocog-val"):
    name, _, split = benchmark.partition("-")
    if name not in SETS or not split or (name != "folder" and benchmark not in NAMES):
        raise ValueError(f"{benchmark!r} is unknown; there are {', '.join(NAMES)} and folder-SPLIT")
    title, dataset, split_by, _ = SETS[name]
    config = template(EvalConfig)
    config.benchmark = f"{title} {split}"
    config.data.dataset, config.data.split = dataset, split
    config.data.split_by = split_by or config.data.split_by
    config.policy.weights = "Qwen/Qwen2.5-VL-7B-Instruct"
    config.policy.remat = "none"
    config.agent.max_pixels = 1_003_520  # as configs/sft_tpu.py and grpo_tpu.py
    config.segmenter.mode = "connect"
    config.segmenter.addresses = ("127.0.0.1:50051",)
    config.segmenter.workers = 8
    config.sampling.context = 6144  # as in training
    config.sampling.patches = 6144
    return config
