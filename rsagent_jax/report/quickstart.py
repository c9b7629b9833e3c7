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

from rsagent_jax.report.comparison import GainInterval, compare, text_table
from rsagent_jax.report.evaluation import Evaluation, Example, load_evaluation, read_objects, setting_rows
from rsagent_jax.report.page import line_chart, render_page, save_page, smoothed, span
from rsagent_jax.runtime.paths import make_directory, write_whole
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
class Summary:
    """Everything that is shown."""

    evaluations: dict[str, Evaluation]  # base, sft, grpo
    gain: GainInterval  # grpo over sft
    sft_gain: GainInterval  # sft over base
    steps: tuple[dict[str, Any], ...]  # metrics.jsonl
    seconds: float

    @property
    def absent(self) -> bool:
        """Whether some samples have no target."""
        return any("n_acc" in e.results for e in self.evaluations.values())

    def to_json(self) -> dict[str, Any]:
        """What summary.json holds."""
        policies = {}
        for name, e in self.evaluations.items():
            keys = (*KEYS, *(key for key in ABSENT_KEYS if key in e.results))
            policies[name] = {key: e.results.get(key) for key in keys}
        return policies | {"gain_ci95": list(self.gain.ci95), "gain": self.gain.value, "seconds": self.seconds}


def summarize_run(train: pathlib.Path, evaluations: dict[str, pathlib.Path], started: float) -> Summary:
    """Reads the four directories, or raises a DataError that names a missing file and the command that makes it."""
    made_by = f"python train.py --config=configs/X.py --workdir={train}"
    steps = {}
    for where, value in read_objects(train / "metrics.jsonl", made_by):
        if not isinstance(value.get("step"), int) or "stage" not in value:
            raise DataError(f"{where}: no step or stage; make it again: {made_by}")
        steps[value["stage"], value["step"]] = value  # after a resume the later one of a step stands
    loaded = {name: load_evaluation(evaluations[name]) for name in NAMES}
    gain, sft_gain = (compare(loaded[a], loaded[b], "").giou for a, b in (("sft", "grpo"), ("base", "sft")))
    return Summary(loaded, gain, sft_gain, tuple(steps[key] for key in sorted(steps)), time.time() - started)


def _rows(summary: Summary) -> list[list[str]]:
    """The head and a row of each policy. Accuracies only where targets are absent."""
    accuracies = {"N-acc": "n_acc", "T-acc": "t_acc"} if summary.absent else {}
    rows = [["", "gIoU", "95% interval", "cIoU", *accuracies, "turns", "tool errors", "samples"]]
    for name, evaluation in summary.evaluations.items():
        r = evaluation.results
        figures = [f"{r['giou']:.3f}", span(r["giou_ci95"]), f"{r['ciou']:.3f}"]
        figures += [_percent(r.get(key)) for key in accuracies.values()]
        rows.append([NAMES[name], *figures, f"{r['mean_turns']:.2f}", _percent(r.get("tool_error_rate")), str(r["n"])])
    return rows


def _verdict(after: str, before: str, gain: GainInterval) -> str:
    sure = "clear of zero" if gain.clear else "zero is inside: no difference shown"
    return f"{after} over {before}: {gain.value:+.3f} gIoU, 95% interval {span(gain.ci95, '+.3f')} ({sure})"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def summary_page(summary: Summary) -> str:
    """The page of the three policies."""
    examples = summary.evaluations["grpo"].examples
    bounds = [e.results["giou_ci95"] for e in summary.evaluations.values()]
    kept = [(NAMES[n], e, {example.id: example for example in e.examples}) for n, e in summary.evaluations.items()]

    def tries(samples: list[Example]) -> list[tuple]:
        return [(s, [(name, evaluation, by_id.get(s.id)) for name, evaluation, by_id in kept]) for s in samples]

    return render_page(
        "quickstart.html",
        title="RSAgent-JAX: base, SFT, GRPO",
        verdict=_verdict("GRPO", "SFT", summary.gain),
        names=NAMES,
        summary=summary,
        rows=_rows(summary),
        axis=(min(0.0, *(b[0] for b in bounds)), max(b[1] for b in bounds)),
        absent_note=ABSENT_NOTE,
        took=_duration(summary.seconds),
        curves=curves(summary.steps),
        sections=dict(zip(("Good: highest", "Bad: lowest"), map(tries, choose(examples)), strict=True)),
        settings=setting_rows(summary.evaluations["grpo"].results.get("settings", {})),
    )


def curves(steps: Sequence[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """(title, smoothed ends, chart) of each metric that was logged, without values that are missing or not finite."""
    parts = sorted({k for step in steps for k in step if k.startswith("reward/")}, key=lambda k: (k.count("/"), k))
    rewards = [("grpo", key, ": ".join(key.split("/")[-2:]), "reward") for key in parts]
    wanted = [*_CURVES[:2], *rewards, *_CURVES[2:]]
    charts = []
    for stage, key, title, label in wanted:
        found = [(s["step"], s[key]) for s in steps if s["stage"] == stage and isinstance(s.get(key), int | float)]
        if points := [(step, value) for step, value in found if math.isfinite(value)]:
            x, y = zip(*points, strict=True)
            line = smoothed(y)
            charts.append((title, f"{line[0]:.3g} → {line[-1]:.3g}", line_chart(x, y, label)))
    return charts


def choose(examples: Sequence[Example]) -> tuple[list[Example], list[Example]]:
    """The best by IoU, best first, and the worst, worst first: at most SHOWN each, none in both."""
    ranked = sorted(examples, key=lambda e: (-e.iou, e.id))
    half = min(SHOWN, (len(ranked) + 1) // 2)
    return ranked[:half], ranked[half:][::-1][:SHOWN]


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
    make_directory(out)
    path = out / "summary.json"
    write_whole(path, json.dumps(summary.to_json(), indent=2) + "\n")
    shown = save_page(summary_page(summary), out)
    notes = [ABSENT_NOTE, ""] if summary.absent else []
    verdicts = [_verdict("GRPO", "SFT", summary.gain), _verdict("SFT", "base", summary.sft_gain)]
    print(text_table(_rows(summary)), "", *notes, *verdicts, sep="\n")
    print(f"\nTook {_duration(summary.seconds)} in all. Summary: {path}  Report: {shown}")
