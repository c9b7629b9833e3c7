"""The pages: figures by hand, pictures that are the policy's own observations, and no markup from a model."""

import base64
import io
import json
import math
import re
import shutil
import xml.etree.ElementTree as ET

import cv2
import numpy as np
import pytest
from agent_fakes import DiscSegmenter, disc, run
from PIL import Image

from rsagent_jax.agent.environment import abort, final_mask
from rsagent_jax.agent.replay import replay, state_to_json
from rsagent_jax.agent.tools import Finish, Segment, Zoom, render_call
from rsagent_jax.config.recipe import RecipeConfig, RecipeStage, plan_steps
from rsagent_jax.evals import metrics
from rsagent_jax.masks import intersection_union
from rsagent_jax.report import evaluation as report
from rsagent_jax.report import page, reproduction, trajectory
from rsagent_jax.report.comparison import compare
from rsagent_jax.types import Status
from sam_bridge.types import FailureKind
from tests.refusals import refused
from tests.report.written import check_markup, check_script, rle, write_files, write_lines

SIDE = 112
EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)> \"' </style>"
TITLES = ["SFT loss", "GRPO reward", "IoU of the rollouts", "reward: process", "process: gain", "Turns"]


def scene(seed):
    """u8[h, w, 3] and the disc that is meant."""
    rng = np.random.default_rng(seed)
    truth = disc(SIDE, SIDE, *rng.integers(30, 80, 2).tolist(), 18)
    image = cv2.resize(rng.integers(60, 200, (5, 5, 3), dtype=np.uint8), (SIDE, SIDE), interpolation=cv2.INTER_CUBIC)
    image[truth] = rng.integers(0, 256, 3)
    return image, truth


def script(truth, skill, rng):
    """Turns of a policy; skill 0 mostly says nonsense, skill 1 clicks into the middle."""
    rows, columns = np.nonzero(truth)
    x, y = columns.mean() + (1 - skill) * rng.normal(0, 25), rows.mean() + (1 - skill) * rng.normal(0, 25)
    place = tuple(float(round(v)) for v in np.clip((x, y), 20, SIDE - 21))
    box = tuple(float(v) for v in (place[0] - 18, place[1] - 18, place[0] + 18, place[1] + 18))
    if rng.random() > skill + 0.4:
        return [EVIL, "I cannot do that.", "\ud800 <think>"]
    thought = "Is it <b>this</b> one? " + EVIL
    calls = [Zoom(box), Segment(points=(place,), labels=(1,)), Segment(box=box), Finish(2)]
    return [render_call(call, thought) for call in (calls[1:] if skill else calls)]


def write_run(workdir, skill, n=12, kept=10):
    """What evaluate.py leaves behind, with real trajectories of a scripted policy."""
    rng, results, examples = np.random.default_rng(0), [], []
    for i in range(n):
        image, truth = scene(i)
        path = workdir.parent / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
        state = run(script(truth, skill, rng), DiscSegmenter(18), image, f"disc {i} {EVIL}", history_size=SIDE)
        state = state if state.status else abort(state, Status.MAX_CONTEXT)
        counts = intersection_union(final_mask(state)[0], truth, None)
        errors = sum(turn.error is not None for turn in state.turns)
        result = metrics.SampleResult(f"s{i:02d}", *counts, state.status, len(state.turns), errors)
        results.append(result)
        ious = [a / (b + 1e-5) for a, b in (intersection_union(m.mask, truth, None) for m in state.masks)]
        row = {"id": result.id, "query": state.query, "iou": result.iou, "status": result.status, "ious": ious}
        examples.append(row | {"gt": rle(truth), "image": str(path), "record": state_to_json(state, str(path))})
    settings, more = {"agent": {"max_turns": 8, "prompt": EVIL}}, {"seconds_per_sample": 0.25, "weights_sha256": "abc"}
    return write_files(workdir, results, settings, examples[:kept], benchmark=EVIL, **more)


