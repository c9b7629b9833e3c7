"""At load time a checkpoint's own chat template must write what agent/prompts writes."""

import json
import pathlib

import pytest

from rsagent_jax.agent import prompts
from rsagent_jax.data.processor import Processor
from rsagent_jax.models.qwen25_vl.config import hugging_face
from rsagent_jax.tiny import vocab
from tests.refusals import refused
from tests.rollout import small
from tests.test_imports import TORCH, loaded_after

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
TINY = json.loads((vocab.BASE / "tokenizer_config.json").read_text())["chat_template"]
HUB = (GOLDEN / "qwen25_vl.jinja").read_text()  # as the hub has it: other spellings of an image, numbers on request
TOOLS = (GOLDEN / "qwen25_vl_with_tools.jinja").read_text()  # the same with Qwen2.5's own block about tools


def directory(path, template, layout):
    """small.weights without its weights, and with this template where the layout has it."""
    inside = template if layout == "tokenizer_config.json" else None
    small.policy_files(path, {"tokenizer_config.json": {"chat_template": inside}})
    if layout != "tokenizer_config.json":
        is_json = layout.endswith(".json")
        (path / layout).write_text(json.dumps({"chat_template": template}) if is_json else template)
    return path


@pytest.mark.parametrize("layout", ["tokenizer_config.json", "chat_template.json", "chat_template.jinja"])
@pytest.mark.parametrize("template", [TINY, HUB, TOOLS], ids=["tiny", "hub", "with tools"])
def test_the_templates_of_qwen_write_what_the_prompts_module_writes_wherever_they_are(template, layout, tmp_path):
    Processor.load(directory(tmp_path, template, layout))
    other = template.replace("<|vision_start|><|image_pad|>", "Question: <|vision_start|><|image_pad|>")
    refused("template: .*Question: <.vision_start", Processor.load, directory(tmp_path, other, layout))


def test_weights_without_a_template_have_nothing_to_compare(tmp_path):
    Processor.load(directory(tmp_path, None, "tokenizer_config.json"))


def test_the_system_message_left_out_is_that_of_the_grounding_prompts():
    tokenizer = hugging_face("AutoTokenizer").from_pretrained(small.weights())
    user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Where?"}]}
    for template in (TINY, HUB):
        said = tokenizer.apply_chat_template([user], chat_template=template, tokenize=False, add_generation_prompt=True)
        assert said == prompts.opening(prompts.BASE_SYSTEM, "Where?")


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (
            "<|im_end|>\n{% endif %}{% endfor %}",
            "<|im_end|>{% endif %}{% endfor %}",
            ["<|im_end|><|im_start|>assistant", r"<|im_end|>\n<|im_start|>assistant"],
        ),
        ("<|image_pad|>", "<|image|>", ["<|vision_start|><|image|>", "<|vision_start|><|image_pad|>"]),
        ("{{ message['role'] }}", "{{ raise_exception('no system role') }}", ["cannot write", "no system role"]),
        ("{% for message", "{% message", ["cannot write"]),
    ],
)
def test_another_layout_is_one_error_that_shows_both(old, new, words, tmp_path):
    assert old in HUB
    changed = directory(tmp_path, HUB.replace(old, new), "chat_template.jinja")
    said = refused(f"^{tmp_path}: its chat template ", Processor.load, changed)
    assert all(word in said for word in words), said


def test_opening_a_policy_leaves_torch_out_and_tells_nobody_that_it_is_missing():
    code = f"""
from rsagent_jax.data.processor import Processor
from rsagent_jax.models.qwen25_vl.load import load_policy
import contextlib, io, sys
with contextlib.redirect_stderr(io.StringIO()) as said:
    Processor.load({str(small.weights())!r}), load_policy({str(small.weights())!r})
assert not said.getvalue(), said.getvalue()"""
    assert loaded_after(code, *sorted(TORCH), "transformers") == ["transformers"]
