"""A job before its first step: what a config asks for, composed, checked and opened.

`compose` makes data, program and executables while nothing has been written; `start` finds the state to go on
from and opens what the run writes to. The loop that goes on from there is `training.loop`.
"""

import shutil
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from artifacts.checkpoints.location import open_checkpoints_of, refuse_occupied
from artifacts.checkpoints.manager import Checkpoints
from artifacts.directory import RunDirectory, completed
from artifacts.ledger import Ledger
from artifacts.manifest import build_manifest
from artifacts.metrics import MetricsLog
from artifacts.tensorboard import TensorBoard
from common.errors import RunFault
from data.config import TokenizerConfig
from data.loading.held_out import EvalBatches, held_out_batches
from data.loading.loader import Loader
from data.pipeline import follow, prepare
from data.prepared import Prepared
from models.config import regrouped
from parallel import processes
from parallel.axes import Layout
from parallel.mesh import build_layout
from parallel.partition import join
from training.autoscale.apply import Scaled
from training.compile_cache import CacheWatch
from training.config import Config, with_vocab
from training.device_batches import placing, rows_here
from training.evaluate import SuiteFigures, suite_figures
from training.figures.annotate import annotated, check_data
from training.flops import Flops, peak_flops, training_flops
from training.input_watch import InputWatch
from training.objectives.base import build_objective
from training.opening.initial_weights import (
    AnyParent,
    below,
    check_tokenizer,
    find_parent,
    same_parent,
    tokenizer_config,
)
from training.preflight import refuse_what_cannot_fit
from training.program import Program, build_program
from training.progress import Progress, startup_table
from training.recorder import Recorder
from training.rollouts.draw import Rollouts, held_out_rewards
from training.safety.faults import before_the_first_step, in_mid_run
from training.safety.rollback import MOST, in_a_row, remedy
from training.safety.skip_updates import Trouble, none_in_a_row, undone
from training.state import TrainState, shardings
from training.step import FlatStep
from training.xla import check_options

# The others wait so long while the primary makes the data (scripts/prepare_data.py has no limit).
PREPARE_SECONDS = 4 * 3600


@dataclass(frozen=True)
class Setup:
    """What a config became before anything was written: all of it abstract, and the same for a whole
    start.
    """

    config: Config
    directory: RunDirectory
    prepared: Prepared
    program: Program
    held_out: dict[str, EvalBatches]  # by component of a mixture; "" is a corpus alone
    train_step: FlatStep
    eval_step: Any
    flops: Flops
    parent: AnyParent | None  # of a new run
    compile_seconds: float
    watch: CacheWatch
    scaled: Scaled
    ledger: Ledger
    suite: SuiteFigures | None  # of eval.suite
    rewarded: Callable[[Any], dict[str, float]] | None  # held-out answers, where the objective has a reward


@dataclass
class Run:
    """What a start has opened to write to, and where it stands in the data; the state is handed on."""

    setup: Setup
    checkpoints: Checkpoints
    recorder: Recorder
    loader: Loader
    outputs: ExitStack  # what rows and curves are written to
    rollouts: Rollouts | None = None  # what draws the batches, where no data are read as they are
    base: dict[str, Any] | None = None  # where what is frozen comes from, for every checkpoint's record
    position: dict[str, Any] | None = None  # of the data, after the last step
    measured_at: tuple[int, dict[str, float]] | None = None  # step and figures of the last evaluation


def compose(directory: RunDirectory, watch: CacheWatch, ledger: Ledger, scaled: Scaled) -> Setup:
    """Data, program and executables; what is wrong with a config shows here, and nothing has been written."""
    config = scaled.config
    with processes.all_or_none("the devices"), before_the_first_step():
        build_objective(config.objective)  # before data are made for a run that cannot be
        layout = build_layout(config.mesh, scaled.devices())
        parent = parent_of(config, directory)
        if processes.is_primary() and not directory.resuming:
            refuse_occupied(directory.path, config.checkpoint)
        tokenizer = tokenizer_config(config, directory, parent)
    with ledger.during("data_preparation"):
        prepared = prepare_together(config, tokenizer, directory.data_digest)
    with processes.all_or_none("the program"), before_the_first_step():
        return build_setup(directory, watch, ledger, layout, parent, prepared, scaled)


