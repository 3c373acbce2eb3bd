"""`prepare`: from a config to tokenizer and token stores, each reused while its inputs are the same."""

import contextlib
import itertools
import multiprocessing
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from data.cache import FORMAT, CorruptCache, building, digest_of, locked, resuming, verify
from data.config import DataConfig, TokenizerConfig, components
from data.curation.optimize import OptimizedCorpus, corpus_of
from data.errors import DataError
from data.loading.mixture import final_shares
from data.prepared import Prepared
from data.sources.bad_records import in_words
from data.sources.corpus import Corpus
from data.sources.documents import Documents
from data.tokens.chat import FORMAT as CHAT_FORMAT
from data.tokens.chat import ChatEncoder, ChatEncoding, plain_text
from data.tokens.chat_template import ChatTemplate, find_template, specials_of
from data.tokens.encoding import Encoding, TextEncoding
from data.tokens.generations import Files, Generation, GenerationIndex, Part
from data.tokens.shards import Engine
from data.tokens.store import TokenStore, write_store
from data.tokens.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

BPE_SAMPLE_BYTES = 32 << 20  # text that a tokenizer is trained on; a larger corpus is sampled evenly
BLOCK = 64  # documents read at a time


def prepare(
    data: DataConfig,
    tokenizer: TokenizerConfig,
    *,
    progress: bool = True,
    append: bool = False,
    wanted: str | None = None,
    engine: Engine | None = None,
) -> Prepared:
    """Make, or find in the cache, what training reads. Calling it again costs a hash of the inputs.

    A folder to which `append` added files is a corpus of several generations (`data.tokens.generations`):
    the one whose digest is `wanted` is taken, else the one that `data.generation` names, else the newest.
    `engine` makes the tokens, by default `data.workers` processes of this machine.

    Progress goes to stdout, where training's goes too: stderr is for what is wrong. Where several processes
    call it at once, one works and the others wait; those of one job had better `follow` it. Tokenizing spawns
    `data.workers` processes, which import the main script anew: call this under
    `if __name__ == "__main__":`.

    Raises DataError, one line that names key, value and remedy; of what was under way only finished shards of
    tokens stay, for the next call.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        # A worker imports a main script that has no guard; its parent holds the lock and waits for it.
        raise DataError(
            'prepare ran as a worker imported the main script; put it under if __name__ == "__main__":'
        )
    root = Path(data.cache_dir)
    console = Console(quiet=not progress)
    with locked(root):
        if data.mixture and append:
            raise DataError(
                "--append grows one corpus, and data.mixture has several; append to each by itself"
            )
        if data.mixture:
            return _prepare_mixture(data, tokenizer, root, console, engine)
        work = _Preparation(data, tokenizer, root, console, engine)
        return work.run(append=append, wanted=wanted)


def _prepare_mixture(
    data: DataConfig, tokenizer: TokenizerConfig, root: Path, console: Console, engine: Engine | None
) -> Prepared:
    """Prepare each component as if it were alone, with one tokenizer.

    A BPE is trained on as much text of each, whatever their weights: so a sweep over weights tokenizes once.
    """
    parts = components(data)
    works = {}
    for name, part in parts.items():
        with _of_component(name):
            works[name] = _Preparation(part.data, tokenizer, root, console, engine)
    if tokenizer.kind == "bpe":
        directory = _shared_tokenizer(list(works.values()), tokenizer)
        tokenizer = replace(tokenizer, kind="file", path=str(directory / "tokenizer.json"))
    prepared = {}
    for name, work in works.items():
        work.tokenizer_config = tokenizer
        with _of_component(name):
            prepared[name] = work.run(append=False, wanted=None)
    # Where some components are conversations, their template is the mixture's; there is one for all.
    chats = [part for part in prepared.values() if part.tokenizer.chat is not None]
    first = next(iter(chats or prepared.values()))
    digest = digest_of({"format": FORMAT, "mixture": {name: part.digest for name, part in prepared.items()}})
    description = {
        "source": "mixture",
        "mode": data.mode,
        "digest": digest,
        **{key: first.description[key] for key in ("tokenizer_digest", "tokenizer_path", "vocab_size")},
        **({"chat_template": first.description["chat_template"]} if chats else {}),
        "rebuilt": [reason for part in prepared.values() for reason in part.description["rebuilt"]],
        "components": {name: part.description for name, part in prepared.items()},
        "final_shares": final_shares(parts),
    }
    return Prepared(first.tokenizer, None, None, None, digest, description, prepared)


@contextlib.contextmanager
def _of_component(name: str) -> Iterator[None]:
    try:
        yield
    except DataError as error:
        raise DataError(f"data.mixture.{name}: {error}") from None


def _shared_tokenizer(works: list["_Preparation"], config: TokenizerConfig) -> Path:
    inputs = {
        **{"kind": config.kind, "format": FORMAT, "vocab_size": config.vocab_size},
        "corpora": [work.corpus.digest for work in works],
        "sample": BPE_SAMPLE_BYTES,
    }

    def make(directory: Path) -> None:
        texts = itertools.chain(*(work._sample(BPE_SAMPLE_BYTES // len(works)) for work in works))
        train_tokenizer(texts, config).save(directory / "tokenizer.json")

    return works[0]._once("tokenizer", digest_of(inputs)[:16], make, {"kind": "tokenizer", **inputs})


def follow(facts: dict[str, Any]) -> Prepared:
    """Open what another process has prepared and checked, by its `Prepared.facts()`: no building, no hashing.

    Raises DataError where this process does not see the same files: the cache must lie on a file system that
    all processes share.
    """
    description = facts["description"]
    parts = {name: follow(part) for name, part in facts.get("components", {}).items()}
    try:
        stores = {name: TokenStore.open(path, contents=False) for name, path in facts["stores"].items()}
        tokenizer = load_tokenizer(description["tokenizer_path"])
        if tokenizer.digest != description["tokenizer_digest"]:
            raise DataError(f"{description['tokenizer_path']} is another tokenizer")
        if "chat_template" in description:
            tokenizer.chat = ChatEncoder(
                tokenizer, ChatTemplate(**description["chat_template"], specials=specials_of(tokenizer))
            )
        documents = (
            Documents(Path(facts["documents"][0]), *facts["documents"][1:]) if facts["documents"] else None
        )
        if documents is not None:
            len(documents)
    except DataError as error:
        raise DataError(
            f"another process has prepared the data, but here {str(error).split('; delete')[0]}; "
            "put data.cache_dir and data.path on a file system that all processes share"
        ) from error
    return Prepared(
        tokenizer,
        stores.get("train"),
        stores.get("validation"),
        documents,
        facts["digest"],
        description,
        parts,
    )


def chat_template(data: DataConfig, config: TokenizerConfig) -> ChatTemplate | None:
    """The template of conversations, known before the tokenizer is: ours have the separator alone."""
    if data.format == "text":
        return None
    path = config.path if config.kind == "file" else None
    known = load_tokenizer(path) if path else train_tokenizer((), TokenizerConfig(kind="byte"))
    given = config.chat_template or ("plain" if data.format == "completion" else None)
    return replace(find_template(given, path, known), form=data.format)


class _Preparation:
    """The steps of one `prepare`, sharing the corpus, the console, and the reasons for building again."""

    def __init__(
        self,
        data: DataConfig,
        tokenizer: TokenizerConfig,
        root: Path,
        console: Console,
        engine: Engine | None,
    ):
        self.data, self.tokenizer_config, self.root, self.console = data, tokenizer, root, console
        self.engine = engine
        self.template = chat_template(data, self.tokenizer_config)
        # `corpus` decides the tokenizer; what was appended to it follows in `parts`.
        self.corpus = corpus_of(data, self._say, self.template)
        self.parts: list[Corpus | OptimizedCorpus] = [self.corpus]
        self.ensured: set[str] = set()
        self.rebuilt: list[str] = []

    def run(self, *, append: bool, wanted: str | None) -> Prepared:
        ledger, groups = self._grow(append, wanted)
        directory = self._tokenizer_directory()
        tokenizer = load_tokenizer(directory / "tokenizer.json")
        if self.template is not None:
            tokenizer.chat = ChatEncoder(tokenizer, self.template)
        digest = self._digest(tokenizer)
        streaming = self.data.mode == "streaming"
        train = None if streaming else self._store("train", directory, tokenizer)
        validation = self._store("validation", directory, tokenizer)
        documents = self._documents("train") if streaming else None
        if documents is not None:
            documents.read([0, len(documents) - 1])  # a copy that broke off shows now, not after hours
        for part in self.parts:
            part.freeze()
        self.skipped = dict(sum((Counter(part.skipped()) for part in self.parts), Counter[str]()))
        if self.skipped:
            self._say(f"left out {in_words(self.skipped)} bad records (data.on_bad_record=skip)")
        if train is not None and train.num_tokens < self.data.seq_len:
            raise DataError(
                f"data.seq_len={self.data.seq_len} is more than the {train.num_tokens} tokens of the train "
                "split; use shorter rows or a larger corpus"
            )
        if ledger is not None:
            ledger.note(Generation(groups, digest))
        for line in self.corpus.lines() if isinstance(self.corpus, OptimizedCorpus) else ():
            self._say(line)
        return Prepared(
            tokenizer,
            train,
            validation,
            documents,
            digest,
            self._describe(train, validation, directory / "tokenizer.json", tokenizer, digest),
        )

    def _grow(self, append: bool, wanted: str | None) -> tuple[GenerationIndex | None, tuple[Files, ...]]:
        """Find of which generations the corpus consists; only folders read in cached mode have several."""
        data, corpus = self.data, self.corpus
        if data.source != "folder" or data.mode != "cached" or isinstance(corpus, OptimizedCorpus):
            if append:
                steps = "with data.steps" if data.steps else "without data.steps"
                raise DataError(
                    f"--append needs data.source=folder and data.mode=cached without data.steps, not "
                    f"{data.source} and {data.mode} {steps}; put the new documents into a folder"
                )
            return None, ()
        ledger = GenerationIndex(self.root, corpus, self._tokenizer_inputs(corpus=False))
        groups = ledger.grown() if append else ledger.current(wanted, self.data.generation)
        if len(groups) > 1 or groups[0] != ledger.files:
            self.parts = [Part(corpus, files) for files in groups]
            self.corpus = self.parts[0]
        elif not append and ledger.news():
            self._say(
                f"{ledger.news()} files are new since the folder was prepared; all is made anew, where "
                "prepare_data.py --append would add them alone"
            )
        return ledger, groups

    def _digest(self, tokenizer: Tokenizer, part: Corpus | OptimizedCorpus | None = None) -> str:
        """Digest of tokens and tokenizer: a part's, or the whole corpus's."""
        if part is not None or len(self.parts) == 1:
            corpus = (part or self.corpus).digest
            inputs = {"format": FORMAT, "corpus": corpus, "tokenizer": tokenizer.digest}
            if self.template is not None:
                inputs["chat"] = digest_of({"format": CHAT_FORMAT, **self.template.inputs})
            return digest_of(inputs)
        return digest_of({"format": FORMAT, "parts": [self._digest(tokenizer, part) for part in self.parts]})

    def _documents(self, split: str) -> Documents:
        return self._ensured(self.corpus).split(split)

    def _ensured(self, corpus: Corpus | OptimizedCorpus) -> Corpus | OptimizedCorpus:
        """Read the corpus only when something has to be built from it: a warm start never opens TFDS."""
        if corpus.digest not in self.ensured:
            if plan := corpus.plan():
                self._say(plan)
            reason = corpus.ensure()
            if reason:
                self._rebuilding(reason)
            self.ensured.add(corpus.digest)
        return corpus

    def _tokenizer_inputs(self, *, corpus: bool = True) -> dict[str, Any]:
        """Everything that decides the tokenizer; without `corpus`, all but what it is trained on."""
        config = self.tokenizer_config
        inputs: dict[str, Any] = {"kind": config.kind, "format": FORMAT}
        if config.kind == "file":
            inputs["digest"] = load_tokenizer(str(config.path)).digest
        if config.kind == "bpe":
            inputs |= {"vocab_size": config.vocab_size, "sample": BPE_SAMPLE_BYTES}
            inputs |= {"corpus": self.corpus.digest} if corpus else {}
        return inputs

    def _tokenizer_directory(self) -> Path:
        config = self.tokenizer_config
        if config.kind == "inherit":
            raise DataError("tokenizer.kind=inherit takes that of init_from's run; give init_from=RUN")
        given = load_tokenizer(str(config.path)) if config.kind == "file" else None
        inputs = self._tokenizer_inputs()

        def make(directory: Path) -> None:
            made = given or train_tokenizer(self._sample() if config.kind == "bpe" else (), config)
            made.save(directory / "tokenizer.json")

        return self._once("tokenizer", digest_of(inputs)[:16], make, {"kind": "tokenizer", **inputs})

    def _sample(self, limit: int = BPE_SAMPLE_BYTES) -> Iterator[str]:
        """Yield training documents, evenly spread over the split, up to about `limit` bytes."""
        documents = self._documents("train")
        self._say(f"training a tokenizer of {self.tokenizer_config.vocab_size} tokens")
        stride = max(1, -(-documents.num_bytes // limit))
        for first in range(0, len(documents), stride * BLOCK):
            texts = documents.read(range(first, min(first + stride * BLOCK, len(documents)), stride))
            yield from texts if self.template is None else map(plain_text, texts)

    def _store(self, split: str, tokenizer_directory: Path, tokenizer: Tokenizer) -> TokenStore:
        stores = [self._tokens(split, tokenizer_directory, tokenizer, part) for part in self.parts]
        found = [path for path in stores if path is not None]
        if len(self.parts) == 1:
            return TokenStore.open(found[0], contents=False)  # `_once` has just read it all
        digest = self._digest(tokenizer)
        about = {"kind": "tokens", "split": split, "inputs": digest, "parts": [path.name for path in found]}
        grown = self._once("tokens", f"{digest[:16]}-{split}", lambda directory: None, about)
        return TokenStore.open(grown, contents=False)

    def _tokens(
        self, split: str, tokenizer_directory: Path, tokenizer: Tokenizer, part: Corpus | OptimizedCorpus
    ) -> Path | None:
        """Return the store of one part's split; None where the part has no such documents."""
        digest = self._digest(tokenizer, part)
        about: dict[str, Any] = {"kind": "tokens", "split": split, "inputs": digest}
        key = f"{digest[:16]}-{split}"
        if part is not self.corpus and not (self.root / "tokens" / key).exists():
            if split not in self._ensured(part).splits():
                return None

        def make(directory: Path) -> None:
            documents = self._ensured(part).split(split)
            if (
                split == "validation"
                and self.template is None
                and not tokenizer.gives_back(documents[0][:999])
            ):
                self._say(
                    f"tokenizer.path={self.tokenizer_config.path} does not give a text back as it was; "
                    "figures by byte share the text's own bytes out over its tokens"
                )
            with _bar(self.console, f"tokenizing {split}", len(documents)) as advance:
                write_store(
                    directory,
                    documents,
                    self._encoding(tokenizer_directory / "tokenizer.json"),
                    workers=self.data.workers,
                    about=about,
                    advance=advance,
                    engine=self.engine,
                )

        return self._once("tokens", key, make, about)

    def _encoding(self, tokenizer: Path) -> Encoding:
        return TextEncoding(tokenizer) if self.template is None else ChatEncoding(tokenizer, self.template)

    def _once(self, kind: str, key: str, make: Callable[[Path], None], about: dict[str, Any]) -> Path:
        """Return the cached directory of that key, made when it is missing or fails its checksums."""
        directory = self.root / kind / key
        if directory.exists():
            try:
                _same_inputs(directory, verify(directory), about)
                return directory
            except CorruptCache as error:
                self._rebuilding(str(error))
        with (resuming if kind == "tokens" else building)(directory, about) as aside:
            make(aside)
        return directory

    def _rebuilding(self, reason: str) -> None:
        reason = reason.split("; delete")[0]
        self.rebuilt.append(reason)
        self._say(f"building again: {reason}")

    def _say(self, line: str) -> None:
        self.console.print(f"data: {line}", highlight=False, markup=False, soft_wrap=True)

    def _describe(
        self, train: TokenStore | None, validation: TokenStore, path: Path, tokenizer: Tokenizer, digest: str
    ) -> dict[str, Any]:
        splits = {"train": train, "validation": validation}
        template = self.template and {"name": self.template.name, **self.template.facts}
        return {
            "source": self.data.source,
            "mode": self.data.mode,
            "digest": digest,
            "corpus_digest": self.corpus.digest,
            "tokenizer_digest": tokenizer.digest,
            "tokenizer_path": str(path.absolute()),
            "vocab_size": tokenizer.vocab_size,
            "documents_path": str(self.corpus.directory),
            "rebuilt": self.rebuilt,
            **({"chat_template": template} if template else {}),
            **({"generation": len(self.parts) - 1} if len(self.parts) > 1 else {}),
            "skipped": self.skipped,
            **({"steps": self.data.steps} if self.data.steps else {}),
            **{name: _counts(store) for name, store in splits.items() if store},
        }


def _same_inputs(directory: Path, found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Hold a store to what it should have been made from: whole it may be, and another tokenizer's."""
    if found.get("inputs") != expected.get("inputs"):
        raise CorruptCache(f"{directory} was made from another corpus or with another tokenizer; delete it")


def _counts(store: TokenStore) -> dict[str, Any]:
    return {
        "documents": store.num_documents,
        "tokens": store.num_tokens,
        "bytes": store.num_bytes,
        "path": str(store.path),
    }


@contextlib.contextmanager
def _bar(console: Console, title: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a bar on a terminal; elsewhere one line says what is under way."""
    if not console.is_terminal:
        console.print(f"data: {title} ({total} documents)", highlight=False, markup=False, soft_wrap=True)
        yield lambda documents: None
        return
    columns = (
        TextColumn("data: {task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(title, total=total)
        yield lambda documents: bar.advance(task, documents)
