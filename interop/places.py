"""Where published files lie: a path of this machine, or a URL, of which no more is read than is needed."""

import contextlib
import hashlib
import posixpath
import struct
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from common.buckets import Bucket, is_remote
from common.files import replacing

CHUNK = 16 << 20  # bytes of a range that is asked for at once; several are under way together
RECENT = 1 << 30  # bytes of arrays that are kept, since devices ask for their parts of each in turn
DAMAGED = (
    LookupError,
    TypeError,
    EOFError,
    OverflowError,
    MemoryError,
    struct.error,
)  # what it holds is wrong


class RemotePath:
    """A file or a folder under a URL; what its server refuses is a ValueError in one line."""

    def __init__(self, url: str, parent: "RemotePath | None" = None):
        self._url = url.rstrip("/")
        self._bucket = Bucket("init_from", self._url, ValueError)
        self._fs, self._path = self._bucket.open()
        self._recent: OrderedDict[Any, np.ndarray] = parent._recent if parent else OrderedDict()
        if parent is None:
            self._fs.invalidate_cache()  # others may have written there since this process looked

    def __str__(self) -> str:
        return self._url

    def __truediv__(self, name: str) -> "RemotePath":
        return RemotePath(f"{self._url}/{name}", self)

    @property
    def name(self) -> str:
        """The last part of the URL."""
        return posixpath.basename(self._url)

    @property
    def suffix(self) -> str:
        """What the name ends in, from its last dot on."""
        return posixpath.splitext(self._url)[1]

    @property
    def parent(self) -> "RemotePath":
        """The folder above."""
        return RemotePath(posixpath.dirname(self._url), self)

    def resolve(self) -> "RemotePath":
        """Itself: a URL has no links to follow."""
        return self

    def _info(self) -> dict[str, Any] | None:
        with self._bucket.plainly("read"), contextlib.suppress(FileNotFoundError, NotADirectoryError):
            return self._fs.info(self._path)
        return None

    def is_file(self) -> bool:
        """Whether there is such an object. ValueError where the server does not say."""
        return (self._info() or {}).get("type") == "file"

    def is_dir(self) -> bool:
        """Whether objects lie below it."""
        return (self._info() or {}).get("type") == "directory"

    @property
    def size(self) -> int:
        """Bytes of the file; FileNotFoundError where there is none."""
        if (info := self._info()) is None:
            raise FileNotFoundError(self._url)
        return int(info["size"])

    @contextmanager
    def open(self, mode: str = "rb") -> Iterator[IO[bytes]]:
        """The file to be read from its beginning on, block by block."""
        with (
            self._bucket.plainly("read", FileNotFoundError, *DAMAGED),
            self._fs.open(self._path, mode) as file,
        ):
            yield file

    def read_bytes(self) -> bytes:
        """All of a small file."""
        with self._bucket.plainly("read", FileNotFoundError):
            return self._fs.cat_file(self._path)

    def read_text(self, encoding: str) -> str:
        """All of a small file as text."""
        return self.read_bytes().decode(encoding)

    def array(self, dtype: Any, offset: int, shape: tuple[int, ...]) -> np.ndarray:
        """The array [shape] that begins at a byte, in ranges; the last ones that were asked for are kept."""
        key = self._url, str(dtype), offset, shape
        if key not in self._recent:
            count = np.dtype(dtype).itemsize * int(np.prod(shape, dtype=np.int64))
            self._recent[key] = np.frombuffer(self._range(offset, count), dtype).reshape(shape)
            while len(self._recent) > 1 and sum(x.nbytes for x in self._recent.values()) > RECENT:
                self._recent.popitem(last=False)
        self._recent.move_to_end(key)
        return self._recent[key]

    def _range(self, start: int, count: int) -> bytes:
        starts = list(range(start, start + count, CHUNK))
        ends = [min(at + CHUNK, start + count) for at in starts]
        with self._bucket.plainly("read"):
            found = b"".join(self._fs.cat_ranges([self._path] * len(starts), starts, ends, on_error="raise"))
        if len(found) != count:
            raise ValueError(
                f"{self._url}: {len(found)} bytes came of {count} from byte {start} on; start again"
            )
        return found


Place = Path | RemotePath


def path_of(name: str) -> Place:
    """What a name means: a URL or a path. Raises ValueError for a URL that cannot be spoken."""
    return RemotePath(name) if is_remote(name) else Path(name).expanduser()


def size_of(path: Place) -> int:
    """Bytes of a file; FileNotFoundError where there is none."""
    return path.size if isinstance(path, RemotePath) else path.stat().st_size


def view(path: Place, dtype: Any, offset: int, shape: tuple[int, ...]) -> np.ndarray:
    """The array [shape] from this byte on: of a local file a view, read where it is touched."""
    if isinstance(path, RemotePath):
        return path.array(dtype, offset, shape)
    return np.memmap(path, dtype, "r", offset, shape)


def local_folder(folder: Place, names: Iterable[str], cache: Path) -> Path:
    """The folder, or one in the cache that has those of these small files which a remote one has."""
    if isinstance(folder, Path):
        return folder
    here = cache / hashlib.sha256(str(folder).encode()).hexdigest()[:16]
    here.mkdir(parents=True, exist_ok=True)
    for name in names:
        if (file := folder / name).is_file():
            with replacing(here / name, shared=True) as aside:
                aside.write_bytes(file.read_bytes())
        else:
            (here / name).unlink(missing_ok=True)
    return here
