"""A small byte-level BPE in Qwen's form: Qwen's special tokens and chat layout, and one token per number below 256.

Real weights bring their own tokenizer.json; this one belongs to the tiny base. One token per coordinate keeps turns
short on a CPU. Where Qwen2.5 splits numbers into digits, this pre-tokenizer keeps up to three digits together.
"""

import itertools
import json
import pathlib

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from rsagent_jax.agent import prompts
from rsagent_jax.agent.tools import Finish, ResetView, Rotate, Segment, Zoom, render_call
from rsagent_jax.models.qwen25_vl.config import read_json
from rsagent_jax.tiny import scenes

# Qwen2.5's added tokens in their order; the last two are not "special" there either
SPECIAL = (
    "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|>"
    " <|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|>"
).split()
TOOL_TOKENS = ("<tool_call>", "</tool_call>")

# Qwen2.5's pattern with two changes: numbers of up to three digits, and ", " before a number as one piece
PATTERN = (
    r", (?=\p{N})|(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# The shipped base: a new one takes over what its files say beside the tokenizer, the chat template among it.
BASE = pathlib.Path(__file__).parents[2] / "assets/tiny-base"


def build_tokenizer(vocab_size: int = 1024) -> Tokenizer:
    """Trains the BPE on the words this project uses; any other text falls back to bytes. Deterministic."""
    tokenizer = Tokenizer(models.BPE())
    pieces = pre_tokenizers.Split(Regex(PATTERN), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pieces, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    extra = len(SPECIAL) + len(TOOL_TOKENS)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - extra, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in TOOL_TOKENS])
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, directory: pathlib.Path, min_pixels: int, max_pixels: int) -> None:
    """tokenizer.json, tokenizer_config.json with the chat template, preprocessor_config.json, as the hub has them."""
    settings = {name: read_json(BASE / name) for name in ("tokenizer_config.json", "preprocessor_config.json")}
    settings["preprocessor_config.json"] |= {"min_pixels": min_pixels, "max_pixels": max_pixels}
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    for name, content in settings.items():
        (directory / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _corpus():
    numbers = [str(n) for n in range(256)]
    for _ in range(400):
        yield from numbers
    for text in _protocol_texts():
        for _ in range(200):
            yield text
    rng = np.random.default_rng(0)
    words = list(itertools.chain(scenes.COLORS, scenes.SHAPES, scenes.SIZES, scenes.RELATIONS, scenes.SUPERLATIVES))
    for _ in range(4000):
        a, b = rng.choice(words, 2)
        yield f"the {a} {b} one object of"
        yield '"' + prompts.ground_question("bbox_2d", f"the {a} {b}")
        yield prompts.ground_answer("bbox_2d", [rng.integers(0, 112, 4)], [f"the {a} {b}"])
        yield prompts.ground_answer("point_2d", [rng.integers(0, 112, 2)], [f"the {a} {b}"])


def _protocol_texts() -> list[str]:
    """What the environment says and what a well-formed turn looks like."""
    calls = [Segment(box=(1, 2, 3, 4)), Segment(points=((1, 2),), labels=(1,))]
    calls += [Segment(points=((1, 2), (3, 4)), labels=(1, 0), refine=1), Zoom(box=(1, 2, 3, 4))]
    calls += [Rotate(quarter_turns=1), ResetView(), Finish(mask_id=1), Finish(mask_id=None)]
    thoughts = (
        "The object is here; I click on it. I put a box around it. The mask covers the object well, I finish.",
        "Part of it is missing, I add a point there. The mask is wrong and spills over, so I correct it.",
        "I see that one now. This looks right. Let me start again with a new click near the centre.",
    )
    texts = [render_call(call, thought) for call in calls for thought in thoughts]
    texts += [
        prompts.opening(prompts.system_prompt("brief"), prompts.user_text("the object", (112, 112), "brief")),
        prompts.opening(prompts.BASE_SYSTEM, "Detect all objects, output their bbox coordinates in JSON format."),
        prompts.observation_turn(prompts.segment_text(1, 0.9, 0.12, (112, 112), "brief"), True),
        prompts.observation_turn(prompts.view_text((112, 112), "brief"), True),
        prompts.observation_turn("Error: no tool call.", False),
    ]
    return texts
