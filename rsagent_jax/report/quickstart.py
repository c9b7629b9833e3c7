"""Before training, after SFT, after GRPO: one table, one page, one summary.json.

    python -m rsagent_jax.report.quickstart --train=DIR --base=DIR --sft=DIR --grpo=DIR
        --out=DIR --started=EPOCH_SECONDS

`--train` is a work directory of train.py (metrics.jsonl); `--base`, `--sft` and `--grpo` are work directories of
evaluate.py on the same samples. Intervals of gains are paired: the same sample under both policies.
"""

from __future__ import annotations

from rsagent_jax.runtime import command

if __name__ == "__main__":
    command.start_command()

import dataclasses
import json
import math
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from rsagent_jax.evals import metrics
from rsagent_jax.report.evaluation import (
    Evaluation,
    Example,
    card,
    endings_table,
    load_evaluation,
    read_json_lines,
    save,
    settings_table,
    span,
)
from rsagent_jax.report.html import Html, html_join, html_page, html_table, interval, line_chart, tag
from rsagent_jax.types import DataError

KEYS = ("giou", "ciou", "mean_turns", "tool_error_rate", "n", "giou_ci95")  # of results.json, kept per policy
ABSENT_KEYS = ("n_acc", "t_acc", "giou_target")  # kept as well where some samples have no target
NAMES = {"base": "base", "sft": "after SFT", "grpo": "after GRPO"}
ABSENT_NOTE = (
    "N-acc: absent targets answered by an empty mask; T-acc: present ones answered by a mask. A policy that never makes"
    " a mask has N-acc 100% and IoU 1 on every absent target."
)
SHOWN = 4  # samples shown among the best of GRPO, and as many among the worst

# (stage, key of metrics.jsonl, title, label of the y axis); rewards' own parts are added as they come
_CURVES = (
    ("sft", "loss", "SFT loss", "nats per token"),
    ("grpo", "reward", "GRPO reward", "reward"),
    ("grpo", "giou", "IoU of the rollouts", "mean final IoU"),
    ("grpo", "endings/finished", "Finished", "share of rollouts"),
    ("grpo", "turns", "Turns", "per rollout"),
    ("grpo", "tool_errors", "Tool errors", "tool errors"),
)


@dataclasses.dataclass(frozen=True)
class Gain:
    """Mean difference of IoU between two policies on the same samples."""

    mean: float
    ci95: tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Summary:
    """Everything that is shown."""

    evaluations: dict[str, Evaluation]  # base, sft, grpo
    gain: Gain  # grpo over sft
    sft_gain: Gain  # sft over base
    steps: tuple[dict[str, Any], ...]  # metrics.jsonl
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """What summary.json holds."""
        policies = {}
        for name, e in self.evaluations.items():
            keys = (*KEYS, *(key for key in ABSENT_KEYS if key in e.results))
            policies[name] = {key: e.results.get(key) for key in keys}
        return policies | {"gain_ci95": list(self.gain.ci95), "gain": self.gain.mean, "seconds": self.seconds}


# --- Reading ---


def summarize_run(train: pathlib.Path, evaluations: dict[str, pathlib.Path], started: float) -> Summary:
    """Reads the four directories, or raises a DataError that names a missing file and the command that makes it."""
    steps = _read_steps(train / "metrics.jsonl")
    loaded = {name: load_evaluation(evaluations[name]) for name in NAMES}
    gain, sft_gain = _gain(loaded["grpo"], loaded["sft"]), _gain(loaded["sft"], loaded["base"])
    return Summary(loaded, gain, sft_gain, steps, time.time() - started)


def _gain(after: Evaluation, before: Evaluation) -> Gain:
    a, b = after.ious, before.ious
    try:
        ci95 = metrics.paired_bootstrap_ci(a, b, after.pictures)
    except DataError as e:
        raise DataError(f"{after.workdir} and {before.workdir} cannot be compared: {e}") from e
    return Gain(float(np.mean([a[key] - b[key] for key in a])), ci95)


