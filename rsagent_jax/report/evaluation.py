"""What evaluate.py leaves in its work directory, read back and shown as one page that works offline.

    write_evaluation(workdir)     results.json, predictions.jsonl, trajectories.jsonl -> report/index.html

Trajectories are played again by `agent.replay`, so the pictures are the very observations that the policy was given.
`summary.py` shows the same trajectories of several policies beside each other.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import cv2
import numpy as np

from rsagent_jax.agent.environment import EnvState, final_mask
from rsagent_jax.agent.overlay import draw_overlay
from rsagent_jax.agent.replay import read_source, replay
from rsagent_jax.agent.tools import call_json
from rsagent_jax.evals import metrics
from rsagent_jax.masks import decode_rle
from rsagent_jax.report.html import (
    LARGEST,
    SMALLEST,
    Html,
    histogram,
    html_join,
    html_page,
    html_table,
    picture,
    tag,
    tiles,
)
from rsagent_jax.types import DataError, Status, Turn

NEEDED = ("benchmark", "n", "giou", "ciou", "giou_ci95", "mean_turns")  # keys of results.json
GOOD_IOU = 0.5  # from here on a mask counts as found: the usual threshold of P@0.5
TRUTH = (0, 230, 118)  # colour of the ground truth's outline
MAKE_EVALUATION = "python evaluate.py --config=configs/eval_X.py --workdir={}"


# --- What evaluate.py wrote ---


@dataclasses.dataclass(frozen=True)
class Prediction:
    """A line of predictions.jsonl without its mask."""

    id: str
    intersection: int  # pixels
    union: int  # pixels
    iou: float
    status: Status
    turns: int
    picture: str = ""  # its name; files of earlier versions have none
    dropped: str = ""  # why the convention does not count it; "" = it does


@dataclasses.dataclass(frozen=True)
class Example:
    """A line of trajectories.jsonl: a trajectory that was kept to be looked at."""

    id: str
    query: str
    iou: float  # of the final mask
    status: Status
    ious: tuple[float, ...]  # of each mask, in the order of their ids
    gt: dict[str, Any]  # COCO RLE
    image: str  # path
    record: str  # of agent.replay.state_to_json


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
    def ious(self) -> dict[str, float]:
        return {p.id: p.iou for p in self.counted}

    @property
    def pictures(self) -> dict[str, str] | None:
        """The picture of each id, which intervals are resampled by; None where the files do not name them."""
        return {p.id: p.picture for p in self.predictions} if all(p.picture for p in self.predictions) else None


def load_evaluation(workdir: str | pathlib.Path) -> Evaluation:
    """Reads the three files, or raises a DataError that names the one that is missing or damaged."""
    workdir = pathlib.Path(workdir)
    made_by = MAKE_EVALUATION.format(workdir)
    results = _parse(_text(workdir / "results.json", made_by), f"{workdir / 'results.json'}", made_by)
    if missing := [key for key in NEEDED if key not in results]:
        raise DataError(f"{workdir / 'results.json'} has no {', '.join(missing)}; make it again: {made_by}")
    predictions = tuple(_read(Prediction, workdir / "predictions.jsonl", made_by))
    if not predictions:
        raise DataError(f"{workdir / 'predictions.jsonl'} is empty; make it again: {made_by}")
    return Evaluation(workdir, results, predictions, tuple(_read(Example, workdir / "trajectories.jsonl", made_by)))


def read_json_lines(path: pathlib.Path, made_by: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, object) of each line of a file; `made_by` is the command that writes it."""
    for number, line in enumerate(_text(path, made_by).split("\n"), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            yield where, _parse(line, where, made_by)


def _text(path: pathlib.Path, made_by: str) -> str:
    if not path.is_file():
        raise DataError(f"{path} is missing; it is made by: {made_by}")
    return path.read_text(encoding="utf-8", errors="replace")


def _parse(text: str, where: str, made_by: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as e:
        raise DataError(f"{where}: not JSON ({e}); make it again: {made_by}") from e
    if not isinstance(value, dict):
        raise DataError(f"{where}: not a JSON object; make it again: {made_by}")
    return value


def _read(cls: type, path: pathlib.Path, made_by: str) -> Iterator[Any]:
    """The lines as `cls`; keys that it has no field for are left out."""
    for where, value in read_json_lines(path, made_by):
        try:
            known = dataclasses.fields(cls)
            fields = {f.name: value[f.name] for f in known if f.name in value or f.default is dataclasses.MISSING}
            fields["status"] = Status(fields["status"])
            if "ious" in fields:
                fields["ious"] = tuple(fields["ious"])
        except (KeyError, TypeError, ValueError) as e:
            raise DataError(f"{where}: {type(e).__name__} {e}; make it again: {made_by}") from e
        yield cls(**fields)


# --- The page of one evaluation ---


def write_evaluation(workdir: str | pathlib.Path) -> pathlib.Path:
    """Writes report/index.html from the files of evaluate.py and returns its path."""
    evaluation = load_evaluation(workdir)
    results = evaluation.results
    row = results.get("row", "policy")
    shown = results.get("settings", {}).get("examples") or len(evaluation.examples)
    good = sorted((e for e in evaluation.examples if e.iou >= GOOD_IOU), key=lambda e: (-e.iou, e.id))
    bad = sorted((e for e in evaluation.examples if e.iou < GOOD_IOU), key=lambda e: (e.iou, e.id))
    text = html_page(
        f"Evaluation: {results['benchmark']}{'' if row == 'policy' else f' ({row})'}",
        tag("p", tag("b", "This row looks at the truth: it bounds what a policy can reach and is none itself."))
        if results.get("sees_the_truth")
        else None,
        tag("p", f"{results['n']} sentences, one trajectory each. Intervals: 95%, {_resampled(evaluation)}."),
        tag("p", what_failed(results)),
        tiles(_headline(evaluation)),
        tag("h2", "How trajectories ended"),
        endings_table(evaluation),
        tag("h2", "IoU of the final masks"),
        tag("div", histogram([p.iou for p in evaluation.counted], bad_below=GOOD_IOU), class_="plot"),
        *_by_turn(results),
        *_conventions(results),
        tag("h2", "Settings"),
        settings_table(results.get("settings", {}), {"weights_sha256": results.get("weights_sha256")}),
        *_unreadable(results),
        tag("h2", f"Good: {_some(good, shown)} with IoU of at least {GOOD_IOU}, best first"),
        _cards(evaluation, good[:shown]),
        tag("h2", f"Bad: {_some(bad, shown)} with IoU below {GOOD_IOU}, worst first"),
        _cards(evaluation, bad[:shown]),
    )
    return save(text, evaluation.workdir)


def what_failed(results: Mapping[str, Any]) -> str:
    """One line for the terminal and the page: by kind, everything that went otherwise than it should."""
    kinds = {"unreadable": len(results.get("unreadable", {}))}
    kinds |= results.get("segmenter_failures", {})
    kinds |= {name: n for name, n in results.get("failures", {}).items() if name != Status.ENV_FAILED.value}
    said = [f"{name} {count}" for name, count in kinds.items() if count]
    if results.get("tool_errors"):
        said.append(f"tool errors {results['tool_errors']}")
    return f"failed: {', '.join(said) or 'nothing'}"


def _resampled(evaluation: Evaluation) -> str:
    return f"bootstrap over {'sentences' if evaluation.pictures is None else 'pictures'}"


def _unreadable(results: Mapping[str, Any]) -> list[Html]:
    """What was left out, by name."""
    if not (unreadable := results.get("unreadable")):
        return []
    head = tag("h2", f"{len(unreadable)} samples could not be read and are in no figure")
    return [head, html_table(["sample", "why"], [[id, why] for id, why in unreadable.items()], text_columns=2)]


def _by_turn(results: Mapping[str, Any]) -> list[Html]:
    """What the same trajectories would have been worth with fewer turns."""
    if not (curve := results.get("by_turn")):
        return []
    head = ["turns", "gIoU", "95% interval", "cIoU", "had ended", "gIoU of the best mask so far (oracle)"]
    rows = [
        [
            r["turns"],
            f"{r['giou']:.3f}",
            span(r["giou_ci95"]) if r["giou_ci95"] else "-",
            f"{r['ciou']:.3f}",
            f"{r['ended']:.1%}",
            f"{r['oracle_best_giou']:.3f}",
        ]
        for r in curve
    ]
    return [tag("h2", "Had it ended after so many turns"), html_table(head, rows, text_columns=0)]


def _conventions(results: Mapping[str, Any]) -> list[Html]:
    """The same trajectories by other papers' rules, and the figures of a set with absent targets."""
    parts = []
    if results.get("n_acc") is not None:
        figures = [
            f"{results[k]:.1%}" if results.get(k) is not None else "-" for k in ("n_acc", "t_acc", "giou_target")
        ]
        parts += [
            tag("h2", "Absent targets"),
            html_table(["N-acc", "T-acc", "gIoU of targets"], [figures], text_columns=0),
        ]
    if conventions := results.get("conventions"):
        head = ["convention", "ignored pixels", "empty union", "failures", "counted", "dropped", "gIoU", "cIoU"]
        rows = []
        for name, r in conventions.items():
            rules = [r["rules"][k] for k in ("ignore_policy", "empty_policy", "failure_policy")]
            rows.append([name, *rules, r["n"], sum(r["dropped"].values()), f"{r['giou']:.3f}", f"{r['ciou']:.3f}"])
        parts += [tag("h2", "The same trajectories by other papers' rules"), html_table(head, rows, text_columns=4)]
    return parts


def _some(examples: Sequence[Example], shown: int) -> str:
    return f"{len(examples)} examples" if len(examples) <= shown else f"{shown} of {len(examples)} examples"


def save(text: str, workdir: pathlib.Path) -> pathlib.Path:
    """Puts a page where every command of this project leaves its report."""
    path = workdir / "report" / "index.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def _headline(evaluation: Evaluation) -> list[tuple[str, str, str]]:
    results, rows, pictures = evaluation.results, evaluation.counted, evaluation.pictures
    of = pictures and [pictures[p.id] for p in rows]
    found = [float(p.iou >= GOOD_IOU) for p in rows]
    finished = [float(p.status is Status.FINISHED) for p in rows]
    figures = [
        ("gIoU", f"{results['giou']:.3f}", span(results["giou_ci95"])),
        ("cIoU", f"{results['ciou']:.3f}", span(_ciou_ci(rows, of))),
        (f"P@{GOOD_IOU}", f"{np.mean(found):.1%}", span(metrics.bootstrap_ci(found, of), percent=True)),
        ("finished", f"{np.mean(finished):.1%}", span(metrics.bootstrap_ci(finished, of), percent=True)),
        ("turns", f"{results['mean_turns']:.2f}", span(metrics.bootstrap_ci([p.turns for p in rows], of), digits=2)),
    ]
    if results.get("tool_error_rate") is not None:
        figures.append(("tool errors", f"{results['tool_error_rate']:.1%}", "of turns malformed or refused"))
    if results.get("seconds_per_sample") is not None:
        figures.append(("time", f"{results['seconds_per_sample']:.2f} s", "per sample"))
    return figures


def span(bounds: Sequence[float], digits: int = 3, percent: bool = False, sign: bool = False) -> str:
    """An interval in words, such as `0.712 to 0.744`."""
    form = ("+" if sign else "") + (".1%" if percent else f".{digits}f")
    return " to ".join(format(float(v), form) for v in bounds)


def _ciou_ci(rows: Sequence[Prediction], pictures: Sequence[str] | None) -> tuple[float, float]:
    """95% percentile interval of cIoU; a ratio of sums, so no mean of anything."""
    counts = np.array([[p.intersection, p.union] for p in rows], np.float64)
    return metrics.cluster_bootstrap_ci(counts, lambda sums: sums[:, 0] / (sums[:, 1] + 1e-10), pictures)


def endings_table(evaluation: Evaluation) -> Html:
    """Every way to end that happened, with what its masks were worth."""
    rows = []
    for status in Status:
        ious = [p.iou for p in evaluation.predictions if p.status is status]
        if ious:
            share = len(ious) / len(evaluation.predictions)
            rows.append([_status_badge(status), len(ious), f"{share:.1%}", f"{np.mean(ious):.3f}"])
    note = "Only “finished” is the policy's own decision; every other ending is counted as a failure to stop."
    return html_join([html_table(["ending", "samples", "share", "mean IoU"], rows), tag("p", note, class_="note")])


def settings_table(*groups: Mapping[str, Any]) -> Html:
    """Nested settings as dotted names, folded away when there are many."""
    rows = [(name, value) for group in groups for name, value in _flat("", group) if value is not None]
    shown = html_table(["setting", "value"], rows, text_columns=2)
    return tag("details", tag("summary", f"{len(rows)} settings"), shown, open="open" if len(rows) <= 12 else None)


def _flat(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _flat(f"{name}.{key}" if name else str(key), inner)
    else:
        yield name, value if isinstance(value, str) or value is None else json.dumps(value)


def _cards(evaluation: Evaluation, examples: Sequence[Example]) -> Html:
    if not examples:
        return tag("p", f"None of the {len(evaluation.examples)} examples kept.", class_="note")
    return html_join([card(e, [(None, evaluation, e)]) for e in examples])


# --- Trajectories ---


def card(sample: Example, tries: Sequence[tuple[str | None, Evaluation, Example | None]]) -> Html:
    """One sample and what policies did on it: (name of the policy, its evaluation, its trajectory if it was kept)."""
    head = tag("header", tag("h3", f"“{sample.query}”"), *(badges(sample) if tries[0][0] is None else ()))
    parts: list[Html] = [head]
    for name, evaluation, example in tries:
        if name is not None:
            known = badges(example) if example else [tag("span", "this trajectory was not kept", class_="note")]
            parts.append(tag("div", tag("b", name), *known, class_="policy"))
        if example is not None:
            parts.append(filmstrip(evaluation, example))
    return tag("article", *parts, class_="card")


def badges(example: Example) -> list[Html]:
    return [iou_badge(example.iou), _status_badge(example.status), tag("span", example.id, class_="id")]


def iou_badge(iou: float) -> Html:
    kind = "good" if iou >= 0.75 else "warn" if iou >= GOOD_IOU else "bad"
    return tag("span", f"IoU {iou:.3f}", class_=f"badge {kind}")


def _status_badge(status: Status) -> Html:
    kind = {Status.FINISHED: "good", Status.ENV_FAILED: "bad"}.get(status, "warn")
    return tag("span", status.value.replace("_", " "), class_=f"badge {kind}")


def filmstrip(evaluation: Evaluation, example: Example) -> Html:
    """The image, every turn, and the answer. A trajectory that cannot be played again says why in its place."""
    try:
        image = read_source(example.record, _find_image(evaluation.workdir, example.image))
        state = replay(example.record, image)
        truth = _decode(example, image.shape[:2])
    except DataError as e:
        return tag("p", f"Cannot be shown: {e}", class_="fault")
    answer, answer_id = final_mask(state)
    said = "no mask; truth in green" if answer_id is None else f"mask {answer_id} in blue, truth in green"
    first = _figure(_outlined(image, np.zeros_like(truth), truth), "image; truth in green")
    last = _figure(_outlined(image, answer, truth), said)
    cells = [tag("section", tag("h4", "Question"), first, class_="turn")]
    for number, turn in enumerate(state.turns, start=1):
        committed = number == len(state.turns) and state.status is Status.FINISHED
        cells.append(_turn(number, turn, state, example, last if committed else None))
    if state.status is not Status.FINISHED:
        cells.append(tag("section", tag("h4", "Answer left behind", iou_badge(example.iou)), last, class_="turn"))
    return tag("div", *cells, class_="strip")


def _turn(number: int, turn: Turn, state: EnvState, example: Example, answer: Html | None) -> Html:
    """What the policy said, and what it was answered; `answer` is the committed mask's figure in the turn that did."""
    notes = [iou_badge(example.iou)] if answer is not None else []
    if turn.mask_id is not None and turn.mask_id <= len(example.ious):
        notes.append(iou_badge(example.ious[turn.mask_id - 1]))
    if turn.repeated:
        notes.append(tag("span", "repeated", class_="badge warn"))
    if turn.clipped:
        notes.append(tag("span", f"{turn.clipped} clipped", class_="badge warn"))
    parts: list[Html] = [tag("h4", f"Turn {number}", *notes)]
    if turn.call is None:
        parts.append(tag("pre", turn.text or "(nothing)", class_="call"))
    else:
        thought = re.search(r"<think>(.*?)</think>", turn.text, re.DOTALL)
        if thought and thought[1].strip():
            parts.append(tag("p", thought[1].strip(), class_="thought"))
        parts.append(tag("pre", call_json(turn.call), class_="call"))
    if turn.error is not None:
        kind = "malformed" if turn.call is None else "refused"
        parts.append(tag("p", tag("b", f"{kind}, {turn.error.reason}: "), turn.error.detail, class_="fault"))
    elif turn.observation is not None and turn.observation.image is not None:
        parts.append(_figure(turn.observation.image, turn.observation.text))
    elif turn.observation is None and state.failure is not None and number == len(state.turns):
        parts.append(tag("p", tag("b", f"tool failed, {state.failure.kind}: "), state.failure.detail, class_="fault"))
    elif turn.observation is None and not (turn.call is not None and turn.call.ends):
        parts.append(tag("p", "The trajectory ended here; no answer came back.", class_="note"))
    return tag("section", *parts, answer, class_="turn" if turn.error is None else "turn failed")


def _figure(image: np.ndarray, caption: str) -> Html:
    return tag("figure", picture(image, caption), tag("figcaption", caption))


def _outlined(image: np.ndarray, mask: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """The image with a mask drawn as the policy sees masks, and the outline of the ground truth on top."""
    side = min(max(max(image.shape[:2]), SMALLEST), LARGEST)
    shown = draw_overlay(image, mask, side)
    cover = cv2.resize(truth.astype(np.float32), shown.shape[1::-1], interpolation=cv2.INTER_LINEAR)
    outline, _ = cv2.findContours((cover >= 0.5).astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(shown, outline, -1, (0, 0, 0), 4, cv2.LINE_AA)
    cv2.drawContours(shown, outline, -1, TRUTH, 2, cv2.LINE_AA)
    return shown


def _find_image(workdir: pathlib.Path, path: str) -> pathlib.Path:
    """A relative path counts from where the command runs, else from the work directory."""
    found = next((p for p in (pathlib.Path(path), workdir / path) if p.is_file()), None)
    if found is None:
        raise DataError(f"image {path} is missing")
    return found


def _decode(example: Example, size: tuple[int, int]) -> np.ndarray:
    """bool[h, w]; the image was checked against the record's size already."""
    try:
        truth = decode_rle(example.gt)
    except (AttributeError, KeyError, TypeError, ValueError) as e:
        raise DataError(f"ground truth of {example.id}: not COCO RLE ({type(e).__name__}: {e})") from e
    if truth.shape != size:
        raise DataError(f"ground truth of {example.id} has {truth.shape} pixels (h, w), its image {size}")
    return truth
