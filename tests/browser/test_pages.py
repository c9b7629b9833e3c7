"""Reports and the viewer in Chromium: by keys alone, live, beside each other, in a file; what axe-core finds."""

import contextlib
import threading
from types import SimpleNamespace
from urllib.parse import parse_qsl

import numpy as np
import pytest

from rsagent_jax.report import evaluation as report
from rsagent_jax.report.page import render_page
from rsagent_jax.report.rows import select_rows
from rsagent_jax.report.viewer import Viewer, export_page, serve
from tests.report.test_evaluation import write_run, write_summary, write_train
from tests.report.test_viewer import journal, line, played

# The page asks every 100 ms here, and what moves without a person's doing is kept.
SHIFTS = """
    const wait = setInterval;
    setInterval = (what) => wait(what, 100);
    window.shifts = [];
    const seen = (list) => shifts.push(...list.getEntries().map((shift) => shift.value));
    new PerformanceObserver(seen).observe({ type: "layout-shift", buffered: true });
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    for name, skill in (("base", 0.0), ("sft", 0.4), ("grpo", 0.9)):
        write_run(root / name, skill, n=4)
    write_train(root / "train")
    return root


@pytest.fixture(scope="module")
def reports(runs, tmp_path_factory):
    """A page of each template that makes one."""
    out = tmp_path_factory.mktemp("reports")
    write_summary(runs, out / "summary")
    told = report.load_evaluation(runs / "grpo")
    found = SimpleNamespace(dropped={"final IoU below 0.9": 3}, not_collected={"not played yet": 2}, total=4)
    shown = {"kept": [("kept", told.examples[0])], "dropped": [("repeated", told.examples[1])]}
    tokens = [("context", 1, "<tool_call>", None), ("trained", 2, "a", None), ("trained", 3, "b", -0.7)]
    tokens += [("image", 16, np.zeros((8, 8, 3), np.uint8), None), ("trained", 4, "c", -9.0), ("trained", 5, "d", -1.0)]
    pages = {
        "collected": dict(
            found=found, failed={"cut": 1}, figures=[("kept", "1", "of 4")], ious=[0.95], turns=[(2, 1)], tools=[],
            settings=[("a.b", "1")], min_iou=0.9, workdir=told.workdir, shown=shown,
        ),
        "ablation": dict(
            config=SimpleNamespace(benchmark="discs", seed=1), rows=[SimpleNamespace(name="full", comparison=None)],
            table=[["variant", "what differs", "gIoU"], ["full", "the recipe", "0.5"]], verdicts=[], note="",
            axis=(0, 1), stages=[("sft", "3 s", "python train.py")],
        ),
        "doctor": dict(pages=[SimpleNamespace(host=0, name="h0", findings=[
            SimpleNamespace(name=word, verdict=word, figure="1 GB", against="2 GB", remedy="free 1 GB")
            for word in ("OK", "slow", "wrong", "not run")
        ])]),
        "tokens": dict(cards=[("s1", 4, 20, tokens)], trained=4, total=20),
    }  # fmt: skip
    for name, values in pages.items():
        (out / f"{name}.html").write_text(render_page(f"{name}.html", title=name, **values), encoding="utf-8")
    return [report.write_evaluation(runs / "grpo"), out / "summary/report/index.html", *sorted(out.glob("*.html"))]


@pytest.fixture
def served():
    """served(*directories): the address of their viewer."""
    with contextlib.ExitStack() as stack:

        def served(*directories):
            server = stack.enter_context(serve(Viewer(directories), 0))
            threading.Thread(target=server.serve_forever, daemon=True).start()
            stack.callback(server.shutdown)
            return f"http://127.0.0.1:{server.server_address[1]}/"

        yield served


def questions(page):
    return page.locator("#rows a").all_inner_texts()


def chosen(page):
    """What the address says, without the form of its keys."""
    return dict(parse_qsl(page.evaluate("location.hash.slice(1)")))


def test_nothing_serious_is_found_and_no_page_is_wider_than_the_window(
    look, reports, runs, served, open_page, serious_findings
):
    viewer = served(runs / "sft", runs / "grpo")
    for address in (*(path.as_uri() for path in reports), f"{viewer}#row=sft:s00"):
        page = open_page(address, *look)
        page.evaluate("document.querySelectorAll('details:not(#tokens)').forEach((d) => { d.open = true; })")
        if address.startswith(viewer):
            page.locator("#shown .turn").first.wait_for()
        assert serious_findings(page) == [], address
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), address


def test_by_keys_alone(runs, served, open_page):
    page = open_page(served(runs / "grpo"))
    page.locator("#shown .turn").first.wait_for()
    assert chosen(page) == {"row": "grpo:s00"}  # the first is there at once
    page.keyboard.press("j")
    page.locator("tr.on a:focus[title='grpo:s01']").wait_for()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert chosen(page) == {"row": "grpo:s01", "turn": "1"} and page.locator(".turn.on h4").inner_text()[:6] == "Turn 1"
    other = open_page(page.url)  # a link
    assert other.locator(".turn.on h4").inner_text()[:6] == "Turn 1"
    page.keyboard.press("Escape")
    assert page.locator(".turn.on").count() == 0 and "turn" not in chosen(page)
    width = "(picture) => picture.getBoundingClientRect().width"
    picture = page.locator("#shown .layers").last
    picture.focus()
    before = picture.evaluate(width)
    page.keyboard.press("Enter")
    assert picture.evaluate(width) > 1.5 * before
    page.locator("#show-truth").focus()
    page.keyboard.press("Space")
    assert not page.locator("#shown path.truth").first.is_visible() and page.locator("#shown path.mask").count() > 0
    page.locator("input[name=q]").press_sequentially("j disc")  # letters of a text are no keys
    page.locator("#where", has_text="none").wait_for()


def test_the_file_filters_and_orders_as_the_server_does(runs, tmp_path, open_page):
    viewer, path = Viewer([runs / "grpo", runs / "sft"]), tmp_path / "page.html"
    path.write_text(export_page(viewer, {}, 9)[0], encoding="utf-8")
    page = open_page(path.as_uri(), offline=True)
    page.locator("#shown .turn").first.wait_for()
    page.locator("input[name=q]").fill("DISC")
    page.locator("select[name=sort]").select_option("-iou")
    page.locator("summary", has_text="Ranges").click()
    page.get_by_label("IoU from").fill("0.1")
    page.get_by_label("IoU from").press("Enter")
    page.wait_for_url("**iou=0.1..*")
    asked = chosen(page)
    assert asked == {"q": "DISC", "sort": "-iou", "iou": "0.1..", "row": "grpo:s00"}
    expected = [row.query for row in select_rows(viewer.all, asked)]
    assert questions(page) == expected and len(expected) > 1
    page.reload()
    page.locator("#rows a").first.wait_for()
    assert questions(page) == expected and page.get_by_label("IoU from").input_value() == "0.1"
    page.locator("button", has_text="Clear").click()
    page.locator("#where", has_text="1 to 4 of 4").wait_for()


@pytest.mark.parametrize("width", [1400, 400])
def test_two_directories_stand_beside_each_other_and_step_together(runs, served, open_page, width):
    page = open_page(served(runs / "sft", runs / "grpo") + "#row=sft:s02&sort=-gain&turn=1", width=width)
    page.locator(".turn.on").first.wait_for()
    assert page.locator(".turn.on").count() == 2 == page.locator(".sides > div").count()
    first, second = (side.bounding_box() for side in page.locator(".sides > div").all())
    beside = second["x"] > first["x"] and second["y"] == first["y"]
    assert beside == (width == 1400) and (beside or second["y"] > first["y"])
    gains = [float(text) for text in page.locator("#rows td:last-child").all_inner_texts()]
    assert gains == sorted(gains, reverse=True) and len(gains) == 4


@pytest.mark.parametrize("width", [1400, 400])
def test_nothing_moves_when_rows_arrive(tmp_path, served, open_page, width):
    path = journal(tmp_path / "run", played(tmp_path / "run", "p", 28.0), line(1))
    page = open_page("about:blank", width=width)
    page.add_init_script(SHIFTS)
    page.goto(served(tmp_path / "run"))
    page.locator("a[title='run:p']").focus()
    with path.open("a") as file:
        file.write("".join(line(k, status="max_turns") for k in range(2, 90)) + "half\n")
    page.locator("#state", has_text="90 trajectories, 90 chosen; 1 damaged").wait_for()
    assert questions(page)[-1] == "thing 49"
    assert page.evaluate("document.activeElement.title") == "run:p"
    assert page.evaluate("shifts") == []
    page.locator("h1").evaluate("(h1) => { h1.style.marginTop = '200px'; }")
    while not page.evaluate("shifts"):  # this is seen
        page.wait_for_timeout(50)


def test_a_text_finds_cards_of_a_report_and_a_head_sorts_its_table(reports, open_page):
    page = open_page(reports[0].as_uri())
    visible = lambda: [card.is_visible() for card in page.locator(".card").all()]  # noqa: E731
    page.locator("#find").fill("DISC 2")
    assert sum(visible()) == 1 and len(visible()) == 4
    head = page.locator("th", has_text="mean IoU")
    for sign, order in ((1, "ascending"), (-1, "descending")):
        head.press("Enter")
        shown = [sign * float(cell) for cell in page.locator("table").first.locator("td:last-child").all_inner_texts()]
        assert shown == sorted(shown) and head.get_attribute("aria-sort") == order
