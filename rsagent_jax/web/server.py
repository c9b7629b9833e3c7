"""The demo's page behind a port: its looks, who may ask for it, and until when."""

import concurrent.futures
import contextlib
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import fastapi
import gradio as gr
import uvicorn
from starlette.middleware.trustedhost import TrustedHostMiddleware

from rsagent_jax.web.page import DemoPage
from sam_bridge.security import is_loopback

CSS = """
.turns ol {list-style: none; margin: 0; padding: 0}
.turns li {border-left: 4px solid var(--color-accent); padding: 2px 0 2px 12px; margin: 0 0 12px}
.turns li.you {border-left-color: #c2410c}
.turns dl {display: grid; grid-template-columns: 5em 1fr; gap: 2px 8px; margin: 4px 0 0}
.turns dt {color: var(--body-text-color)} .turns dd {margin: 0; overflow-wrap: anywhere; font-family: var(--font-mono)}
.status {min-height: 3em}
input[type=radio]:checked {background-color: var(--checkbox-background-color-selected) !important} /* hovered, too */
"""


def mount_page(page: DemoPage, users: Sequence[tuple[str, str]], address: str) -> fastapi.FastAPI:
    """The page as an app at /, for these users (none: for anybody). On loopback it answers to this machine's own names
    alone: a page elsewhere could lead a name of its own here."""
    app = fastapi.FastAPI(openapi_url=None)
    if is_loopback(address):
        hosts = ["localhost", "127.0.0.1", address.rpartition(":")[0]]
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=hosts)
    # No fonts from elsewhere; texts that stand out from what is behind them by 4.5 to 1.
    theme = gr.themes.Default(primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["monospace"])
    blue, grey = "*primary_700", "*neutral_600"
    theme.set(button_primary_background_fill=blue, button_primary_background_fill_dark=blue)
    theme.set(link_text_color_dark="*primary_300", body_text_color_subdued_dark="*neutral_300")
    theme.set(body_text_color_subdued=grey, block_label_text_color=grey, block_title_text_color=grey)
    theme.set(input_placeholder_color=grey)
    looks = dict(theme=theme, css=CSS, footer_links=[], run_history=False)
    limits = dict(max_file_size=f"{page.limits.max_mb}mb", auth=list(users) or None, enable_monitoring=False)
    blocks = page.blocks()
    blocks.has_launched = True  # only launch() sets it; else Gradio takes any path of this machine for an upload
    return gr.mount_gradio_app(app, blocks, "", ssr_mode=False, show_error=False, mcp_server=False, **looks, **limits)


def open_listener(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    return socket.create_server((host, int(port)), family=socket.AF_INET6 if ":" in host else socket.AF_INET)


def serve_page(
    app: Any, listener: socket.socket, agent: concurrent.futures.Future, load: Callable[[], Any], **tls: str | None
) -> None:
    """Until Ctrl-C or SIGTERM. The page is there first; `agent` gets what `load` gives. Raises what `load` raises."""
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1, **tls))

    def work() -> None:
        while not server.started and not server.should_exit:  # loading would hold up the page
            time.sleep(0.05)
        try:
            agent.set_result(load())
            print("the policy is ready", flush=True)
        except BaseException as error:  # noqa: BLE001 - raised below
            agent.set_exception(error)
            server.should_exit = True

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # or the folder of pictures would be left behind
    threading.Thread(target=work, daemon=True).start()
    with contextlib.suppress(KeyboardInterrupt):
        server.run(sockets=[listener])
    if agent.done():
        agent.result().close()
