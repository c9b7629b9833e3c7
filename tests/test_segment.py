"""One picture, one sentence: what is printed and written, and every kind of picture file a user may bring."""

import dataclasses
import pathlib
import subprocess
import sys

import jax
import numpy as np
import PIL.Image
import pytest
from agent_fakes import DiscSegmenter, make_image, same_states

from rsagent_jax.agent.replay import replay
from rsagent_jax.agent.tools import Finish, Segment, Zoom, render_call
from rsagent_jax.api import Agent
from rsagent_jax.config.build import build_config
from rsagent_jax.config.schema import SegmentConfig
from rsagent_jax.data.processor import Processor
from rsagent_jax.rollout.policy import TextPolicy
from rsagent_jax.runtime.command import load_config_file, use_compilation_cache
from rsagent_jax.segment import segment
from rsagent_jax.types import Status
from sam_bridge.types import FailureKind
from tests.refusals import refused

ROOT = pathlib.Path(__file__).parents[1]
TINY = ROOT / "assets" / "tiny-base"
CONFIG = build_config(SegmentConfig, load_config_file(str(ROOT / "configs" / "segment.py")))
BOX = render_call(Segment(box=(20, 30, 80, 90)), "it is in the middle")


@pytest.fixture(scope="module")
def processor():
    return Processor.load(TINY)


def play(turns, processor, out, segmenter=None):
    """The final state of the command's own function with scripted turns for the policy."""
    script = iter(turns)
    policy = TextPolicy(lambda task, state: next(script), processor, slots=1)
    with Agent(policy, segmenter or DiscSegmenter(), processor, CONFIG.agent) as agent:
        return segment(agent, make_image(60, 90), "the disc", out).state


def read(path) -> np.ndarray:
    return np.asarray(PIL.Image.open(path))


def test_prints_the_turns_and_writes_the_committed_mask(processor, tmp_path, capsys):
    # 90 x 60 is shown as 112 x 84: the masks must come back in the picture's own size
    zoom = render_call(Zoom((0, 0, 60, 60)))
    state = play([zoom, BOX, render_call(Finish(1), "good")], processor, tmp_path)
    assert state.status is Status.FINISHED and state.query == "the disc"
    same_states(replay((tmp_path / "trajectory.json").read_text()), state)
    mask = read(tmp_path / "mask.png")
    assert mask.shape == (60, 90) and set(np.unique(mask)) == {0, 255}
    np.testing.assert_array_equal(mask == 255, state.masks[0].mask)
    overlay, image = read(tmp_path / "overlay.png"), make_image(60, 90)
    assert overlay.shape == (60, 90, 3)
    # tinted inside, untouched away from the outline
    assert (overlay != image).any(-1)[state.masks[0].mask].mean() > 0.95
    assert (overlay == image).all(-1)[mask == 0].mean() > 0.8
    out = capsys.readouterr().out
    assert '  call     segment {"box": [20, 30, 80, 90]}' in out
    assert "  thought  it is in the middle" in out
    area = 100 * state.masks[0].mask.mean()
    assert f"mask 1, score 0.88, area {area:.1f} %" in out and "a view of" in out
    said, *files = out.splitlines()[-2], *out.splitlines()[-1].split()
    assert f"ended: finished after 3 turns; mask 1: score 0.88, area {area:.1f} %" in out
    assert said == "The tiny policy was never trained on “disc”."
    assert {*files} == {str(path) for path in tmp_path.iterdir()}


@pytest.mark.parametrize(
    ("turns", "status", "says"),
    [
        (["what?", "\x1b[31mred\x07 " * 80, ""], Status.INVALID, "invalid after 3 turns; the mask is empty"),
        ([render_call(Finish(None))], Status.FINISHED, "1 turn; the policy says that the target is not in the picture"),
    ],
)
def test_an_empty_mask_is_written_and_said_to_be_empty(processor, tmp_path, capsys, turns, status, says):
    assert play(turns, processor, tmp_path).status is status
    assert not read(tmp_path / "mask.png").any()
    np.testing.assert_array_equal(read(tmp_path / "overlay.png"), make_image(60, 90))
    out = capsys.readouterr().out
    assert f"ended: {status}" in out and says in out and "\x1b" not in out and "\x07" not in out
    assert ("malformed (no_call)" in out) == (status is Status.INVALID)


def test_a_broken_segmenter_leaves_no_mask(processor, tmp_path):
    play([BOX, render_call(Finish(1))], processor, tmp_path)
    broken = DiscSegmenter(fail=[FailureKind.TIMEOUT])
    says = "segmenter, timeout: as the test asked; there is no mask"
    refused(says, play, [BOX], processor, tmp_path, segmenter=broken)
    assert not (tmp_path / "mask.png").exists()  # not even that of the run before
    assert replay((tmp_path / "trajectory.json").read_text()).status is Status.ENV_FAILED


@pytest.mark.slow
def test_the_command_with_the_tiny_base(tmp_path):
    """The base knows no tools, so it ends early; the command still leaves everything it promises. From Python the
    answer is the same."""
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # the camera was turned: to be shown a quarter turn clockwise
    PIL.Image.fromarray(np.rot90(make_image(90, 150))).save(tmp_path / "photo.png", exif=exif)
    out = tmp_path / "out"
    command = [sys.executable, "-m", "rsagent_jax.segment", str(tmp_path / "photo.png"), "the red circle"]
    command += ["--config.sampling.max_new_tokens=28", "--config.agent.max_turns=2", f"--out={out}"]
    command += ["--config.segmenter.mode=inprocess", f"--weights={TINY}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert "ended: max_turns after 2 turns; the mask is empty" in done.stdout
    assert read(out / "mask.png").shape == (90, 150) and read(out / "overlay.png").shape == (90, 150, 3)
    np.testing.assert_array_equal(read(out / "image.png"), make_image(90, 150))
    state = replay((out / "trajectory.json").read_text())
    assert state.status is Status.MAX_TURNS and state.query == "the red circle"
    config = dataclasses.replace(CONFIG, sampling=dataclasses.replace(CONFIG.sampling, max_new_tokens=28))
    before = jax.config.jax_compilation_cache_dir
    try:
        use_compilation_cache("", out / "compiled")  # the command's programs
        with Agent.load(TINY, segmenter="grabcut", config=config, slots=1) as agent:
            result = agent.segment(tmp_path / "photo.png", "the red circle", max_turns=2)
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
    turns = [turn.text for turn in state.turns]
    assert [turn.text for turn in result.state.turns] == turns and len(set(turns)) == 2
    np.testing.assert_array_equal(result.mask, read(out / "mask.png") == 255)
