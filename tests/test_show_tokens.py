"""The page's colours are the loss mask, its pictures what the policy saw."""

import dataclasses
import html
import re

import numpy as np

from rsagent_jax.data import trajectories
from rsagent_jax.report.page import render_page
from rsagent_jax.report.tokens import item_images, shown_tokens
from rsagent_jax.report.viewer import Viewer
from rsagent_jax.runtime.command import run_command
from tests.refusals import refused
from tests.rollout import small

SCRIPT = {"s0": [small.click(30, 40), "nonsense", small.click(50, 40), small.finish(2)]}


def test_colours_are_the_loss_mask_no_token_is_lost_and_pictures_are_those_that_were_shown(tmp_path, capsys):
    directory = small.store(tmp_path / "set", [small.task(0)], SCRIPT)
    arguments = [f"--trajectories={directory}", f"--processor={small.weights()}", f"--out={tmp_path / 'a/page.html'}"]
    assert run_command("rsagent_jax.show_tokens", arguments) == 0
    page = (tmp_path / "a/page.html").read_text()
    item = trajectories.decode_record(trajectories.open_records(directory)[0], small.processor())
    spans = re.findall(r'<span class="\w+" title="(\d+), (\w+)">(.*?)</span>', page, flags=re.DOTALL)
    is_image = (item.tokens == small.processor().image_id) & ~item.loss_mask
    assert [int(i) for i, _, _ in spans] == item.tokens[~is_image].tolist()
    assert [kind == "trained" for _, kind, _ in spans] == item.loss_mask[~is_image].tolist()
    said = "".join(html.unescape(text) for _, kind, text in spans if kind == "trained")
    for turn in SCRIPT["s0"]:
        assert turn + "<|im_end|>" in said.replace("⏎\n", "\n").replace("·", " ")
    assert page.count("<img") == len(item.grids) == 3 and f"{item.loss_mask.sum()} of {len(item.tokens)} tokens" in page
    assert run_command("rsagent_jax.show_tokens", [*arguments, f"--trajectories={tmp_path / 'none'}"]) == 2
    assert "no complete set" in capsys.readouterr().err
    assert run_command("rsagent_jax.show_tokens", [*arguments, f"--out={tmp_path}"]) == 2
    assert "is a folder; give a file" in capsys.readouterr().err
    first = item_images(item, small.processor())[0]
    np.testing.assert_allclose(first, small.sample(0).image, atol=1)  # 112 x 112 is not resized; rounded once


def test_log_probs_colour_the_tokens_that_were_drawn_and_the_viewer_shows_a_stored_set_the_same_way(tmp_path):
    directory = small.store(tmp_path / "set", [small.task(0)], SCRIPT)
    item = trajectories.decode_record(trajectories.open_records(directory)[0], small.processor())
    drawn = np.flatnonzero(item.loss_mask)
    logprobs = np.zeros(len(item.tokens), np.float32)
    logprobs[drawn[:4]] = np.log([0.95, 0.85, 0.45, 0.05])
    parts = shown_tokens(dataclasses.replace(item, logprobs=logprobs), small.processor())
    markup = render_page("trajectory_tokens.html", parts=parts)
    classes = re.findall(r'class="trained (p\d)" title="\d+, trained, log p (\S+)"', markup)
    assert classes[:4] == [("p0", "-0.051"), ("p1", "-0.163"), ("p2", "-0.799"), ("p3", "-2.996")]
    assert len(classes) == len(drawn) and {name for name, _ in classes[4:]} == {"p0"}
    viewer = Viewer([directory], str(small.weights()))
    (row,) = viewer.rows({})["rows"]
    assert row["values"] == {"turns": 4}
    shown = viewer.tokens(row["key"])
    titles = r'title="(\d+), (\w+)'
    assert re.findall(titles, shown) == re.findall(titles, markup) and "log p" not in shown
    viewer.processor = ""
    refused("give --processor", viewer.tokens, row["key"])
