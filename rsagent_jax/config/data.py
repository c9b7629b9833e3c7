"""Which samples a command takes, and by which conventions their masks are judged."""

from __future__ import annotations

import dataclasses
from typing import Literal

from rsagent_jax.config import rules
from rsagent_jax.config.ranges import CountOrZero, Dataset, Fraction, Positive, Text


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which samples; rsagent_jax.data.sets.open.open_samples opens them for every command."""

    root: str = ""  # folder of the data set (docs/data.md)
    dataset: Dataset = "refcocog"  # or my_set.py:load, called with (root, split, limit): docs/extend.md
    layout: Literal["refer", "tfds"] = "refer"  # RefCOCO family: refer (refs(*).p), tfds (prepared TFDS ref_coco)
    split_by: str = "umd"  # of the RefCOCO family
    split: Text = "train"  # such as train, val, testA
    # RefCOCO family: sentence = every expression is a sample; reference = the first of each
    unit: Literal["sentence", "reference"] = "sentence"
    texts: Literal["first", "all"] = "first"  # of ReasonSeg's paraphrases
    raw: bool = False  # RefCOCO family: the annotator's own text, not in lower case
    limit: CountOrZero = 0  # 0 = all
    unreadable: Literal["skip", "stop"] = "skip"  # samples that cannot be read or shown: counted and named, or stop
    # What tells a changed picture file: its bytes, or size and time of change.
    fingerprint: Literal["content", "stat"] = "content"
    exclude: tuple[Text, ...] = ()  # refcoco/unc/val, reasonseg/test, …: samples on their pictures are left out
    exclude_root: str = ""  # where those are; "" = root
    mix: tuple[MixPart, ...] = ()  # several sets by weight, in place of the one above
    conflicts = rules.data


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixPart:
    """One set of a mix; its `data` without a root is under the mix's own."""

    name: Text
    weight: Positive = 1.0  # share of the samples drawn, after division by the sum
    data: DataConfig = DataConfig()


@dataclasses.dataclass(frozen=True, kw_only=True)
class MetricConfig:
    """Conventions in which papers differ, beside data.unit and data.texts. The defaults are LISA's."""

    # Ignored pixels: excluded (LISA), target (Seg-Zero), background (LENS).
    ignore_policy: Literal["excluded", "target", "background"] = "excluded"
    # IoU where prediction and truth are empty: one (LISA), zero, dropped (Seg-Zero).
    empty_policy: Literal["one", "zero", "dropped"] = "one"
    # A sample that the segmenter failed: refuse = no figures until it is measured (ours); zero, with the whole truth as
    # union; dropped (Seg-Zero).
    failure_policy: Literal["refuse", "zero", "dropped"] = "refuse"
    ending_policy: Literal["mask", "zero"] = "mask"  # any other ending than finish: mask = its last one is judged
    epsilon: Fraction = 1e-5  # IoU = I / (U + epsilon); LISA's
    empty_below: CountOrZero = 0  # a prediction of fewer pixels counts as empty
