"""What other weights say of a run's tokens, computed once and kept beside them: no second model in a step.

The reference of a preference is the run's own parent; a teacher is any model with the same tokenizer. Either
becomes arrays of one value (or K) an entry of the token store, which a loader copies into batches as it does
the tokens. They lie in the cache, named by the digests of the store and of the weights. Windows of
which no step has a target are not asked about: of a corpus that is read in part the rest costs nothing.

N entries of a store, K values of an entry, B rows, T positions.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Int

from common.checks import ConfigError
from data.batch import REFERENCE, Field
from data.cache import CorruptCache, building, digest_of, locked, verify
from data.formats import GROUPS
from data.loading.packing import PackingPlan, empty_batch, fill
from data.prepared import Prepared
from data.tokens.store import TokenStore
from parallel import processes
from training.config import Config
from training.device_batches import placing, rows_here
from training.figures.teacher import open_teacher, teacher_scorer
from training.objectives.distill import Distill, teacher_fields
from training.program import Program

ANNOTATE_SECONDS = 24 * 3600  # the others wait so long while the primary asks a teacher
# A batch [B, T] to figures [B, T] or [K, B, T].
Scorer = Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]


def check_data(config: Config, program: Program) -> None:
    """Raise ConfigError where the objective is not one of these data."""
    objective, own = program.objective, config.data.format
    formats = objective.formats
    if formats and own not in formats:
        raise ConfigError(
            f"objective={objective.name} needs data.format={' or '.join(formats)}, not {own}; "
            f"see docs/objectives.md for what records look like"
        )
    if own in GROUPS and not formats:
        raise ConfigError(
            f"objective={objective.name} would learn from the worse answers of data.format={own} as well; "
            "use objective=dpo, or data.format=chat with the better ones"
        )
    if own in GROUPS and config.training.global_batch_size % GROUPS[own]:
        raise ConfigError(
            f"training.global_batch_size={config.training.global_batch_size} splits rows that belong "
            f"together (data.format={own}); use a multiple of {GROUPS[own]}"
        )
    if objective.draws and config.guard.rollback_batches:
        raise ConfigError(
            f"guard.rollback_batches={config.guard.rollback_batches} leaves batches out, and objective="
            f"{objective.name} draws its own; use guard.rollback_batches=0"
        )
    if "reference_logprobs" in objective.fields and config.init_from is None:
        raise ConfigError(
            f"objective={objective.name} compares with the weights that the run begins with, and "
            "init_from=null has random ones; give init_from=RUN"
        )


def annotated(
    prepared: Prepared,
    config: Config,
    program: Program,
    parent: Callable[[], str],
    params: Callable[[], Any],
    open_model: Callable[..., Any],
    read: Callable[[int], Bool[np.ndarray, " N"]],
) -> Prepared:
    """The data with what the objective wants beside them; all processes call it alike.

    parent, params: the parent's digest, and its parameters as they lie in memory, asked for only where they
    are wanted. open_model: what opens a teacher by its name (`training.opening.opened.open_model`). read:
    which entries of the store are targets of so many steps.
    """
    objective = program.objective
    if isinstance(objective, Distill):
        return with_teacher(prepared, config, objective, open_model, wanted_targets(prepared, config, read))
    if "reference_logprobs" in objective.fields and not objective.draws:
        wanted = wanted_targets(prepared, config, read)
        return with_reference(prepared, config, program, parent(), params, wanted)
    return prepared


def with_reference(
    prepared: Prepared,
    config: Config,
    program: Program,
    parent: str,
    params: Callable[[], Any],
    wanted: Bool[np.ndarray, " N"],
) -> Prepared:
    """The data with the parent's log-probability of every target; all processes call it alike.

    params: the parent's parameters as they lie in memory, asked for only where nothing is cached.
    """
    store = prepared.train
    assert store is not None  # judged texts are cached and no mixture
    store.refuse_longer(config.data.seq_len)
    batch = program.text_batch
    rows = rows_here(batch)
    place = placing(batch, rows)
    whole = program.layout.replicated()
    size, length = batch["tokens"].shape
    inputs = {
        **{"kind": "reference", "data": prepared.digest, "parent": parent},
        **{"precision": str(program.ops.compute_dtype), "row": length, "wanted": digest_of_mask(wanted)},
    }

    def scorer() -> Scorer:
        weights = params()

        @partial(jax.jit, compiler_options=program.layout.compiler_options)
        def score(weights: Any, batch: Any) -> Any:
            found = program.strategy.score(program.model, weights, batch, program.ops)["logprobs"]
            return jax.lax.with_sharding_constraint(found, whole)

        def of(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            mine = {name: values[rows] for name, values in batch.items()}
            return {"reference_logprobs": np.asarray(score(weights, place(mine)))}

        return of

    directory = _kept(config, inputs)
    if not processes.from_primary("the reference", lambda: _is_sound(directory)):
        # All compute, since the mesh is all of theirs; the primary writes.
        figures = _figures_of(store, REFERENCE, scorer(), (size, length), wanted)
        processes.from_primary("the reference's file", lambda: _write(directory, figures, inputs))
    return _joined(prepared, directory, REFERENCE)


def with_teacher(
    prepared: Prepared,
    config: Config,
    objective: Distill,
    open_model: Callable[..., Any],
    wanted: Bool[np.ndarray, " N"],
) -> Prepared:
    """The data with a teacher's outcomes of every target; the primary asks it, on its own devices."""
    store = prepared.train
    assert store is not None
    shape = (config.training.global_batch_size, config.data.seq_len)
    fields = teacher_fields(objective.targets)

    def make() -> str:
        teacher = open_teacher(config, objective, prepared.tokenizer, open_model)
        inputs = {
            **{"kind": "teacher", "data": prepared.digest, "teacher": teacher.version, "seed": config.seed},
            **{"support": objective.support, "targets": objective.targets, "row": shape[1]},
            **{"precision": config.training.precision, "wanted": digest_of_mask(wanted)},
        }
        directory = _kept(config, inputs)
        if not _is_sound(directory):
            scorer = teacher_scorer(teacher, objective, config.seed)
            _write(directory, _figures_of(store, fields, scorer, shape, wanted), inputs)
        return str(directory)

    directory = processes.from_primary("the teacher's figures", make, ANNOTATE_SECONDS)
    return _joined(prepared, Path(directory), fields)


