"""The S3 that these tests speak to."""

from tests.s3 import endpoint

__all__ = ["endpoint"]
