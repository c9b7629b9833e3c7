"""Problems from an endpoint: what is unusable is counted, a stopped command goes on, the folder loader reads them."""

import base64
import contextlib
import dataclasses
import io
import json

import numpy as np
import pytest
from agent_fakes import disc
from PIL import Image

from configs import problems as problems_config
from rsagent_jax.collecting import problem_writer
from rsagent_jax.collecting.problem_writer import ANSWERS, ProblemWriter, write_set
from rsagent_jax.config.build import build_config
from rsagent_jax.config.schema import ProblemsConfig, RemoteConfig
from rsagent_jax.data.sets import folder
from rsagent_jax.problems import problems_resume_fingerprint
from rsagent_jax.runtime.journal import Journal
from rsagent_jax.runtime.processes import Share
from rsagent_jax.types import DataError
from tests.collecting.test_endpoint import Server, good
from tests.refusals import refused
from tests.rollout import small

GOOD = ("Which thing would roll away if nobody held it?", "What here has no corner that could hurt you?")


@pytest.fixture
def samples(tmp_path):
    """Three objects: two on picture 0, one on picture 1, which has ignored pixels and is no file of its own."""
    out = []
    for i, number in enumerate((0, 0, 1)):
        sample = small.sample(number)
        Image.fromarray(sample.image).save(tmp_path / f"{number}.png")
        mask = disc(112, 112, 30 + 40 * i, 56, 14)
        path = str(tmp_path / f"{number}.png") if number == 0 else ""
        more = {"ignore_mask": disc(112, 112, 20, 20, 5)} if number else {}
        out.append(dataclasses.replace(sample, id=f"o{i}", query=f"disc {i}", gt_mask=mask, path=path, **more))
    return out


def answer(*queries):
    return good("```json\n" + json.dumps({"queries": list(queries)}) + "\n```")


def write(workdir, samples, server, **more):
    """One run over what is left; the Writer."""
    remote = RemoteConfig(url=server.url, model="m", backoff_s=0.001, retries=1, concurrent=2)
    config = ProblemsConfig(**{"writer": remote, "picture_size": 80} | more)
    answers = Journal(workdir / ANSWERS, Share(), {}, {f"o{i}": "as ever" for i in range(len(samples))})
    left = [(i, i) for i in range(len(samples)) if f"o{i}" not in answers.done]
    writer = ProblemWriter(config, samples, workdir, answers)
    with contextlib.closing(answers):
        writer.run(left, len(samples))
    return writer, config


def of(body) -> str:
    """The object that a request is about."""
    return body["messages"][0]["content"][2]["text"].split('calls it "')[1].split('"')[0]


def test_queries_become_a_data_set_and_what_is_unusable_is_counted(tmp_path, samples):
    said = {
        "disc 0": [answer(*GOOD, "One query more than was asked for, to be left out")],
        "disc 1": [good("I cannot do that."), answer(GOOD[0].upper(), "What is under the blue mask that you see?")],
        "disc 2": [answer("Too short", "A ball of which nobody knows where it will stop?")],
    }
    with Server([lambda body: said[of(body)].pop(0)]) as server:
        writer, config = write(tmp_path / "w", samples, server)
    assert writer.failures.counts == {} and len(server.asked) == 4
    assert write_set(tmp_path / "w", config, {}) == 2
    report = json.loads((tmp_path / "w/problems.json").read_text())
    wanted = {"malformed answer": 1, "speaks of the mark": 1, "too short or too long": 1, "said of two objects": 2}
    assert report["left_out"] == wanted and report["problems"] == 2
    first, second = folder.load_folder(tmp_path / "w", "train")
    assert first.id == "folder/train/o0/1" and first.query == GOOD[1] and first.path == samples[0].path
    np.testing.assert_array_equal(first.gt_mask, samples[0].gt_mask)
    assert second.id == "folder/train/o2/0" and "pictures" in second.path
    np.testing.assert_array_equal(second.image, samples[2].image)
    np.testing.assert_array_equal(second.gt_mask, samples[2].gt_mask)
    np.testing.assert_array_equal(second.ignore_mask, samples[2].ignore_mask)


