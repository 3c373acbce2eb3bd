"""A model in use on a device that is not here: how many texts fit, how long a token takes, what is promised.

The engine's own programs (`serving.programs`), compiled for one described device as it compiles them when it
starts; nothing is allocated. An engine has one device: more devices are more engines.

    bytes      weights + state of S slots + what the larger program needs beside them
    T_decode   the roofline (`planner.roofline`) of a decode of S rows, each `context` tokens long
    T_chunk    of a prompt's chunk, behind `prompt` tokens: the dearest one
    gap        ≤ T_decode + T_chunk, whatever arrives: decodes go first, then one chunk at most
    first      ≤ n (T_chunk + T_decode) + T_decode for n chunks, where neither slot nor turn is waited for

S slots, V vocabulary, C tokens of a chunk.
"""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from common.text import GIB
from models.weights import quantizable, quantize
from parallel.axes import Layout
from parallel.config import MeshConfig
from parallel.hardware import Machine
from parallel.mesh import build_layout
from planner.compiled import compiler_name, even_load, flops_of
from planner.described_devices import TORI, compiler_options, described_devices, quiet
from planner.hlo.program import read_hlo
from planner.hlo.text import Instruction
from planner.roofline import predict
from planner.serving_question import ServingQuestion
from planner.sizes import model_of
from planner.work import StepCost
from serving.programs import Programs
from training.config import Config
from training.precision import compute_dtype
from training.preflight import Memory
from training.program import build_ops, common_ops

MOST_SLOTS = 512  # that are looked for
MOST_TRIES = 3  # numbers of slots between the first two that are compiled
PROGRAMS = ("decode", "prefill")


@dataclass(frozen=True)
class ServingTime:
    """A decode of so many slots, predicted; bound: compute or memory."""

    slots: int
    seconds: float
    tokens_per_second: float
    bound: str


