"""Chunks to and from an S3 server on loopback: obstore beside s3fs (fsspec), in turns.

The server is moto's, in a process of its own. s3fs pins libraries that the tests do not want, so this runs in an
environment of its own: `pip install obstore s3fs 'moto[s3]' flask flask-cors`, then `python benchmarks/remote.py`.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

ROUNDS = 7
SIZES = {"4 MiB": 4 * 2**20, "64 MiB": 64 * 2**20}
PORT = 5123


def seconds(job: Callable[[], object]) -> float:
    started = time.perf_counter()
    job()
    return time.perf_counter() - started


def main() -> None:
    endpoint = f"http://127.0.0.1:{PORT}"
    settings = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_REGION": "us-east-1"}
    os.environ.update(settings | {"AWS_ENDPOINT": endpoint, "AWS_ALLOW_HTTP": "true"})
    command = [sys.executable, "-c", f"from moto.server import main; main(['-p', '{PORT}'])"]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        measure(endpoint)
    finally:
        server.kill()


def measure(endpoint: str) -> None:
    import boto3
    import obstore
    import s3fs
    from obstore.store import S3Store

    client = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1")
    for attempt in range(50):
        try:
            client.create_bucket(Bucket="bench")
            break
        except Exception:
            if attempt == 49:
                raise
            time.sleep(0.2)
    store, files = S3Store("bench"), s3fs.S3FileSystem(endpoint_url=endpoint)
    for title, size in SIZES.items():
        data = os.urandom(size)
        jobs = {
            "put": (
                lambda data=data: obstore.put(store, "a", data),
                lambda data=data: files.pipe_file("bench/b", data),
            ),
            "get": (lambda: bytes(obstore.get(store, "a").bytes()), lambda: files.cat_file("bench/b")),
        }
        for name, (ours, theirs) in jobs.items():
            times = [(seconds(ours), seconds(theirs)) for _ in range(ROUNDS + 1)][1:]
            ratios = [other / own for own, other in times]
            own = 1e3 * statistics.median(own for own, _ in times)
            spread = f"({min(ratios):.2f} to {max(ratios):.2f})"
            print(f"{name} {title:7} obstore {own:8.1f} ms   s3fs / obstore {statistics.median(ratios):5.2f} {spread}")


if __name__ == "__main__":
    main()
