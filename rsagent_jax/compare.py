"""Compares evaluations of the same samples: paired differences with intervals, and the samples that differ most.

  python -m rsagent_jax.compare runs/eval-a runs/eval-b [runs/eval-c …] [--out=comparison.md] [--samples=8]

The first is the one the others are held against. Each is a work directory of evaluate.py. A paired interval is of the
difference on the same sample, so it is narrower than the two policies' own intervals suggest.
"""

from __future__ import annotations

from rsagent_jax.runtime import command

if __name__ == "__main__":
    command.start_command()

import dataclasses
import json
import pathlib
from collections.abc import Sequence

import numpy as np

from rsagent_jax.config.ranges import CountOrZero
from rsagent_jax.evals.metrics import bootstrap_ci, cluster_bootstrap_ci
from rsagent_jax.report.evaluation import Evaluation, Prediction, load_evaluation
from rsagent_jax.types import DataError

DECISIVE = ("benchmark", "settings.metric", "settings.data")  # must agree, or the figures are of different things


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


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One evaluation against the first."""

    name: str
    giou: GainInterval
    ciou: GainInterval
    turns: GainInterval
    better: int  # samples with a higher IoU, a lower one, the same
    worse: int
    same: int
    samples: tuple[tuple[str, float, float], ...]  # (id, IoU there, IoU here), largest difference first
    unit: str  # what the intervals are resampled by: picture, or sample where the files name no pictures


def compare(a: Evaluation, b: Evaluation, name: str) -> Comparison:
    """DataError if the two are not of the same samples."""
    first, second = ({p.id: p for p in e.predictions} for e in (a, b))
    if first.keys() != second.keys():
        lost = sorted(first.keys() ^ second.keys())
        raise DataError(
            f"{a.workdir} and {b.workdir} do not cover the same samples: {len(lost)} are in one only, such as"
            f" {lost[:3]}; evaluate both with the same config.data"
        )
    ids = sorted(first)
    pairs = [(first[i], second[i]) for i in ids]
    named = a.pictures or b.pictures
    pictures = named and [named[i] for i in ids]
    gaps = np.array([q.iou - p.iou for p, q in pairs])
    order = sorted(range(len(ids)), key=lambda i: (-abs(gaps[i]), ids[i]))
    return Comparison(
        name,
        giou_difference([p for p, _ in pairs], [q for _, q in pairs], pictures),
        ciou_difference([p for p, _ in pairs], [q for _, q in pairs], pictures),
        _paired([float(q.turns - p.turns) for p, q in pairs], pictures),
        int((gaps > 0).sum()),
        int((gaps < 0).sum()),
        int((gaps == 0).sum()),
        tuple((ids[i], pairs[i][0].iou, pairs[i][1].iou) for i in order),
        "picture" if pictures else "sample",
    )


def _paired(values: Sequence[float], pictures: Sequence[str] | None) -> GainInterval:
    return GainInterval(float(np.mean(values)), bootstrap_ci(values, pictures))


def ciou_difference(
    a: Sequence[Prediction], b: Sequence[Prediction], pictures: Sequence[str] | None = None
) -> GainInterval:
    """cIoU is a ratio of sums: both are formed anew from each resample."""
    pixels = [[[p.intersection, p.union] for p in side] for side in (a, b)]
    return _ratios(a, b, pixels, pictures)


def giou_difference(
    a: Sequence[Prediction], b: Sequence[Prediction], pictures: Sequence[str] | None = None
) -> GainInterval:
    """Of the means over what either run's convention counts, which need not be the same samples."""
    return _ratios(a, b, [[[p.iou, 1] for p in side] for side in (a, b)], pictures)


def _ratios(a: Sequence[Prediction], b: Sequence[Prediction], parts, pictures: Sequence[str] | None) -> GainInterval:
    """The difference of two ratios of sums over what each run counts; `parts` are (numerator, denominator)."""
    counted = [[[not p.dropped] for p in side] for side in (a, b)]
    rows = np.concatenate(np.array(parts, np.float64) * np.array(counted), axis=1)

    def gap(sums: np.ndarray) -> np.ndarray:
        i, u, j, v = sums.T
        return j / (v + 1e-10) - i / (u + 1e-10)

    return GainInterval(float(gap(rows.sum(axis=0, keepdims=True))[0]), cluster_bootstrap_ci(rows, gap, pictures))


def check_comparable(evaluations: Sequence[Evaluation]) -> None:
    """DataError where they were counted by different rules."""
    for other in evaluations[1:]:
        for key in DECISIVE:
            mine, theirs = (_at(e.results, key) for e in (evaluations[0], other))
            if mine != theirs:
                raise DataError(
                    f"{evaluations[0].workdir} and {other.workdir} differ in {key}: {_differs(mine, theirs)};"
                    " such figures cannot be compared. Evaluate both with the same config"
                )


