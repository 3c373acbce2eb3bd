"""Has the data moved? `python scripts/drift_report.py RUN old=STORE new=STORE`.

    RUN                    a run whose newest checkpoint's loss is compared on both; may be left out
    old= new=              token stores (directories that scripts/prepare_data.py prints), runs (their$
                           training data), or folders of documents, tokenized with the run's tokenizer first
    tokenizer=FILE         a tokenizer.json, where no run has it
    documents=2000         documents sampled of each
    rows=128               documents of each whose loss is taken
    seed=0                 of samples and resamples
    cache_dir=.cache/data  where folders are tokenized to
    out=drift              PREFIX of the two files

Compares two prepared corpora of one tokenizer: the distribution of tokens, features of documents, how well
the tokenizer still fits, and the loss of a trained model on both. Each figure stands beside its floor, what
two samples of the old corpus differ by. Writes PREFIX.json and PREFIX.html, a page with plots in one file.

Exit status: 0 no drift, 3 drift (the verdict, one line, says of what), 1 a damaged checkpoint, 2 bad input.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if __name__ == "__main__":
    import command

from artifacts.load import find_run, load
from scripts.command import parse, run

if TYPE_CHECKING:
    from data.curation.drift import StoreSample
    from data.tokens.store import TokenStore
    from data.tokens.tokenizer import Tokenizer

DRIFTED = 3
LOSS_LIMIT = 0.05  # nats a token by which a mean loss may differ
RESAMPLES = 1000


@dataclass(frozen=True)
class DriftOptions:
    """The command line; see the module's docstring."""

    old: str
    new: str
    run: str | None = None
    tokenizer: Path | None = None
    documents: int = 2000
    rows: int = 128
    seed: int = 0
    cache_dir: str = ".cache/data"
    out: str = "drift"


def report(options: DriftOptions) -> dict[str, Any]:
    """The whole report; features keep their arrays under "old" and "new" for the plots."""
    from data.curation.drift import compare, findings, sample
    from data.errors import DataError

    for key in ("documents", "rows"):
        if getattr(options, key) < 20:
            raise DataError(f"{key}={getattr(options, key)} says nothing about a corpus; use 20 or more")
    tokenizer, path = known_tokenizer(options)
    stores = [open_store(key, getattr(options, key), path, options.cache_dir) for key in ("old", "new")]
    # Other documents of the two where they are the same store: the same corpus is no drift, and no identity.
    old, new = (sample(store, options.documents, options.seed + i) for i, store in enumerate(stores))
    made = compare(old, new, seed=options.seed)
    for mover in (*made["tokens"]["risen"], *made["tokens"]["fallen"]):
        mover["text"] = tokenizer.decode([mover["id"]]) if tokenizer else f"#{mover['id']}"
    drifted = findings(made)
    if options.run:
        made["loss"] = losses(options, old, new)
        low, high = made["loss"]["interval"]
        if (low > 0 or high < 0) and abs(made["loss"]["difference"]) > LOSS_LIMIT:
            drifted.append(
                f"loss: {made['loss']['difference']:+.3f} nats a token ({low:+.3f} to {high:+.3f})"
            )
    verdict = "drift in " + "; ".join(drifted) if drifted else "no drift beyond chance"
    return {
        "verdict": verdict,
        "drifted": drifted,
        "corpora": {
            key: {"path": str(store.path), "documents": store.num_documents, "tokens": store.num_tokens}
            for key, store in zip(("old", "new"), stores, strict=True)
        },
        "seed": options.seed,
        **made,
    }


def known_tokenizer(options: DriftOptions) -> tuple["Tokenizer | None", Path | None]:
    """The tokenizer that movers are spelled with, and its file: given, or one of the runs'."""
    from data.tokens.tokenizer import load_tokenizer

    runs = [find_run(options.run)] if options.run else []
    runs += [Path(p) for p in (options.old, options.new) if (Path(p) / "config.yaml").is_file()]
    files = [options.tokenizer] if options.tokenizer else [run / "tokenizer.json" for run in runs]
    return (load_tokenizer(files[0]), files[0]) if files else (None, None)


