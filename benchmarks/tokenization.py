"""Tokenizing into a store against the tokenizer library alone: `python benchmarks/tokenization.py`.

The same text and the same cores. The library gets every text in one list and one call, its own threads, and
nobody reads what it makes; ours reads the corpus, tokenizes, and leaves a store with its checksums.
"""

import argparse
import json
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # found from a clone that was never installed, too
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measure import alternate, ratio, summary, timed, write_result
from data.config import DataConfig, TokenizerConfig
from data.curation.optimize import documents
from data.sources.corpus import stdlib_root
from data.sources.documents import Documents
from data.sources.files import list_stdlib
from data.tokens.encoding import TextEncoding
from data.tokens.shards import local_engine
from data.tokens.store import write_store
from data.tokens.tokenizer import load_tokenizer, train_tokenizer

DOCUMENT = (20, 200)  # lines
VOCABULARY = 4096


def prepared(root: Path, megabytes: int) -> tuple[Documents, Path]:
    """Documents of lines drawn from the standard library, and a BPE trained on some of them."""
    config = DataConfig(source="folder", path=str(root / "texts"), cache_dir=str(root / "cache"))
    tokenizer = root / "tokenizer.json"
    if not tokenizer.exists():
        (root / "texts").mkdir(parents=True, exist_ok=True)
        _write_texts(root / "texts", megabytes * 10**6)
    corpus = documents(config, "train")
    if not tokenizer.exists():
        sample = corpus.read(range(0, len(corpus), 10))
        train_tokenizer(sample, TokenizerConfig(vocab_size=VOCABULARY)).save(tokenizer)
    return corpus, tokenizer


def _write_texts(folder: Path, size: int) -> None:
    rng = random.Random(0)
    lines = [line for path in list_stdlib(stdlib_root()) for line in path.read_text("utf-8").splitlines(True)]
    with open(folder / "lines.jsonl", "w", encoding="utf-8") as file:
        while size > 0:
            text = "".join(rng.choices(lines, k=rng.randint(*DOCUMENT)))
            size -= len(text.encode())
            file.write(json.dumps({"text": text}) + "\n")


def library_seconds(tokenizer: Path, texts: list[str]) -> float:
    """The library's own batch rate: one call, its threads, no offsets."""
    backend = load_tokenizer(tokenizer)._backend
    return timed(lambda: backend.encode_batch_fast(texts, add_special_tokens=False))


def store_seconds(corpus: Documents, tokenizer: Path, workers: int) -> float:
    """From the corpus to a finished store; the start of the processes is part of it."""
    with tempfile.TemporaryDirectory(dir=tokenizer.parent) as scratch:
        engine = local_engine(workers)
        encoding = TextEncoding(tokenizer)
        return timed(
            lambda: write_store(Path(scratch), corpus, encoding, workers=workers, about={}, engine=engine)
        )


def main() -> None:
    """Measure in turns, print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--megabytes", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--directory", type=Path, help="where the corpus stays; by default it is removed")
    parser.add_argument("--only-make", action="store_true", help="make the corpus and stop")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        corpus, tokenizer = prepared(options.directory or Path(scratch), options.megabytes)
        if options.only_make:
            return
        texts = corpus.read(range(len(corpus)))
        size = sum(len(text.encode()) for text in texts) / 1e6
        cases: dict[str, Any] = {
            "library": lambda: library_seconds(tokenizer, texts),
            "two processes": lambda: store_seconds(corpus, tokenizer, 2),
            "one process": lambda: store_seconds(corpus, tokenizer, 1),
        }
        seconds = alternate(cases, options.rounds)
    library = seconds["library"]
    ratios = {name: ratio(took, library) for name, took in seconds.items() if name != "library"}
    rows = [
        {
            "tokenizing": name,
            "MB/s": size / summary(took)["median"],
            "of the library's rate": ratio(took, library)["median"],
        }
        for name, took in seconds.items()
    ]
    for row in rows:
        print(row)
    print(ratios)
    write_result(
        "tokenization",
        {
            "title": f"Tokenizing {size:.0f} MB into a store, and the library's own batch call",
            "table": rows,
            "ratios": ratios,
            "note": "`benchmarks/tokenization.py`: BPE of 4096 tokens; a store is read, tokenized, synced "
            "and checksummed, and its processes started, within the time; the library's one call keeps all "
            f"that it made in memory. Rounds: {options.rounds}.",
        },
    )


if __name__ == "__main__":
    main()
