"""The agent in a browser: upload a picture, ask, watch the turns, correct the mask, take it away.

  python -m rsagent_jax.demo [--weights=HF_DIR_OR_CHECKPOINT] [--segmenter=FILE.pt]      http://127.0.0.1:7860

Without flags the tiny policy that comes with the package answers, with GrabCut: nothing is downloaded. docs/demo.md has
the page, and who may reach it.
"""

from rsagent_jax.runtime import command, preemption

if __name__ == "__main__":
    command.start_command()

import concurrent.futures
import importlib.util
import os
import pathlib
import ssl
import tempfile
from typing import Any

import numpy as np
from PIL import Image

from rsagent_jax.config.ranges import Count
from rsagent_jax.config.schema import SegmentConfig
from rsagent_jax.models.qwen25_vl.config import LARGE, load_config
from rsagent_jax.models.qwen25_vl.load import processor_directory
from rsagent_jax.tiny import scenes
from rsagent_jax.types import DataError
from sam_bridge.security import SetupError, check_address, is_loopback, read_secret_file

AUTH = "RSAGENT_DEMO_AUTH"  # of the environment, in place of --auth: name:password
CACHE = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "rsagent_jax" / "compiled"
SCENES = ((2, "every yellow square"), (1, "the large square"), (9, "the blue circle"))  # of examples: seed, question


def main(
    config: SegmentConfig = "configs/segment.py",
    *,
    weights: str = "",  # a Hugging Face directory, org/name or checkpoints/<stage>[@best]; in place of policy.weights
    segmenter: str = "",  # grabcut, host:port of a side-car, or SAM 2's FILE.pt or org/name; in place of segmenter.*
    address: str = "127.0.0.1:7860",  # host:port; port 0 picks a free one
    auth: str = "",  # file with name:password on each line; or one such pair in RSAGENT_DEMO_AUTH
    tls_cert: str = "",  # PEM file; with --tls_key
    tls_key: str = "",  # PEM file
    insecure: bool = False,  # allow other machines without TLS and --auth
    slots: Count = 4,  # trajectories at a time
    waiting: Count = 32,  # questions that may wait for a slot
    per_minute: Count = 30,  # questions and corrections of one user; of one address without --auth
    max_mb: Count = 20,  # of a picture's file
    max_megapixels: Count = 25,  # of a picture
) -> None:
    users = check_access(address, auth, tls_cert, tls_key, insecure)
    if importlib.util.find_spec("gradio") is None:
        raise DataError("the demo's page is made with Gradio, which is not installed: pip install -e '.[web]'")
    weights = weights or config.policy.weights
    tiny = load_config(processor_directory(weights)).text.hidden_size < LARGE
    for name in [name for name in os.environ if name.startswith("GRADIO_")]:
        del os.environ[name]  # GRADIO_SHARE and others change what is served, and to whom
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    with tempfile.TemporaryDirectory(prefix="rsagent-demo-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = f"{folder}/gradio"
        agent: concurrent.futures.Future[Any] = concurrent.futures.Future()
        from rsagent_jax.web import page, server  # after the settings above

        limits = page.Limits(slots, waiting, per_minute, max_mb, max_megapixels)
        examples = draw_examples(pathlib.Path(folder)) if tiny else []
        demo = page.DemoPage(agent, limits, pathlib.Path(folder), examples, page.KNOWS * tiny)
        app = server.mount_page(demo, users, address)

        def load() -> Any:
            from rsagent_jax.api import Agent  # brings jax; the page is there before it

            command.quieten()
            command.use_compilation_cache(config.cache_dir, CACHE)
            chosen = segmenter or config.segmenter
            return Agent.load(weights, config=config, segmenter=chosen, slots=slots, warm_up=True)

        listener = server.open_listener(address)
        print(f"policy: {weights}")
        host, port = address.rpartition(":")[0], listener.getsockname()[1]
        print(f"http{'s' * bool(tls_cert)}://{host}:{port}  (Ctrl-C ends it)", flush=True)
        server.serve_page(app, listener, agent, load, ssl_certfile=tls_cert or None, ssl_keyfile=tls_key or None)
    if not agent.done():
        preemption.leave(0)  # Python's own end would break a thread off that compiles, which aborts


def check_access(address: str, auth: str, tls_cert: str, tls_key: str, insecure: bool) -> list[tuple[str, str]]:
    """The users who may log in, none where anybody may. DataError for what cannot be used, and for a page that other
    machines could reach without TLS and a password."""
    try:
        users = _read_users(auth)
        if bool(tls_cert) != bool(tls_key):
            raise SetupError("TLS needs both a certificate and its key: --tls_cert and --tls_key")
        for file, what in ((tls_cert, "certificate"), (tls_key, "key")):
            _ = file and read_secret_file(file, what)
        if tls_cert:  # "": no question for the password of a key that has one
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(tls_cert, tls_key, password="")
        check_address(address, token="there" * bool(users), tls=bool(tls_cert), insecure=insecure, secret="--auth")
    except SetupError as error:
        raise DataError(str(error)) from None
    except ssl.SSLError as error:
        what = f"--tls_cert={tls_cert} and --tls_key={tls_key} are no certificate and its key"
        raise DataError(f"{what}: give both as PEM, the key without a password ({error})") from None
    if not is_loopback(address) and not (users and tls_cert):
        print(f"warning: {address} can be reached from other machines without TLS and a password, as --insecure allows")
    return users


def _read_users(auth: str) -> list[tuple[str, str]]:
    """Of the file, or of the environment."""
    try:
        text = read_secret_file(auth, "--auth").decode() if auth else os.environ.get(AUTH, "")
    except UnicodeDecodeError:
        raise SetupError(f"the --auth file {auth} is not UTF-8: save it as that") from None
    pairs = [line.strip().partition(":") for line in text.splitlines() if line.strip()]
    users = [(name.strip(), password) for name, _, password in pairs]
    if (auth and not users) or not all(name and password for name, password in users):
        raise SetupError(f"{auth or AUTH} must hold name:password, one on each line")
    if len(dict(users)) < len(users):
        raise SetupError(f"{auth or AUTH} holds a name twice: leave one line for each")
    return users


def draw_examples(folder: pathlib.Path) -> list[tuple[str, str]]:
    """(file, question) of scenes like those that the tiny policy was trained on."""
    photos, config, made = scenes.load_photos(), scenes.SceneConfig(), []
    for seed, question in SCENES:
        file = folder / f"scene-{seed}.png"
        Image.fromarray(scenes.make_scene(np.random.default_rng([20, seed]), config, photos).image).save(file)
        made.append((str(file), question))
    return made
