"""TLS, the token, and the rule about addresses; the metrics page; logs as JSON."""

import http.client
import json
import logging
import ssl
import subprocess
import urllib.error
import urllib.request

import grpc
import numpy as np
import pytest
from prometheus_client import generate_latest

from rsagent_jax.runtime.listening import free_port, listeners
from sam_bridge import bridge_pb2 as pb
from sam_bridge import telemetry, wire
from sam_bridge.client import SamClient
from sam_bridge.local import LocalSegmenter
from sam_bridge.security import SetupError, read_token
from sam_bridge.server import Server
from sam_bridge.types import FailureKind, SegmentRequest
from tests.sam_bridge.fakes import BOX, failure, healthy

TOKEN = "a-token-of-forty-letters-for-this-test-x"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Paths of a certificate for 127.0.0.1, its key, and two tokens."""
    folder = tmp_path_factory.mktemp("tls")
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=test"
    command += f" -addext subjectAltName=IP:127.0.0.1 -keyout {folder}/key.pem -out {folder}/cert.pem"
    subprocess.run(command.split(), check=True, capture_output=True)
    (folder / "token").write_text(TOKEN + "\n")
    (folder / "other").write_text(TOKEN[::-1])
    return {name: str(folder / name) for name in ("cert.pem", "key.pem", "token", "other")}


def test_tls_and_token_on_an_open_address(fake, serve, connect, image, files):
    local = LocalSegmenter(fake())
    secure = dict(token=TOKEN, tls_cert=files["cert.pem"], tls_key=files["key.pem"])
    server = serve(local, address="0.0.0.0:0", **secure)
    address = f"127.0.0.1:{server.address.rpartition(':')[2]}"
    client = connect(address, token_file=files["token"], tls_ca=files["cert.pem"])
    assert client.segment(image, BOX).mask.sum() == 37 * 37
    for token_file in ("", files["other"]):
        stranger = connect(address, token_file=token_file, tls_ca=files["cert.pem"])
        error = failure(stranger.segment, image, BOX)
        assert error.kind is FailureKind.INTERNAL and "token" in error.detail
    plain = connect(address, wait_s=0.5)
    assert failure(plain.segment, image, BOX).kind is FailureKind.UNAVAILABLE
    distrustful = connect(address, token_file=files["token"], tls=True, wait_s=0.5)
    assert failure(distrustful.segment, image, BOX).kind is FailureKind.UNAVAILABLE
    assert local.segments == 1


def test_without_the_token_nothing_but_health_answers(fake, serve, files):
    server = serve(LocalSegmenter(fake()), token=TOKEN)
    assert healthy(server.address)
    with grpc.insecure_channel(server.address) as channel:
        stub = wire.rpcs(channel)
        for call, message in (
            (stub.Info, pb.InfoRequest()),
            (stub.Put, pb.PutRequest()),
            (stub.Segment, pb.SegmentRequest()),
        ):
            for token in (None, "", "Bearer", f"Bearer {TOKEN}x", TOKEN, f"bearer {TOKEN}"):
                metadata = () if token is None else (("authorization", token),)
                with pytest.raises(grpc.RpcError) as caught:
                    call(message, timeout=5, metadata=metadata)
                assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        assert stub.Info(pb.InfoRequest(), timeout=5, metadata=(("authorization", f"Bearer {TOKEN}"),)).protocol
    assert (
        'sam_bridge_calls_total{rpc="any",status="unauthenticated"} 18.0'
        in generate_latest(server.metrics.registry).decode()
    )


@pytest.mark.parametrize(
    ("address", "secure", "says"),
    [
        ("0.0.0.0:0", "", "--tls_cert and --tls_key and --token_file.*--insecure"),
        ("0.0.0.0:0", "tls", "give --token_file"),
        ("0.0.0.0:0", "token", "--tls_key,"),
        ("192.0.2.1:0", "", "--insecure"),
        ("[::]:0", "", "--insecure"),
        ("example.com:0", "", "--insecure"),
        (":0", "", "not host:port"),
    ],
)
def test_an_address_off_this_machine_needs_tls_and_a_token(fake, files, address, secure, says):
    tls = dict(tls_cert=files["cert.pem"], tls_key=files["key.pem"])
    with pytest.raises(SetupError, match=says):
        Server(LocalSegmenter(fake()), address, **{"": {}, "tls": tls, "token": dict(token=TOKEN)}[secure])


def test_insecure_allows_it_and_a_port_in_use_is_said(fake, serve, connect, image):
    port = serve(LocalSegmenter(fake()), address="0.0.0.0:0", insecure=True).address.rpartition(":")[2]
    assert connect(f"127.0.0.1:{port}").segment(image, BOX).mask.any()
    with pytest.raises(SetupError, match="Address already in use"):
        Server(LocalSegmenter(fake()), f"127.0.0.1:{port}")


def test_files_that_cannot_be_used(fake, files, tmp_path):
    (tmp_path / "short").write_text("secret")
    (tmp_path / "two").write_text("two words of a good length")
    for name, says in (("short", "at least 16"), ("two", "without spaces"), ("none", "cannot be read: No such file")):
        with pytest.raises(SetupError, match=says):
            read_token(str(tmp_path / name))
    with pytest.raises(SetupError, match="both"):
        Server(LocalSegmenter(fake()), tls_cert=files["cert.pem"])
    with pytest.raises(ValueError, match="in the clear"):
        SamClient(["192.0.2.1:50051"], token_file=files["token"])


def test_metrics_count_calls_images_and_seconds(fake, serve, connect, image):
    local = LocalSegmenter(fake())
    server = serve(local)
    client = connect(server.address)
    for x in (30.0, 40.0):
        client.segment(image, SegmentRequest(box=(10.0, 10.0, x, 40.0)))
    failure(client.segment, image, SegmentRequest(box=(10.0, 10.0, 20.0, 20.0), refine_logits_id="nothing"))
    lines = generate_latest(server.metrics.registry).decode().splitlines()
    for line in (
        'sam_bridge_calls_total{rpc="Segment",status="ok"} 2.0',
        'sam_bridge_calls_total{rpc="Segment",status="unknown_image"} 1.0',
        'sam_bridge_calls_total{rpc="Segment",status="unknown_logits"} 1.0',
        'sam_bridge_calls_total{rpc="Put",status="ok"} 1.0',
        'sam_bridge_seconds_count{rpc="Segment",stage="decode"} 2.0',
        "sam_bridge_encodes_total 1.0",
        f"sam_bridge_image_bytes {float(image.nbytes)}",
        "sam_bridge_waiting 0.0",
    ):
        assert line in lines


def test_the_metrics_page_is_for_this_machine_or_for_who_has_the_token(fake, serve, files):
    registry = serve(LocalSegmenter(fake())).metrics.registry
    secure = dict(token=TOKEN, tls_cert=files["cert.pem"], tls_key=files["key.pem"], insecure=False)
    here, there = free_port(), free_port()
    with pytest.raises(SetupError, match=r"give --token_file, listen on 127.0.0.1"):
        telemetry.serve_metrics(f"0.0.0.0:{there}", registry, **secure | {"token": ""})
    telemetry.serve_metrics(f"127.0.0.1:{here}", registry, **secure)
    telemetry.serve_metrics(f"0.0.0.0:{there}", registry, **secure)
    assert [found.getsockname()[0] for found in listeners(here)] in ([], ["127.0.0.1"])  # none where nothing tells
    trusted = ssl.create_default_context(cafile=files["cert.pem"])

    def page(url: str, **headers: str) -> int:
        try:
            request = urllib.request.Request(f"{url}/metrics", headers=headers)
            with urllib.request.urlopen(request, context=trusted, timeout=5) as answer:
                assert b"sam_bridge_encodes_total" in answer.read()
                return answer.status
        except urllib.error.HTTPError as error:
            return error.code

    assert page(f"http://127.0.0.1:{here}") == 200
    assert page(f"https://127.0.0.1:{there}", Authorization=f"Bearer {TOKEN}") == 200
    assert page(f"https://127.0.0.1:{there}") == page(f"https://127.0.0.1:{there}", Authorization=TOKEN) == 401
    with pytest.raises((OSError, http.client.HTTPException)):
        page(f"http://127.0.0.1:{there}")


def test_a_side_car_listens_where_it_is_told(fake, serve):
    port = int(serve(LocalSegmenter(fake())).address.rpartition(":")[2])
    assert {found.getsockname()[0].removeprefix("::ffff:") for found in listeners(port)} in (set(), {"127.0.0.1"})


def test_json_lines():
    record = logging.LogRecord("sam_bridge.server", logging.WARNING, "", 0, "%s failed: %s", ("Put", "é\n"), None)
    record.fields = {"rpc": "Put", "seconds": np.float64(0.5)}
    line = telemetry.JsonLines().format(record)
    assert "\n" not in line
    read = json.loads(line)
    assert read["message"] == "Put failed: é\n" and read["rpc"] == "Put" and read["level"] == "warning"
