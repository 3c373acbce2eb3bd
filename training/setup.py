"""A job before its first step: what a config asks for, composed, checked and opened.

`compose` makes data, program and executables while nothing has been written; `start` finds the state to go on
from training.config import Config
from and opens what the run writes to. The loop that goes on from there is `training.loop`.
"""

import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import jax

from artifacts.checkpoints.location import open_checkpoints_of, refuse_occupied
from artifacts.checkpoints.manager import Checkpoints
from artifacts.directory import RunDirectory
from artifacts.initial_weights import Parent, check_tokenizer, find_parent, same_parent, tokenizer_config
from artifacts.ledger import Ledger
from artifacts.manifest import build_manifest
from artifacts.metrics import MetricsLog
from artifacts.tensorboard import TensorBoard
from common.errors import Requeue, RunFault
from data.config import TokenizerConfig
from data.loading.loader import EvalBatches, Loader, held_out_batches
from data.pipeline import follow, prepare
from data.prepared import Prepared
from parallel import processes
from parallel.axes import Layout
from parallel.mesh import build_layout
from training.autoscale.apply import Scaled
from training.compile_cache import CacheWatch
from training.config import Config
from training.device_batches import rows_here
from training.flops import Flops, peak_flops, training_flops
from training.input_watch import InputWatch
from training.precision import precision_row
from training.preflight import refuse_what_cannot_fit
from training.program import Program, build_program, padded_vocab
from training.progress import Progress, human, startup_table
from training.recorder import Recorder, ignored
from training.safety.skip_updates import none_in_a_row, undone
from training.state import TrainState
from training.step import FlatStep
from training.xla import check_options, deterministic_row, options_line

# The others wait so long while the primary makes the data (scripts/prepare_data.py has no limit).
PREPARE_SECONDS = 4 * 3600
# What gloo, NCCL and the coordination service say when the other end of a connection is gone.
LOST = (
    "onnection closed",
    "onnection reset",
    "roken pipe",
    "UNAVAILABLE",
    "ABORTED",
    "remote process exited",
)


@contextmanager
def before_the_first_step() -> Iterator[None]:
    """Devices that cannot hold what is asked for are the command line's fault while nothing is written."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(device_fault(error)) from error


def device_fault(error: Exception) -> str:
    """One line for whatever XLA says, with a remedy where it says that memory is short."""
    line = str(error).strip().splitlines()[0][:300]
    remedy = "raise training.accumulation_steps, set training.remat=full, or split the model by mesh.fsdp"
    short = any(word in line for word in ("RESOURCE_EXHAUSTED", "ut of memory"))
    return f"the devices failed: {line.rstrip('.')}" + (f"; {remedy}" if short else "")


@contextmanager
def in_mid_run(job: "Job") -> Iterator[None]:
    """From here on nothing is the command line's fault: what the data or the devices raise is a RunFault."""
    try:
        yield
    except KeyboardInterrupt as error:
        step = job.checkpoints.newest_committed() if job.checkpoints is not None else 0
        raise type(error)(f"interrupted; the same command goes on from step {step}") from None
    except OSError as error:
        where, what = error.filename or job.run.path, error.strerror or error
        raise RunFault(
            f"{where}: {what}; free space or mend the disk, then the same command goes on"
        ) from error
    except ValueError as error:
        raise RunFault(str(error)) from error
    except processes.PeerFault:
        raise
    except processes.ClusterFault as error:
        raise Requeue(f"{error}; the same command goes on from the last checkpoint") from error
    except jax.errors.JaxRuntimeError as error:
        if processes.process_count() > 1 and any(word in str(error) for word in LOST):
            what = f"process {processes.process_index()} has lost another one"
            line = device_fault(error)
            raise Requeue(f"{what}: {line}; the same command goes on from the last checkpoint") from error
        raise RunFault(device_fault(error)) from error


