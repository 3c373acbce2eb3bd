"""A corpus after `data.steps`: documents like those of any corpus, cached by what they were made of.

The steps themselves, one room each, lie in `data/steps/`; here they are put in passes, and their result, with
a report of what each did, becomes a directory that `Documents` reads.
"""

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from common.files import file_digest
from data.cache import CorruptCache, building, digest_of, verify
from data.config import DataConfig
from data.curation.base import SPLITS
from data.curation.config import (
    Compress,
    DedupExact,
    DedupMinhash,
    FilterLanguage,
    FilterLearned,
    FilterLength,
    FilterQuality,
    MaskPII,
    Shard,
    Step,
    StratifiedSample,
    as_dict,
    parse_steps,
)
from data.curation.length import EDGES as LENGTHS
from data.curation.passes import WHOLE, BothSplits, Pass, decide, run_pass
from data.curation.report import check_report, line_of, step_entry, whole_entry
from data.curation.tally import Tally
from data.curation.write import NAME, VERSION, CorpusWriter, file_bytes
from data.errors import DataError
from data.sources.corpus import Corpus
from data.sources.documents import Documents
from data.tokens.chat_template import ChatTemplate

FORMAT = 1  # raise it when the same steps make other documents of the same corpus, or the layout changes
REPORT, PAGE = "report.json", "report.html"

Say = Callable[[str], None]


def corpus_of(
    config: DataConfig, say: Say = lambda line: None, chat: ChatTemplate | None = None
) -> "Corpus | OptimizedCorpus":
    """Return the corpus of a config: the source's own, or what `data.steps` makes of it."""
    return OptimizedCorpus(config, say, chat) if config.steps else Corpus(config, chat=chat)


def documents(config: DataConfig, split: str) -> Documents:
    """Return the "train" or "validation" documents of a corpus, built into the cache if need be."""
    corpus = corpus_of(config)
    corpus.ensure()
    return corpus.split(split)


class OptimizedCorpus:
    """What `Corpus` is, of documents that went through `data.steps`; the digest covers source and steps."""

    def __init__(self, config: DataConfig, say: Say = lambda line: None, chat: ChatTemplate | None = None):
        self.config, self.say = config, say
        self.source = Corpus(dataclasses.replace(config, steps=[]), say, chat)
        self.steps = parse_steps(config.steps)
        self.inputs: dict[str, Any] = {
            "corpus": self.source.digest,
            "steps": [_inputs(step) for step in self.steps],
            "format": FORMAT,
        }
        self.digest = digest_of(self.inputs)
        self.directory = Path(config.cache_dir) / "documents" / self.digest[:16]

    def ensure(self) -> str | None:
        """Run the steps unless a sound result is there; return why one was replaced, else None."""
        reason = None
        if self.directory.exists():
            try:
                verify(self.directory)
                return None
            except CorruptCache as error:
                reason = str(error)
        if plan := self.source.plan():
            self.say(plan)
        about: dict[str, Any] = {"kind": "documents", "digest": self.digest}
        of_source = self.source.ensure()
        with building(self.directory, about) as aside:
            _Building(self, aside, about).run()
        return reason or of_source

    def plan(self) -> None:
        """Say nothing: `ensure` says what it does."""

    def freeze(self) -> None:
        """Take note that the source is whole, as `Corpus` does."""
        self.source.freeze()

    def skipped(self) -> dict[str, int]:
        """Return how many bad records the source left out, by kind."""
        return self.source.skipped()

    def splits(self) -> list[str]:
        """Return the splits that have documents: a step that empties one is refused."""
        return list(SPLITS)

    def split(self, split: str) -> Documents:
        """Return one split's documents."""
        return Documents(self.directory / NAME / VERSION, split, "text")

    def report(self) -> dict[str, Any] | None:
        """Return the data report, or None where the corpus is not there (its tokens may be)."""
        try:
            return json.loads((self.directory / REPORT).read_text("utf-8"))
        except (OSError, ValueError):
            return None

    def lines(self) -> list[str]:
        """Return a line on each step, and where the page lies."""
        report = self.report()
        if report is None:
            return []
        return [*map(line_of, report["steps"]), f"report of these steps: {self.directory / PAGE}"]


def _inputs(step: Step) -> dict[str, Any]:
    """Return what decides a step's result: example files count by their content, not by their place."""
    values = as_dict(step)
    if isinstance(step, FilterLearned):
        for key in ("good", "bad"):
            values[key] = [_content(path) for path in values[key]]
    return values


def _content(path: str) -> str:
    try:
        return file_digest(path)
    except OSError as error:
        raise DataError(
            f"data.steps: filter_learned: {path} cannot be read ({error.strerror}); name a .jsonl file"
        ) from None


def _made(step: Step) -> Any:
    """Return what does a step's work; its room, and the libraries that it needs, are loaded only now."""
    from data.curation import dedup, language, learned, length, pii, quality, sample

    match step:
        case StratifiedSample():
            return sample.SampleStep(step)
        case DedupExact():
            return dedup.DedupExactStep(step)
        case DedupMinhash():
            return dedup.DedupMinhashStep(step)
        case FilterLength():
            return length.FilterLengthStep(step)
        case FilterQuality():
            return quality.FilterQualityStep(step)
        case FilterLanguage():
            return language.FilterLanguageStep(step)
        case FilterLearned():
            return learned.FilterLearnedStep(step) if step.keep is None else learned.KeepBestStep(step)
        case MaskPII():
            return pii.MaskPIIStep(step)
    raise AssertionError(step)