def _at(results: dict, path: str):
    for key in path.split("."):
        results = results.get(key) if isinstance(results, dict) else None
    # where the data lie and how changes are noticed does not matter, which they are does
    free = ("root", "exclude_root", "limit", "unreadable", "fingerprint")
    return {k: v for k, v in results.items() if k not in free} if isinstance(results, dict) else results


def _differs(a, b) -> str:
    if isinstance(a, dict) and isinstance(b, dict):
        keys = [k for k in {**a, **b} if a.get(k) != b.get(k)]
        return "; ".join(f"{k}: {a.get(k)!r} and {b.get(k)!r}" for k in keys)
    return f"{a!r} and {b!r}"


# --- Tables ---


def comparison_table(
    evaluations: Sequence[Evaluation], names: Sequence[str], found: Sequence[Comparison]
) -> list[list[str]]:
    """Rows of cells; the first row is the head."""
    differ = f"minus {names[0]}, 95% interval"
    rows = [["", "gIoU", differ, "cIoU", differ, "turns", differ, "better / worse / same", "n"]]
    for k, (evaluation, name) in enumerate(zip(evaluations, names, strict=True)):
        r, c = evaluation.results, found[k - 1] if k else None
        figures = [f"{r['giou']:.3f}", f"{r['ciou']:.3f}", f"{r['mean_turns']:.2f}"]
        gaps = [_marked(d) for d in (c.giou, c.ciou, c.turns)] if c else ["", "", ""]
        counts = f"{c.better} / {c.worse} / {c.same}" if c else ""
        rows.append([name, *(cell for pair in zip(figures, gaps, strict=True) for cell in pair), counts, str(r["n"])])
    return rows


def _marked(difference: GainInterval) -> str:
    return f"{difference} *" if difference.clear else str(difference)


def sample_table(c: Comparison, base: str, queries: dict[str, str], shown: int) -> list[list[str]]:
    rows = [["sample", "query", base, c.name, "difference"]]
    for id, there, here in c.samples[:shown]:
        rows.append([id, queries.get(id, ""), f"{there:.3f}", f"{here:.3f}", f"{here - there:+.3f}"])
    return rows


def aligned(rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def markdown(rows: list[list[str]]) -> str:
    escaped = [[" ".join(cell.split()).replace("|", "\\|") for cell in row] for row in rows]
    lines = ["| " + " | ".join(row) + " |" for row in escaped]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def note(found: Sequence[Comparison]) -> str:
    text = "* zero is outside the interval. Intervals: 95%, paired bootstrap over pictures"
    if old := [c.name for c in found if c.unit == "sample"]:
        text += (
            f"; over samples for {', '.join(old)}, whose predictions name no pictures: where a picture has several"
            " sentences, these intervals are too narrow"
        )
    return text + "."


def names_of(workdirs: Sequence[pathlib.Path]) -> list[str]:
    """The shortest tails of the paths that tell them apart."""
    parts = [path.absolute().parts for path in workdirs]
    for n in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-n:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    raise DataError(f"the same directory is given twice: {', '.join(map(str, workdirs))}")


def marked(name: str, evaluation: Evaluation) -> str:
    """The name, with the row's own where it is none of a policy: an oracle must not pass for a model."""
    row = evaluation.results.get("row", "policy")
    return name if row == "policy" else f"{name} ({row})"


def main(
    *workdirs: pathlib.Path,  # work directories of evaluate.py, two or more
    out: pathlib.Path | None = None,  # a file for the tables, as Markdown
    samples: CountOrZero = 8,  # how many of the samples that differ most
) -> None:
    if len(workdirs) < 2:
        raise DataError("give at least two work directories of evaluate.py")
    names = names_of(workdirs)
    evaluations = [load_evaluation(path) for path in workdirs]
    names = [marked(name, e) for name, e in zip(names, evaluations, strict=True)]
    check_comparable(evaluations)
    found = [compare(evaluations[0], e, n) for e, n in zip(evaluations[1:], names[1:], strict=True)]
    queries = {example.id: example.query for e in evaluations for example in e.examples}
    main_table = comparison_table(evaluations, names, found)
    print(f"{aligned(main_table)}\n{note(found)}")
    text = [f"# {names[0]} and {', '.join(names[1:])}", markdown(main_table), note(found).replace("*", "\\*", 1)]
    for comparison in found:
        rows = sample_table(comparison, names[0], queries, samples)
        print(f"\nSamples on which {comparison.name} and {names[0]} differ most\n{aligned(rows)}")
        text += [f"## Samples on which {comparison.name} and {names[0]} differ most", markdown(rows)]
    if out:
        try:
            out.write_text("\n\n".join(text) + "\n", encoding="utf-8")
        except OSError as error:
            raise DataError(f"--out={out} cannot be written ({error.strerror or error})") from None
    gaps = {c.name: {k: dataclasses.asdict(getattr(c, k)) for k in ("giou", "ciou", "turns")} for c in found}
    print("\n" + json.dumps({"base": names[0], "differences": gaps}))
