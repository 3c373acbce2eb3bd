"""A bucket of the S3 on loopback that `endpoint` starts, and the environment that users would set."""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest

from tests.data.extras import require


@contextlib.contextmanager
def bucket(endpoint: str, monkeypatch: pytest.MonkeyPatch, name: str) -> Iterator[Any]:
    """A file system with an empty bucket of this name."""
    s3fs = require("s3fs", "s3")
    for key, value in {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(key, value)
    s3fs.S3FileSystem.clear_instance_cache()
    fs = s3fs.S3FileSystem()
    fs.mkdir(name)
    yield fs
    fs.rm(name, recursive=True)
