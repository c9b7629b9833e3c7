"""Shows what SFT learns from a stored trajectory: every token, coloured by whether it is trained.

  python -m rsagent_jax.show_tokens --trajectories=runs/quickstart/collect \
      --processor=assets/tiny-base --out=tokens.html [--samples=4]

Green tokens are in the loss (reasoning, tool calls and their terminators), grey ones are context (prompt, observations,
images). Where the log-probs of the policy that played are kept, the redder a token is the less likely it was.
"""

from rsagent_jax.runtime import command

if __name__ == "__main__":
    command.start_command()

import pathlib

from rsagent_jax.config.ranges import CountOrZero
from rsagent_jax.data import trajectories
from rsagent_jax.data.processor import Processor
from rsagent_jax.data.sets.index import spread
from rsagent_jax.models.qwen25_vl.load import processor_directory
from rsagent_jax.report.page import render_page
from rsagent_jax.report.tokens import shown_tokens
from rsagent_jax.runtime.paths import make_directory, write_whole, writing


def tokens_page(directory: pathlib.Path, processor: Processor, samples: int) -> str:
    """The page of so many trajectories of a set, evenly spread; 0 = all."""
    records = trajectories.open_records(directory)
    cards, trained, total = [], 0, 0
    for record in (records[i] for i in spread(len(records), samples)):
        item = trajectories.decode_record(record, processor)
        here, tokens = int(item.loss_mask.sum()), list(shown_tokens(item, processor))
        cards.append((trajectories.record_header(record).get("id", ""), here, len(item.tokens), tokens))
        trained, total = trained + here, total + len(item.tokens)
    title = "What SFT is trained on"
    return render_page("tokens.html", title=title, cards=cards, trained=trained, total=total)


def main(
    *,
    trajectories: pathlib.Path,  # a directory written by collect
    processor: str,  # a Hugging Face directory with the tokenizer
    out: pathlib.Path,  # an HTML file
    samples: CountOrZero = 4,  # how many, evenly spread; 0 = all
) -> None:
    command.check_out_file(out, "out")
    text = tokens_page(trajectories, Processor.load(processor_directory(processor)), samples)
    with writing(f"--out={out}"):
        make_directory(out.parent)
        write_whole(out, text)
    print(out)
