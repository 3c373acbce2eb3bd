"""A folder's files as documents: which are read, in what order, and what each holds."""

import codecs
import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from common.files import file_digest
from common.text import first_line
from data.errors import DataError
from data.sources.bad_records import BadRecords
from data.sources.lines import BYTE_ORDER_MARK, file_lines, load_json, unreadable

TEXT = (".txt", ".md", ".py")
RECORDS = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
SUFFIXES = TEXT + RECORDS
PARQUET_BATCH = 64  # records decoded at a time: few, since one may be 50 MB
# Left out so that machines agree: some distributions ship these with Python and some do not.
STDLIB_EXCLUDED = frozenset(
    {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__"}
)


def list_folder(folder: Path) -> list[Path]:
    """Return the files under `folder` that can be documents, sorted; hidden ones are passed over.

    Raises DataError when the folder is missing, is no folder or holds none.
    """
    if not folder.exists():
        raise DataError(f"data.path={folder} does not exist; give the folder that holds your files")
    if not folder.is_dir():
        raise DataError(f"data.path={folder} is not a folder; give the folder that holds your files")
    files = walk(folder)
    for link in filter(Path.is_symlink, files):
        try:
            link.stat()
        except OSError as error:  # what is not there, or may not be seen, might be a folder of documents
            raise DataError(unreadable(link, error)) from None
    found = [path for path in files if path.name.endswith(SUFFIXES)]
    if not found:
        raise DataError(
            f"data.path={folder} holds no documents; put files there that end in {' '.join(SUFFIXES)}"
        )
    for path in found:
        if path.exists() and not path.is_file():  # a pipe or a device, which would be read for ever
            raise DataError(f"data.path: {path} is no regular file; move it away")
    return found


def list_stdlib(root: Path) -> list[Path]:
    """Return the standard library's own source files, sorted.

    `_sysconfigdata*` is left out: it is written when Python is built and holds that machine's paths.
    """
    files = walk(root, STDLIB_EXCLUDED)
    return [path for path in files if path.suffix == ".py" and not path.name.startswith("_sysconfigdata")]


def walk(root: Path, excluded: frozenset[str] = frozenset()) -> list[Path]:
    """Return every file under `root`, sorted; hidden ones and `excluded` directories are passed over.

    Linked folders are entered when all others have been, and each folder once: what lies under `root` itself
    keeps its name there, and a link to a parent, or one that goes round, adds nothing.
    """

    def fail(error: OSError) -> None:
        raise DataError(unreadable(str(error.filename), error))

    found: list[Path] = []
    entered: set[str] = set()
    tops = [root]
    while tops:
        links = []
        for top in tops:
            for directory, names, files in os.walk(top, onerror=fail):
                real = os.path.realpath(directory)
                if real in entered:
                    names.clear()
                    continue
                entered.add(real)
                names[:] = [name for name in names if name not in excluded and not name.startswith(".")]
                links += [path for name in names if (path := Path(directory, name)).is_symlink()]
                found += [Path(directory, name) for name in files if not name.startswith(".")]
        tops = sorted(links)
    return sorted(found)


def fingerprint(root: Path, files: list[Path], workers: int) -> list[tuple[str, str]]:
    """Return (path in `root`, sha256) of each file: content, not dates, says whether inputs are the same."""
    with ThreadPoolExecutor(workers) as pool:  # hashing releases the interpreter lock
        digests = list(pool.map(_input_digest, files))
    return [(relative(root, path), digest) for path, digest in zip(files, digests, strict=True)]


def relative(root: Path, path: Path) -> str:
    """Return a file's name inside `root`, as text that can always be encoded."""
    return os.fsencode(path.relative_to(root)).decode("utf-8", "backslashreplace")


def _input_digest(path: Path) -> str:
    try:
        return file_digest(path)
    except OSError as error:
        raise DataError(unreadable(path, error)) from None


def in_validation(text: str, fraction: float) -> bool:
    """Say whether a document is held out, by its content alone: duplicates always fall on the same side."""
    head = hashlib.sha256(text.encode()).digest()[:8]
    return int.from_bytes(head, "big") < fraction * 2**64


def read_documents(path: Path, text_key: str, bad: BadRecords | None = None) -> Iterator[str]:
    """Yield a file's documents: the file itself, or one a record, under `text_key`; empty ones are left out.

    What is no text goes to `bad`, which stops unless told to skip. Raises DataError whatever `bad` says for
    an empty file (save .py: an empty module is ordinary), an unreadable and a truncated or corrupt one.
    """
    bad = bad or BadRecords()
    try:
        if path.stat().st_size <= len(codecs.BOM_UTF8) and path.read_bytes() in (b"", codecs.BOM_UTF8):
            if path.suffix == ".py":
                return
            raise DataError(f"data.path: {path} is empty; fill it or move it away")
        if path.name.endswith(TEXT):
            for text in decode(path.read_bytes(), str(path), bad):
                yield text.removeprefix(BYTE_ORDER_MARK)
        elif path.suffix == ".parquet":
            yield from _parquet(path, text_key, bad)
        else:
            yield from _json_lines(path, text_key, bad)
    except OSError as error:
        raise DataError(unreadable(path, error)) from None


def decode(raw: bytes, where: str, bad: BadRecords, base: int = 0) -> Iterator[str]:
    """Yield the text of `raw`, or nothing where it is no UTF-8; `base` is where it begins in its file."""
    try:
        yield raw.decode("utf-8")
    except UnicodeDecodeError as error:
        bad.found(
            "utf8", f"data.path: {where} is not UTF-8 at byte {base + error.start}; convert it to UTF-8"
        )


def _json_lines(path: Path, text_key: str, bad: BadRecords) -> Iterator[str]:
    offset = 0
    for number, line in enumerate(file_lines(path), 1):
        where = f"{path}:{number}"
        for text in decode(line, where, bad, offset):
            record = text.removeprefix(BYTE_ORDER_MARK)  # of each line: files are put together with `cat`
            if record.strip():
                yield from _text_of_line(record, text_key, where, bad)
        offset += len(line)


def _text_of_line(line: str, text_key: str, where: str, bad: BadRecords) -> Iterator[str]:
    try:
        record = load_json(line)
    except (json.JSONDecodeError, RecursionError) as error:  # the latter: brackets nested thousands deep
        reason = getattr(error, "msg", "nested too deep")
        bad.found("json", f"data.path: {where} is not JSON ({reason}); mend or remove that line")
        return
    if not isinstance(record, dict):
        kind = type(record).__name__
        bad.found("no_object", f"data.path: {where} is a {kind}; each line must be an object with text")
    elif text_key not in record:
        keys = ", ".join(sorted(map(str, record))) or "none"
        bad.found("no_key", f"data.text_key={text_key} is not in {where}; its keys are {keys}")
    else:
        yield from checked_text(record[text_key], text_key, where, bad)


def checked_text(text: object, text_key: str, where: str, bad: BadRecords) -> Iterator[str]:
    """Yield a record's value where it is text that can be encoded; an empty one is left out."""
    if not isinstance(text, str):
        kind = type(text).__name__
        bad.found("no_text", f"data.text_key={text_key} is a {kind} in {where}; it must be text")
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:  # "\ud800" is legal JSON but no character
        at = error.start
        bad.found(
            "surrogate", f"data.path: {where} has half a surrogate pair at character {at}; mend or remove it"
        )
        return
    if text:
        yield text


def _parquet(path: Path, text_key: str, bad: BadRecords) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if text_key not in names:
                raise DataError(
                    f"data.text_key={text_key} is not in {path}; its columns are {', '.join(names)}"
                )
            first = 0
            for batch in file.iter_batches(columns=[text_key], batch_size=PARQUET_BATCH):
                yield from column_texts(batch.column(0), text_key, str(path), bad, first)
                first += batch.num_rows
    except pyarrow.ArrowException as error:
        raise DataError(
            f"data.path: {path} is not a sound parquet file ({first_line(error)}); fetch it again"
        ) from None


def column_texts(column: Any, text_key: str, where: str, bad: BadRecords, first: int = 0) -> Iterator[str]:
    """Yield the texts of an Arrow column that begins at record `first`; null and empty ones are left out.

    Raises DataError where the column's type is not text.
    """
    for part in getattr(column, "chunks", [column]):
        # Arrow takes it on trust that a string column is UTF-8; as bytes, each value is decoded by itself.
        raws = _as_bytes(part)
        if raws is None:
            raise DataError(f"data.text_key={text_key} is {column.type} in {where}; it must be text")
        for number, raw in enumerate(raws, first):
            if value := raw.as_py():
                yield from decode(value, f"{where}: record {number}", bad)
        first += len(part)


def _as_bytes(array: Any) -> Any:
    """Return an Arrow array of text, however it is encoded, as one of bytes; None where it is no text."""
    import pyarrow
    import pyarrow.compute

    kind, types = array.type, pyarrow.types
    if types.is_string(kind):
        return array.cast(pyarrow.binary())
    if types.is_large_string(kind) or types.is_string_view(kind):
        return array.cast(pyarrow.large_binary())
    if types.is_dictionary(kind):  # pandas' categoricals
        values = _as_bytes(array.dictionary)
        return values if values is None else values.take(array.indices)
    if types.is_run_end_encoded(kind):
        return _as_bytes(pyarrow.compute.run_end_decode(array))
    return _as_bytes(array.storage) if isinstance(array, pyarrow.ExtensionArray) else None
