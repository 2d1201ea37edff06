"""What is in a bucket of the server that speaks S3 on loopback."""

from __future__ import annotations

import obstore
from obstore.store import S3Store


def objects(bucket):
    """Return what is in the bucket, by name."""
    store = S3Store(bucket)
    names = [entry["path"] for page in obstore.list(store) for entry in page]
    return {name: bytes(obstore.get(store, name).bytes()) for name in names}
