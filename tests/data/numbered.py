"""Corpora in which every token is another number, so that a batch says itself which samples it holds.

And hosts: processes that import nothing but `data`, each asking for its rows of every step, as a mesh whose
batch is split over processes would.
"""

import contextlib
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data.cache import building
from data.config import DataConfig
from data.loading.loader import Loader
from data.prepared import Prepared
from data.sources.documents import Documents
from data.tokens.store import TokenStore
from data.tokens.tokenizer import Tokenizer

SEQ_LEN, BATCH = 8, 24


def lengths_of(count: int, seed: int) -> np.ndarray:
    """Inputs of each document: from 1 to four rows' worth."""
    return np.random.default_rng(seed).integers(1, 4 * SEQ_LEN, count)


def write_numbered(directory: Path, count: int, first: int = 0, seed: int = 0) -> Path:
    """A token store of `count` documents whose entries are `first`, `first` + 1, ..., each occurring once."""
    offsets = np.concatenate([[0], np.cumsum(lengths_of(count, seed) + 1)])
    about = {"dtype": "<u4", "num_bytes": int(offsets[-1]), "bos_id": 0, "eos_id": 0}
    with building(directory, about) as aside:
        (first + np.arange(offsets[-1])).astype("<u4").tofile(aside / "tokens.bin")
        np.save(aside / "offsets.npy", offsets)
        np.save(aside / "token_bytes.npy", np.ones(1, np.int32))
    return directory


def inputs_of(store: TokenStore) -> list[int]:
    """Every entry of a store that is an input: all but each document's last."""
    return sorted(set(store.tokens.tolist()) - set(store.tokens[store.offsets[1:] - 1].tolist()))


class Numbers(Documents):
    """Texts of numbers; no number occurs twice."""

    def __init__(self, count: int):
        self.ends = np.cumsum(lengths_of(count, 0))

    def __len__(self) -> int:
        return len(self.ends)

    def numbers(self, index: int) -> range:
        return range(1 + (int(self.ends[index - 1]) if index else 0), 1 + int(self.ends[index]))

    def read(self, indices: Any) -> list[str]:
        return [" ".join(map(str, self.numbers(i))) for i in indices]


class NumberTokenizer(Tokenizer):
    """A number is its own token; 0 begins and ends a document."""

    def __init__(self) -> None:
        self.bos_id = self.eos_id = 0

    def encode_batch(self, texts: Any) -> list[np.ndarray]:
        return [np.array(text.split(), np.int32) for text in texts]


def open_loader(data: DataConfig, places: dict[str, str], batch: int = BATCH) -> Loader:
    """A loader over numbered stores by component (\"\": alone), or over numbers that are streamed."""
    if data.mode == "streaming":
        source: Any = Prepared(NumberTokenizer(), None, None, Numbers(300), "", {})
    else:
        stores = {name: TokenStore.open(place, contents=False) for name, place in places.items()}
        source = stores if data.mixture else stores[""]
    return Loader(source, data, global_batch_size=batch, seed=3)


def samples(batch: dict[str, np.ndarray]) -> list[list[list[int]]]:
    """Of each row its inputs and their targets and segments: which samples it holds, and how."""
    keys = ("tokens", "targets", "segment_ids", "positions")
    real = batch["loss_weights"] > 0
    return [[batch[key][r][real[r]].tolist() for key in keys] for r in range(len(real))]


def host(data: DataConfig, places: dict[str, str], task: dict[str, Any]) -> None:
    """Make the rows of host `number` of `hosts` from step `first` on; after each step say so and save."""
    loader = open_loader(data, places)
    loader.restore(task["state"])
    share, number = BATCH // task["hosts"], task["number"]
    rows = slice(number * share, (number + 1) * share)
    out = Path(task["out"])
    for step in range(task["first"], task["last"]):
        made = samples(loader.batch(step, rows))
        with (out / f"{step:05d}-{number}.new").open("w") as file:
            json.dump({"samples": made, "state": loader.state()}, file)
        os.replace(file.name, out / f"{step:05d}-{number}.json")


class Hosts:
    """Phases of a run, each by some number of processes that go on where the last phase was saved."""

    def __init__(self, data: DataConfig, places: dict[str, str], out: Path):
        self.data, self.places, self.out = data, places, out
        self.state = open_loader(data, places).state()
        self.step = 0
        self.seen: dict[int, list[Any]] = {}  # samples of each step, in the order of rows

    def run(self, hosts: int, steps: int) -> None:
        """So many steps, to the end."""
        with self._started(hosts, self.step + steps) as processes:
            for process in processes:
                process.join(60)
        assert [process.exitcode for process in processes] == [0] * hosts
        self._collect(hosts)

    def killed(self, hosts: int, steps: int) -> None:
        """SIGKILL to all hosts, at any moment once one has made so many steps."""
        with self._started(hosts, self.step + 10**6) as processes:
            end = time.monotonic() + 60
            while not (self.out / f"{self.step + steps - 1:05d}-{hosts - 1}.json").exists():
                assert time.monotonic() < end
                time.sleep(0.002)
            for process in processes:
                os.kill(process.pid, signal.SIGKILL)
            for process in processes:
                process.join(60)
        assert [process.exitcode for process in processes] == [-signal.SIGKILL] * hosts
        self._collect(hosts)

    @contextlib.contextmanager
    def _started(self, hosts: int, last: int) -> Iterator[list[Any]]:
        for left in self.out.glob("*"):
            left.unlink()
        # Processes of their own, forked from one that has imported `data` and has no threads.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.data.numbered"])
        task = {"hosts": hosts, "first": self.step, "last": last, "state": self.state, "out": str(self.out)}
        processes = [
            context.Process(target=host, args=(self.data, self.places, {**task, "number": n}))
            for n in range(hosts)
        ]
        for process in processes:
            process.start()
        try:
            yield processes
        finally:
            for process in processes:
                process.kill()

    def _collect(self, hosts: int) -> None:
        """Take what every host has made; the newest step that all of them saved is the checkpoint."""
        from data.loading.streaming import merged

        while all(path.exists() for path in self._of(self.step, hosts)):
            made = [json.loads(path.read_text()) for path in self._of(self.step, hosts)]
            self.seen[self.step] = [row for part in made for row in part["samples"]]
            self.state = json.loads(json.dumps(merged([part["state"] for part in made])))
            self.step += 1

    def _of(self, step: int, hosts: int) -> list[Path]:
        return [self.out / f"{step:05d}-{number}.json" for number in range(hosts)]
