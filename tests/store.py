"""An object store on this machine for tests: moto's S3 behind a door that counts, refuses what no store has, and fails on
demand."""

import contextlib
import datetime
import logging
import os
import re
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

from dail_jax import storage

BUCKET = "bucket"


class Store:
    """A running server. `requests` are (method, key, first byte, bytes) of what was asked for."""

    def __init__(self):
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self.app = DomainDispatcherApplication(create_backend_app)
        self.server = make_server("127.0.0.1", 0, self._ask, threaded=True)
        self.requests: list[tuple[str, str, int, int]] = []
        self.failing = lambda method, key: False  # True: this request fails with 503
        self.environment = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.server.port}",
            "AWS_ALLOW_HTTP": "true",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_REGION": "us-east-1",
        }
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.send("PUT", "")

    def _ask(self, environ, start):
        method, key = environ["REQUEST_METHOD"], environ["PATH_INFO"].removeprefix(f"/{BUCKET}").strip("/")
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", environ.get("HTTP_RANGE", ""))
        first, last = map(int, found.groups()) if found else (0, -1)
        self.requests.append((method, key, first, last + 1 - first))
        assert "HTTP_X_AMZ_COPY_SOURCE" not in environ, f"{key}: a store has no rename"
        if self.failing(method, key):
            start("503 Slow Down", [("Content-Type", "text/plain")])
            return [b"slow down"]
        return self.app(environ, start)

    def send(self, method: str, key: str, data: bytes = b"") -> bytes:
        """A request of the test's own."""
        url = f"{self.environment['AWS_ENDPOINT_URL']}/{BUCKET}/{key}"
        login = "AWS4-HMAC-SHA256 Credential=key/20260101/us-east-1/s3/aws4_request"
        headers = {"Authorization": login, "Content-Type": "application/octet-stream"}
        with urllib.request.urlopen(urllib.request.Request(url, data or None, headers, method=method)) as reply:
            return reply.read()

    def put(self, key: str, data: bytes | Path) -> str:
        """Puts an object, or a folder's files, there; returns its URL."""
        if isinstance(data, Path):
            for file in data.rglob("*"):
                if file.is_file():
                    self.send("PUT", f"{key}/{file.relative_to(data).as_posix()}", file.read_bytes())
        else:
            self.send("PUT", key, data)
        return f"s3://{BUCKET}/{key}"

    def keys(self, prefix: str) -> list[str]:
        return sorted(re.findall(r"<Key>([^<]+)</Key>", self.send("GET", f"?list-type=2&prefix={prefix}").decode()))

    def read(self) -> list[tuple[str, int, int]]:
        """The ranges that have been read since the last call: (key, first byte, bytes)."""
        found = [(key, first, size) for method, key, first, size in self.requests if method == "GET" and size > 0]
        self.requests.clear()
        return found


def forget() -> None:
    """What a new process does not know."""
    for cached in (storage._folder, storage.look, storage._bucket):
        cached.cache_clear()
    storage._LEFT.clear()


@contextlib.contextmanager
def running(cache: Path) -> Iterator[Store]:
    """A store that this process and its children use, and that nobody waits for between two attempts."""
    store = Store()
    quick = {"init_backoff": datetime.timedelta(milliseconds=2), "max_backoff": datetime.timedelta(milliseconds=4)}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**store.environment, storage.CACHE: str(cache)}.items():
            patch.setitem(os.environ, name, value)
        patch.setattr(storage, "RETRY", {**storage.RETRY, "backoff": {**quick, "base": 2}})
        forget()
        yield store
        forget()
    store.server.shutdown()