def test_the_writer_sees_the_picture_and_the_object_marked(tmp_path, samples):
    with Server([answer(*GOOD)]) as server:
        write(tmp_path / "w", samples[:1], server)
    plain, marked, text = server.asked[0]["messages"][0]["content"]
    decode = lambda part: Image.open(io.BytesIO(base64.b64decode(part["image_url"]["url"].split(",")[1])))  # noqa: E731
    plain, marked = (np.asarray(decode(part)).astype(int) for part in (plain, marked))
    assert plain.shape == marked.shape == (80, 80, 3) and "Write 2 queries" in text["text"]
    changed = np.abs(plain - marked).sum(axis=2) > 40
    ys, xs = np.nonzero(changed)  # the disc of radius 14 in the middle left of 112 pixels, at 80
    assert abs(xs.mean() - 30 * 80 / 112) < 2 and abs(ys.mean() - 40) < 2 and xs.max() - xs.min() < 25


def test_what_failed_is_counted_and_asked_again_by_the_next_start(tmp_path, samples):
    class Broken(list):
        ids = ("o0", "o1", "o2")

        def __getitem__(self, i):
            if i == 0:
                raise DataError("picture 0 is missing")
            return super().__getitem__(i)

    with Server([lambda body: (400, {}, "{}") if of(body) == "disc 1" else good("no")]) as server:
        writer, _ = write(tmp_path / "w", Broken(samples), server)
    assert writer.failures.counts == {"unreadable sample": 1, "endpoint, refused": 1, "malformed answer": 1}
    empty = dataclasses.replace(samples[2], gt_mask=np.zeros((112, 112), bool))
    with Server([lambda body: answer(*GOOD) if of(body) == "disc 0" else good("no")]) as server:
        writer, config = write(tmp_path / "w", [*samples[:2], empty], server)
        # an empty mask asks nothing
        assert writer.failures.counts == {"malformed answer": 1} and len(server.asked) == 3
        write_set(tmp_path / "w", config, dict(writer.failures.counts))
    report = json.loads((tmp_path / "w/problems.json").read_text())
    assert report["not_answered"] == {"malformed answer": 1} and report["left_out"] == {"no target to ask for": 1}
    with Server([answer("What would you never want to swallow by mistake?")]) as server:
        writer, config = write(tmp_path / "w", [*samples[:2], empty], server)
        assert len(server.asked) == 1 and write_set(tmp_path / "w", config, {}) == 3


@pytest.mark.parametrize(
    ("text", "match"),
    [("", "no JSON"), ("} {", "no JSON"), ("{", "no JSON"), ('{"queries": "x"}', "list"), ('{"queries": [1]}', "list"),
     ('{"q": []}', "KeyError"), ('{"queries": ["a", ]}', "JSONDecodeError"), ("{" * 100_000 + "}", "no JSON")],
)  # fmt: skip
def test_an_answer_that_cannot_be_read_is_typed(text, match):
    with pytest.raises(problem_writer.BadAnswer, match=match):
        problem_writer.read_answer(text)


def test_a_query_is_kept_only_if_it_can_stand_alone():
    for query, name, reason in (
        ("What keeps the rain off?", "umbrella", None),
        ("The  Umbrella, on the left!", "the umbrella on the left", "the data set's own words"),
        ("What is outlined in yellow?", "x", "speaks of the mark"),
        ("What stands there <|im_end|> now?", "x", "cannot stand in a prompt"),
        ("Go on", "x", "too short or too long"),
        ("a " * 9, "x", "too short or too long"),
    ):
        assert problem_writer.fault(query, name, (3, 8)) == reason


def test_the_config_is_the_commands_and_names_its_own_fields(tmp_path):
    config = problems_config.get_config()
    built = build_config(ProblemsConfig, config)
    assert built.data.unit == "reference" and "refcocog/umd/test" in built.data.exclude
    assert set(problems_resume_fingerprint(built)["writer"]) == {"url", "model", "temperature", "max_tokens"}
    writer = ProblemWriter(built, [], tmp_path, None)
    refused(r"writer.url and writer.model are needed", writer.run, [], 0)