def open_store(key: str, where: str, tokenizer: Path | None, cache_dir: str) -> "TokenStore":
    """The token store that `old=` or `new=` means. Raises DataError."""
    from data.config import DataConfig, TokenizerConfig
    from data.errors import DataError
    from data.pipeline import prepare
    from data.tokens.store import TokenStore

    path = Path(where)
    if (path / "manifest.json").is_file() and not (path / "config.yaml").is_file():
        return TokenStore.open(path)
    if (path / "manifest.json").is_file():
        data = json.loads((path / "manifest.json").read_text("utf-8"))["data"]["description"]
        if "train" not in data:
            raise DataError(f"{key}={where} is a run that streamed; give a token store or its documents")
        return TokenStore.open(data["train"]["path"])
    if not path.exists():
        raise DataError(f"{key}={where} does not exist; give a token store, a run or a folder of documents")
    if tokenizer is None:
        raise DataError(f"{key}={where} has to be tokenized first; give a RUN or tokenizer=FILE")
    # Documents are held out too, of which there must be some; the comparison is of the others.
    data = DataConfig(source="folder", path=where, cache_dir=cache_dir, seq_len=2, validation_fraction=0.1)
    store = prepare(data, TokenizerConfig(kind="file", path=str(tokenizer))).train
    assert store is not None
    return store


def losses(options: DriftOptions, old: "StoreSample", new: "StoreSample") -> dict[str, Any]:
    """Mean loss of the run's newest checkpoint on the beginnings of some documents of each, and its spread.

    The interval holds 95 % of the differences of resampled documents (Efron's percentile bootstrap).
    """
    from data.pipeline import prepare
    from parallel.schedules.accumulate import GradientAccumulation
    from training.config import from_stored
    from training.evaluate import row_losses
    from training.opening.opened import trained_model

    loaded = load(str(options.run), from_stored)
    config = loaded.config
    tokenizer = loaded.tokenizer(lambda: prepare(config.data, config.tokenizer, progress=False).tokenizer)
    if not np.array_equal(tokenizer.token_bytes(), old.store.token_bytes):
        raise ValueError(
            f"run={options.run} has another tokenizer than {old.store.path}; prepare both with it"
        )
    model, params, ops, _ = trained_model(loaded, tokenizer.vocab_size)

    def of(one: "StoreSample") -> tuple[np.ndarray, np.ndarray]:
        rows = beginnings(one, options.rows, loaded.config.data.seq_len)
        nll, weight = row_losses(
            lambda p, b: GradientAccumulation().evaluate(model, p, b, ops), params, [rows]
        )
        return nll[weight > 0], weight[weight > 0]

    a, b = of(old), of(new)
    rng = np.random.default_rng(options.seed)
    spread = [_resampled(b, rng) - _resampled(a, rng) for _ in range(RESAMPLES)]
    means = [float(nll.sum() / weight.sum()) for nll, weight in (a, b)]
    return {
        "old": means[0],
        "new": means[1],
        "difference": means[1] - means[0],
        "interval": [float(x) for x in np.quantile(spread, (0.025, 0.975))],
        "documents": [len(a[0]), len(b[0])],
        "old_rows": (a[0] / a[1]).tolist(),
        "new_rows": (b[0] / b[1]).tolist(),
    }


def _resampled(rows: tuple[np.ndarray, np.ndarray], rng: np.random.Generator) -> float:
    chosen = rng.integers(len(rows[0]), size=len(rows[0]))
    return float(rows[0][chosen].sum() / rows[1][chosen].sum())


def beginnings(one: "StoreSample", rows: int, seq_len: int) -> dict[str, np.ndarray]:
    """A batch of the first `seq_len` tokens of some documents, one a row."""
    from data.loading.packing import PackingPlan, empty_batch, fill

    store, index = (
        one.store,
        one.index[np.linspace(0, len(one.index) - 1, min(rows, len(one.index))).astype(int)],
    )
    lengths = np.minimum(store.lengths[index], seq_len)
    plan = PackingPlan(store.starts[index], lengths, np.arange(len(index) + 1))
    batch = empty_batch(len(index), seq_len)
    everything = np.arange(len(index))
    fill(batch, everything, store.tokens, plan, everything, weights=store.weights)
    return batch


def plain(value: Any) -> Any:
    """Without the documents' arrays, which only the plots need."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items() if not isinstance(v, np.ndarray)}
    return value


def write_report(arguments: Sequence[str]) -> int:
    """Write the report and print the verdict; the exit status."""
    from data.curation.drift_page import page

    options = parse(arguments, DriftOptions)
    made = report(options)
    Path(f"{options.out}.json").write_text(json.dumps(plain(made), indent=1) + "\n", encoding="utf-8")
    Path(f"{options.out}.html").write_text(page(made), encoding="utf-8")
    print(made["verdict"])
    print(f"{options.out}.json, {options.out}.html")
    return DRIFTED if made["drifted"] else 0


def main(arguments: Sequence[str]) -> int:
    """The command; its exit status."""
    return run(write_report, arguments, __doc__)


if __name__ == "__main__":
    command.start(main)