def write_train(workdir):
    """What train.py leaves behind: a falling loss, and rewards that rise."""
    workdir.mkdir()
    rows = [{"step": i, "stage": "sft", "loss": 3 * math.exp(-i / 20), "logprob": -1.0} for i in range(1, 61)]
    for i in range(1, 41):
        keys = {"reward": i / 40, "reward/final": i / 50, "reward/process": 0.1, "reward/process/gain": 0.2, EVIL: 1.0}
        rows.append(keys | {"step": i, "stage": "grpo", "giou": i / 50, "turns": 3.0, "kl_old": float("nan")})
    write_lines(workdir / "metrics.jsonl", [*rows, rows[-1] | {"turns": 4.0}])
    return workdir


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    for name, skill in (("base", 0.0), ("sft", 0.4), ("grpo", 0.9)):
        write_run(root / name, skill)
    write_train(root / "train")
    return root


def write_summary(runs, out, **other):
    """The report of a recipe whose stages are all given; summary.json."""
    paths = {name: runs / name for name in ("train", "base", "sft", "grpo")} | other
    stages = tuple(
        RecipeStage(name=name, command="evaluate.py", given=str(path), benchmark=EVIL, row=name)
        if name != "train"
        else RecipeStage(name=name, command="train.py", given=str(path))
        for name, path in paths.items()
    )
    out.mkdir()
    reproduction.write_report(EVIL, plan_steps(RecipeConfig(stages=stages), out), out, {})
    return json.loads((out / "summary.json").read_text())


def content(uri):
    """What a data URI holds."""
    return base64.b64decode(uri.partition(",")[2])


def check_page(text):
    """As every page is, and with nothing of EVIL in it. Returns its pictures."""
    check_script(text)
    assert text.count("<script") == 1 and "url(" not in text and "&lt;script&gt;" in text
    images = [element.attrib for element in check_markup(text) if element.tag == "img"]
    charts = [a for a in images if a["src"].startswith("data:image/svg")]
    assert all(ET.fromstring(content(a["src"])).tag.endswith("svg") and a["alt"] for a in charts)
    return [Image.open(io.BytesIO(content(a["src"]))) for a in images if a not in charts]


def card_page(example, evaluation):
    """The page of one evaluation with this one example."""
    evaluation = report.dataclasses.replace(evaluation, examples=(example,))
    values = {"failed": "", "figures": [], "settings": [], "shown": 1, "good": [example], "bad": []}
    return page.render_page("evaluation.html", title=EVIL, evaluation=evaluation, results=evaluation.results, **values)


# --- One evaluation ---


def test_page_of_an_evaluation(runs):
    path = report.write_evaluation(runs / "grpo")
    assert path == runs / "grpo" / "report" / "index.html"
    text = path.read_text(encoding="utf-8")
    figures = json.loads((runs / "grpo" / "results.json").read_text())
    assert f"{figures['giou']:.3f}" in text and "{:.3f} to {:.3f}".format(*figures["giou_ci95"]) in text
    assert (
        "agent.max_turns" in text
        and "weights_sha256" in text
        and "0.25 s" in text
        and "of one process, per sample" in text
    )
    evaluation = report.load_evaluation(runs / "grpo")
    images = check_page(text)
    observed = sum(t.observation is not None and t.observation.image is not None for e in evaluation.examples
                   for t in replay(e.record).turns)  # fmt: skip
    assert len(images) == observed + 2 * len(evaluation.examples)  # and question and answer of each


def test_sections_are_sorted(runs):
    text = report.write_evaluation(runs / "sft").read_text(encoding="utf-8")
    good, bad = (re.findall(r'class="badge \w+">IoU ([\d.]+)</span><span class="badge \w+">', part)
                 for part in text.partition("<h2>Good")[2].split("<h2>Bad"))  # fmt: skip
    good, bad = [float(v) for v in good], [float(v) for v in bad]
    assert len(good) + len(bad) == 10 and good and bad
    assert good == sorted(good, reverse=True) and min(good) >= 0.5
    assert bad == sorted(bad) and max(bad) < 0.5


