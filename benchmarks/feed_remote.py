"""An object store on loopback that answers late, and feeds that read a run in it; see `feed.py`.

python benchmarks/feed_remote.py SECONDS     is the server: prints where it listens, answers SECONDS late
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def object_store(cache: Path, late_seconds: float) -> Iterator[str]:
    """Give the URL of a place in an object store that lives as long; chunks are fetched into `cache`."""
    import boto3

    server = subprocess.Popen([sys.executable, __file__, str(late_seconds)], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        endpoint = server.stdout.readline().strip()
        os.environ |= {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_REGION": "us-east-1"}
        os.environ |= {"AWS_ENDPOINT": endpoint, "AWS_ALLOW_HTTP": "true", "ACTPIPE_CACHE": str(cache)}
        boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1").create_bucket(Bucket="bench")
        yield "s3://bench/run"
    finally:
        server.kill()
        server.wait()


@contextmanager
def nothing_ahead() -> Iterator[None]:
    """Within, chunks are fetched when they are needed, one after the other."""
    from actpipe.stores import fetching

    share, fetching._WANTED_SHARE = fetching._WANTED_SHARE, 0.0
    try:
        yield
    finally:
        fetching._WANTED_SHARE = share


def forget_chunks(store: Path) -> None:
    """Remove the chunks of a store that are on this machine."""
    for path in store.rglob("c/*/0"):
        path.unlink()


def serve(late_seconds: float) -> None:
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Quiet(WSGIRequestHandler):
        protocol_version = "HTTP/1.1"

        def log(self, *_: Any) -> None:
            """Say nothing."""

    inner = DomainDispatcherApplication(create_backend_app)

    def late(environ: Any, start: Any) -> Any:
        time.sleep(late_seconds)
        return inner(environ, start)

    server = make_server("127.0.0.1", 0, late, threaded=True, request_handler=Quiet)
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    serve(float(sys.argv[1]))