@dataclass
class Job:
    """What one call of `fit` works with; the state is not here, it is handed on."""

    config: Config
    run: RunDirectory
    prepared: Prepared
    program: Program
    loader: Loader
    held_out: dict[str, EvalBatches]  # by component of a mixture; "" is a corpus alone
    train_step: FlatStep
    eval_step: Any
    flops: Flops
    parent: Parent | None  # of a new run
    compile_seconds: float
    watch: CacheWatch
    scaled: Scaled
    ledger: Ledger
    checkpoints: Checkpoints | None = None
    recorder: Recorder | None = None
    position: dict[str, Any] | None = None  # of the data, after the last step
    held_out_at: tuple[int, dict[str, float]] | None = None  # step and figures of the last evaluation
    outputs: ExitStack = field(default_factory=ExitStack)  # what rows and curves are written to


def compose(config: Config, run: RunDirectory, watch: CacheWatch, ledger: Ledger, scaled: Scaled) -> Job:
    """Data, program and executables; what is wrong with a config shows here, and nothing has been written."""
    with processes.all_or_none("the devices"), before_the_first_step():
        layout = build_layout(config.mesh, scaled.devices())
        parent = None if run.resuming else find_parent(config)
        if processes.is_primary() and not run.resuming:
            refuse_occupied(run.path, config.checkpoint)
        tokenizer = tokenizer_config(config, run, parent)
    with ledger.during("data_preparation"):
        prepared = prepare_together(config, tokenizer, run.data_digest)
    with processes.all_or_none("the program"), before_the_first_step():
        return build_job(config, run, watch, ledger, layout, parent, prepared, scaled)


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


def build_job(
    config: Config,
    run: RunDirectory,
    watch: CacheWatch,
    ledger: Ledger,
    layout: Layout,
    parent: Parent | None,
    prepared: Prepared,
    scaled: Scaled,
) -> Job:
    """What every process compiles for itself, once it has data and devices."""
    if parent is not None:
        check_tokenizer(parent, prepared.tokenizer.digest)
    config = with_vocab(config, prepared.tokenizer.vocab_size)
    program = build_program(config, layout)
    check_options(program.compiler_options, layout.mesh.local_devices[0], config.hardware.xla)
    loader = new_loader(config, prepared)
    loader.check_rows(rows_here(program.batch))
    held_out = held_out_batches(
        prepared,
        config.data,
        batch_size=config.training.global_batch_size,
        max_batches=config.eval.batches,
    )
    device = layout.mesh.devices.flat[0]
    peak, how = peak_flops(config.hardware, device.platform, device.device_kind)
    flops = training_flops(
        program.model.flops_per_token(config.data.seq_len), peak_per_device=peak, num_devices=layout.mesh.size
    )
    if processes.is_primary():
        rows = describe(config, run, program, loader, f"{peak / 1e12:.3g} TFLOP/s a device, {how}")
        startup_table(rows[:3] + scaled.rows() + rows[3:])
    began = time.perf_counter()
    with ledger.during("compilation"):
        train_step, eval_step = program.compile_train(), program.compile_eval()
    refuse_what_cannot_fit(config.hardware, program, train_step)
    seconds = time.perf_counter() - began
    return Job(
        config,
        run,
        prepared,
        program,
        loader,
        held_out,
        train_step,
        eval_step,
        flops,
        parent,
        seconds,
        watch,
        scaled,
        ledger,
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


def start(job: Job, stack: ExitStack, announce: Callable[[str], None] = ignored) -> tuple[TrainState, int]:
    """The state to go on from, restored, taken from a parent, or fresh, and the number of steps behind it."""
    config, run, program = job.config, job.run, job.program
    first, tokens = 0, 0
    state: TrainState | None = None
    if run.resuming:
        checkpoints = open_checkpoints(job, stack)
        forget_undone(run, checkpoints)
        with job.ledger.during("restore"):
            found = checkpoints.restore_newest(program.canonical)
        if found is not None:
            stored, record, quarantined = found
            first, tokens, job.position = record["step"], record["tokens"], record["data"]
            whole = program.with_guard(stored)
            if any(entry["to_step"] == first for entry in run.rollbacks):
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
            f"training.num_steps={config.training.num_steps}, but {run.path} is at step {first}; "
            f"use {first} or more"
        )
    if run.resuming:
        most = config.run.max_restarts
        processes.from_primary("the run's restarts", lambda: run.check_restarts(first, most))
    if state is None:  # before anything is written: a parent may be of another shape, or damaged
        state = fresh_state(job)
    go_on_reading(job)
    hosts = sorted(set(processes.exchange("host names", socket.gethostname())))
    facts = manifest(job, hosts)
    processes.from_primary("the run's directory", lambda: run.begin(facts, resume_step=first))
    if config.deterministic and (changed := run.other_bits(facts)):
        say(
            f"deterministic: {', '.join(changed)} are not as at the first start, so bits behind step {first} "
            f"may not be either; python scripts/reproduce.py {config.run.name} names them"
        )
    with in_mid_run(job):
        open_outputs(job, first, tokens, stack, announce)
    return state, first