def test_pictures_are_what_the_policy_saw(runs):
    evaluation = report.load_evaluation(runs / "grpo")
    example = next(e for e in evaluation.examples if e.status is Status.FINISHED)
    turn = replay(example.record).turns[0]
    seen = Image.fromarray(turn.observation.image)
    shown = check_page(card_page(example, evaluation))[1]
    assert shown.size == seen.size
    assert np.abs(np.asarray(shown, float) - np.asarray(seen, float)).mean() < 4  # JPEG


def test_errors_and_failures_are_shown(tmp_path):
    image, truth = scene(0)
    texts = [EVIL, render_call(Finish(7), "<done>"), render_call(Segment(box=(-9, 0, 50, 50)), "try")]
    state = run(texts, DiscSegmenter(fail=[FailureKind.TIMEOUT]), image, EVIL)
    assert state.status is Status.ENV_FAILED
    Image.fromarray(image).save(tmp_path / "image.png")
    example = report.Example("s", EVIL, 0.0, state.status, (), rle(truth), "image.png", state_to_json(state))
    row = report.Prediction("s", 0, 1, 0.0, state.status, 3, "s")
    text = card_page(example, report.Evaluation(tmp_path, {"n": 1, "n_acc": None}, (row,), ()))
    check_page(text)
    for words in ("malformed, no_call", "refused, unknown_mask", "tool failed, timeout", "1 clipped", "env failed"):
        assert words in text, words


WIRE, SPECK, WIDE = np.s_[100:1000, 700:701], np.s_[50:51, 1200:1201], np.s_[300:700, 200:500]


@pytest.mark.parametrize("parts", [(WIRE,), (SPECK,), (WIRE, SPECK, WIDE), ()])
def test_a_target_too_thin_for_the_page_is_drawn_all_the_same(tmp_path, parts):
    """A page is 640 pixels wide, so one of these 1500 covers less than half of one of its own."""
    image, truth = np.full((1100, 1500, 3), 90, np.uint8), np.zeros((1100, 1500), bool)
    for part in parts:
        truth[part] = True
    Image.fromarray(image).save(tmp_path / "a.png")
    state = run([render_call(Finish(None), "Nothing.")], DiscSegmenter(18), image, "thin")
    example = report.Example("s", "thin", 0.0, state.status, (), rle(truth), "a.png", state_to_json(state))
    path = trajectory.play(example, tmp_path).truth.path
    assert path.count("M") == path.count("Z") == len(parts)
    x = [float(v) for v in re.findall(r"[ML]([\d.]+) ", path)]
    assert not parts or (min(x), max(x)) == pytest.approx(
        (np.nonzero(truth)[1].min() * 640 / 1500, np.nonzero(truth)[1].max() * 640 / 1500), abs=1
    )
    text = card_page(example, report.Evaluation(tmp_path, {"n": 1, "n_acc": None}, (), ()))
    assert ("no mask and truth" in text, "no mask; there is no target" in text) == (bool(parts), not parts)


@pytest.mark.parametrize("damage", ["image", "record", "gt"])
def test_a_trajectory_that_cannot_be_shown_says_why(runs, damage):
    evaluation = report.load_evaluation(runs / "grpo")
    values = {"image": "nowhere/<b>.png", "record": "{}", "gt": {"size": [1, 2]}}
    example = report.dataclasses.replace(evaluation.examples[0], **{damage: values[damage]})
    text = card_page(example, evaluation)
    assert '<p class="fault">Cannot be shown: ' in text and "<b>.png" not in text


def test_ciou_interval_of_equal_rows_has_no_width():
    rows = tuple(report.Prediction("a", 30, 40, 0.75, Status.FINISHED, 2, picture) for picture in "aabbb")
    figures = {"giou": 0.75, "ciou": 0.75, "giou_ci95": [0.75, 0.75], "mean_turns": 2}
    shown = report.headline_figures(report.Evaluation(None, figures, rows, ()))
    assert shown[1] == ("cIoU", "0.750", "0.750 to 0.750")


