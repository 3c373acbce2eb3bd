"""Looking for the fastest plan: all legal candidates by the analytic model, the best of them by the compiler.

A candidate's time is `planner.roofline.predict`'s. The analytic model ranks those that it says fit into
MARGIN of a device's memory; the best are compiled side by side, each in a process of its own, and ranked
again by what the compiler says. Where none of them fits, the search goes on down the list.
"""

import heapq
import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import Any

from parallel.config import mesh_shape
from parallel.hardware import Machine
from planner.analytic import estimate
from planner.candidates import Candidate, candidates
from planner.compiled import compile_step, model_flops
from planner.roofline import Prediction, predict
from planner.sizes import model_of
from planner.work import StepCost
from training.config import Config

MARGIN = 0.92  # of a device's memory: the analytic model errs by a few per cent
MOST_COMPILED = 4  # times as many as are asked for, at most
Compile = Callable[[Any, Machine], StepCost]
Tell = Callable[[int, int], None]


@dataclass(frozen=True)
class Evaluated:
    """A candidate's work and time, computed or compiled; fault: why it could not be compiled."""

    candidate: Candidate
    work: StepCost
    prediction: Prediction
    fault: str | None = None

    @property
    def seconds(self) -> float:
        """Of a step."""
        return self.prediction.step_seconds

    def json(self) -> dict[str, Any]:
        """For a file: words, bytes and seconds."""
        return {
            "words": list(self.candidate.words),
            "how": self.work.how,
            "bytes": self.work.memory.total,
            "step_seconds": self.seconds,
            "fault": self.fault,
        }


@dataclass(frozen=True)
class Searched:
    """What was found, fastest first. best: None where nothing fits. computed: a sample."""

    machine: Machine
    asked: Evaluated
    best: Evaluated | None
    compiled: list[Evaluated]
    computed: list[Evaluated]
    legal: int
    fitting: int
    failed: list[Evaluated] = field(default_factory=list)

    def json(self) -> dict[str, Any]:
        """Everything, for a file."""
        return {
            "devices": self.machine.devices,
            "hardware": self.machine.name,
            "legal": self.legal,
            "fitting": self.fitting,
            "asked": self.asked.json(),
            "best": self.best.json() if self.best else None,
            "compiled": [e.json() for e in self.compiled],
            "failed": [e.json() for e in self.failed],
            "computed": [e.json() for e in self.computed],
        }


def evaluate(candidate: Candidate, machine: Machine, work: StepCost, fault: str | None = None) -> Evaluated:
    """The time of a candidate's work."""
    config = candidate.config
    flops = model_flops(model_of(config.model), config.data.seq_len)
    found = predict(
        work,
        machine,
        mesh_shape(config.mesh, machine.devices),
        tokens=config.training.global_batch_size * config.data.seq_len,
        flops_full=flops["full"],
        flops_causal=flops["causal"],
    )
    return Evaluated(candidate, work, found, fault)


def compiled_work(config: Config, machine: Machine) -> StepCost:
    """What the compiler says. Raises as `compile_step` does."""
    return compile_step(config, machine).work


def search(
    config: Config,
    machine: Machine,
    *,
    top: int = 8,
    jobs: int = 2,
    compile: Compile | None = compiled_work,
    tell: Tell = lambda done, all: None,
) -> Searched:
    """The fastest plan for a config, whose vocabulary is known, on these devices.

    top: candidates that are compiled, and again as many where none of them fits. compile: None ranks by the
    analytic model alone. tell: called with how many are compiled, of how many.
    """
    everything = [evaluate(c, machine, estimate(c.config, machine)) for c in candidates(config, machine)]
    fitting = [e for e in everything if e.work.memory.total <= MARGIN * machine.memory_bytes]
    ranked = sorted(fitting, key=lambda e: (e.seconds, e.work.memory.total, e.candidate.words))
    asked = evaluate(Candidate(config, ()), machine, estimate(config, machine))
    compiled: list[Evaluated] = []
    failed: list[Evaluated] = []
    if compile is not None:
        for batch in itertools.islice(batches(ranked, top), MOST_COMPILED):
            for done, found in enumerate(compile_all(batch, machine, compile, jobs), 1):
                tell(done, len(batch))
                fits = found.fault is None and found.work.memory.total <= machine.memory_bytes
                (compiled if fits else failed).append(found)
            if compiled:
                break
    compiled.sort(key=lambda e: (e.seconds, e.work.memory.total, e.candidate.words))
    best = compiled[0] if compiled else (ranked[0] if ranked and compile is None else None)
    sample = heapq.nsmallest(2000, everything, key=lambda e: e.seconds)
    return Searched(machine, asked, best, compiled, sample, len(everything), len(fitting), failed)


def batches(ranked: list[Evaluated], size: int) -> Iterator[list[Evaluated]]:
    """So many at a time, the best first."""
    for start in range(0, len(ranked), size):
        yield ranked[start : start + size]


def compile_all(
    chosen: list[Evaluated], machine: Machine, compile: Compile, jobs: int
) -> Iterator[Evaluated]:
    """Each compiled, in the order in which they are done; a process that dies is its candidate's fault.

    jobs: processes side by side; 1 compiles in this one.
    """
    if jobs == 1:
        for one in chosen:
            yield _compiled(one, machine, lambda one=one: compile(one.candidate.config, machine))  # type: ignore[misc]
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(compile, one.candidate.config, machine): one for one in chosen}
        for future in as_completed(futures):
            yield _compiled(futures[future], machine, future.result)


def _compiled(one: Evaluated, machine: Machine, result: Callable[[], StepCost]) -> Evaluated:
    try:
        return evaluate(one.candidate, machine, result())
    except BrokenProcessPool:
        return evaluate(one.candidate, machine, one.work, "the process that compiled it died")
    except (ValueError, RuntimeError) as error:  # DoesNotFit, or what else a compiler has to say
        return evaluate(one.candidate, machine, one.work, str(error).splitlines()[0])
