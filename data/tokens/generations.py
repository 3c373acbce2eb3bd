"""Folders that grow: a corpus as an ordered list of generations, each made once and never touched again.

`scripts/prepare_data.py --append` tokenizes only the files that are new and notes, beside the stores, which
files each generation added (`corpora/*.json` in the cache). What is there is neither written nor read again,
save to check it. So a run that began on an old generation finds exactly that one, by its digest.
"""

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.files import write_text
from data.cache import digest_of
from data.errors import DataError
from data.sources.corpus import Corpus

Files = dict[str, str]  # name in the folder: sha256
SHOWN = 3  # names of files in an error


@dataclass(frozen=True)
class Generation:
    """A corpus as it once was prepared: the files of each generation, and the digest of them all."""

    groups: tuple[Files, ...]
    digest: str

    @property
    def files(self) -> Files:
        """All files."""
        return {name: sha for group in self.groups for name, sha in group.items()}


class Part(Corpus):
    """The documents of some of a folder's files; not every split need have any."""

    def __init__(self, whole: Corpus, files: Mapping[str, str]):
        self.config = whole.config
        kept = [(name, sha) for name, sha in whole.inputs["files"] if name in files]
        self.inputs = {**whole.inputs, "files": kept}
        self.digest = digest_of(self.inputs)
        self.directory = Path(self.config.cache_dir) / "documents" / self.digest[:16]
        self.source = copy.copy(whole.source)
        self.source.names = frozenset(files)  # type: ignore[attr-defined]  # only folders grow


class GenerationIndex:
    """What has been prepared from folders with these options, in this cache.

    A folder is known by its files, not by its place, as everything in the cache is.
    """

    def __init__(self, root: Path, corpus: Corpus, tokenizer: Mapping[str, Any]):
        options = {key: value for key, value in corpus.inputs.items() if key != "files"}
        self.prefix = digest_of({**options, "tokenizer": dict(tokenizer)})[:16]
        self.directory = root / "corpora"
        self.files: Files = dict(corpus.inputs["files"])
        self.known = sorted(self._read(), key=lambda one: (len(one.groups), one.digest))

    def current(self, wanted: str | None, number: int | None) -> tuple[Files, ...]:
        """Return the files of each generation of the corpus to be used.

        The one of digest `wanted` where the folder still has its files, else number `number`, else the
        newest: the whole folder. Raises DataError where `number` is not there.
        """
        inside = [one for one in self.known if one.files.items() <= self.files.items()]
        same = [one for one in inside if one.digest == wanted]
        if same:
            return same[-1].groups
        whole = [one for one in inside if one.files == self.files]
        if number is None:
            return whole[-1].groups if whole else (self.files,)
        largest = max(inside, key=lambda one: len(one.files), default=None)
        groups = whole[-1].groups if whole else largest.groups if largest else ()
        if number >= len(groups):
            there = f"has generations 0 to {len(groups) - 1}" if groups else "has not been prepared"
            raise DataError(
                f"data.generation={number} is not there: the folder {there} in this cache; name one that is, "
                "or none for the newest"
            )
        return groups[: number + 1]

    def grown(self) -> tuple[Files, ...]:
        """Return `current` with the folder's new files as one generation more, where there are any.

        Raises DataError where nothing of the folder has been prepared, or a file of it was changed or
        removed.
        """
        shared = [len(one.files.keys() & self.files.keys()) for one in self.known]
        if not any(shared):
            raise DataError(
                "--append: nothing of this folder has been prepared in this cache with these options and "
                "this tokenizer; run once without --append"
            )
        number = max(range(len(shared)), key=lambda i: (shared[i], i))  # of equals the one that grew longest
        last = self.known[number]
        _refuse_changes(last.files, self.files)
        new = {name: sha for name, sha in self.files.items() if name not in last.files}
        return (*last.groups, new) if new else last.groups

    def news(self) -> int:
        """Return how many files `--append` would add to the largest corpus that the folder still holds."""
        inside = [len(one.files) for one in self.known if one.files.items() <= self.files.items()]
        return len(self.files) - max(inside, default=len(self.files))

    def note(self, generation: Generation) -> None:
        """Write down what has been prepared, unless it stands there."""
        path = self._path(generation.digest)
        if path.exists():
            return
        self.directory.mkdir(exist_ok=True)
        facts: dict[str, Any] = {"digest": generation.digest, "groups": generation.groups}
        text = json.dumps({**facts, "sum": digest_of(facts)}, indent=0) + "\n"
        write_text(path, text, shared=True)

    def _path(self, digest: str) -> Path:
        return self.directory / f"{self.prefix}-{digest[:16]}.json"

    def _read(self) -> Sequence[Generation]:
        found = []
        for path in self.directory.glob(f"{self.prefix}-*.json"):
            try:
                facts = json.loads(path.read_text("utf-8"))
                said = facts.pop("sum")
                sound = said == digest_of(facts)
            except (OSError, ValueError, KeyError, AttributeError):
                sound = False
            if not sound:
                raise DataError(f"{path} is broken, and with it which files were prepared; delete it")
            found.append(Generation(tuple(facts["groups"]), facts["digest"]))
        return found


def _refuse_changes(old: Files, now: Files) -> None:
    for what, names in (
        ("changed", [name for name, sha in old.items() if now.get(name, sha) != sha]),
        ("removed", [name for name in old if name not in now]),
    ):
        if names:
            shown = ", ".join(sorted(names)[:SHOWN]) + (
                f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            )
            raise DataError(
                f"--append: since they were prepared these files of the folder were {what}: {shown}; put "
                "them back, or prepare a new corpus without --append"
            )