def as_now(stored: Mapping[str, Any], config: Config) -> dict[str, Any]:
    """A config that any version stored, with the keys of today: what that run would be told now."""
    model = stored.get("model")
    named = {**stored, "model": regrouped(model)} if isinstance(model, Mapping) else stored
    return completed(named, config)


def prepare_together(config: Config, tokenizer: TokenizerConfig, wanted: str | None = None) -> Prepared:
    """The primary makes or checks the data, and the others open what it has found.

    `wanted`: the digest of what a run began with; of a corpus that has grown since, that generation is taken.
    """
    mine: list[Prepared] = []

    def make() -> dict[str, Any]:
        mine.append(prepare(config.data, tokenizer, wanted=wanted))
        return mine[0].facts()

    facts = processes.from_primary("the data", make, PREPARE_SECONDS)
    with processes.all_or_none("the data's files"):
        return mine[0] if mine else follow(facts)


def build_setup(
    directory: RunDirectory,
    watch: CacheWatch,
    ledger: Ledger,
    layout: Layout,
    parent: AnyParent | None,
    prepared: Prepared,
    scaled: Scaled,
) -> Setup:
    """What every process compiles for itself, once it has data and devices."""
    if parent is not None:
        check_tokenizer(parent, prepared.tokenizer.digest)
    config = with_vocab(scaled.config, prepared.tokenizer.vocab_size)
    if parent is not None:
        parent.check_model(config.model)
    program = build_program(config, layout)
    if parent is not None:
        parent.check_adapters(program.model, program.placement.adapters)
    check_data(config, program)
    check_options(program.compiler_options, layout.mesh.local_devices[0], config.hardware.xla)
    loader = new_loader(config, prepared)
    loader.check_rows(rows_here(program.batch))
    held_out = held_out_batches(
        prepared,
        config.data,
        batch_size=config.training.global_batch_size,
        max_batches=config.eval.batches,
    )
    # Read before anything is written: a missing file must not end a run at its first evaluation.
    suite = suite_figures(config, program, prepared.tokenizer)
    device = layout.mesh.devices.flat[0]
    peak, how = peak_flops(config.hardware, device.platform, device.device_kind)
    flops = training_flops(
        program.model.flops_per_token(config.data.seq_len),
        peak_per_device=peak,
        num_devices=layout.mesh.size,
        frozen=program.placement.adapters is not None,
    )
    if processes.is_primary():
        rows = describe(config, directory, program, loader, f"{peak / 1e12:.3g} TFLOP/s a device, {how}")
        startup_table(rows[:3] + scaled.rows() + rows[3:])
    began = time.perf_counter()
    with ledger.during("compilation"):
        train_step, eval_step = program.compile_train(), program.compile_eval()
    refuse_what_cannot_fit(config.hardware, layout.mesh, program.state, program.batch, train_step)
    seconds = time.perf_counter() - began
    return Setup(
        config=config,
        directory=directory,
        prepared=prepared,
        program=program,
        held_out=held_out,
        train_step=train_step,
        eval_step=eval_step,
        flops=flops,
        parent=parent,
        compile_seconds=seconds,
        watch=watch,
        scaled=scaled,
        ledger=ledger,
        suite=suite,
        rewarded=held_out_rewards(config, program, prepared),
    )


def new_loader(config: Config, prepared: Prepared) -> Loader:
    """Batches from the first on."""
    return Loader(
        prepared,
        config.data,
        global_batch_size=config.training.global_batch_size,
        seed=config.seed,
        num_steps=config.training.num_steps,
    )


