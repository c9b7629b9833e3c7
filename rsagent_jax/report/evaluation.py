"""What evaluate.py leaves in its work directory, read back and shown as one page that works offline.

    write_evaluation(workdir)     results.json, predictions.jsonl, trajectories.jsonl -> report/index.html

`reproduction.py` shows the same trajectories of several policies beside each other.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from rsagent_jax.evals import metrics
from rsagent_jax.report.page import GOOD_IOU, render_page, save_page, span
from rsagent_jax.report.trajectory import Example, evaluated_example
from rsagent_jax.runtime.journal import flatten_settings
from rsagent_jax.runtime.paths import open_path, read_lines
from rsagent_jax.types import DataError, Status

NEEDED = ("benchmark", "n", "giou", "ciou", "giou_ci95", "mean_turns")  # keys of results.json


@dataclasses.dataclass(frozen=True)
class Prediction:
    """A line of predictions.jsonl without its mask."""

    id: str
    intersection: int  # pixels
    union: int  # pixels
    iou: float
    status: Status
    turns: int
    picture: str  # its name
    dropped: str = ""  # why the convention does not count it; "" = it does
    sample_checksum: str = ""  # of what the sample is made of; "" = not known: an earlier version wrote it


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """A work directory of evaluate.py."""

    workdir: pathlib.Path
    results: dict[str, Any]  # results.json
    predictions: tuple[Prediction, ...]
    examples: tuple[Example, ...]

    @property
    def counted(self) -> tuple[Prediction, ...]:
        """Those that the convention counts."""
        return tuple(p for p in self.predictions if not p.dropped)

    @property
    def left_out(self) -> int:
        """How many it does not count."""
        return len(self.predictions) - len(self.counted)

    @property
    def counted_images(self) -> list[str]:
        """The pictures of `counted`, which intervals are resampled by."""
        return [p.picture for p in self.counted]

    @property
    def absent(self) -> set[str]:
        """The samples without a target that got no mask, which says little of a policy."""
        return {p.id for p in self.predictions if p.union == 0}

    @property
    def ciou_ci95(self) -> tuple[float, float]:
        """95% interval of cIoU, by picture."""
        counts = np.array([[p.intersection, p.union] for p in self.counted], np.float64)
        return metrics.cluster_bootstrap_ci(counts, lambda s: s[:, 0] / (s[:, 1] + 1e-10), self.counted_images)

    @property
    def endings(self) -> list[tuple[Status, int, float, float | None]]:
        """Every way to end that happened: how often, its share, the mean IoU of its masks that count."""
        ended, out = [p.status for p in self.predictions], []
        for status in (s for s in Status if s in ended):
            ious = [p.iou for p in self.counted if p.status is status]
            n = ended.count(status)
            out.append((status, n, n / len(ended), float(np.mean(ious)) if ious else None))
        return out


def load_evaluation(workdir: str | pathlib.Path) -> Evaluation:
    """Reads the three files, or raises a DataError that names the one that is missing or damaged."""
    workdir = open_path(workdir)
    made_by = f"python evaluate.py --config=configs/eval_X.py --workdir={workdir}"
    _, results = next(read_objects(workdir / "results.json", made_by, lines=False))
    if missing := [key for key in NEEDED if key not in results]:
        raise DataError(f"{workdir / 'results.json'} has no {', '.join(missing)}; make it again: {made_by}")
    predictions = tuple(_read(_prediction, workdir / "predictions.jsonl", made_by))
    if not predictions:
        raise DataError(f"{workdir / 'predictions.jsonl'} is empty; make it again: {made_by}")
    examples = _read(evaluated_example, workdir / "trajectories.jsonl", made_by)
    return Evaluation(workdir, results, predictions, tuple(examples))


def read_objects(path: pathlib.Path, made_by: str, lines: bool = True) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, object) of each line of a file, or of all of it; `made_by` is the command that writes it."""
    if not path.exists():
        raise DataError(f"{path} is missing; it is made by: {made_by}")
    text = read_lines(path).decode(errors="replace")
    for number, part in enumerate(text.split("\n") if lines else [text], start=1):
        if part.strip() or not lines:
            where = f"{path}, line {number}" if lines else f"{path}"
            try:
                value = json.loads(part)
            except ValueError as e:
                raise DataError(f"{where}: not JSON ({e}); make it again: {made_by}") from e
            if not isinstance(value, dict):
                raise DataError(f"{where}: not a JSON object; make it again: {made_by}")
            yield where, value