class _Building:
    """One building of an optimized corpus, from its source's documents to the report."""

    def __init__(self, corpus: OptimizedCorpus, aside: Path, about: dict[str, Any]):
        self.corpus, self.aside, self.about = corpus, aside, about
        self.steps = corpus.steps
        self.working = {number: _made(step) for number, step in enumerate(self.steps) if not _of_writer(step)}
        self.source = BothSplits({split: corpus.source.split(split) for split in SPLITS})
        self.tallies: dict[int, Tally] = {}
        self.details: dict[int, dict[str, Any]] = {}

    def run(self) -> None:
        """Run every pass, write what is left, and report."""
        numbers = np.arange(len(self.source))
        writer = CorpusWriter(self.aside / NAME / VERSION, self._only(Compress), self._only(Shard))
        passes = self._passes()
        try:
            for place, what in enumerate(passes, 1):
                began, before = time.monotonic(), len(numbers)
                numbers = self._pass(what, numbers, writer)
                self._say(f"pass {place} of {len(passes)}", what, before, time.monotonic() - began)
                self._check_left(numbers)
            sizes = writer.finish()
        finally:
            writer.abandon()
        self._report(sizes)

    def _passes(self) -> list[Pass]:
        """Group the steps: those that decide alone run together, one that must see all ends a pass."""
        hide = [self.working[n] for n, step in enumerate(self.steps) if isinstance(step, MaskPII)]
        passes = [Pass(first=True, hide=hide)]
        masks: list[Any] = []
        for number, step in enumerate(self.steps):
            if number not in self.working:
                continue
            if hasattr(self.working[number], "decide"):
                passes[-1].last = (number, self.working[number])
                passes.append(Pass(masks=list(masks), hide=hide))
            else:
                passes[-1].steps.append((number, self.working[number]))
            if isinstance(step, MaskPII):
                masks.append(self.working[number])
        return passes

    def _pass(self, what: Pass, numbers: np.ndarray, writer: CorpusWriter) -> np.ndarray:
        left, signatures = [], []
        for split, done in run_pass(self.source, what, numbers, self.corpus.config.workers):
            left.append(done.numbers)
            for number, tally in done.tallies.items():
                self.tallies.setdefault(number, Tally()).add(tally)
            for text, path in done.documents:
                writer.write(split, text, path)
            if what.last is not None:
                what.last[1].names.update(done.names)
            if done.signatures is not None:
                signatures.append(done.signatures)
        found = np.concatenate(left)
        if what.last is not None and len(found):
            number = what.last[0]
            rows = np.concatenate([part for part in signatures if len(part)])
            del signatures
            found, self.tallies[number], self.details[number] = decide(what, self.source, found, rows)
        return found

    def _check_left(self, numbers: np.ndarray) -> None:
        left = {"validation": int((numbers < self.source.offset).sum())}
        left["train"] = len(numbers) - left["validation"]
        for split, count in left.items():
            if count == 0:
                guilty = next(
                    n for n, t in sorted(self.tallies.items()) if n >= 0 and not t.documents[split][1]
                )
                raise DataError(
                    f"data.steps[{guilty}] ({self.steps[guilty].step}) leaves no {split} documents; "
                    "loosen it, or add documents to the corpus"
                )

    def _only(self, kind: type) -> Any:
        return next(
            (step for step in self.steps if isinstance(step, kind)), kind() if kind is Compress else None
        )

    def _say(self, title: str, what: Pass, documents: int, seconds: float) -> None:
        names = [self.steps[number].step for number, _ in [*what.steps, *([what.last] if what.last else [])]]
        rate = documents / max(seconds, 1e-9)
        self.corpus.say(
            f"{title} ({', '.join(names) or 'writing'}): {documents:,} documents in {seconds:.1f} s, "
            f"{rate:,.0f} a second"
        )

    def _report(self, sizes: dict[str, Any]) -> None:
        sizes = {"source_file_bytes": file_bytes(self.source.splits["train"].directory), **sizes}
        report: dict[str, Any] = {
            "format": FORMAT,
            "digest": self.corpus.digest,
            "source_digest": self.corpus.source.digest,
            "corpus": whole_entry(self.tallies[WHOLE], {"characters": LENGTHS}, sizes),
            "steps": [self._entry(number, step, sizes) for number, step in enumerate(self.steps)],
        }
        check_report(report)
        models = [
            entry["details"]["model_digest"]
            for entry in report["steps"]
            if "model_digest" in entry["details"]
        ]
        self.about |= {"model_digests": models}
        (self.aside / REPORT).write_text(json.dumps(report, indent=1, sort_keys=True) + "\n", "utf-8")
        from data.curation.page import page

        (self.aside / PAGE).write_text(page(report), "utf-8")

    def _entry(self, number: int, step: Step, sizes: dict[str, Any]) -> dict[str, Any]:
        if _of_writer(step):
            return step_entry(step, self._untouched(number), {}, sizes, {})
        working = self.working[number]
        details = self.details.get(number, getattr(working, "details", {}))
        edges = getattr(working, "edges", EDGES_OF_GLOBAL)
        return step_entry(step, self.tallies[number], edges, details, getattr(working, "bounds", {}))

    def _untouched(self, number: int) -> Tally:
        """Return the counts of a step that drops nothing: what the one before it has left."""
        before = [n for n in range(number) if n in self.working]
        last, side = (self.tallies[before[-1]], 1) if before else (self.tallies[WHOLE], 0)
        same = Tally()
        for split in SPLITS:
            same.documents[split] = [last.documents[split][side]] * 2
            same.bytes[split] = [last.bytes[split][side]] * 2
        return same


EDGES_OF_GLOBAL = {"score": np.linspace(0, 1, 41)}


def _of_writer(step: Step) -> bool:
    """Say whether a step concerns how documents are stored, not which they are."""
    return isinstance(step, Compress | Shard)
