"""The demo in a browser: upload, ask, watch, correct, download, with the tiny policy; refusals and cancel, with a
scripted one."""

import concurrent.futures
import contextlib
import json
import re
import threading
import time
import types

import numpy as np
import PIL.Image
import pytest
from agent_fakes import HangingSegmenter

from rsagent_jax.agent.replay import replay
from rsagent_jax.api import Agent
from rsagent_jax.demo import draw_examples
from rsagent_jax.masks import decode_rle, iou
from rsagent_jax.rollout import kv_cache
from rsagent_jax.rollout.policy import TextPolicy
from rsagent_jax.tiny import scenes
from rsagent_jax.types import Status
from tests.rollout import small

pytest.importorskip("gradio")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::pandas.errors.Pandas4Warning")]  # Gradio's own


@pytest.fixture
def served(tmp_path, monkeypatch):
    """served(load): the address of a demo in which the agent that load() gives answers."""
    import uvicorn

    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "gradio"))
    from rsagent_jax.web import page, server

    def served(load, per_minute=30):
        agent = concurrent.futures.Future()
        examples = draw_examples(tmp_path)
        shown = page.DemoPage(agent, page.Limits(1, 8, per_minute, 1, 25), tmp_path, examples, page.KNOWS)
        listener = server.open_listener("127.0.0.1:0")
        app = server.mount_page(shown, [], "127.0.0.1:0")
        serving = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
        threads = [threading.Thread(target=serving.run, args=([listener],))]
        threads.append(threading.Thread(target=lambda: agent.set_result(load())))
        for thread in threads:
            thread.start()
            ended.callback(thread.join)
        ended.callback(lambda: agent.result().close())
        ended.callback(setattr, serving, "should_exit", True)
        return f"http://127.0.0.1:{listener.getsockname()[1]}"

    with contextlib.ExitStack() as ended:
        yield served


def ask(page, picture, query):
    page.locator("input[type=file]").first.set_input_files(picture)
    page.locator(".image-frame img").first.wait_for()
    page.get_by_label("What to segment").first.fill(query)
    page.get_by_role("button", name="Ask").click()


def wait_for(page, text):
    page.get_by_role("status").filter(has_text=text).wait_for()


def ending(page):
    """What is said of a trajectory when it has ended."""
    found = page.get_by_role("status").filter(has_text=re.compile("^(Ended|No answer)"))
    found.wait_for()
    return found.inner_text()


def turns(page):
    return page.locator(".turns li b").all_inner_texts()


def downloads(page):
    files = {}
    for link in page.locator("a[download]").all():
        with page.expect_download() as download:
            link.click()
        files[download.value.suggested_filename] = download.value.path()
    return files