def forget_undone(run: RunDirectory, checkpoints: Checkpoints) -> None:
    """Remove checkpoints of steps that a rollback undid, where a crash came before that was done."""
    if not run.rollbacks:
        return

    def forget() -> None:
        for step, known in checkpoints.known_rollbacks().items():
            if undone(step, known, run.rollbacks):
                checkpoints.forget_after(step - 1)
                return

    processes.from_primary("undone checkpoints", forget)
    checkpoints.reload()


def go_on_reading(job: Job) -> None:
    """The loader behind the last step, without the batches that the run's rollbacks leave out."""
    if job.position is not None:
        job.loader.restore(job.position)
    for entry in job.run.rollbacks:
        job.loader.leave_out(entry["to_step"], entry["batches"])


def manifest(job: Job, hosts: list[str]) -> dict[str, Any]:
    """What the run's directory keeps of how it was made."""
    program = job.program
    return build_manifest(
        asdict(job.config),
        prepared_digest=job.prepared.digest,
        tokenizer_digest=job.prepared.tokenizer.digest,
        mesh=dict(program.layout.mesh.shape),
        data=job.prepared.description,
        parent=job.parent.facts() if job.parent else None,
        extra={
            "hosts": hosts,
            "compute_dtype": str(program.ops.compute_dtype),
            "compiler_options": dict(program.compiler_options),
            **job.scaled.facts(),
            "deterministic": job.config.deterministic,
        },
    )


def open_outputs(
    job: Job, first: int, tokens: int, stack: ExitStack, announce: Callable[[str], None]
) -> None:
    """What the run writes to, continued behind step `first` or begun."""
    config, run = job.config, job.run
    if not run.resuming:
        open_checkpoints(job, stack)
    primary = processes.is_primary()
    if primary:
        job.ledger.open(run.path, first)
        job.prepared.tokenizer.save(run.path / "tokenizer.json")
        if job.prepared.tokenizer.chat is not None:
            job.prepared.tokenizer.chat.save(run.path)
    stack.callback(job.outputs.close)
    log, board = open_log(job, first)
    progress = Progress(
        config.training.num_steps,
        start_step=first,
        live=config.logging.live,
        every=config.logging.every,
        primary=primary,
    )
    stack.callback(progress.close)
    job.recorder = Recorder(
        log,
        job.flops,
        progress,
        board,
        tokens=tokens,
        every=config.logging.every,
        ledger=job.ledger,
        input_watch=InputWatch(config.data),
        announce=announce,
    )