def start(
    setup: Setup, stack: ExitStack, announce: Callable[[str], None], open_model: Callable[..., Any]
) -> tuple[Run, TrainState, int]:
    """The opened run, the state to go on from (restored, a parent's, or fresh) and the steps behind it.

    open_model: what opens a teacher (`training.opening.opened.open_model`).
    """
    config, directory, program = setup.config, setup.directory, setup.program
    first, tokens, position = 0, 0, None
    state: TrainState | None = None
    base: dict[str, Any] | None = None
    checkpoints: Checkpoints | None = None
    if directory.resuming:
        checkpoints = open_checkpoints(setup, stack)
        forget_undone(directory, checkpoints)
        with setup.ledger.during("restore"):
            found = checkpoints.restore_newest(program.stored(program.canonical))
        if found is not None:
            stored, record, quarantined = found
            stored, base = rejoined(setup, stored, record), record.get("parent")
            first, tokens, position = record["step"], record["tokens"], record["data"]
            whole = program.with_guard(stored)
            if any(entry["to_step"] == first for entry in directory.rollbacks):
                whole = none_in_a_row(whole)
            state = program.from_canonical(whole)
            for reason in quarantined:
                say(f"quarantined: {reason}")
            if program.replicas is not None and "replicas" not in (stored.local or {}):
                say("the checkpoint is not of so many replicas that step alone: they start at its mean")
            if stored.guard is None:
                say("the checkpoint knows no losses to compare new ones with: the guard begins anew")
    if first > config.training.num_steps:
        raise ValueError(
            f"training.num_steps={config.training.num_steps}, but {directory.path} is at step {first}; "
            f"use {first} or more"
        )
    if directory.resuming:
        most = config.run.max_restarts
        processes.from_primary("the run's restarts", lambda: directory.check_restarts(first, most))
    if state is None:  # before anything is written: a parent may be of another shape, or damaged
        state, base = fresh_state(setup)
    with processes.all_or_none("what the objective wants"), before_the_first_step():
        rollouts = open_rollouts(setup, state if first == 0 else None)
    setup = with_figures(setup, state if first == 0 else None, open_model)
    loader = positioned_loader(setup, position)
    hosts = sorted(set(processes.exchange("host names", socket.gethostname())))
    facts = manifest(setup, hosts)
    processes.from_primary("the run's directory", lambda: directory.begin(facts, resume_step=first))
    if config.deterministic and (changed := directory.other_bits(facts)):
        say(
            f"deterministic: {', '.join(changed)} are not as at the first start, so bits behind step {first} "
            f"may not be either; python scripts/reproduce.py {config.run.name} names them"
        )
    with in_mid_run(directory, checkpoints):
        if checkpoints is None:
            checkpoints = open_checkpoints(setup, stack)
        outputs = ExitStack()
        stack.callback(outputs.close)
        recorder = open_recorder(setup, first, tokens, stack, outputs, announce)
    return Run(setup, checkpoints, recorder, loader, outputs, rollouts, base, position), state, first


def with_figures(setup: Setup, fresh: TrainState | None, open_model: Callable[..., Any]) -> Setup:
    """The setup with what other weights say of its data; `fresh`: the state at step 0, if it is known."""
    program, config, directory = setup.program, setup.config, setup.directory

    def parent() -> str:
        found = same_parent(config, directory) if directory.resuming else setup.parent
        assert found is not None  # or it would have been refused
        return found.facts()["digest"]

    def params() -> Any:
        return (fresh or fresh_state(setup)[0]).weights

    def read(steps: int) -> Any:
        return positioned_loader(setup, None).targets_of(steps)  # with what rollbacks have left out

    prepared = annotated(setup.prepared, config, program, parent, params, open_model, read)
    return replace(setup, prepared=prepared)


def open_rollouts(setup: Setup, fresh: TrainState | None) -> Rollouts | None:
    """What draws the batches of an objective that has them drawn; `fresh` as above."""
    program, prepared = setup.program, setup.prepared
    if not program.objective.draws:
        return None
    assert prepared.train is not None
    rows = rows_here(program.batch)
    place = placing(program.batch, rows)

    def placed(batch: dict[str, Any]) -> Any:
        return place({name: values[rows] for name, values in batch.items()})

    reference = None
    if "reference_logprobs" in program.objective.fields:  # a copy: the step takes the state's own away
        reference = jax.tree.map(jnp.copy, (fresh or fresh_state(setup)[0]).weights)
    return Rollouts(
        program, setup.config, prepared.train, prepared.tokenizer, setup.directory, placed, reference
    )


