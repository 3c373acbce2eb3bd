"""The data report: what each step did, in numbers that add up."""

from collections import Counter
from typing import Any

from common.text import aligned
from data.curation.base import SPLITS
from data.curation.config import Step, as_dict
from data.curation.tally import Tally
from data.errors import DataError


def step_entry(
    step: Step, tally: Tally, edges: dict[str, Any], details: dict[str, Any], bounds: dict[str, Any]
) -> dict[str, Any]:
    """Return what the report says of one step; documents and bytes are [before, after] of each split.

    `edges` are those of its histograms, `bounds` the [least, most] that a value may have.
    """
    return {
        "step": step.step,
        "parameters": {key: value for key, value in as_dict(step).items() if key != "step"},
        "documents": tally.documents,
        "bytes": tally.bytes,
        "reasons": {split: dict(sorted(tally.reasons[split].items())) for split in SPLITS},
        "counts": dict(sorted(tally.counts.items())),
        "details": details,
        "histograms": _histograms(tally, edges, bounds),
        "examples": [example for _, example in tally.examples],
    }


def _histograms(tally: Tally, edges: dict[str, Any], bounds: dict[str, Any]) -> dict[str, Any]:
    return {
        name: {
            "edges": [round(float(edge), 6) for edge in edges[name]],
            "before": histogram[0].tolist(),
            "after": histogram[1].tolist(),
            "bounds": list(bounds.get(name, (None, None))),
        }
        for name, histogram in sorted(tally.histograms.items())
    }


def whole_entry(tally: Tally, edges: dict[str, Any], details: dict[str, Any]) -> dict[str, Any]:
    """Return what the report says of the corpus before and after all steps."""
    return {
        "documents": tally.documents,
        "bytes": tally.bytes,
        "histograms": _histograms(tally, edges, {}),
        "details": details,
    }


def check_report(report: dict[str, Any]) -> None:
    """Raise DataError unless the report adds up.

    Each step begins with what the one before has left, what is gone has a reason, the first and last are the
    corpus's own counts, and every histogram holds every document.
    """
    whole, steps = report["corpus"], report["steps"]
    for kind in ("documents", "bytes"):
        for split in SPLITS:
            chain = [whole[kind][split][0]]
            for step in steps:
                _same(step[kind][split][0], chain[-1], f"{step['step']}: {kind} of {split} before it")
                chain.append(step[kind][split][1])
            _same(whole[kind][split][1], chain[-1], f"{kind} of {split} written")
    for step in steps:
        for split in SPLITS:
            before, after = step["documents"][split]
            _same(before - after, sum(step["reasons"][split].values()), f"{step['step']}: reasons of {split}")
    for entry in (whole, *steps):
        for name, histogram in entry["histograms"].items():
            for side, row in enumerate(("before", "after")):
                documents = sum(entry["documents"][split][side] for split in SPLITS)
                _same(sum(histogram[row]), documents, f"{entry.get('step', 'corpus')}: histogram of {name}")


def _same(found: int, wanted: int, what: str) -> None:
    if found != wanted:
        raise DataError(
            f"the data report does not add up: {what} is {found}, not {wanted}; report this defect"
        )


def line_of(step: dict[str, Any]) -> str:
    """Return one line on a step, for a terminal."""
    parts = [
        f"{split} {before:,} → {after:,}" if before != after else f"{split} {after:,}"
        for split, (before, after) in sorted(step["documents"].items())
    ]
    reasons = sum((Counter(step["reasons"][split]) for split in SPLITS), Counter())
    counted = reasons or Counter(step["counts"])
    said = [f"{name} {count:,}" for name, count in counted.most_common(6)]
    if "file_bytes" in step["details"]:
        before, after = step["details"]["source_file_bytes"], step["details"]["file_bytes"]
        said = [f"files of {before:,} → {after:,} bytes"]
    return f"{step['step']}: {', '.join(parts)} documents" + (f" ({', '.join(said)})" if said else "")


def table(report: dict[str, Any]) -> list[str]:
    """Return the report as lines of a table, documents and bytes before and after each step."""
    rows = [("step", "split", "documents", "left", "bytes", "left")]
    entries = [*report["steps"], {"step": "in all", **report["corpus"]}]
    for entry in entries:
        for split in sorted(SPLITS):
            documents, sizes = entry["documents"][split], entry["bytes"][split]
            rows.append((entry["step"], split, *(f"{n:,}" for n in (*documents, *sizes))))
    return aligned(rows, right=range(2, 6))