def open_log(job: Job, first: int) -> tuple[MetricsLog | None, TensorBoard | None]:
    """Rows and curves of the steps behind `first`; of later ones nothing is left. None but on the primary."""
    job.outputs.close()
    if not processes.is_primary():
        return None, None
    log = MetricsLog.open(job.run.path / "metrics.jsonl", resume_step=first)
    job.outputs.callback(log.close)
    if log.missing:
        say(f"metrics.jsonl lacks {log.missing} of the {first} steps behind this checkpoint; it was altered")
    if not job.config.logging.tensorboard:
        return log, None
    board = TensorBoard(job.run.path / "tensorboard", first)
    job.outputs.callback(board.close)
    return log, board


def open_checkpoints(job: Job, stack: ExitStack) -> Checkpoints:
    """The run's checkpoints, closed with it."""
    job.checkpoints = open_checkpoints_of(job.run.path, job.config.checkpoint)
    stack.callback(job.ledger.enter, "other")  # these three from the last to the first
    stack.push(job.checkpoints.leave)
    stack.callback(job.ledger.enter, "checkpoints")
    return job.checkpoints


def fresh_state(job: Job) -> TrainState:
    """Step 0: random weights, or the parent's with a new optimizer, schedule and data position."""
    program = job.program
    with processes.all_or_none("the first state"), before_the_first_step():
        state = program.init_state(job.config.seed)
        jax.block_until_ready(state)  # so that too little memory is said before anything is written
        parent = same_parent(job.config, job.run) if job.run.resuming else job.parent
    if parent is None:
        return state
    params = parent.checkpoints.restore_weights(parent.step, program.canonical.params)
    return program.with_params(state, program.from_canonical(params))


def with_vocab(config: Config, tokenizer_size: int) -> Config:
    """`model.vocab_size=-1` becomes the tokenizer's padded size; a given one must hold every token."""
    size = config.model.vocab_size
    if size == -1:
        return replace(config, model=replace(config.model, vocab_size=padded_vocab(tokenizer_size)))
    if size < tokenizer_size:
        raise ValueError(
            f"model.vocab_size={size} is smaller than the tokenizer's {tokenizer_size}; "
            f"use model.vocab_size=-1 or at least {padded_vocab(tokenizer_size)}"
        )
    return config


def describe(
    config: Config, run: RunDirectory, program: Program, loader: Loader, peak: str
) -> list[tuple[str, str, str]]:
    """The start-up table: what was chosen, and why."""
    mesh = {axis: size for axis, size in program.layout.mesh.shape.items() if size > 1}
    devices = program.layout.mesh.devices
    counts = program.model.num_params()
    training = config.training
    tokens = training.global_batch_size * config.data.seq_len
    remat = f"remat={training.remat}, {'scanned' if training.scan_layers else 'unrolled'} layers"
    elsewhere = config.checkpoint.directory
    free = shutil.disk_usage(run.path.parent if run.path.parent.exists() else ".").free
    replicas = "step together"
    if program.replicas is not None:
        alone = program.replicas.config
        replicas = f"step alone, exchange {alone.exchange} every {alone.inner_steps} steps"
    again = []
    if config.deterministic:
        again = [("deterministic", deterministic_row(devices.flat[0].platform), "deterministic=true")]
    return [
        ("run", config.run.dir, "going on" if run.resuming else "new"),
        ("devices", f"{devices.size} x {devices.flat[0].device_kind}", peak),
        ("mesh", ", ".join(f"{a}={n}" for a, n in mesh.items()) or "one device", "mesh.*"),
        *([("replicas", replicas, "local_sgd.*")] if "replica" in mesh else []),
        ("model", f"{config.model.name}, {human(counts['total'])} parameters", "model="),
        ("precision", precision_row(training, program.ops, devices.flat[0].platform), training.precision),
        ("attention", program.attention.name, program.attention.why),
        ("layers", remat, "training.remat, training.scan_layers"),
        ("compiler", options_line(program.compiler_options), f"hardware.xla={config.hardware.xla}"),
        *again,
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