def test_what_a_convention_drops_is_listed_and_in_no_figure():
    """Two pictures: one with IoU 0.75 in two turns; one of an absent target, dropped, in six, and of a failure in one.
    Turns and endings are of all, as in results.json."""
    rows = (
        report.Prediction("a", 30, 40, 0.75, Status.FINISHED, 2, "p"),
        report.Prediction("b", 0, 0, 0.0, Status.FINISHED, 6, "q", "empty"),
        report.Prediction("c", 0, 0, 0.0, Status.ENV_FAILED, 1, "q", "failure"),
    )
    figures = {"benchmark": "toy", "giou": 0.75, "ciou": 0.75, "giou_ci95": [0.75, 0.75], "mean_turns": 3}
    evaluation = report.Evaluation(None, figures, rows, ())
    assert evaluation.endings == [(Status.FINISHED, 2, 2 / 3, 0.75), (Status.ENV_FAILED, 1, 1 / 3, None)]
    assert report.headline_figures(evaluation)[3:] == [
        ("finished", "66.7%", "50.0% to 100.0%"),
        ("turns", "3.00", "2.00 to 3.50"),
    ]
    turns = [{"turns": 1, "giou": 0.5, "ciou": 0.5, "giou_ci95": None, "ended": 0, "oracle_best_giou": 0.5}]
    turns.append(turns[0] | {"turns": 2, "n": 1})  # the first as earlier versions wrote it
    empty = {"failed": "", "figures": [], "settings": [], "shown": 0, "good": [], "bad": []}
    results = figures | {"n": 1, "n_acc": None, "by_turn": turns}
    text = page.render_page("evaluation.html", title="toy", evaluation=evaluation, results=results, **empty)
    assert "<p>3 sentences, one trajectory each, of which the rules of the metric leave out 2. " in text
    assert "<td>1</td><td>-</td><td>0.500" in text and "<td>2</td><td>1</td><td>0.500" in text
    assert report.evaluation_title(figures) == "toy" and report.evaluation_title(
        figures | {"samples": "refcoco/unc/val"}
    ) == ("toy (refcoco/unc/val)")


# --- Three policies ---


def test_summary(runs, tmp_path, capsys):
    value = write_summary(runs, tmp_path / "out")
    figures = {name: json.loads((runs / name / "results.json").read_text()) for name in ("base", "sft", "grpo")}
    for name, expected in figures.items():
        assert value[name] == {key: expected[key] for key in reproduction.KEYS}
    assert value["gain"] == pytest.approx(figures["grpo"]["giou"] - figures["sft"]["giou"], abs=1e-9)
    gain = compare(*(report.load_evaluation(runs / name) for name in ("sft", "grpo")), "after GRPO").giou
    assert value["gain_ci95"] == list(gain.ci95)
    assert value["gain_ci95"][0] <= value["gain"] <= value["gain_ci95"][1]
    lines = capsys.readouterr().out.splitlines()
    assert len({len(line) for line in lines[:5]}) == 1  # aligned
    assert lines[4].removeprefix(EVIL).split()[:3] == ["after", "GRPO", f"{figures['grpo']['giou']:.3f}"]
    rows = {row["row"]: row for row in value["rows"]}
    evaluation = report.load_evaluation(runs / "sft")
    assert rows["sft"]["ciou_ci95"] == list(evaluation.ciou_ci95) and "failure_policy zero" in rows["sft"]["convention"]
    markdown = [line.split(" | ") for line in (tmp_path / "out/table.md").read_text().splitlines() if "|" in line]
    assert [len(cells) for cells in markdown if len(cells) > 1] == [len(markdown[0])] * 4
    assert markdown[3][2:4] == [f"{figures['sft']['giou']:.3f}", page.span(figures["sft"]["giou_ci95"])]
    text = (tmp_path / "out" / "report" / "index.html").read_text(encoding="utf-8")
    check_page(text)
    assert all(f"<b>{title}</b>" in text for title in TITLES) and "Tool errors</b>" not in text
    assert "reward: final</b>" not in text  # the same curve as the IoU's
    assert text.count('<article class="card">') == 8 and text.count('class="policy"') == 24
    assert "3 → 3.33" in text  # the later object of a step that was done again