@dataclass(frozen=True)
class ServingPlan:
    """Bytes on one device and seconds, of one engine; `planner.serving_screen` shows it.

    how: `compiled` for the device; `here`: bytes beside weights and state as this machine's CPU needs them,
    times computed; `computed`: nothing was compiled. start: bytes while weights are made of float32 masters.
    cache_slot: with recurrent states. fit: slots; 0 where not even one does. state: cache and all else that
    slots have. beside: temporaries and results. first, first_busy: seconds to the first token, alone and with
    every other slot writing.
    """

    name: str
    hardware: str
    parameters: int
    dtype: str
    question: ServingQuestion
    how: str
    capacity: int
    start: int
    weights: int
    cache_token: int
    cache_slot: int
    state: int
    beside: int
    slots: int
    fit: int
    decode: tuple[ServingTime, ...]
    chunk_seconds: float
    compile_seconds: float | None
    compiler: str | None
    notes: tuple[str, ...] = ()

    @property
    def total(self) -> int:
        """Bytes while the engine answers."""
        return self.weights + self.state + self.beside

    @property
    def missing(self) -> int:
        """Bytes that the device has too few; 0 where the engine fits."""
        return max(0, self.total - self.capacity, self.start - self.capacity)

    @property
    def gap(self) -> float:
        """Seconds between two tokens at most."""
        return self.decode[-1].seconds + self.chunk_seconds

    @property
    def chunks(self) -> int:
        """That a prompt is read in: its last token is the first decode's."""
        return -(-(self.question.prompt - 1) // self.question.chunk)

    @property
    def first(self) -> float:
        """Seconds to a first token, nobody else being there."""
        return self.chunks * self.chunk_seconds + self.decode[-1].seconds

    @property
    def first_busy(self) -> float:
        """The same while every other slot writes."""
        return self.chunks * self.gap + self.decode[-1].seconds

    @property
    def promises(self) -> dict[str, tuple[float, float, bool]]:
        """By key: what was asked, what is predicted, and whether it holds."""
        found = {"slo_ttft": self.first_busy, "slo_gap": self.gap}
        asked = {key: getattr(self.question, key) for key in found}
        return {key: (limit, found[key], found[key] <= limit) for key, limit in asked.items() if limit}

    def json(self) -> dict[str, Any]:
        """Everything, with what follows from it; sizes in bytes, times in seconds."""
        keys = ("total", "missing", "gap", "first", "first_busy")
        promises = {
            key: {"asked": a, "predicted": p, "holds": holds} for key, (a, p, holds) in self.promises.items()
        }
        own = {key: getattr(self, key) for key in keys}
        return {"fits": not self.missing, **own, "promises": promises, **asdict(self)}


@dataclass(frozen=True)
class ServingCost:
    """An engine of so many slots: bytes of its state and beside it, and its programs' work by name."""

    slots: int
    state: int
    beside: int
    work: dict[str, StepCost]


@dataclass
class ServingModel:
    """A model as an engine on one device has it, at any number of slots.

    device: on which programs are made. here: it stands in for the machine's own, whose compiler is missing.
    compiles: whether anything is compiled; else all but the bytes of weights and state is `guess`ed.
    """

    config: Config
    machine: Machine
    question: ServingQuestion
    device: Any
    here: bool = False
    compiles: bool = True
    compile_seconds: float = 0.0
    costs: dict[int, ServingCost] = field(default_factory=dict)
    refused: set[int] = field(default_factory=set)  # slots for which the compiler makes no program

    @cached_property
    def layout(self) -> Layout:
        """The mesh of that one device."""
        return build_layout(MeshConfig(data=1, rules=self.config.mesh.rules), [self.device])

    @cached_property
    def ops(self) -> Any:
        """As `training.opening` gives them to an engine; for a device that is not here, in its own dtype."""
        if self.machine.kind == "cpu":
            return build_ops(self.config, self.layout)
        dtype = compute_dtype(self.config.training.precision, self.machine.kind)
        return replace(common_ops(self.config, self.layout, self.device), compute_dtype=dtype)

    @cached_property
    def masters(self) -> Any:
        """Parameters as a checkpoint has them, or as an artifact of so many bits."""
        bits = self.question.weight_bits

        def made(key: Any) -> Any:
            params = self.model.init(key)
            if bits is None:
                return params
            return jax.tree.map(
                lambda info, w: quantize(info, w, bits) if quantizable(info) else w, self.model.info, params
            )

        return jax.tree.map(self._placed, jax.eval_shape(made, jax.random.key(0)))

    @cached_property
    def weights(self) -> Any:
        """Parameters as decode takes them."""
        return jax.tree.map(self._placed, jax.eval_shape(self.programs(1).ready, self.masters))

    @property
    def model(self) -> Any:
        """It, built once."""
        return model_of(self.config.model)

    def _placed(self, x: Any) -> Any:
        return jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=NamedSharding(self.layout.mesh, PartitionSpec())
        )

    def programs(self, slots: int) -> Programs:
        """The engine's, with so many slots and pages for the longest texts in all of them."""
        q = self.question
        return Programs(
            self.model,
            self.ops,
            self.layout,
            slots=slots,
            max_len=q.max_len,
            page=q.page,
            chunk=q.chunk,
            pages=slots * -(-q.max_len // q.page),
            packed=True,
            cache_bits=q.cache_bits,
        )

    def cost(self, slots: int) -> ServingCost:
        """Compiled where that can be, else computed; once for each number of slots."""
        if slots not in self.costs:
            programs = self.programs(slots)
            state, beside, work = programs.abstract(), {}, {}
            for name in PROGRAMS:
                beside[name], work[name] = self.guess(name, slots)
                if self.compiles:
                    beside[name], read = self.compile(programs, name, state)
                    work[name] = work[name] if self.here else read
            self.costs[slots] = ServingCost(slots, size_of(state), max(beside.values()), work)
        return self.costs[slots]

    def compile(self, programs: Programs, name: str, state: Any) -> tuple[int, StepCost]:
        """(bytes beside weights and state, work) of one program, as the compiler has it."""
        rest = programs.decode_of_none() if name == "decode" else programs.prefill_of_none()
        began = time.perf_counter()
        arguments = self.weights, state, *map(self._placed, map(np.asarray, rest))
        with quiet():
            try:
                lowered = getattr(programs, name).lower(*arguments)
                compiled = lowered.compile(compiler_options([self.device]))
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                # A compiler for TPUs makes no program that does not fit.
                self.refused.add(programs.slots)
                return self.machine.memory_bytes, self.guess(name, programs.slots)[1]
        self.compile_seconds += time.perf_counter() - began
        used = compiled.memory_analysis()
        results = used.output_size_in_bytes - used.alias_size_in_bytes
        beside = used.temp_size_in_bytes + max(0, results) + size_of(rest)
        length = self.question.context if name == "decode" else self.question.prompt
        rows = programs.slots if name == "decode" else self.question.chunk
        trips = self.trips(-(-length // self.question.page), rows)
        reading = read_hlo(compiled.as_text() or "", dict(self.layout.mesh.shape), trips=trips)
        work = StepCost("compiled", NO_MEMORY, flops_of(reading, self.machine), float(reading.moved_bytes))
        return beside, work

    def trips(self, pages: int, tokens: int) -> Callable[[Instruction], int | None]:
        """How often a loop runs whose length is in the data: over pages, or over experts that are chosen."""
        even, moe = even_load(self.config), self.config.model.moe

        def trips(loop: Instruction) -> int | None:
            if moe is not None and "/mlp/" in loop.source:
                found = even(loop)
                # Few tokens do not choose every expert.
                return None if found is None else min(found, tokens * moe.experts_per_token)
            return pages

        return trips

    def guess(self, name: str, slots: int) -> tuple[int, StepCost]:
        """The same by what must be done: weights and caches are read once, logits made and drawn from.

        The bytes beside weights and state are a guess: three arrays as large as the logits, and a chunk's
        widest activations.
        """
        q, m, weights = self.question, self.config.model, self.weights
        decode = name == "decode"
        tokens, length = (slots, q.context) if decode else (q.chunk, q.prompt)
        logits = 4 * slots * m.vocab_size if decode else 0
        chosen = 1.0 if m.moe is None else min(1.0, tokens * m.moe.experts_per_token / m.moe.num_experts)
        read = 0.0
        for path, leaf in jax.tree_util.tree_leaves_with_path(weights):
            names = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
            # A table is looked up, and a chunk draws nothing.
            if names[0] not in (("embed",) if decode else ("embed", "head")):
                read += size_of(leaf) * (chosen if "experts" in names else 1.0)
        token, fixed = self.cache_bytes
        rows = slots if decode else 1
        moved = read + rows * (length * token + 2 * fixed) + tokens * token + 4 * logits
        flops = model_of(replace(m, mtp=None)).flops_per_token(length)
        head = 0 if decode else 2 * m.vocab_size * m.d_model
        count = tokens * (flops["matmul"] - head + flops["attention_full"])
        kind = "float32" if self.dtype == "float32" else "bfloat16"
        width = max(m.d_ff, m.num_heads * m.head_dim, m.d_model)
        beside = 3 * logits + 4 * 4 * tokens * width
        return beside, StepCost("analytic", NO_MEMORY, {kind: float(count)}, float(moved))

    @property
    def dtype(self) -> str:
        """Of products: a CPU keeps all else in float32."""
        return np.dtype(self.ops.factor_dtype or self.ops.compute_dtype).name

    @cached_property
    def cache_bytes(self) -> tuple[int, int]:
        """(bytes a token, bytes a slot whatever its length) of what the mixers keep."""
        arrays = jax.tree.leaves(self.model.cache_arrays(self.question.page, self.question.cache_bits))
        token = fixed = 0
        for array in arrays:
            size = math.prod(array.shape) * np.dtype(array.dtype or self.ops.compute_dtype).itemsize
            token += size if "length" in array.axes else 0
            fixed += 0 if "length" in array.axes else size
        return token // self.question.page, fixed

    def needs(self, slots: int) -> int:
        """Bytes while it answers with so many."""
        cost = self.cost(slots)
        return size_of(self.weights) + cost.state + cost.beside

    def fit(self, most: int = MOST_SLOTS) -> int:
        """The slots that the device holds, up to `most`; 0 where not even one does.

        Looked for between one and what a slot's state alone would allow, along the line through the nearest
        that fits and the nearest that does not.
        """
        capacity = self.machine.memory_bytes
        if self.needs(1) > capacity:
            return 0
        state = size_of(self.programs(2).abstract()) - self.cost(1).state
        low, high = 1, min(most, 1 + (capacity - self.needs(1)) // state)
        if high == 1 or self.needs(high) <= capacity:
            return high
        for _ in range(MOST_TRIES):
            each = (self.needs(high) - self.needs(low)) / (high - low)
            middle = low + int((capacity - self.needs(low)) / each)
            if middle == low:
                break
            low, high = (middle, high) if self.needs(middle) <= capacity else (low, middle)
        return low


NO_MEMORY = Memory(0, 0, 0, 0, 0)  # a roofline asks for none


def size_of(tree: Any) -> int:
    """Bytes of all of its arrays."""
    return sum(math.prod(x.shape) * np.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))


def one_device(machine: Machine, compile: str) -> tuple[Any, bool, bool, tuple[str, ...]]:
    """(device, whether it only stands in, whether to compile for it, notes): described, or this machine's.

    Raises ValueError under `always` where the compiler is missing.
    """
    here = jax.devices("cpu")[0]
    if compile == "never":
        return (
            here,
            machine.kind != "cpu",
            False,
            ("not compiled: plan.compile=never; what programs need beside weights and cache is a guess",),
        )
    if machine.kind == "cpu":
        return here, False, True, ()
    topology = "1" if machine.kind == "gpu" else "2x2" if machine.name in TORI else "2x2x1"
    try:
        return described_devices(machine.name, topology)[0], False, True, ()
    except ImportError as error:
        if compile == "always":
            raise ValueError(f"plan.compile=always: {error}") from error
        return (
            here,
            True,
            True,
            (
                f"not compiled for {machine.name}: {error}",
                "temporaries are those of this machine's CPU, a guess; times are computed, not read",
            ),
        )


def plan_serving(
    config: Config, machine: Machine, question: ServingQuestion, *, compile: str = "auto"
) -> ServingPlan:
    """What an engine of this model is and does on one of these devices.

    config: with its vocabulary known. compile: auto, always or never.
    Raises ValueError for sizes that cannot be.
    """
    question = question.settled(config.model)
    device, here, compiles, notes = one_device(machine, compile)
    made = ServingModel(config, machine, question, device, here, compiles)
    asked = question.slots
    fit = estimated(made, asked) if asked and compiles else made.fit(max(MOST_SLOTS, asked))
    slots = asked or max(1, fit)
    if slots == MOST_SLOTS:
        notes = (*notes, f"more than {MOST_SLOTS} slots are not looked for; slots=N asks for them")
    cost = made.cost(slots)
    if slots in made.refused:
        notes = (
            *notes,
            f"no program for slots={slots}, the compiler refuses it: temporaries are all there is",
        )
    token, fixed = made.cache_bytes
    times = [timed(made, n) for n in sorted({1, slots})]
    chunk = seconds_of(cost.work["prefill"], machine, question.chunk)[0]
    weights = size_of(made.weights)
    return ServingPlan(
        name=config.model.name,
        hardware=machine.name,
        parameters=made.model.num_params()["total"],
        dtype=made.dtype,
        question=question,
        how="computed" if not compiles else "here" if here else "compiled",
        capacity=machine.memory_bytes,
        start=size_of(made.masters) + weights,
        weights=weights,
        cache_token=token,
        cache_slot=fixed + token * question.page * -(-question.max_len // question.page),
        state=cost.state,
        beside=cost.beside,
        slots=slots,
        fit=fit,
        decode=tuple(times),
        chunk_seconds=chunk,
        compile_seconds=made.compile_seconds if compiles else None,
        compiler=compiler_name(device.platform) if compiles else None,
        notes=notes,
    )


def estimated(made: ServingModel, slots: int) -> int:
    """The slots that fit, by the line through one and `slots`; not compiled."""
    capacity, one = made.machine.memory_bytes, made.needs(1)
    other = max(2, slots)
    each = (made.needs(other) - one) / (other - 1)
    return 0 if one > capacity else int(1 + (capacity - one) / each)


def timed(made: ServingModel, slots: int) -> ServingTime:
    """A decode of so many slots."""
    seconds, bound = seconds_of(made.cost(slots).work["decode"], made.machine, slots)
    return ServingTime(slots, seconds, slots / seconds, bound)


def seconds_of(work: StepCost, machine: Machine, tokens: int) -> tuple[float, str]:
    """Of a program's roofline on one device, and what bounds it."""
    found = predict(
        work, replace(machine, devices=1), {"data": 1}, tokens=tokens, flops_full=0, flops_causal=0
    )
    return found.step_seconds, found.bound


def refusal_of(plan: ServingPlan) -> str | None:
    """One line about what cannot be, with what would change it; None where all fits and holds."""
    if plan.missing:
        start = plan.start > max(plan.total, plan.capacity)
        what = f"float32 masters and weights of {plan.name} side by side" if start else f"slots={plan.slots}"
        needed = plan.start if start else plan.total
        fewer = (
            f"use slots={plan.fit}, or a shorter max_len"
            if plan.fit and not start
            else (
                "take hardware with more memory, a shorter max_len, or scripts/export.py for engines of "
                "several devices"
            )
        )
        return (
            f"{what} need {needed / GIB:.1f} GiB, {plan.missing:,} bytes more than the "
            f"{plan.capacity / GIB:.1f} GiB of a {plan.hardware}; {fewer}"
        )
    for key, (limit, seconds, holds) in plan.promises.items():
        if not holds:
            return (
                f"{key}={limit:g} does not hold: {seconds:.4g} s are predicted at slots={plan.slots}; fewer "
                f"slots, a shorter context or {'prompt' if key == 'slo_ttft' else 'chunk'} take less"
            )
    return None
