"""A server that speaks S3 on loopback."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module")
def server():
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(server, monkeypatch, tmp_path):
    """An empty bucket, as the environment tells of it."""
    name = f"bucket-{tmp_path.name.replace('_', '-').lower()[:40]}"
    settings = {
        "AWS_ENDPOINT": server,
        "AWS_ACCESS_KEY_ID": "someone",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1",
        "AWS_ALLOW_HTTP": "true",
        "ACTPIPE_CACHE": str(tmp_path / "cache"),
    }
    for key, value in settings.items():
        monkeypatch.setenv(key, value)
    import boto3

    boto3.client("s3", endpoint_url=server, region_name="us-east-1").create_bucket(Bucket=name)
    return name
