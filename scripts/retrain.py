"""A model kept up with a corpus that grows: `python scripts/retrain.py RUN [training.num_steps=200 ...]`.

    RUN                 the run that the line began with; runs/RUN.live names the one that is in use now
    KEY=VALUE           keys of the candidate's config that differ from those of the run in use, such as
                        optim.learning_rate=0.0003, adapter.rank=8, training.num_steps=200
    only_on_drift=true  train only where the new documents differ from the old ones beyond chance
    documents=256       held-out documents of each corpus that old and new weights are compared on
    runs=DIR            where runs lie, runs/ by default

One round: the files that are new in data.path are tokenized and added to the corpus; a report says how far
they have drifted; a candidate (RUN.1, RUN.2, …) goes on from the run in use, on old and new documents; both
are compared on held-out documents, the same ones; and where the candidate is better on the new ones, and
worse on the old ones by no more than chance, runs/RUN.live becomes it. A server of it
(`scripts/serve.py RUN.live follow=true`) answers by it from then on. Else it says why not.

Everything that is decided stands in runs/RUN.rounds/K/. Stopped or killed anywhere, the same command goes
on. Exit status: 0 promoted, or nothing is new; 4 not promoted; 75 stopped, start it again; 1, 2 as train.py.
"""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":
    import command

from artifacts.load import RUNS, load
from common.files import write_text
from scripts.command import parse, run

if TYPE_CHECKING:
    from data.tokens.store import TokenStore
    from training.config import Config
    from training.opening.opened import OpenedModel

REFUSED = 4


@dataclass(frozen=True)
class RetrainOptions:
    """The command line's own words; all others are keys of the config."""

    run: str
    only_on_drift: bool = False
    documents: int = 256
    runs: Path = RUNS