def test_upload_ask_watch_correct_and_download(served, open_page, serious_findings, tmp_path, monkeypatch):
    monkeypatch.setattr(kv_cache, "SMALL", 1024)  # one block: a third of the programs to compile
    scene = scenes.make_scene(np.random.default_rng([20, 2]), scenes.SceneConfig(), scenes.load_photos())
    scene_file = tmp_path / "mine.png"
    image, star = scene.image.copy(), next(o for o in scene.objects if o.shape == "star" and o.color == "yellow")
    image[0, 0] ^= 1  # so that it is none of the examples
    PIL.Image.fromarray(image).save(scene_file)
    squares = np.any([o.mask for o in scene.objects if o.shape == "square"], axis=0)
    address = served(lambda: Agent.load("assets/tiny-agent", segmenter="grabcut", slots=1))
    page, asked = open_page(address), set()
    page.set_default_timeout(120_000)
    page.on("request", lambda request: asked.add(request.url.partition("://")[2].partition("/")[0]))
    page.get_by_text("This is a tiny policy").wait_for()
    assert serious_findings(page) == []

    ask(page, scene_file, "every yellow square")
    said = ending(page)
    assert said.startswith("Ended: finished after 3 turns; mask 2") and "This picture is your own" in said
    assert turns(page) == ["Turn 1, policy", "Turn 2, policy", "Turn 3, policy"]
    files = downloads(page)
    assert files.keys() == {"mask.png", "mask.json", "trajectory.json", "image.png"}
    mask = np.asarray(PIL.Image.open(files["mask.png"])) == 255
    assert iou(mask, squares) > 0.8
    np.testing.assert_array_equal(decode_rle(json.loads(files["mask.json"].read_bytes())), mask)
    np.testing.assert_array_equal(PIL.Image.open(files["image.png"]), image)

    page.get_by_label("New mask of what I click").check()
    canvas = page.get_by_alt_text("Picture and mask")
    size = canvas.bounding_box()
    scale = size["width"] / 112  # a square picture in its frame
    canvas.click(position={"x": (star.point[0] + 0.5) * scale, "y": (star.point[1] + 0.5) * scale})
    wait_for(page, "after 4 turns")
    assert turns(page) == ["Turn 1, policy", "Turn 2, policy", "Turn 3, you", "Turn 4, policy"]
    state = replay(downloads(page)["trajectory.json"].read_text(), image)
    (click,) = state.turns[2].call.points
    assert np.hypot(*np.subtract(click, star.point)) <= 2 and iou(state.masks[2].mask, star.mask) > 0.6
    page.get_by_label("Mask of the history pool").first.fill("1")
    assert serious_findings(page) == []
    assert asked == {address.partition("://")[2]}


def test_what_is_too_much_is_refused_and_a_cancelled_question_leaves_its_slot(served, open_page, tmp_path, monkeypatch):
    clock = types.SimpleNamespace(monotonic=lambda: 0.0, perf_counter=time.perf_counter, sleep=time.sleep)
    monkeypatch.setattr("rsagent_jax.web.page.time", clock)  # all of it is in one minute
    texts = [small.click(30, 40), small.click(50, 50), small.finish(None)]
    policy = TextPolicy(lambda task, state: texts[min(len(state.turns), 2)], small.processor(), slots=1)
    segmenter = HangingSegmenter(1, 3)
    address = served(lambda: Agent(policy, segmenter, small.processor(), small.AGENT, workers=3), per_minute=4)
    page = open_page(address)
    PIL.Image.new("RGB", (60, 40), "red").save(tmp_path / "red.png")
    ask(page, tmp_path / "red.png", "the jug")
    page.locator(".turns li").first.wait_for()
    wait_for(page, "Turn 2 is under way")
    page.get_by_label("What to segment").first.fill("the mug")  # in place of the one under way
    page.get_by_role("button", name="Ask", exact=True).click()
    while len(segmenter.requests) < 4:
        page.wait_for_timeout(50)
    wait_for(page, "Turn 2 is under way")
    page.get_by_role("button", name="Cancel").click()
    said = ending(page)
    assert said.startswith("Ended: cancelled after 1 turn; mask 1, the latest one") and "never trained on “mug”" in said

    places = page.get_by_label("or type x, y")
    places.fill("5, 6, 50, 30")
    places.press("Enter")
    wait_for(page, "finished after 3 turns; the policy says that the target is not in the picture")
    assert turns(page) == ["Turn 1, policy", "Turn 2, you", "Turn 3, policy"] and places.input_value() == ""
    state = replay(downloads(page)["trajectory.json"].read_text(), np.asarray(PIL.Image.open(tmp_path / "red.png")))
    assert state.status is Status.FINISHED and state.masks[1].mask[18, 27]
    for text, said in (("5, 600", "a point lies outside of the picture"), ("here", "'here' is no place")):
        places.fill(text)
        places.press("Enter")
        page.get_by_text(said).wait_for()
    places.fill("5, 6")
    places.press("Enter")
    page.get_by_text("4 questions a minute are the most here").wait_for()
    segmenter.woken.set()
