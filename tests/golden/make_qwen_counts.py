"""Counts tokens with Qwen2.5's real vocabulary for the strings that tests/agent/test_budget.py asks about.

  python tests/golden/make_qwen_counts.py qwen.tiktoken > tests/golden/qwen_counts.json

qwen.tiktoken is Qwen's own list of 151,643 byte pairs, which the package `dashscope` 1.20.14 ships in
dashscope/resources. Qwen2.5's tokenizer.json holds the same pairs, cuts text at the pattern below and adds the special
tokens. Only counts are kept here: the vocabulary is not a part of this repository.
"""

import base64
import functools
import itertools
import json
import pathlib
import re
import sys

from tokenizers import Regex, pre_tokenizers

from rsagent_jax.agent.budget import Texts
from rsagent_jax.config.schema import AgentConfig

PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = re.compile(r"(<\|(?:im_start|im_end|vision_start|vision_end|image_pad)\|>|</?tool_call>)")


def main(path: str) -> None:
    lines = [line.split() for line in pathlib.Path(path).read_bytes().splitlines()]
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    split, counts = pre_tokenizers.Split(Regex(PATTERN), "isolated"), {}

    @functools.cache
    def count_word(word: bytes) -> int:
        parts = [bytes([byte]) for byte in word]
        while len(parts) > 1:
            pairs = [ranks.get(a + b, len(ranks)) for a, b in itertools.pairwise(parts)]
            best = pairs.index(min(pairs))
            if pairs[best] == len(ranks):
                break
            parts[best : best + 2] = [parts[best] + parts[best + 1]]
        return len(parts)

    def encode(text: str) -> range:
        pieces = SPECIAL.split(text)  # every second one is special
        words = [word for piece in pieces[::2] if piece for word, _ in split.pre_tokenize_str(piece)]
        counts[text] = len(pieces) // 2 + sum(count_word(word.encode()) for word in words)
        return range(counts[text])

    for turns in (8, 4):
        Texts.of(AgentConfig(max_turns=turns), encode, (1316, 728))
    print(json.dumps({"source": "dashscope 1.20.14, qwen.tiktoken", "tokens": counts}, indent=1))


if __name__ == "__main__":
    main(sys.argv[1])
