"""Anonymous memory of preparing and reading, by the size of the corpus: `python benchmarks/input_memory.py`.

Corpora of JSONL are made in a temporary directory; each is prepared and then read for training in a process
of its own. RssAnon of that process and of everything it starts is added up every 20 ms, and the peak counts.
With `--directory`, what is there already is used again, and a preparation that was cut off goes on.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # found from a clone that was never installed, too
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measure import write_result

SIZES = (50, 2000)  # MB of text
WORDS = 20_000
DOCUMENT = (20, 900)  # words
FILE_MB = 64
LIMIT_MB = 200  # by how much the larger corpus may exceed the smaller


def write_corpus(folder: Path, megabytes: int) -> None:
    """Documents of random words, of about 3 kB, in JSONL files."""
    rng = random.Random(megabytes)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 10))) for _ in range(WORDS)]
    folder.mkdir(parents=True)
    written = 0
    for number in range(10**6):
        size = 0
        with open(folder / f"{number:04d}.jsonl", "w", encoding="utf-8") as file:
            while size < FILE_MB << 20 and written + size < megabytes * 10**6:
                text = " ".join(rng.choices(words, k=rng.randint(*DOCUMENT)))
                size += len(text)
                file.write(json.dumps({"text": text}) + "\n")
        written += size
        if written >= megabytes * 10**6:
            return


def stage(name: str, root: Path, seq_len: int) -> None:
    """What the measured process does: "prepare" the corpus, or "read" batches of its first two epochs."""
    from data.config import DataConfig, TokenizerConfig
    from data.loading.loader import Loader
    from data.pipeline import prepare

    config = DataConfig(
        source="folder", path=str(root / "texts"), cache_dir=str(root / "cache"), seq_len=seq_len
    )
    prepared = prepare(config, TokenizerConfig(kind="byte"))
    if name == "read":
        assert prepared.train is not None
        loader = Loader(prepared, config, global_batch_size=64, seed=0)
        steps = prepared.train.num_tokens // (seq_len * 64)
        for step in [*range(50), *range(steps - 2, steps + 50)]:
            loader.batch(step)


def descendants(pid: int) -> Iterator[int]:
    """A process and all that it has started."""
    yield pid
    try:
        for task in os.listdir(f"/proc/{pid}/task"):
            for child in Path(f"/proc/{pid}/task/{task}/children").read_text("utf-8").split():
                yield from descendants(int(child))
    except OSError:
        return


def anonymous(pid: int) -> int:
    """RssAnon of a process in bytes; 0 where it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text("utf-8").splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def peak_of(command: list[str], note: Path) -> float:
    """Run a command; the peak of RssAnon in MB. `note` keeps it, for where a run is cut off and goes on."""
    peak = int(note.read_text("utf-8")) if note.exists() else 0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        now = sum(map(anonymous, descendants(process.pid)))
        if now > peak:
            peak = now
            note.write_text(str(peak), "utf-8")
        time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return peak / 1e6


def measure(root: Path, megabytes: int, seq_len: int) -> dict[str, Any]:
    """One corpus through both stages, each in a process of its own, unless they are done already."""
    place = root / str(megabytes)
    if not (place / "whole").exists():
        write_corpus(place / "texts", megabytes)
        (place / "whole").touch()
    row: dict[str, Any] = {"text": f"{megabytes} MB"}
    for name in ("prepare", "read"):
        words = [
            sys.executable,
            __file__,
            "--stage",
            name,
            "--directory",
            str(place),
            "--seq-len",
            str(seq_len),
        ]
        done = place / f"{name}.done"
        if not done.exists():
            done.write_text(str(peak_of(words, place / f"{name}.peak")), "utf-8")
        row[f"{name}: peak MB"] = float(done.read_text("utf-8"))
    return row


def main() -> int:
    """Measure, print and write the result; exit status 1 where memory grew too much."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--sizes", type=int, nargs=2, default=SIZES, help="MB of text, small and large")
    parser.add_argument("--directory", type=Path, help="where corpora stay; by default they are removed")
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--stage", choices=("prepare", "read"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stage:
        stage(options.stage, options.directory, options.seq_len)
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        rows = [measure(options.directory or Path(scratch), size, options.seq_len) for size in options.sizes]
    for row in rows:
        print(row)
    growth = {key: rows[1][f"{key}: peak MB"] - rows[0][f"{key}: peak MB"] for key in ("prepare", "read")}
    write_result(
        "input_memory",
        {
            "title": "Anonymous memory of preparing and of reading a corpus",
            "table": rows,
            "growth": growth,
            "note": "`benchmarks/input_memory.py`: peak RssAnon of all processes together; byte tokenizer, "
            f"two workers, rows of {options.seq_len} tokens, batches of 64 rows over the edge of an epoch.",
        },
    )
    return int(max(growth.values()) > LIMIT_MB)


if __name__ == "__main__":
    sys.exit(main())
