"""Checkpoints in a bucket: sent there from the run's directory once committed, and fetched from there.

    URL/STEP/...              the files of checkpoints/STEP, with FILES.sha256 written last
    URL/quarantine/STEP/...   one that failed, with its REASON
    URL/run/...               config, manifest, tokenizer and metrics, so that a lost run directory can be had

An object store renames nothing at once, so a step counts from the moment when its list is there, and loses it
first when it is removed. Each file is compared with the list while it is fetched.
"""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from artifacts.checkpoints.errors import CorruptCheckpoint
from artifacts.checkpoints.files import LIST, files_of, parsed
from common.buckets import Bucket
from common.errors import RunFault
from common.files import file_digest

TRANSFERS = 8  # files under way at once
RUN_FILES = ("config.yaml", "manifest.json", "metrics.jsonl", "tokenizer.json", "tokenizer_config.json")


class Remote:
    """The checkpoints under one URL.

    Raises ValueError where the URL is none that we can speak, RunFault where the server refuses.
    """

    def __init__(self, url: str):
        then = ", then the same command goes on"
        self._bucket = Bucket("checkpoint.directory", url, RunFault, then)
        self.url = self._bucket.url
        self._fs, self._root = self._bucket.open()

    def steps(self) -> list[int]:
        """Steps whose list is there, oldest first."""
        return sorted(step for step, names in self._found().items() if LIST in names)

    def _found(self) -> dict[int, dict[str, int]]:
        """Step → its objects by name → bytes."""
        found: dict[int, dict[str, int]] = {}
        for name, size in self._objects("").items():
            step, _, rest = name.partition("/")
            if step.isdecimal() and rest:
                found.setdefault(int(step), {})[rest] = size
        return found

    def _objects(self, below: str) -> dict[str, int]:
        top = f"{self._root}/{below}".rstrip("/")
        with self._plainly("listed"):
            self._fs.invalidate_cache()
            with contextlib.suppress(FileNotFoundError):
                infos = self._fs.find(top, detail=True)
                return {path[len(top) + 1 :]: int(info["size"]) for path, info in infos.items()}
        return {}

    def probe(self) -> None:
        """Write a file and remove it, so that a mistyped bucket is not found out at the first checkpoint."""
        with tempfile.NamedTemporaryFile() as empty:
            self._put(Path(empty.name), ".probe")
        with self._plainly("written"):
            self._fs.rm_file(f"{self._root}/.probe")

    def send(self, step: int, directory: Path, run: Path | None = None) -> None:
        """Send a committed checkpoint whose files are listed; `run`: and what its directory needs."""
        if run is not None:
            names = [name for name in RUN_FILES if (run / name).exists()]
            self._each(names, lambda name: self._put(run / name, f"run/{name}"))
        sizes = {name: (directory / name).stat().st_size for name in files_of(directory)}
        self._each(sizes, lambda name: self._put(directory / name, f"{step}/{name}"))
        arrived = self._objects(str(step))
        late = [name for name, size in sizes.items() if arrived.get(name) != size]
        if late:
            raise RunFault(
                f"{self.url}/{step}: {late[0]} arrived with {arrived.get(late[0], 0)} bytes of "
                f"{sizes[late[0]]}; the same command goes on from the last good checkpoint"
            )
        self._put(directory / LIST, f"{step}/{LIST}")

    def fetch(self, step: int, directory: Path) -> None:
        """Bring a checkpoint to `directory`, whole and verified, or raise CorruptCheckpoint."""
        listed = self.listed(step)
        aside = directory.parent / f".fetched-{directory.name}"
        shutil.rmtree(aside, ignore_errors=True)
        try:
            self._each(listed, lambda name: self._get(f"{step}/{name}", aside / name, listed[name]))
            self._get(f"{step}/{LIST}", aside / LIST, None)
            os.replace(aside, directory)
        finally:
            shutil.rmtree(aside, ignore_errors=True)

    def fetch_run(self, directory: Path) -> list[str]:
        """Bring what the run's directory needs; the names of the files."""
        names = sorted(self._objects("run"))
        for name in set(names) & set(RUN_FILES):
            self._get(f"run/{name}", directory / name, None)
        return names

    def listed(self, step: int) -> dict[str, str]:
        """Name → sha256 of a step's files. Raises CorruptCheckpoint where the list was altered."""
        where = f"{self.url}/{step}"
        try:
            with self._plainly("read"):
                return parsed(self._fs.cat_file(f"{self._root}/{step}/{LIST}").decode("utf-8"), where)
        except (FileNotFoundError, UnicodeDecodeError):
            raise CorruptCheckpoint(f"{where}: {LIST} is missing or altered") from None

    def bad_files(self, step: int, scratch: Path) -> dict[str, str]:
        """File → what is wrong with it; each is fetched into `scratch`, compared, and removed."""
        listed, here = self.listed(step), self._objects(str(step))
        bad = {name: "is not in the list" for name in here if name not in listed and name != LIST}

        def look(name: str) -> None:
            path = scratch / f"{step}.{name.replace('/', '.')}"
            try:
                self._get(f"{step}/{name}", path, listed[name])
            except CorruptCheckpoint as error:
                bad[name] = str(error).rsplit(": ", 1)[1]
            path.unlink(missing_ok=True)

        self._each(listed, look)
        return dict(sorted(bad.items()))

    def tidy(self, keep: int | None = None) -> None:
        """Remove the oldest beyond `keep`, or, without it, what was sent in part."""
        found = self._found()
        if keep is None:
            gone = [step for step, names in found.items() if LIST not in names]
        else:
            gone = sorted(step for step, names in found.items() if LIST in names)[:-keep]
        for step in gone:
            self._remove(step, found[step])

    def forget_after(self, step: int) -> None:
        """Remove the checkpoints of later steps, which a rollback undid."""
        for later, names in self._found().items():
            if later > step:
                self._remove(later, names)

    def _remove(self, step: int, names: Iterable[str]) -> None:
        with self._plainly("removed"):
            if LIST in names:  # first, so that what is left of it is no checkpoint
                self._fs.rm_file(f"{self._root}/{step}/{LIST}")
        self._each([n for n in names if n != LIST], lambda n: self._fs.rm_file(f"{self._root}/{step}/{n}"))

    def set_apart(self, step: int, reason: str) -> None:
        """Move a checkpoint to the quarantine, with the reason."""
        names, target = self._objects(str(step)), f"quarantine/{step}"
        self._each(names, lambda n: self._fs.cp_file(f"{self._root}/{step}/{n}", self._made(f"{target}/{n}")))
        with self._plainly("written"):
            self._fs.pipe_file(self._made(f"{target}/REASON"), f"{reason}\n".encode())
        self._remove(step, names)

    def _made(self, name: str) -> str:
        """A name below the URL, its folder made where the file system has folders."""
        path = f"{self._root}/{name}"
        if getattr(self._fs, "auto_mkdir", False):
            os.makedirs(os.path.dirname(path), exist_ok=True)
        return path

    def _put(self, path: Path, name: str) -> None:
        try:
            with self._plainly("written"):
                self._fs.put_file(str(path), self._made(name))
        except FileNotFoundError as error:  # as s3fs says of a bucket
            raise self._bucket.refused("written", error) from error

    def _get(self, name: str, path: Path, digest: str | None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with self._plainly("read"):
                self._fs.get_file(f"{self._root}/{name}", str(path))
        except FileNotFoundError:
            raise CorruptCheckpoint(f"{self.url}/{name}: is missing") from None
        if digest is not None and file_digest(path) != digest:
            raise CorruptCheckpoint(f"{self.url}/{name}: is altered (sha256)")

    def _each(self, names: Iterable[str] | Mapping[str, Any], do: Callable[[str], None]) -> None:
        with self._plainly("reached"), ThreadPoolExecutor(TRANSFERS) as pool:
            pending = [pool.submit(do, name) for name in names]
            try:
                for future in pending:
                    future.result()
            finally:
                for future in pending:
                    future.cancel()

    def _plainly(self, what: str) -> AbstractContextManager[None]:
        return self._bucket.plainly(what, FileNotFoundError, UnicodeDecodeError)
