"""A bucket on loopback for tests: gcp-storage-emulator, and the preconditions of the real service that it lacks."""

import logging
from collections.abc import Callable
from http import HTTPStatus

from gcp_storage_emulator import server
from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers.buckets import create_bucket
from gcp_storage_emulator.storage import Storage

logging.getLogger("gcp_storage_emulator").setLevel(logging.CRITICAL)


def with_preconditions(handler: Callable) -> Callable:
    """tensorstore reads and writes by generation: https://cloud.google.com/storage/docs/request-preconditions."""

    def handle(request, response, storage: Storage) -> None:
        names = request.params or {}
        name = names.get("object_id") or request.query.get("name", [""])[0]
        try:
            generation = storage.get_file_obj(names.get("bucket_name"), name)["generation"]
        except NotFound:
            generation = "0"
        storage.left = None if storage.left is None else storage.left - 1
        if storage.left is not None and storage.left < 0:
            response.status = HTTPStatus.SERVICE_UNAVAILABLE
        elif storage.forbidden:
            response.status = HTTPStatus.FORBIDDEN
        elif request.query.get("ifGenerationMatch", [generation]) != [generation]:
            response.status = HTTPStatus.PRECONDITION_FAILED
        elif request.query.get("ifGenerationNotMatch") == [generation]:
            response.status = HTTPStatus.NOT_MODIFIED
        else:
            handler(request, response, storage)
            if request.query.get("alt") == ["media"]:
                response["x-goog-generation"] = generation
            if storage.halt and any(name.startswith(storage.halt) for name in storage.objects.get("bucket", {})):
                storage.left = 0

    return handle


HANDLERS = [(path, {m: with_preconditions(h) for m, h in handlers.items()}) for path, handlers in server.HANDLERS]


class LoopbackBucket:
    """gs://bucket. It may go away and come back with what it held: `stop`, `start`; `storage.forbidden` refuses all;
    `storage.left` requests are answered, if it is a number, and none after them; none once there is an object whose
    name begins with `storage.halt`."""

    def __init__(self):
        server.HANDLERS = HANDLERS
        self.storage, self.port = Storage(use_memory_fs=True), 0
        self.storage.forbidden, self.storage.left, self.storage.halt = False, None, ""
        create_bucket("bucket", self.storage)
        self.start()

    @property
    def environment(self) -> dict[str, str]:
        """What leads gcsfs, google-cloud-storage and tensorstore here."""
        url = f"http://127.0.0.1:{self.port}"
        return {"STORAGE_EMULATOR_HOST": url, "TENSORSTORE_GCS_HTTP_URL": url, "GOOGLE_CLOUD_PROJECT": "tests"}

    def start(self) -> None:
        self.api = server.APIThread("127.0.0.1", self.port, self.storage, daemon=True)
        self.api.start()
        self.api.is_running.wait()
        self.api._httpd.handle_error = lambda *_: None  # a client that was killed
        self.port = self.api._httpd.server_port

    def stop(self) -> None:
        self.api.join()

    def names(self, prefix: str) -> list[str]:
        """Of the objects below gs://bucket/prefix."""
        return sorted(name for name in self.storage.objects.get("bucket", {}) if name.startswith(prefix))