def _read_steps(path: pathlib.Path) -> tuple[dict[str, Any], ...]:
    """The objects in the order of their steps; after a resume the later one of a step stands."""
    made_by = f"python train.py --config=configs/X.py --workdir={path.parent}"
    by_step = {}
    for where, value in read_json_lines(path, made_by):
        if not isinstance(value.get("step"), int) or "stage" not in value:
            raise DataError(f"{where}: no step or stage; make it again: {made_by}")
        by_step[value["stage"], value["step"]] = value
    return tuple(by_step[key] for key in sorted(by_step))


# --- On the terminal ---


def terminal(summary: Summary) -> str:
    """An aligned table in plain text."""
    head, figures = _figures(summary)
    rows = [["", "gIoU", "95% interval", *head]]
    for name, evaluation in summary.evaluations.items():
        r = evaluation.results
        rows.append([NAMES[name], f"{r['giou']:.3f}", span(r["giou_ci95"]), *figures[name]])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join([r[0].ljust(widths[0]), *map(str.rjust, r[1:], widths[1:])]) for r in rows]
    lines.insert(1, "-" * len(lines[0]))
    verdicts = [_verdict("GRPO", "SFT", summary.gain), _verdict("SFT", "base", summary.sft_gain)]
    return "\n".join([*lines, "", *([ABSENT_NOTE, ""] if "N-acc" in head else []), *verdicts])


def _figures(summary: Summary) -> tuple[list[str], dict[str, list[str]]]:
    """The columns beside gIoU: their heads, and the cells of each policy. Accuracies only where targets are absent."""
    absent = any("n_acc" in e.results for e in summary.evaluations.values())
    head = ["cIoU", *(["N-acc", "T-acc"] if absent else []), "turns", "tool errors", "samples"]
    cells = {}
    for name, evaluation in summary.evaluations.items():
        r = evaluation.results
        accuracies = [_percent(r.get("n_acc")), _percent(r.get("t_acc"))] if absent else []
        rest = [f"{r['mean_turns']:.2f}", _percent(r.get("tool_error_rate")), str(r["n"])]
        cells[name] = [f"{r['ciou']:.3f}", *accuracies, *rest]
    return head, cells


def _verdict(after: str, before: str, gain: Gain) -> str:
    low, high = gain.ci95
    sure = "clear of zero" if low > 0 or high < 0 else "zero is inside: no difference shown"
    return f"{after} over {before}: {gain.mean:+.3f} gIoU, 95% interval {span(gain.ci95, sign=True)} ({sure})"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


# --- On the page ---


def summary_page(summary: Summary) -> str:
    """The page of the three policies."""
    grpo = summary.evaluations["grpo"]
    what = (
        "A vision-language policy segments what a sentence describes: it looks, thinks, calls a segmentation tool, sees"
        " the mask drawn on the image, corrects itself and commits. Here it is before training, after supervised"
        " fine-tuning (SFT) and after reinforcement learning (GRPO), on the same"
        f" {grpo.results['n']} held-out samples of {grpo.results['benchmark']}."
    )
    took = f"All of it took {_duration(summary.seconds)}."
    good, bad = choose(grpo.examples)
    folded = [
        tag("details", tag("summary", f"How trajectories ended: {NAMES[name]}"), endings_table(e))
        for name, e in summary.evaluations.items()
    ]
    return html_page(
        "RSAgent-JAX: base, SFT, GRPO",
        tag("p", what),
        tag("p", tag("b", _verdict("GRPO", "SFT", summary.gain) + "."), class_="lead"),
        _results_table(summary),
        tag("p", f"Intervals: 95%, bootstrap over pictures; gains are paired by sample. {took}", class_="note"),
        *folded,
        tag("h2", "Learning curves"),
        tag("p", "Dots are single steps, lines a moving mean; the figures are its two ends.", class_="note"),
        tag("div", *curves(summary.steps), class_="charts"),
        tag("h2", f"Good: highest IoU after GRPO, {len(good)} of {len(grpo.examples)} examples kept"),
        _tries(summary, good),
        tag("h2", f"Bad: lowest IoU after GRPO, {len(bad)} of {len(grpo.examples)} examples kept"),
        _tries(summary, bad),
        tag("h2", "Settings of the evaluation"),
        settings_table(grpo.results.get("settings", {})),
    )