def _kept(config: Config, inputs: dict[str, Any]) -> Path:
    return Path(config.data.cache_dir) / "figures" / digest_of(inputs)[:16]


def _is_sound(directory: Path) -> bool:
    """Whether the figures lie there, every file as its manifest says."""
    try:
        verify(directory)
    except CorruptCache:
        return False
    return True


def _write(directory: Path, figures: dict[str, np.ndarray], inputs: dict[str, Any]) -> None:
    with locked(directory.parent.parent), building(directory, {"inputs": digest_of(inputs)}) as aside:
        for name, values in figures.items():
            np.save(aside / f"{name}.npy", values)


def _joined(prepared: Prepared, directory: Path, fields: dict[str, Field]) -> Prepared:
    with processes.all_or_none("the figures' files"):
        verify(directory, contents=False)
        figures = {name: np.load(directory / f"{name}.npy", mmap_mode="r") for name in fields}
    assert prepared.train is not None
    return replace(prepared, train=replace(prepared.train, figures=figures))


def wanted_targets(
    prepared: Prepared, config: Config, read: Callable[[int], Bool[np.ndarray, " N"]]
) -> Bool[np.ndarray, " N"]:
    """Which entries of the store the run's steps have as targets; all where a rollback may ask for others."""
    if prepared.train is None:
        raise ConfigError(
            "objective=distill needs data.mode=cached and no data.mixture: its figures lie beside tokens"
        )
    if config.guard.rollback_batches:
        return np.ones(prepared.train.num_addresses, bool)
    return read(config.training.num_steps)


def digest_of_mask(wanted: Bool[np.ndarray, " N"]) -> str:
    """What was asked about, for the name of what was answered."""
    return hashlib.sha256(np.packbits(wanted).tobytes()).hexdigest()


def _figures_of(
    store: TokenStore,
    fields: dict[str, Field],
    score: Scorer,
    shape: tuple[int, int],
    wanted: Bool[np.ndarray, " N"],
) -> dict[str, np.ndarray]:
    """Of every entry as a target, its figures [N] or [K, N]; 0 where it is none or is not asked about."""
    found = {
        name: np.zeros((*map(int, field.dims[2:]), store.num_addresses), field.dtype)
        for name, field in fields.items()
    }
    starts, lengths, skipped = windows(store.starts, store.lengths, shape[1])
    before = np.concatenate([[0], np.cumsum(wanted)])
    asked = before[starts + 1 + lengths] > before[starts + 1 + skipped]
    starts, lengths, skipped = starts[asked], lengths[asked], skipped[asked]
    plan = PackingPlan(starts, lengths, np.arange(len(starts) + 1))
    for batch, rows in _batches(store, plan, shape):
        for name, values in score(batch).items():
            for row, number in enumerate(rows):
                begin, end = int(skipped[number]), int(lengths[number])
                there = slice(int(starts[number]) + 1 + begin, int(starts[number]) + 1 + end)
                found[name][..., there] = values[..., row, begin:end]
    return found


def windows(
    starts: Int[np.ndarray, " D"], lengths: Int[np.ndarray, " D"], size: int
) -> tuple[Int[np.ndarray, " W"], Int[np.ndarray, " W"], Int[np.ndarray, " W"]]:
    """Stretches of documents that cover all targets: (first address, length, targets known from before).

    What is longer than a row is read in rows that overlap by half, so that every target but a document's
    first ones has at least half a row before it.
    """
    half = size // 2
    counts = np.where(lengths <= size, 1, -(-(lengths - size) // half) + 1)
    number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    ends = np.minimum(np.repeat(lengths, counts), number * half + size)
    known = np.where(number > 0, number * half + size - half, 0)
    return np.repeat(starts, counts) + number * half, ends - number * half, known - number * half


def _batches(
    store: TokenStore, plan: PackingPlan, shape: tuple[int, int]
) -> Iterator[tuple[dict[str, np.ndarray], Int[np.ndarray, " R"]]]:
    """Rows of the plan in order, as batches of one shape, and their numbers; padded at the end."""
    for first in range(0, plan.num_rows, shape[0]):
        rows = np.arange(first, min(first + shape[0], plan.num_rows))
        batch = empty_batch(*shape)
        fill(batch, np.arange(len(rows)), store.tokens, plan, rows, weights=store.weights)
        yield batch, rows
