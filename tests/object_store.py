"""What is in a bucket of the server that speaks S3 on loopback."""

from __future__ import annotations

import http.client
import http.server
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import obstore
from obstore.store import S3Store


def objects(bucket):
    """Return what is in the bucket, by name."""
    store = S3Store(bucket)
    names = [entry["path"] for page in obstore.list(store) for entry in page]
    return {name: bytes(obstore.get(store, name).bytes()) for name in names}


class Proxy(http.server.BaseHTTPRequestHandler):
    """Passes requests on, all but those that `meet` has answered."""

    protocol_version = "HTTP/1.1"
    behind = ""

    def meet(self):
        return False

    def refuse(self, status):
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()
        return True

    def pass_on(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.meet():
            return
        connection = http.client.HTTPConnection(self.behind.removeprefix("http://"))
        connection.request(self.command, self.path, body, dict(self.headers))
        answer = connection.getresponse()
        data = answer.read()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("transfer-encoding", "content-length", "connection"):
                self.send_header(name, value)
        length = answer.getheader("Content-Length", "0") if self.command == "HEAD" else str(len(data))
        self.send_header("Content-Length", length)
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = pass_on  # noqa: N815 - the names that the library calls

    def log_message(self, *_):
        pass


class Flaky(Proxy):
    """Answers every fourth request with 503 and cuts every seventh off."""

    n_requests = 0

    def meet(self):
        type(self).n_requests += 1
        if self.n_requests % 7 == 0:
            self.close_connection = True
            self.connection.close()
            return True
        return self.n_requests % 4 == 0 and self.refuse(503)


@contextmanager
def in_between(handler, server: str, **attributes) -> Iterator[tuple[str, type]]:
    """Put a proxy of some kind before the server; gives its address and its class."""
    handler = type("Here", (handler,), {"behind": server, **attributes})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{proxy.server_port}", handler
        finally:
            proxy.shutdown()


@contextmanager
def flaky(server: str) -> Iterator[tuple[str, Callable[[], int]]]:
    """Give the address of a server that passes requests on when it pleases, and a function that counts them."""
    with in_between(Flaky, server) as (address, handler):
        yield address, lambda: handler.n_requests