def _read(make: Callable[[dict[str, Any]], Any], path: pathlib.Path, made_by: str) -> Iterator[Any]:
    for where, value in read_objects(path, made_by):
        try:
            yield make(value)
        except (KeyError, TypeError, ValueError) as e:
            raise DataError(f"{where}: {type(e).__name__} {e}; make it again: {made_by}") from e


def _prediction(line: dict[str, Any]) -> Prediction:
    """Keys that it has no field for are left out."""
    fields = {f.name: line[f.name] for f in dataclasses.fields(Prediction) if f.name in line or f.default != ""}
    return Prediction(**fields | {"status": Status(line["status"])})


def write_evaluation(workdir: str | pathlib.Path) -> pathlib.Path:
    """Writes report/index.html from the files of evaluate.py and returns its path."""
    evaluation = load_evaluation(workdir)
    results, absent = evaluation.results, evaluation.absent
    row = results.get("row", "policy")
    good = [e for e in evaluation.examples if e.iou >= GOOD_IOU]
    text = render_page(
        "evaluation.html",
        title=f"Evaluation: {evaluation_title(results)}{'' if row == 'policy' else f' ({row})'}",
        evaluation=evaluation,
        results=results,
        failed=what_failed(results),
        figures=headline_figures(evaluation),
        settings=setting_rows(results.get("settings", {}) | {"weights_sha256": results.get("weights_sha256")}),
        shown=results.get("settings", {}).get("examples") or len(evaluation.examples),
        good=sorted(good, key=lambda e: (e.id in absent, -e.iou, e.id)),
        bad=sorted((e for e in evaluation.examples if e.iou < GOOD_IOU), key=lambda e: (e.iou, e.id)),
    )
    return save_page(text, evaluation.workdir)


def evaluation_title(results: Mapping[str, Any]) -> str:
    """What the config calls it, and the samples' own name where that is another."""
    name, samples = results["benchmark"], results.get("samples")
    return name if samples in (None, name) else f"{name} ({samples})"


def what_failed(results: Mapping[str, Any]) -> str:
    """One line for the terminal and the page: by kind, everything that went otherwise than it should."""
    kinds = {"unreadable": len(results.get("unreadable", {}))}
    kinds |= results.get("segmenter_failures", {})
    kinds |= {name: n for name, n in results.get("failures", {}).items() if name not in metrics.UNMEASURED}
    kinds["tool errors"] = results.get("tool_errors", 0)
    return f"failed: {', '.join(f'{name} {count}' for name, count in kinds.items() if count) or 'nothing'}"


def headline_figures(evaluation: Evaluation) -> list[tuple[str, str, str]]:
    """(name, value, what stands under it) of each figure."""
    results, rows, of = evaluation.results, evaluation.counted, evaluation.counted_images
    found = [float(p.iou >= GOOD_IOU) for p in rows]
    # How trajectories ended and how long they were is of all, as in the table of endings and in results.json.
    played = [(p.status is Status.FINISHED, p.turns, p.picture) for p in evaluation.predictions]
    finished, turns, pictures = (list(column) for column in zip(*played, strict=True))
    figures = [
        ("gIoU", f"{results['giou']:.3f}", span(results["giou_ci95"])),
        ("cIoU", f"{results['ciou']:.3f}", span(evaluation.ciou_ci95)),
        (f"P@{GOOD_IOU}", f"{np.mean(found):.1%}", span(metrics.bootstrap_ci(found, of), ".1%")),
        ("finished", f"{np.mean(finished):.1%}", span(metrics.bootstrap_ci(finished, pictures), ".1%")),
        ("turns", f"{results['mean_turns']:.2f}", span(metrics.bootstrap_ci(turns, pictures), ".2f")),
    ]
    if results.get("tool_error_rate") is not None:
        figures.append(("tool errors", f"{results['tool_error_rate']:.1%}", "of turns malformed or refused"))
    if results.get("seconds_per_sample") is not None:
        figures.append(("time", f"{results['seconds_per_sample']:.2f} s", "of one process, per sample"))
    return figures


def setting_rows(settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(dotted name, value) of nested settings, without those that are None."""
    rows = flatten_settings(settings).items()
    return [(name, v if isinstance(v, str) else json.dumps(v)) for name, v in rows if v is not None]