def test_summary_shows_accuracies_where_targets_are_absent(runs, tmp_path, capsys):
    for name, accuracies in (("base", (1.0, 0.0)), ("sft", (0.5, 0.75)), ("grpo", (0.875, None))):
        shutil.copytree(runs / name, tmp_path / name)
        path = tmp_path / name / "results.json"
        figures = json.loads(path.read_text()) | dict(zip(("n_acc", "t_acc"), accuracies, strict=True))
        figures["behaviour"] = {"recovery": None if name == "base" else 0.625}
        path.write_text(json.dumps(figures | {"giou_target": 0.25}))
    value = write_summary(tmp_path, tmp_path / "out", train=runs / "train")
    assert (value["sft"]["n_acc"], value["sft"]["t_acc"], value["sft"]["giou_target"]) == (0.5, 0.75, 0.25)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[-7:] == ["N-acc", "T-acc", "recovered", "turns", "tool", "errors", "samples"]
    shares = [re.findall(r"(\S+%|-) ", line)[:3] for line in lines[2:5]]
    assert shares[0][:2] == ["100.0%", "0.0%"] and "62.5%" not in lines[2]
    assert shares[1:] == [["50.0%", "75.0%", "62.5%"], ["87.5%", "-", "62.5%"]]
    assert reproduction.ABSENT_NOTE in lines and reproduction.RECOVERED_NOTE in lines
    text = (tmp_path / "out" / "report" / "index.html").read_text(encoding="utf-8")
    check_page(text)
    assert ">N-acc</th>" in text and ">87.5%</td>" in text and reproduction.ABSENT_NOTE in text


def test_choose_takes_no_sample_twice():
    rows = [report.Example(str(i), "", i / 10, Status.FINISHED, (), {}, "", "") for i in range(10)]
    good, bad = reproduction.choose(rows)
    assert [e.id for e in good] == ["9", "8", "7", "6"] and [e.id for e in bad] == ["0", "1", "2", "3"]
    good, bad = reproduction.choose(rows[:3])
    assert [e.id for e in good] == ["2", "1"] and [e.id for e in bad] == ["0"]
    assert reproduction.choose([]) == ([], [])


def test_what_is_missing_is_an_empty_cell_that_says_why(runs, tmp_path, capsys):
    """And the rest is shown all the same."""
    value = write_summary(runs, tmp_path / "out", sft=tmp_path / "none", train=tmp_path / "none")
    assert value["sft"] is value["gain"] is value["gain_ci95"] is None and value["grpo"]["n"] == 12
    row = value["rows"][1]
    assert row["giou"] is row["ciou_ci95"] is row["n"] is None
    assert f"{tmp_path / 'none' / 'results.json'} is missing; it is made by: python evaluate.py" in row["waits"]
    text = (tmp_path / "out/report/index.html").read_text(encoding="utf-8")
    check_page(text)
    assert "No steps were logged." in text and text.count('class="policy"') == 16 and "waits for" in text


def test_a_start_that_only_validates_a_step_leaves_what_was_logged_of_it(tmp_path):
    lines = [{"loss": 1.0, "val/giou": 0.1}, {"val/giou": 0.2}]
    write_lines(tmp_path / "metrics.jsonl", [{"stage": "sft", "step": 4} | line for line in lines])
    (step,) = reproduction._logged(tmp_path / "metrics.jsonl")
    assert step == {"stage": "sft", "step": 4, "loss": 1.0, "val/giou": 0.2}