def forget_undone(directory: RunDirectory, checkpoints: Checkpoints) -> None:
    """Remove checkpoints of steps that a rollback undid, where a crash came before that was done."""
    if not directory.rollbacks:
        return

    def forget() -> None:
        for step, known in checkpoints.known_rollbacks().items():
            if undone(step, known, directory.rollbacks):
                checkpoints.forget_after(step - 1)
                return

    processes.from_primary("undone checkpoints", forget)
    checkpoints.reload()


def positioned_loader(setup: Setup, position: dict[str, Any] | None) -> Loader:
    """A loader behind the last step, without the batches that the run's rollbacks leave out."""
    loader = new_loader(setup.config, setup.prepared)
    if position is not None:
        loader.restore(position)
    for entry in setup.directory.rollbacks:
        loader.leave_out(entry["to_step"], entry["batches"])
    return loader


def manifest(setup: Setup, hosts: list[str]) -> dict[str, Any]:
    """What the run's directory keeps of how it was made."""
    program, prepared = setup.program, setup.prepared
    return build_manifest(
        asdict(setup.config),
        prepared_digest=prepared.digest,
        tokenizer_digest=prepared.tokenizer.digest,
        mesh=dict(program.layout.mesh.shape),
        data=prepared.description,
        parent=setup.parent.facts() if setup.parent else None,
        extra={
            "hosts": hosts,
            "compute_dtype": str(program.ops.compute_dtype),
            "compiler_options": dict(program.compiler_options),
            **setup.scaled.facts(),
            "deterministic": setup.config.deterministic,
        },
    )


def open_recorder(
    setup: Setup,
    first: int,
    tokens: int,
    stack: ExitStack,
    outputs: ExitStack,
    announce: Callable[[str], None],
) -> Recorder:
    """What turns steps into rows, curves and lines, continued behind step `first` or begun."""
    config, tokenizer = setup.config, setup.prepared.tokenizer
    primary = processes.is_primary()
    if primary:
        setup.ledger.open(setup.directory.path, first)
        tokenizer.save(setup.directory.path / "tokenizer.json")
        if tokenizer.chat is not None:
            tokenizer.chat.save(setup.directory.path)
    log, board = open_log(setup, first, outputs)
    progress = Progress(
        config.training.num_steps,
        start_step=first,
        live=config.logging.live,
        every=config.logging.every,
        primary=primary,
    )
    stack.callback(progress.close)
    return Recorder(
        log,
        setup.flops,
        progress,
        board,
        tokens=tokens,
        every=config.logging.every,
        ledger=setup.ledger,
        input_watch=InputWatch(config.data),
        announce=announce,
    )


def open_log(setup: Setup, first: int, outputs: ExitStack) -> tuple[MetricsLog | None, TensorBoard | None]:
    """Rows and curves of the steps behind `first`; of later ones nothing is left. None but on the primary."""
    outputs.close()
    if not processes.is_primary():
        return None, None
    path = setup.directory.path
    log = MetricsLog.open(path / "metrics.jsonl", resume_step=first)
    outputs.callback(log.close)
    if log.missing:
        say(f"metrics.jsonl lacks {log.missing} of the {first} steps behind this checkpoint; it was altered")
    if not setup.config.logging.tensorboard:
        return log, None
    board = TensorBoard(path / "tensorboard", first)
    outputs.callback(board.close)
    return log, board


def open_checkpoints(setup: Setup, stack: ExitStack) -> Checkpoints:
    """The run's checkpoints, closed with it."""
    checkpoints = open_checkpoints_of(setup.directory.path, setup.config.checkpoint)
    stack.callback(setup.ledger.enter, "other")  # these three from the last to the first
    stack.push(checkpoints.leave)
    stack.callback(setup.ledger.enter, "checkpoints")
    return checkpoints


def parent_of(config: Config, directory: RunDirectory) -> AnyParent | None:
    """Where a new run begins, and what one whose weights are only in part its own stands on again."""
    if not directory.resuming:
        return find_parent(config)
    return same_parent(config, directory) if config.adapter is not None or config.freeze else None


