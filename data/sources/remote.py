"""`s3://` and `gs://`: a remote folder mirrored once into the cache, file by file, then read as a local one.

Each start lists the remote folder again: what is new or has another size or ETag is fetched, what is gone
is removed. A file is fetched beside its name, checked (size; md5, where the server tells one), then renamed,
then noted in `mirror.jsonl`; a mirror that broke off goes on with the first file that is not noted.
"""

import base64
import binascii
import contextlib
import hashlib
import json
import os
import re
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

from common.buckets import Bucket, is_remote
from common.files import file_digest, write_text
from data.cache import digest_of
from data.config import DataConfig
from data.errors import DataError
from data.sources.documents import Say


def local_path(config: DataConfig, say: Say, below: str = "", *, contents: bool = True) -> Path:
    """Return `data.path` as a folder of this machine: itself, or its mirror brought up to date.

    below: a part of the remote folder, mirrored alone. contents: hash mirrored files once more, so that one
    which was damaged here is fetched again. Raises DataError where the remote folder cannot be read.
    """
    if not is_remote(config.path):
        return Path(str(config.path)) / below
    url = "/".join(part for part in (str(config.path).rstrip("/"), below) if part)
    return Mirror(url, Path(config.cache_dir)).update(config.workers, say, contents=contents)


def mirrored_digest(directory: Path) -> str:
    """Return the digest of the names and contents of a mirror's files."""
    return digest_of({name: note["sha256"] for name, note in sorted(_notes(directory.parent).items())})


class Mirror:
    """One remote folder and its copy in the cache."""

    def __init__(self, url: str, cache: Path):
        try:
            self.bucket = Bucket("data.path", url, DataError, schemes=("s3", "gs"))
        except ValueError as error:
            raise DataError(str(error)) from None
        self.url = self.bucket.url
        self.place = cache / "mirror" / digest_of(url)[:16]
        self.files = self.place / "files"

    def update(self, workers: int, say: Say, *, contents: bool) -> Path:
        """Fetch what is missing or changed and return the local folder."""
        self._listed()
        notes = _notes(self.place)
        stale = [name for name in self.remote if not self._sound(name, notes.get(name), contents)]
        try:
            self.files.mkdir(parents=True, exist_ok=True)
            for name in set(notes) - set(self.remote):
                (self.files / name).unlink(missing_ok=True)
            if stale:
                total = sum(self.remote[name]["size"] for name in stale) >> 20
                say(f"fetching {len(stale)} files ({total} MB) from {self.url}")
            self._write_notes({name: note for name, note in notes.items() if name in self.remote})
            with (
                ThreadPoolExecutor(workers) as pool,
                open(self.place / "mirror.jsonl", "a", encoding="utf-8") as log,
            ):
                self._fetch_all(stale, pool, log)
        except OSError as error:
            raise DataError(
                f"data.cache_dir: {self.files} cannot be written ({error}); free space or choose another"
            ) from None
        return self.files

    def _listed(self) -> None:
        """List the remote files: name below the folder → what the server says of it."""
        self.fs, self.root = self.bucket.open()
        with self.bucket.plainly("read"):
            self.fs.invalidate_cache()
            found = self.fs.find(self.root, detail=True)
        below = len(self.root.rstrip("/")) + 1
        self.remote = {path[below:]: info for path, info in found.items() if path[below:]}
        self.remote = {name: info for name, info in self.remote.items() if not name.endswith("/")}
        for name in self.remote:
            if ".." in PurePosixPath(name).parts or name.startswith("/"):
                raise DataError(f"data.path={self.url} holds {name}, outside its folder; rename it")
        if not self.remote:
            raise DataError(f"data.path={self.url} holds no objects; give the folder of your files")

    def _sound(self, name: str, note: dict[str, Any] | None, contents: bool) -> bool:
        path = self.files / name
        if note is None or note["tag"] != _tag(self.remote[name]) or not path.is_file():
            return False
        stat = path.stat()
        if [stat.st_size, stat.st_mtime_ns] != [note["bytes"], note["mtime_ns"]]:
            return False
        return not contents or file_digest(path) == note["sha256"]

    def _fetch_all(self, names: list[str], pool: ThreadPoolExecutor, log: Any) -> None:
        pending: list[Future] = [pool.submit(self._fetch, name) for name in names]
        try:
            for future in pending:
                log.write(json.dumps(future.result()) + "\n")
                log.flush()
        finally:
            for future in pending:
                future.cancel()

    def _fetch(self, name: str) -> dict[str, Any]:
        info, path = self.remote[name], self.files / name
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.part")
        remote = f"{self.root.rstrip('/')}/{name}"
        with self.bucket.plainly("read"):
            self.fs.get_file(remote, str(part))
        if part.stat().st_size != info["size"]:
            raise DataError(
                f"data.path: {self.url}/{name} came with {part.stat().st_size} bytes of {info['size']}; "
                "start again to fetch it anew"
            )
        told = _md5(info)
        if told and _md5_of(part) != told and not self._encrypted(remote):
            raise DataError(
                f"data.path: {self.url}/{name} did not arrive as the server has it (md5); start again to "
                "fetch it anew"
            )
        os.replace(part, path)
        stat = path.stat()
        known = {"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": file_digest(path)}
        return {"name": name, "tag": _tag(info), **known}

    def _encrypted(self, remote: str) -> bool:
        """Say whether the ETag is no md5 after all, as with keys of one's own in S3."""
        if not hasattr(self.fs, "call_s3"):
            return False
        bucket, key = remote.split("/", 1)
        with self.bucket.plainly("read"):
            head = self.fs.call_s3("head_object", Bucket=bucket, Key=key)
        return head.get("ServerSideEncryption", "").startswith("aws:kms") or "SSECustomerAlgorithm" in head

    def _write_notes(self, notes: dict[str, dict[str, Any]]) -> None:
        lines = [json.dumps({"name": name, **note}) + "\n" for name, note in notes.items()]
        write_text(self.place / "mirror.jsonl", "".join(lines))


def _notes(place: Path) -> dict[str, dict[str, Any]]:
    """What was fetched: the last note of each file; a line that a kill cut short is none."""
    notes = {}
    with contextlib.suppress(OSError):
        for line in (place / "mirror.jsonl").read_text("utf-8").splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):
                note = json.loads(line)
                notes[note.pop("name")] = note
    return notes


def _tag(info: dict[str, Any]) -> list[Any]:
    """What changes when a remote object does."""
    tag = info.get("ETag") or info.get("etag") or info.get("md5Hash")
    return [info["size"], tag or str(info.get("created", ""))]


def _md5(info: dict[str, Any]) -> str | None:
    """Return the md5 (hex) that the server tells: GCS outright, S3 as the ETag of what came in one part."""
    if info.get("md5Hash"):
        with contextlib.suppress(binascii.Error):
            return base64.b64decode(info["md5Hash"]).hex()
    tag = str(info.get("ETag") or "").strip('"')
    return tag if re.fullmatch("[0-9a-f]{32}", tag) else None


def _md5_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
