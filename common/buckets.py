"""Folders in buckets by URL: which library speaks it, where its credentials are, its errors in one line."""

import importlib.util
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from common.text import reason

# Scheme → the module that speaks it, the extra that installs it, where its credentials come from.
SCHEMES = {
    "s3": ("s3fs", "s3", "AWS_PROFILE or AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL for a server of your own"),
    "gs": ("gcsfs", "gcs", "GOOGLE_APPLICATION_CREDENTIALS or gcloud auth application-default login"),
    "file": ("fsspec", "s3", "the permissions of the folder"),
}


def is_remote(path: str | None) -> bool:
    """Whether a path is a URL."""
    return path is not None and "://" in path


class Bucket:
    """The folder at `url`, the value of `key`; whatever its server says becomes a `fault` of one line.

    Raises ValueError where the URL is none of `schemes`, or what speaks it is not installed.
    """

    def __init__(
        self, key: str, url: str, fault: type[Exception], then: str = "", schemes: Iterable[str] = SCHEMES
    ):
        scheme = url.split("://")[0]
        if scheme not in schemes:
            raise ValueError(f"{key}={url} has the scheme {scheme}; use {'://, '.join(schemes)}:// or a path")
        module, extra, self._credentials = SCHEMES[scheme]
        if importlib.util.find_spec(module) is None:
            raise ValueError(f"{key}={url} needs {module}; pip install -e '.[{extra}]'")
        self.url, self._key, self._fault, self._then = url.rstrip("/"), key, fault, then

    def open(self) -> tuple[Any, str]:
        """Its file system, and the path within that."""
        import fsspec

        options = {"auto_mkdir": True} if self.url.startswith("file:") else {}
        with self.plainly("opened"):
            return fsspec.core.url_to_fs(self.url, **options)

    @contextmanager
    def plainly(self, what: str, *passing: type[Exception]) -> Iterator[None]:
        """Turn what a library raises in here into the fault; what is one already, or `passing`, goes by."""
        try:
            yield
        except (self._fault, *passing):
            raise
        except Exception as error:  # botocore's, aiohttp's and gcsfs's own, and OSError
            raise self.refused(what, error) from error

    def refused(self, what: str, error: Exception) -> Exception:
        """The fault that an error means, with the remedy."""
        return self._fault(
            f"{self._key}={self.url} cannot be {what} ({reason(error)}); check the bucket and folder, and "
            f"the credentials ({self._credentials}){self._then}"
        )
