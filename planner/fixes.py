"""A plan that does not fit, and the cheapest changes that make it fit, each verified by compiling.

Tried are a smaller chunk of the loss and every candidate of a search: what layers keep, accumulation,
microbatches, other meshes of the same devices; the step's time by the analytic model says which are cheap.
Batch, length, model, optimizer and precision are the experiment: a change of them is another one, and no fix.
"""

from dataclasses import dataclass

from common.text import GIB
from parallel.hardware import Machine
from planner.analytic import estimate
from planner.candidates import Candidate, candidates, changed
from planner.search import Compile, Evaluated, compiled_work, evaluate
from training.config import Config
from training.legal.nearest import legal

MOST_TRIED = 12  # candidates that are compiled before giving up
LEEWAY = 1.05  # of a device's memory by the analytic model: what it says of a candidate may be too much


@dataclass(frozen=True)
class Fix:
    """A change that fits. slower: its step's time over that of the refused plan, both by the same model."""

    evaluated: Evaluated
    slower: float
    verified: bool

    @property
    def words(self) -> str:
        """To add to the command."""
        return " ".join(self.evaluated.candidate.words)

    def line(self) -> str:
        """For the screen."""
        how = "verified by compiling" if self.verified else "by the analytic model, not compiled"
        size = self.evaluated.work.memory.total / GIB
        seconds = self.evaluated.seconds
        return f"{self.words}: {size:.1f} GiB, {seconds:.3f} s a step ({self.slower:.2f} x), {how}"


def fixes(
    config: Config,
    machine: Machine,
    *,
    count: int = 3,
    compile: Compile | None = compiled_work,
) -> list[Fix]:
    """At most `count`, the cheapest first; compile: None takes the analytic model's word.

    Of several that change the same keys only the cheapest counts, so that what is offered differs in kind.
    """
    before = evaluate(Candidate(config, ()), machine, estimate(config, machine))
    found: list[Fix] = []
    tried = 0
    kinds: set[tuple[str, ...]] = set()
    for one in options(config, machine):
        if len(found) == count or tried == MOST_TRIED:
            break
        kind = tuple(sorted(word.split("=")[0] for word in one.candidate.words))
        if kind in kinds:
            continue
        verdict = one
        if compile is not None:
            tried += 1
            try:
                verdict = evaluate(one.candidate, machine, compile(one.candidate.config, machine))
            except ValueError:  # DoesNotFit, or what only the program knows
                continue
        if verdict.work.memory.total <= machine.memory_bytes:
            kinds.add(kind)
            found.append(Fix(verdict, one.seconds / before.seconds, compile is not None))
    return sorted(found, key=lambda fix: fix.slower)


def options(config: Config, machine: Machine) -> list[Evaluated]:
    """What may fit, the cheapest first; of equals the one with the fewest words."""
    made = (*small_changes(config, machine), *candidates(config, machine))
    near = {c.words: c for c in made if c.words}
    evaluated = [evaluate(c, machine, estimate(c.config, machine)) for c in near.values()]
    fitting = [e for e in evaluated if e.work.memory.total <= LEEWAY * machine.memory_bytes]
    # Two per cent of time are no reason to change another key.
    return sorted(fitting, key=lambda e: (e.seconds * (1 + 0.02 * len(e.candidate.words)), e.candidate.words))


def small_changes(config: Config, machine: Machine) -> list[Candidate]:
    """Of the mesh that was asked for: a smaller chunk of the loss."""
    chunk = config.training.loss_chunk
    made = [
        changed(config, {"training.loss_chunk": chunk // part}) for part in (2, 4, 8) if chunk // part >= 1
    ]
    return [c for c in made if legal(c.config, machine.devices) is None]