@dataclass(frozen=True)
class Round:
    """One candidate: the run that it goes on from, its own directory, and where its decisions stand."""

    live: Path
    directory: Path
    decisions: Path

    def once(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `make` said, the first time that it came to its end."""
        path = self.decisions / f"{name}.json"
        if not path.exists():
            made = make()
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps(made, indent=1) + "\n")
        return json.loads(path.read_text("utf-8"))


def split_words(words: Sequence[str]) -> tuple[RetrainOptions, list[str]]:
    """The options of this command, and the words that change the candidate's config."""
    own = {field.name for field in fields(RetrainOptions)}
    mine = [word for word in words if "=" not in word or word.partition("=")[0] in own]
    return parse(mine, RetrainOptions), [word for word in words if word not in mine]


def pointer_of(options: RetrainOptions) -> Path:
    """The link that names the run in use, made where the line begins. ValueError where there is no run."""
    pointer = options.runs / f"{options.run}.live"
    if not pointer.is_symlink():
        load(options.run, lambda config: config, options.runs)
        point(pointer, options.run)
    return pointer


def point(pointer: Path, name: str) -> None:
    """Let the link name that run, in one step: who follows it sees the old one or the new one."""
    aside = pointer.with_name(f".{pointer.name}.{os.getpid()}")
    aside.symlink_to(name)
    os.replace(aside, pointer)


def open_round(options: RetrainOptions) -> Round:
    """The round under way, or the next one."""
    pointer, rounds, number = pointer_of(options), options.runs / f"{options.run}.rounds", 1
    while (rounds / str(number) / "decision.json").exists():
        number += 1
    begun = rounds / str(number) / "from.json"
    # A round that was killed behind its promotion goes on from where it began, not from itself.
    live = json.loads(begun.read_text("utf-8"))["run"] if begun.exists() else os.readlink(pointer)
    return Round(options.runs / live, options.runs / f"{options.run}.{number}", rounds / str(number))


def candidate(config: "Config", one: Round, words: Sequence[str]) -> "Config":
    """The config of the run in use with these words over it, as a run that goes on from its weights."""
    from omegaconf import OmegaConf

    from common.checks import ConfigError
    from training.config import from_stored

    try:
        tree = OmegaConf.merge(OmegaConf.create(asdict(config)), OmegaConf.from_dotlist(list(words)))
    except ValueError as error:
        raise ConfigError(str(error)) from error
    made = from_stored(OmegaConf.to_container(tree))  # type: ignore[arg-type]
    return replace(
        made,
        run=replace(made.run, name=one.directory.name, dir=str(one.directory)),
        init_from=str(one.live.resolve()),
        data=replace(made.data, generation=None),
    )


def newest_part(path: Path, split: str) -> "TokenStore | None":
    """The documents that the last generation of a grown store has added; None where it has not grown."""
    from data.cache import verify
    from data.tokens.store import TokenStore

    parts = verify(path, contents=False).get("parts", [])
    own = [name for name in parts if name.endswith(f"-{split}")]
    return TokenStore.open(path.parent / own[-1]) if len(parts) > 1 else None


def retrain(words: Sequence[str]) -> int:
    """One round, from where it stands; the exit status."""
    from data.pipeline import prepare
    from training.config import from_stored

    options, changes = split_words(words)
    one = open_round(options)
    live = load(one.live.name, from_stored, options.runs)
    known = live.manifest()["data"]["description"]
    if live.config.data.source != "folder" or live.config.data.mode != "cached":
        raise ValueError(
            f"{one.live} reads data.source={live.config.data.source}, data.mode={live.config.data.mode}; "
            "a corpus that grows is a folder read in cached mode"
        )
    config = candidate(live.config, one, changes)
    prepared = prepare(config.data, config.tokenizer, append=True)
    assert prepared.train is not None and prepared.validation is not None  # cached
    added = newest_part(prepared.train.path, "train")
    held_out = newest_part(prepared.validation.path, "validation")
    if prepared.digest == live.manifest()["data"]["digest"] or added is None:
        print(f"{one.live.name}: nothing is new in {config.data.path}")
        return 0
    if held_out is None:
        raise ValueError(
            f"data.path={config.data.path}: none of the new documents is held out, so nothing could be "
            "decided; add more of them"
        )
    one.once("from", lambda: {"run": one.live.name, "data": prepared.digest})

    drift = one.once("drift", lambda: drifted(one, known["train"]["path"], added))
    print(f"{one.directory.name}: {drift['verdict']}")
    if options.only_on_drift and not drift["drifted"]:
        return decide(one, options, ["no drift, so nothing to learn (only_on_drift=true)"], {})
    trained = one.once("trained", lambda: {"status": train(config)})
    if trained["status"]:
        raise ValueError(f"{one.directory} ended with status {trained['status']}")
    compared = one.once(
        "compared", lambda: compare(one, options, Path(known["validation"]["path"]), held_out)
    )
    return decide(one, options, reasons(compared), compared)


def train(config: "Config") -> int:
    """The candidate, begun or gone on with. RunFault where it stops before its end, with its status."""
    import jax

    from training.legal.check import check
    from training.loop import fit

    check(config, jax.device_count())
    return fit(config)


def drifted(one: Round, old: str, added: "TokenStore") -> dict[str, Any]:
    """The report of scripts/drift_report.py on old and new documents, and its page."""
    from data.curation.drift_page import page
    from scripts.drift_report import DriftOptions, report
    from scripts.drift_report import plain as without_documents

    made = report(DriftOptions(old=old, new=str(added.path), run=str(one.live)))
    (one.decisions / "drift.html").write_text(page(made), "utf-8")
    return without_documents(made)


def compare(one: Round, options: RetrainOptions, old: Path, new: "TokenStore") -> dict[str, Any]:
    """Losses of the run in use and of the candidate on held-out documents of both corpora.

    Of each: both means in nats a token, the difference, and the 95 % interval of it over documents, the same
    ones for both (paired bootstrap).
    """
    from data.tokens.store import TokenStore
    from evaluation.metrics import paired_bootstrap
    from training.opening.opened import open_run

    stores = {"old": TokenStore.open(old), "new": new}
    terms: dict[str, list[dict[str, Any]]] = {name: [] for name in stores}
    for path in (one.directory, one.live):
        opened = open_run(str(path))
        for name, store in stores.items():
            terms[name].append(losses(opened, store, options.documents))
    found = {}
    for name, (ours, theirs) in terms.items():
        difference, low, high = paired_bootstrap("nll", ours, theirs)
        found[name] = {
            **{"candidate": mean(ours), "live": mean(theirs), "documents": len(ours)},
            **{"difference": difference, "interval": [low, high]},
        }
    return found


def losses(opened: "OpenedModel", store: "TokenStore", documents: int) -> dict[str, Any]:
    """Loss and weight of some documents' first row each, by the document's number."""
    from data.curation.drift import sample
    from parallel.schedules.accumulate import GradientAccumulation
    from scripts.drift_report import beginnings
    from training.evaluate import row_losses

    assert opened.config is not None  # of a run
    model, params, ops, _ = opened.trained
    rows = beginnings(sample(store, documents, 0), documents, opened.config.data.seq_len)
    strategy = GradientAccumulation()
    nll, weight = row_losses(lambda p, b: strategy.evaluate(model, p, b, ops), params, [rows])
    pairs = zip(nll, weight, strict=True)
    return {str(number): {"nll": (float(a), float(b))} for number, (a, b) in enumerate(pairs) if b}


def mean(terms: dict[str, Any]) -> float:
    """Nats a token over documents."""
    sums, weights = zip(*(one["nll"] for one in terms.values()), strict=True)
    return sum(sums) / sum(weights)


def reasons(compared: dict[str, Any]) -> list[str]:
    """Why a candidate is not to be used; none where it may be."""
    found = []
    old, new = compared["old"], compared["new"]
    if old["interval"][0] > 0:
        found.append(f"it is worse on old documents, by {said(old)}")
    if new["interval"][1] >= 0:
        found.append(f"it is no better on new documents, by {said(new)}")
    return found


def said(figures: dict[str, Any]) -> str:
    """A difference with its interval."""
    low, high = figures["interval"]
    interval = f"{low:+.4f} to {high:+.4f}, {figures['documents']} documents"
    return f"{figures['difference']:+.4f} nats a token ({interval})"


def decide(one: Round, options: RetrainOptions, against: list[str], compared: dict[str, Any]) -> int:
    """Promote the candidate, or say why not; either way the round is over."""
    if not against:
        # First the link: killed in between, the round comes here again and does the same.
        point(options.runs / f"{options.run}.live", one.directory.name)
    one.once("decision", lambda: {"promoted": not against, "reasons": against, **compared})
    if against:
        print(f"{one.directory.name} is not promoted: {'; '.join(against)}; {one.live.name} stays in use")
        return REFUSED
    print(f"{one.directory.name} is in use from now: on new documents {said(compared['new'])}")
    return 0


def main(arguments: Sequence[str]) -> int:
    """The command; its exit status."""
    return run(retrain, arguments, __doc__)


if __name__ == "__main__":
    command.start(main)