def test_each_training_has_curves_of_its_own_until_it_is_changed(tmp_path):
    def trained(lr: str):
        """Two GRPO stages, the second with this learning rate."""
        stages = [
            RecipeStage(name=name, command="train.py", arguments=(f"--config.grpo.optim.lr={rate}",))
            for name, rate in (("grpo", "1e-6"), ("again", lr))
        ]
        return plan_steps(RecipeConfig(stages=tuple(stages)), tmp_path)

    steps = trained("1e-5")
    for (name, step), (reward, count) in zip(steps.items(), ((0.5, 10), (0.9, 6)), strict=True):
        step.directory.mkdir()
        lines = [{"stage": "grpo", "step": k, "reward": reward} for k in range(1, count + 1)]
        write_lines(step.directory / "metrics.jsonl", lines)
        stamp = {"seconds": 60, "key": step.key, "nonce": name, "nonces": {}}
        (step.directory / reproduction.STAMP).write_text(json.dumps(stamp))

    def shown(steps):
        return [curve[:2] for curve in reproduction.curves(reproduction.summarize_recipe("", steps, {}).steps)]

    apart, first = (
        [("GRPO reward, grpo", "0.5 → 0.5"), ("GRPO reward, again", "0.9 → 0.9")],
        ("GRPO reward", "0.5 → 0.5"),
    )
    changed = trained("1e-3")
    assert (shown(steps), shown(changed)) == (apart, [first])
    reproduction.take_back(changed["again"])  # it was begun, and refused for the other run's checkpoints
    assert shown(changed) == [first] and reproduction.seconds_of(steps["again"]) is None
    assert shown(steps) == apart  # taken back to what its files are of


def test_examples_may_be_none(tmp_path):
    for name in ("base", "sft", "grpo"):
        write_run(tmp_path / name, 0.9, n=3, kept=0)
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "metrics.jsonl").write_text("")
    write_summary(tmp_path, tmp_path / "out")
    assert "None of the 0 examples kept" in report.write_evaluation(tmp_path / "sft").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("results.json", "[1]", "not a JSON object"),
        ("results.json", '{"n": 1}', "has no benchmark"),
        ("predictions.jsonl", "", "is empty"),
        ("predictions.jsonl", '\n{"id": 1', "line 2: not JSON"),
        ("predictions.jsonl", '{"id": "a"}', "line 1: KeyError"),
        ("trajectories.jsonl", None, "is missing"),
    ],
)
def test_damaged_files_are_named(tmp_path, file, text, words):
    workdir = write_run(tmp_path / "run", 0.9, n=2)
    (workdir / file).unlink()
    if text is not None:
        (workdir / file).write_text(text)
    refused(rf"(?s){re.escape(str(workdir / file))}.*{words}.*evaluate.py", report.load_evaluation, workdir)


# --- Parts ---


def test_what_no_page_can_hold_becomes_a_mark(runs):
    assert "\ufffd &lt;think&gt;" in report.write_evaluation(runs / "base").read_text(encoding="utf-8")


def test_smoothing_keeps_a_straight_line_and_halves_noise():
    line = [2.0 * i for i in range(100)]
    assert page.smoothed(line)[6:-6] == pytest.approx(line[6:-6])
    assert page.smoothed(line)[0] == pytest.approx(np.mean(line[:7]))
    noise = np.random.default_rng(0).normal(size=100)
    assert np.std(page.smoothed(noise)) < 0.5 * np.std(noise)
    assert page.smoothed([1.0, 5.0]) == pytest.approx([1.0, 5.0])


@pytest.mark.parametrize("y", [[0.5], [0.0, 0.0], [1e6, -1e6, 3.0], [1e-9, 2e-9]])
def test_charts_of_odd_curves_are_drawn_and_come_out_the_same(y):
    text = page.line_chart(list(range(len(y))), y, "y")
    assert text == page.line_chart(list(range(len(y))), y, "y")
    svg = ET.fromstring(content(text))
    *_, line = (path for path in svg.findall(".//{*}path") if path.get("clip-path"))
    points = np.array([float(v) for v in re.findall(r"-?\d+\.?\d*", line.get("d"))]).reshape(-1, 2)
    assert len(points) == len(y) and (points >= 0).all() and (points <= (259.2, 158.4)).all()  # 3.6 x 2.2 inches


def test_histogram_counts():
    svg = content(page.histogram([0.0, 0.01, 0.5, 1.0], bad_below=0.5, bins=4)).decode()
    assert re.findall(r"font-size: 8px.*>(\d+)</text>", svg) == ["2", "1", "1"]
    assert re.findall(rf"fill: ({page.BAD}|{page.ACCENT})", svg) == [page.BAD] * 2 + [page.ACCENT] * 2
