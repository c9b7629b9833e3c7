"""Who may listen where, and who may call: TLS, a bearer token, and that loopback needs neither."""

import errno
import hmac
import ipaddress
import pathlib
import socket
from collections.abc import Callable

import grpc

from sam_bridge import wire

TOKEN_KEY = "authorization"
MIN_TOKEN = 16  # characters
HEALTH = "/grpc.health.v1.Health/"  # answered without a token: it tells only that somebody is there


class SetupError(ValueError):
    """An address, token or certificate file that cannot be used. The message says which, why and what to do."""


def read_secret_file(path: str, what: str) -> bytes:
    """SetupError, which says `what` it is, when it cannot be read."""
    try:
        return pathlib.Path(path).read_bytes()
    except OSError as error:
        raise SetupError(f"the {what} file {path} cannot be read: {error.strerror}") from error


def read_token(path: str) -> str:
    """The token in a file; "" for no file. SetupError when it is empty, short, or cannot be a header."""
    if not path:
        return ""
    token = read_secret_file(path, "token").decode("ascii", "replace").strip()
    if len(token) < MIN_TOKEN or not token.isascii() or not token.isprintable() or " " in token:
        raise SetupError(
            f"the token in {path} must be at least {MIN_TOKEN} printable characters without spaces:"
            ' python -c "import secrets; print(secrets.token_urlsafe())" makes one'
        )
    return token


def server_credentials(cert_file: str, key_file: str) -> grpc.ServerCredentials | None:
    """From two PEM files; None when neither is named."""
    if bool(cert_file) != bool(key_file):
        raise SetupError("TLS needs both a certificate and its key: --tls_cert and --tls_key")
    if not cert_file:
        return None
    pair = (read_secret_file(key_file, "key"), read_secret_file(cert_file, "certificate"))
    return grpc.ssl_server_credentials([pair])


class TokenCheck(grpc.ServerInterceptor):
    """Turns away calls without the token, before their message is read."""

    def __init__(self, token: str, on_refusal: Callable[[], None] = lambda: None):
        self._expected, self._on_refusal = f"Bearer {token}".encode(), on_refusal

        def refuse(_: bytes, context: grpc.ServicerContext) -> None:
            context.set_trailing_metadata(((wire.REASON_KEY, wire.UNAUTHENTICATED),))
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "the token is missing or wrong")

        self._refusal = grpc.unary_unary_rpc_method_handler(refuse)

    def intercept_service(self, continuation, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        given = next((value for key, value in details.invocation_metadata if key == TOKEN_KEY), "")
        given = given if isinstance(given, bytes) else given.encode()
        if details.method.startswith(HEALTH) or hmac.compare_digest(given, self._expected):
            return continuation(details)
        self._on_refusal()
        return self._refusal


def is_loopback(address: str) -> bool:
    """True for `localhost:port`, 127.0.0.0/8 and [::1]. SetupError when it is not host:port."""
    host, colon, port = address.rpartition(":")
    if not (colon and host and port.isascii() and port.isdigit() and int(port) < 65536):
        raise SetupError(f"address {address!r} is not host:port, such as 127.0.0.1:50051")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.removeprefix("[").removesuffix("]")).is_loopback
    except ValueError:
        return False


def check_address(address: str, *, token: str, tls: bool, insecure: bool, secret: str = "--token_file") -> None:
    """SetupError for an address that is malformed, in use, or open to other machines without TLS and a token, which the
    flag `secret` gives."""
    loopback = is_loopback(address)
    missing = " and ".join(name for name, there in (("--tls_cert and --tls_key", tls), (secret, token)) if not there)
    if not loopback and missing and not insecure:
        raise SetupError(
            f"{address} can be reached from other machines: give {missing}, listen on 127.0.0.1,"
            " or pass --insecure on a network that you trust"
        )
    host, _, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    try:  # gRPC's own error does not say why; a plain socket does
        family, kind, proto, _, target = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, proto) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(target)
    except OSError as error:
        hint = "; is another one running? Pick another --address" if error.errno == errno.EADDRINUSE else ""
        raise SetupError(f"cannot listen on {address}: {error.strerror}{hint}") from error
