"""Shows the trajectories of a run, an evaluation or a collection in a browser, while they are played, too.

  python -m rsagent_jax.view DIR [DIR2] [--port=8000]         http://127.0.0.1:8000
  python -m rsagent_jax.view DIR [DIR2] --export=page.html    one file that needs neither server nor network

DIR is the work directory of evaluate.py, collect, train.py or reproduce, or a stored set. DIR2 is another policy on the
same samples: its trajectories stand beside those of DIR. docs/view.md has the page, its keys and its links.
"""

from rsagent_jax.runtime import command

if __name__ == "__main__":
    command.start_command()

import contextlib
import pathlib
import urllib.parse

from rsagent_jax.config.ranges import Count, CountOrZero
from rsagent_jax.report.rows import LOOKED_FOR
from rsagent_jax.report.viewer import Viewer, export_page, serve
from rsagent_jax.runtime.paths import make_directory, write_whole, writing
from rsagent_jax.types import DataError


def main(
    directory: pathlib.Path,
    /,
    *second: pathlib.Path,
    port: CountOrZero = 8000,  # of the loopback interface; 0 = any that is free
    export: pathlib.Path | None = None,  # an HTML file to write, instead of serving
    rows: Count = 200,  # of --export: how many trajectories
    query: str = "",  # of --export: which, and in which order, as behind the # of a link: sort=-iou&turns=3..
    processor: str = "",  # a Hugging Face directory with the tokenizer, for tokens; "" = the run's
) -> None:
    if len(second) > 1:
        raise DataError(f"two directories can be held against each other, not {len(second) + 1}")
    command.check_out_file(export, "export")
    viewer = Viewer([directory, *second], processor)
    viewer.refresh()
    found = ", ".join(f"{n} in {i.directory}" for i in viewer.indexes for n in [len(i.rows)])
    print(f"trajectories: {found}")
    if not viewer.all:
        print(f"nothing that could be shown is in {directory} yet: {LOOKED_FOR}, there or in its folders")
    if export:
        if not viewer.all:
            raise DataError(f"{directory} has no trajectories that could be exported")
        text, shown, total = export_page(viewer, dict(urllib.parse.parse_qsl(query)), rows)
        with writing(export):
            make_directory(export.parent)
            write_whole(export, text)
        print(f"{export}: {shown} of {total} trajectories, {len(text) / 1e6:.1f} MB")
        return
    with serve(viewer, port) as server, contextlib.suppress(KeyboardInterrupt):
        host, bound = server.server_address[:2]
        print(f"http://{host}:{bound}  (Ctrl-C ends it)", flush=True)
        server.serve_forever()
