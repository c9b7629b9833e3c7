"""Evaluations of the same samples held against each other: paired differences with intervals.

A paired interval is of the difference on the same sample, so it is narrower than the two policies' own intervals
suggest.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from rsagent_jax.evals.metrics import cluster_bootstrap_ci
from rsagent_jax.report.evaluation import Evaluation, Prediction
from rsagent_jax.runtime.journal import flatten_settings
from rsagent_jax.types import DataError

NOTE = "* zero is outside the interval. Intervals: 95%, paired bootstrap over pictures."  # under a table of such rows
MARKDOWN_NOTE = NOTE.replace("*", "\\*")
DECISIVE = ("benchmark", "settings.metric.", "settings.data.")  # must agree, or the figures are of different things
FREE = ("root", "exclude_root", "limit", "unreadable", "fingerprint")  # where data lie, how changes are noticed


@dataclasses.dataclass(frozen=True)
class GainInterval:
    """`b` minus `a`, with its 95% interval over resampled pictures."""

    value: float
    ci95: tuple[float, float]

    def __str__(self) -> str:
        return f"{self.value:+.3f} [{self.ci95[0]:+.3f}, {self.ci95[1]:+.3f}]"

    @property
    def clear(self) -> bool:
        return self.ci95[0] > 0 or self.ci95[1] < 0

    @property
    def verdict(self) -> str:
        return "clear of zero" if self.clear else "zero is inside: no difference shown"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One evaluation against the first."""

    name: str
    giou: GainInterval
    ciou: GainInterval
    turns: GainInterval
    left_out: int  # samples that the convention of either run drops: in none of the figures but `turns`
    better: int  # samples with a higher IoU, a lower one, the same
    worse: int
    same: int
    samples: tuple[tuple[str, float, float], ...]  # (id, IoU there, IoU here), largest difference first
    by_id_alone: int  # samples that an earlier version wrote without a checksum: they may have changed in between

    @property
    def caveat(self) -> str:
        """What a sentence of it must end with; "" where all samples are known to be the same."""
        n = self.by_id_alone
        return f"; {n} samples are paired by id alone: an earlier version evaluated them" if n else ""


def compare(a: Evaluation, b: Evaluation, name: str) -> Comparison:
    """DataError if the two are not of the same samples."""
    first, second = ({p.id: p for p in e.predictions} for e in (a, b))
    if lost := sorted(first.keys() ^ second.keys()):
        raise DataError(
            f"{a.workdir} and {b.workdir} do not cover the same samples: {len(lost)} are in one only, such as"
            f" {lost[:3]}; evaluate both with the same config.data"
        )
    both = [(first[i], second[i]) for i in sorted(first)]
    known = [(p, q) for p, q in both if p.sample_checksum and q.sample_checksum]
    if changed := [p.id for p, q in known if p.sample_checksum != q.sample_checksum]:
        raise DataError(
            f"{a.workdir} and {b.workdir} do not cover the same samples: question, picture, target or ignored pixels of"
            f" {len(changed)} differ as they were decoded, such as {changed[:3]}; evaluate both on the same"
            " files, with the same decoders"
        )
    pairs = [(p, q) for p, q in both if not (p.dropped or q.dropped)]
    if not pairs:
        raise DataError(f"{a.workdir} and {b.workdir}: no sample counts in both by their conventions")

    def difference(pairs: Sequence[tuple[Prediction, Prediction]], over: str, under: str = "") -> GainInterval:
        """Of two ratios of sums of these fields ("" = 1), both formed anew from each resample."""
        parts = [[float(getattr(p, name) if name else 1) for p in pair for name in (over, under)] for pair in pairs]

        def gap(sums: np.ndarray) -> np.ndarray:
            i, u, j, v = sums.T
            return j / np.maximum(v, 1) - i / np.maximum(u, 1)

        rows, images = np.array(parts), [p.picture for p, _ in pairs]
        return GainInterval(float(gap(rows.sum(axis=0, keepdims=True))[0]), cluster_bootstrap_ci(rows, gap, images))

    gaps = np.array([q.iou - p.iou for p, q in pairs])
    order = sorted(pairs, key=lambda pair: (-abs(pair[1].iou - pair[0].iou), pair[0].id))
    return Comparison(
        name,
        difference(pairs, "iou"),
        difference(pairs, "intersection", "union"),
        difference(both, "turns"),
        len(both) - len(pairs),
        *(int(n) for n in ((gaps > 0).sum(), (gaps < 0).sum(), (gaps == 0).sum())),
        tuple((p.id, p.iou, q.iou) for p, q in order),
        len(both) - len(known),
    )


def differing(a: Evaluation, b: Evaluation, names: str | tuple[str, ...]) -> str:
    """In which of the keys of results.json that begin so the two differ, and how."""
    mine, theirs = (flatten_settings(e.results) for e in (a, b))
    keys = (k for k in {**mine, **theirs} if k.startswith(names) and k.rpartition(".")[2] not in FREE)
    return "; ".join(f"{k}: {mine.get(k)!r} and {theirs.get(k)!r}" for k in keys if mine.get(k) != theirs.get(k))


def check_comparable(evaluations: Sequence[Evaluation], *more: str) -> None:
    """DataError where they were counted by different rules, or differ in what `more` of results.json begins with."""
    for other in evaluations[1:]:
        if differ := differing(evaluations[0], other, (*DECISIVE, *more)):
            raise DataError(
                f"{evaluations[0].workdir} and {other.workdir} differ in {differ}; such figures cannot be compared."
                " Evaluate both with the same config"
            )


def text_table(rows: Sequence[Sequence[str]], text_columns: int = 1) -> str:
    """Aligned for a terminal; the first row is the head, the first `text_columns` columns are words, not numbers."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = [str.ljust if i < text_columns else str.rjust for i in range(len(widths))]
    lines = ["  ".join(side(*cell) for side, *cell in zip(sides, row, widths, strict=True)) for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def markdown(rows: Sequence[Sequence[str]]) -> str:
    escaped = [[" ".join(cell.split()).replace("|", "\\|") for cell in row] for row in rows]
    lines = ["| " + " | ".join(row) + " |" for row in escaped]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def comparison_head(base: str) -> list[str]:
    """Of a table whose rows are `comparison_row`; `base`: the name of what the others are held against."""
    differ = f"minus {base}, 95% interval"
    return ["", "gIoU", differ, "cIoU", differ, "turns", differ, "better / worse / same", "n"]


def comparison_row(name: str, evaluation: Evaluation, c: Comparison | None) -> list[str]:
    """c: with the base; None of the base itself."""
    r = evaluation.results
    figures = [f"{r['giou']:.3f}", f"{r['ciou']:.3f}", f"{r['mean_turns']:.2f}"]
    gaps = [f"{d} *" if d.clear else str(d) for d in (c.giou, c.ciou, c.turns)] if c else ["", "", ""]
    counts = f"{c.better} / {c.worse} / {c.same}{f' ({c.left_out} left out)' * bool(c.left_out)}" if c else ""
    return [name, *(cell for pair in zip(figures, gaps, strict=True) for cell in pair), counts, str(r["n"])]