def _results_table(summary: Summary) -> Html:
    bounds = [e.results["giou_ci95"] for e in summary.evaluations.values()]
    axis = (min(0.0, *(b[0] for b in bounds)), max(b[1] for b in bounds))
    head, figures = _figures(summary)
    rows: list[list[object]] = []
    for name, evaluation in summary.evaluations.items():
        r = evaluation.results
        plot = interval(r["giou"], *r["giou_ci95"], axis)
        rows.append([NAMES[name], plot, tag("b", f"{r['giou']:.3f}"), span(r["giou_ci95"]), *figures[name]])
    for name, gain in (("SFT − base", summary.sft_gain), ("GRPO − SFT", summary.gain)):
        rows.append([name, "", tag("b", f"{gain.mean:+.3f}"), span(gain.ci95, sign=True), *[""] * len(head)])
    shown = html_table(["policy", "gIoU and its interval", "gIoU", "95% interval", *head], rows, text_columns=2)
    return html_join([shown, tag("p", ABSENT_NOTE, class_="note")]) if "N-acc" in head else shown


def curves(steps: Sequence[dict[str, Any]]) -> list[Html]:
    """A chart for each metric that was logged; values that are missing or not finite are left out."""
    parts = {key for step in steps for key in step if key.startswith("reward/")}
    wanted = list(_CURVES)
    wanted[2:2] = [("grpo", key, ": ".join(key.split("/")[-2:]), "reward") for key in sorted(parts, key=_depth)]
    charts = []
    for stage, key, title, label in wanted:
        points = [(s["step"], s[key]) for s in steps if s["stage"] == stage and _finite(s.get(key))]
        if points:
            charts.append(line_chart(title, *zip(*points, strict=True), "step", label))
    return charts or [tag("p", "No steps were logged.", class_="note")]


def _depth(key: str) -> tuple[int, str]:
    return key.count("/"), key


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def choose(examples: Sequence[Example]) -> tuple[list[Example], list[Example]]:
    """The best by IoU, best first, and the worst, worst first: at most SHOWN each, none in both."""
    ranked = sorted(examples, key=lambda e: (-e.iou, e.id))
    half = min(SHOWN, (len(ranked) + 1) // 2)
    return ranked[:half], ranked[half:][::-1][:SHOWN]


def _tries(summary: Summary, samples: Sequence[Example]) -> Html:
    """Each sample with what every policy did on it."""
    kept = {name: {e.id: e for e in evaluation.examples} for name, evaluation in summary.evaluations.items()}
    cards = [
        card(sample, [(NAMES[name], e, kept[name].get(sample.id)) for name, e in summary.evaluations.items()])
        for sample in samples
    ]
    return html_join(cards) if cards else tag("p", "No examples were kept.", class_="note")


# --- Command line ---


def main(
    *,
    train: pathlib.Path,  # work directory of train.py
    base: pathlib.Path,  # work directory of evaluate.py before training
    sft: pathlib.Path,  # the same after SFT
    grpo: pathlib.Path,  # the same after GRPO
    out: pathlib.Path,  # where the summary goes
    started: float,  # when the quickstart began, as `date +%s` says it
) -> None:
    summary = summarize_run(train, dict(base=base, sft=sft, grpo=grpo), started)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "summary.json"
    path.write_text(json.dumps(summary.to_json(), indent=2) + "\n", encoding="utf-8")
    shown = save(summary_page(summary), out)
    print(terminal(summary))
    print(f"\nTook {_duration(summary.seconds)} in all. Summary: {path}  Report: {shown}")
