"""Files of an exported policy that servers read beside its weights, so that they talk to it as we do."""

import json
import pathlib
from typing import Any

from rsagent_jax.config.import_path import shipped
from rsagent_jax.data.chat_template import own_template
from rsagent_jax.data.processor import IMAGE_PAD, Processor
from rsagent_jax.models.qwen25_vl.config import hugging_face, read_json
from rsagent_jax.runtime.paths import write_whole

PLACEHOLDERS = (IMAGE_PAD, "<|video_pad|>")  # where a server puts an image; one too many, and it does not answer
# transformers' server takes thought and calls out of a Qwen's answer, and fails at a malformed call. This leaves a
# turn as it was written.
VERBATIM = {
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "content": {"content": "text", "content_args": {"strip": False}, "close_pattern": r"<\|(im_end|endoftext)\|>"}
    },
}


def write_serving_files(source: pathlib.Path, out: pathlib.Path) -> None:
    """Into `out`, a copy of the policy's files in `source`:

    chat_template.jinja    where every processor and server looks; Qwen2.5-VL's layout where the source has none
    tokenizer_config.json  with the rule by which transformers' server reads an answer
    generation_config.json what ends a turn, and no sampling of its own: Qwen2.5-VL's has a repetition penalty, which a
                           policy of ours never met, and servers apply it unasked

    DataError for a source whose template has another layout.
    """
    ends = sorted(Processor.load(source).end_ids)
    template = _template(source) or _template(pathlib.Path(shipped("assets/tiny-base")))
    write_whole(out / "chat_template.jinja", template)
    tokenizer, generation = (_read(out / f"{name}_config.json") for name in ("tokenizer", "generation"))
    _write(out / "tokenizer_config.json", tokenizer | {"response_template": VERBATIM})
    kept = {name: generation[name] for name in ("bos_token_id", "pad_token_id") if name in generation}
    _write(out / "generation_config.json", kept | {"eos_token_id": ends, "do_sample": True, "top_k": 0})


def _read(path: pathlib.Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _write(path: pathlib.Path, values: dict[str, Any]) -> None:
    write_whole(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def _template(directory: pathlib.Path) -> str | None:
    tokenizer = hugging_face("AutoTokenizer").from_pretrained(directory, local_files_only=True)
    given = own_template(directory, tokenizer)
    return tokenizer.get_chat_template(given) if given else None