def fresh_state(setup: Setup) -> tuple[TrainState, dict[str, Any] | None]:
    """Step 0: random weights, or the parent's with a new optimizer, schedule and data position.

    Second what checkpoints are to say of the weights that stay the parent's, where any do.
    """
    program, directory = setup.program, setup.directory
    with processes.all_or_none("the first state"), before_the_first_step():
        state = program.init_state(setup.config.seed)
        jax.block_until_ready(state)  # so that too little memory is said before anything is written
        parent = same_parent(setup.config, directory) if directory.resuming else setup.parent
    if parent is None:
        return state, None
    adapters = program.placement.adapters
    weights, base = parent.base(program.parent_weights, program.model, adapters)
    params, frozen = program.begin_at(weights, setup.config.seed)
    if (factors := parent.factors(program.model, adapters)) is not None:
        params = jax.device_put(factors, shardings(program.canonical.params))
    state = program.with_params(state, program.from_canonical(join(params, frozen)))
    return state, base if frozen is not None else None


def rejoined(setup: Setup, stored: TrainState, record: Mapping[str, Any]) -> TrainState:
    """A restored state with what is frozen, read again from the parent that the record names."""
    program = setup.program
    if not program.placement.inherits or program.canonical.frozen is None:
        return stored
    weights = below(setup.directory.path, setup.config, record, program.parent_weights, program.model)
    return stored.replace(frozen=program.begin_at(weights, setup.config.seed)[1])


def go_back(run: Run, trouble: Trouble) -> tuple[TrainState, int]:
    """The state to go on from, and the steps behind it; rows and checkpoints of later steps are gone.

    Every process calls this after the same step. Raises RunFault where the run was taken back too often.
    """
    setup, checkpoints = run.setup, run.checkpoints
    program, directory, batches = setup.program, setup.directory, setup.config.guard.rollback_batches
    checkpoints.wait()
    wanted = program.stored(program.canonical)
    found = checkpoints.restore_newest(wanted, most=trouble.began)
    if found is None:  # none is so old: one from within has the same weights
        found = checkpoints.restore_newest(wanted, most=trouble.step)
    first = found[1]["step"] if found else 0
    entry = {"at_step": trouble.step, "to_step": first, "batches": batches, "reason": trouble.reason}
    if in_a_row([*directory.rollbacks, entry]) > MOST:
        raise RunFault(f"{trouble}; {MOST} rollbacks got no further; {remedy(run.recorder.last)}")
    directory.rollbacks.append(entry)
    processes.from_primary("the run's manifest", directory.write_manifest)
    processes.from_primary("undone checkpoints", lambda: checkpoints.forget_after(first))
    checkpoints.reload()

    tokens, run.position = 0, None
    if found is None:
        state, run.base = fresh_state(setup)
    else:
        stored, record, _ = found
        stored = rejoined(setup, stored, record)
        tokens, run.position = record["tokens"], record["data"]
        state = program.from_canonical(none_in_a_row(program.with_guard(stored)))
    run.loader = positioned_loader(setup, run.position)
    run.recorder.go_back(tokens, *open_log(setup, first, run.outputs))
    say(f"{trouble}; going on from step {first} without the next {batches} batches")
    return state, first


def describe(
    config: Config, directory: RunDirectory, program: Program, loader: Loader, peak: str
) -> list[tuple[str, str, str]]:
    """The start-up table, (name, value, why) a row: what was chosen, and why. `peak`: FLOP/s of a device."""
    training = config.training
    tokens = training.global_batch_size * config.data.seq_len
    elsewhere = config.checkpoint.directory
    free = shutil.disk_usage(directory.path.parent if directory.path.parent.exists() else ".").free
    return [
        ("run", config.run.dir, "going on" if directory.resuming else "new"),
        *program.chosen(config, peak),
        ("optimizer", f"{config.optim.name}, {config.schedule.name} schedule", "optim=, schedule="),
        ("batch", f"{training.global_batch_size} x {config.data.seq_len} = {tokens:,} tokens", "a step"),
        ("data", loader.describe(), f"data.mode={config.data.mode}"),
        *([("checkpoints", elsewhere, "checkpoint.directory")] if elsewhere else []),
        ("disk", f"{free / 2**30:.0f} GiB free", "for checkpoints"),
    ]


def say(line: str) -> None:
    """Print a line, once in a job."""
    if processes.is_primary():
        print(line)
