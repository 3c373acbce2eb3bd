"""The loop, to be read aloud: compose, resume, then step after step.

What happens once in a while stands there in sight. Every process of a job runs this; the primary alone
writes the run's directory and prints.
"""

import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax

from data.loader import EvalBatches, Loader, Prefetcher, eval_batches
from data.pipeline import Prepared, follow, prepare
from parallel import cluster
from parallel.axes import Layout
from parallel.backends import documents_of
from parallel.cudnn import check_documents
from parallel.mesh import build_layout
from training.checkpoint import Checkpoints
from training.compile_cache import CacheWatch, start_compile_cache
from training.errors import RunFault
from training.evaluate import evaluate
from training.feed import placing, rows_here
from training.flops import Flops, peak_flops, training_flops
from training.manifest import build_manifest
from training.metrics import MetricsLog
from training.one_device import on_one_device
from training.parent import Parent, check_tokenizer, find_parent, same_parent
from training.plots import plot_loss
from training.program import Program, build_program, padded_vocab
from training.progress import Progress, human, startup_table
from training.recorder import Recorder
from training.run_directory import RunDirectory, open_run_together
from training.state import TrainState
from training.summary import print_summary, summarize
from training.tensorboard import TensorBoard

Sampler = Callable[..., dict[str, Any]]

# The others wait so long while the primary makes the data (scripts/prepare_data.py has no limit) ...
PREPARE_SECONDS = 4 * 3600
CLOSING_SECONDS = 3600  # ... and while it writes samples


def fit(config: Any, sample: Sampler | None = None) -> int:
    """Train as `config` (the root Config) says, or go on where an earlier start of the same run stopped.

    `sample(program, params, tokenizer, config, run_dir)` writes generated text at the end and returns figures
    for the summary; it is handed in because serving stands above training. Returns the exit status.

    Raises ValueError and OSError for what the user can mend, before anything is written; RunFault in mid-run.
    """
    began = time.perf_counter()
    watch = start_compile_cache(config.run.compile_cache)
    with ExitStack() as stack:
        run = open_run_together(asdict(config), config.run.dir)
        stack.callback(run.close)
        if (summary := finished(run, config)) is not None:
            show(summary)
            return 0
        with before_the_first_step():
            job = compose(config, run, watch)
            state, first = start(job, stack)
        with in_mid_run(job):
            state = train(job, state, first, stack)
            return finish(job, state, sample, began)


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
    except KeyboardInterrupt:
        step = job.checkpoints.newest_committed() if job.checkpoints is not None else 0
        raise KeyboardInterrupt(f"interrupted; the same command goes on from step {step}") from None
    except OSError as error:
        where, what = error.filename or job.run.path, error.strerror or error
        raise RunFault(
            f"{where}: {what}; free space or mend the disk, then the same command goes on"
        ) from error
    except ValueError as error:
        raise RunFault(str(error)) from error
    except jax.errors.JaxRuntimeError as error:
        raise RunFault(device_fault(error)) from error


@dataclass
class Job:
    """What one call of `fit` works with; the state is not here, it is handed on."""

    config: Any
    run: RunDirectory
    prepared: Prepared
    program: Program
    loader: Loader
    held_out: EvalBatches
    train_step: Any
    eval_step: Any
    flops: Flops
    parent: Parent | None  # of a new run
    compile_seconds: float
    watch: CacheWatch
    checkpoints: Checkpoints | None = None
    recorder: Recorder | None = None
    position: dict[str, Any] | None = None  # of the data, after the last step


def compose(config: Any, run: RunDirectory, watch: CacheWatch) -> Job:
    """Data, program and executables; what is wrong with a config shows here, and nothing has been written."""
    with cluster.together("the devices"), before_the_first_step():
        layout = build_layout(config.mesh)
        parent = None if run.resuming else find_parent(config)
    prepared = prepare_together(config)
    with cluster.together("the program"), before_the_first_step():
        return build_job(config, run, watch, layout, parent, prepared)


def prepare_together(config: Any) -> Prepared:
    """The primary makes or checks the data, and the others open what it has found."""
    mine: list[Prepared] = []

    def make() -> dict[str, Any]:
        mine.append(prepare(config.data, config.tokenizer))
        return mine[0].facts()

    facts = cluster.from_primary("the data", make, PREPARE_SECONDS)
    with cluster.together("the data's files"):
        return mine[0] if mine else follow(facts)


def build_job(
    config: Any,
    run: RunDirectory,
    watch: CacheWatch,
    layout: Layout,
    parent: Parent | None,
    prepared: Prepared,
) -> Job:
    """What every process compiles for itself, once it has data and devices."""
    if parent is not None:
        check_tokenizer(parent, prepared.tokenizer.digest)
    config = with_vocab(config, prepared.tokenizer.vocab_size)
    program = build_program(config, layout)
    loader = Loader(
        prepared, config.data, global_batch_size=config.training.global_batch_size, seed=config.seed
    )
    held_out = eval_batches(
        prepared.validation,
        config.data,
        batch_size=config.training.global_batch_size,
        max_batches=config.eval.batches,
    )
    device = layout.mesh.devices.flat[0]
    peak, how = peak_flops(config.hardware, device.platform, device.device_kind)
    flops = training_flops(
        program.model.flops_per_token(config.data.seq_len), peak_per_device=peak, num_devices=layout.mesh.size
    )
    if cluster.is_primary():
        startup_table(describe(config, run, program, loader, f"{peak / 1e12:.3g} TFLOP/s a device, {how}"))
    began = time.perf_counter()
    train_step, eval_step = program.compile_train(), program.compile_eval()
    seconds = time.perf_counter() - began
    return Job(
        config, run, prepared, program, loader, held_out, train_step, eval_step, flops, parent, seconds, watch
    )


def start(job: Job, stack: ExitStack) -> tuple[TrainState, int]:
    """The state to go on from, restored, taken from a parent, or fresh, and the number of steps behind it."""
    config, run, program = job.config, job.run, job.program
    first, tokens = 0, 0
    state: TrainState | None = None
    if run.resuming:
        checkpoints = open_checkpoints(job, stack)
        if (found := checkpoints.restore_newest(program.canonical)) is not None:
            stored, record, quarantined = found
            state = program.from_canonical(stored)
            first, tokens = record["step"], record["tokens"]
            job.loader.restore(record["data"])
            for reason in quarantined:
                say(f"quarantined: {reason}")
            if program.replicas is not None and "replicas" not in (stored.local or {}):
                say("the checkpoint is not of so many replicas that step alone: they start at its mean")
    if first > config.training.num_steps:
        raise ValueError(
            f"training.num_steps={config.training.num_steps}, but {run.path} is at step {first}; "
            f"use {first} or more"
        )
    if state is None:  # before anything is written: a parent may be of another shape, or damaged
        state = fresh_state(job)
    hosts = sorted(set(cluster.exchange("host names", socket.gethostname())))
    cluster.from_primary("the run's directory", lambda: run.begin(manifest(job, hosts), resume_step=first))
    with in_mid_run(job):
        open_outputs(job, first, tokens, stack)
    return state, first


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
        },
    )


def open_outputs(job: Job, first: int, tokens: int, stack: ExitStack) -> None:
    """What the run writes to, continued behind step `first` or begun."""
    config, run = job.config, job.run
    if not run.resuming:
        open_checkpoints(job, stack)
    primary = cluster.is_primary()
    log, board = None, None
    if primary:
        job.prepared.tokenizer.save(run.path / "tokenizer.json")
        log = MetricsLog.open(run.path / "metrics.jsonl", resume_step=first)
        stack.callback(log.close)
        if log.missing:
            say(
                f"metrics.jsonl lacks {log.missing} of the {first} steps behind this checkpoint; "
                "it was altered"
            )
    if primary and config.logging.tensorboard:
        board = TensorBoard(run.path / "tensorboard", first)
        stack.callback(board.close)
    progress = Progress(
        config.training.num_steps,
        start_step=first,
        live=config.logging.live,
        every=config.logging.every,
        primary=primary,
    )
    stack.callback(progress.close)
    job.recorder = Recorder(log, job.flops, progress, board, tokens=tokens, every=config.logging.every)


def open_checkpoints(job: Job, stack: ExitStack) -> Checkpoints:
    """The run's checkpoints, closed with it."""
    job.checkpoints = Checkpoints(job.run.path / "checkpoints", job.config.checkpoint)
    stack.push(job.checkpoints.leave)
    return job.checkpoints


def fresh_state(job: Job) -> TrainState:
    """Step 0: random weights, or the parent's with a new optimizer, schedule and data position."""
    program = job.program
    with cluster.together("the first state"), before_the_first_step():
        state = program.init_state(job.config.seed)
        jax.block_until_ready(state)  # so that too little memory is said before anything is written
        parent = same_parent(job.config, job.run) if job.run.resuming else job.parent
    if parent is None:
        return state
    params = parent.checkpoints.restore_weights(parent.step, program.canonical.params)
    return program.with_params(state, program.from_canonical(params))


def train(job: Job, state: TrainState, first: int, stack: ExitStack) -> TrainState:
    """From step `first` to the last."""
    config, recorder, checkpoints = job.config, job.recorder, job.checkpoints
    assert recorder is not None and checkpoints is not None
    last = config.training.num_steps
    rows = rows_here(job.program.batch)
    feed = Prefetcher(
        job.loader,
        start=first,
        depth=config.data.prefetch,
        rows=rows,
        place=checked(job, placing(job.program.batch, rows)),
    )
    stack.callback(feed.close)
    recorder.resume_clock()
    for step in range(first + 1, last + 1):
        batch, wait, job.position = feed.next()
        state, metrics = job.train_step(state, batch)
        recorder.push(step, metrics, wait)

        if every(config.eval.every, step, last):
            recorder.flush()
            recorder.event(step, held_out_figures(job, state))
            recorder.resume_clock()

        if every(config.checkpoint.every, step, last):
            recorder.flush()
            recorder.sync()  # a checkpoint is never ahead of its rows
            record = {"data": job.position, "tokens": recorder.tokens, "data_digest": job.prepared.digest}
            checkpoints.save(step, job.program.to_canonical(state), record)
            recorder.resume_clock()
    recorder.flush()
    checkpoints.wait()
    return state


def checked(job: Job, place: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """`place`, after a look at what cuDNN's kernel, where it is the one that runs, must know of a row."""
    if job.program.attention.name != "cudnn":
        return place

    def look(batch: Any) -> Any:
        check_documents(batch["segment_ids"], documents_of(job.config))
        return place(batch)

    return look


def every(period: int, step: int, last: int) -> bool:
    """True once in a while, and at the last step; a period of 0 leaves only the last."""
    return step == last or (period > 0 and step % period == 0)


def held_out_figures(job: Job, state: TrainState) -> dict[str, float]:
    """Loss and bits per byte on the held-out batches, of the average too where one is kept."""
    figures = held_out_loss(job, state.params)
    if state.ema is not None:
        figures |= {f"{name}_ema": value for name, value in held_out_loss(job, state.ema).items()}
    return figures


def held_out_loss(job: Job, params: Any) -> dict[str, float]:
    """`eval/loss` and `eval/bits_per_byte` of some weights."""
    rows = rows_here(job.program.batch)
    batches = map(checked(job, placing(job.program.batch, rows)), job.held_out.batches(rows))
    return evaluate(job.eval_step, params, batches, job.held_out.num_bytes)


def finish(job: Job, state: TrainState, sample: Sampler | None, began: float) -> int:
    """Averages, samples, plot and summary; all of it can be made again from what is on disk."""
    config, recorder, checkpoints = job.config, job.recorder, job.checkpoints
    assert recorder is not None and checkpoints is not None
    recorder.progress.close()
    figures: dict[str, Any] = held_out_figures(job, state)
    if config.checkpoint.average_last > 0:
        steps = cluster.from_primary("the checkpoints to average", checkpoints.steps)
        steps = steps[-config.checkpoint.average_last :]
        mean = job.program.from_canonical(checkpoints.mean_weights(steps, job.program.canonical.params))
        figures |= {f"{name}_mean": value for name, value in held_out_loss(job, mean).items()}
    program, params = job.program, state.params
    if sample is not None and program.layout.mesh.size > 1:
        program, params = on_one_device(job.program, config, params)

    def write() -> None:
        written = {}
        if sample is not None and params is not None:
            written = sample(program, params, job.prepared.tokenizer, config, job.run.path)
        show(report(job, recorder, figures | written, began))

    cluster.from_primary("the samples and the summary", write, CLOSING_SECONDS)
    return 0


def report(job: Job, recorder: Recorder, figures: dict[str, Any], began: float) -> dict[str, Any]:
    """The plot, and the summary with these figures in it."""
    config, run = job.config, job.run
    bigram = job.prepared.bigram_bits_per_byte()
    picture = run.path / "plots" / "loss.png"
    plot_loss(run.path / "metrics.jsonl", picture, title=config.run.name, bigram_bits_per_byte=bigram)
    return summarize(
        run.path,
        figures
        | {
            "step": config.training.num_steps,
            "num_steps": config.training.num_steps,
            "tokens": recorder.tokens,
            "bigram_bits_per_byte": bigram,
            "train_seconds": recorder.seconds,
            "wall_seconds": time.perf_counter() - began,
            "compile_seconds": job.compile_seconds,
            "compile_cache": job.watch.outcome(),
            "parameters": job.program.model.num_params(),
            "peak_flops": job.flops.peak,
        },
    )


def finished(run: RunDirectory, config: Any) -> dict[str, Any] | None:
    """The summary of a run that has reached its last step; None where there is work to do."""
    summary = run.summary
    return summary if summary and summary.get("step") == config.training.num_steps else None


def show(summary: dict[str, Any]) -> None:
    """Print the summary, once in a job."""
    if cluster.is_primary():
        print_summary(summary)


def say(line: str) -> None:
    """Print a line, once in a job."""
    if cluster.is_primary():
        print(line)


def with_vocab(config: Any, tokenizer_size: int) -> Any:
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
    config: Any, run: RunDirectory, program: Program, loader: Loader, peak: str
) -> list[tuple[str, str, str]]:
    """The start-up table: what was chosen, and why."""
    mesh = {axis: size for axis, size in program.layout.mesh.shape.items() if size > 1}
    devices = program.layout.mesh.devices
    counts = program.model.num_params()
    training = config.training
    tokens = training.global_batch_size * config.data.seq_len
    remat = f"remat={training.remat}, {'scanned' if training.scan_layers else 'unrolled'} layers"
    free = shutil.disk_usage(run.path.parent if run.path.parent.exists() else ".").free
    replicas = "step together"
    if program.replicas is not None:
        replicas = (
            f"step alone, exchange {config.local_sgd.exchange} every {config.local_sgd.inner_steps} steps"
        )
    return [
        ("run", config.run.dir, "going on" if run.resuming else "new"),
        ("devices", f"{devices.size} x {devices.flat[0].device_kind}", peak),
        ("mesh", ", ".join(f"{a}={n}" for a, n in mesh.items()) or "one device", "mesh.*"),
        *([("replicas", replicas, "local_sgd.*")] if "replica" in mesh else []),
        ("model", f"{config.model.name}, {human(counts['total'])} parameters", "model="),
        ("precision", f"{program.ops.compute_dtype} compute, float32 masters", training.precision),
        ("attention", program.attention.name, program.attention.why),
        ("layers", remat, "training.remat, training.scan_layers"),
        ("optimizer", f"{config.optim.name}, {config.schedule.name} schedule", "optim=, schedule="),
        ("batch", f"{training.global_batch_size} x {config.data.seq_len} = {tokens:,} tokens", "a step"),
        ("data", loader.describe(), f"data.mode={config.data.mode}"),
        ("disk", f"{free / 2**30:.0f} GiB free", "for checkpoints"),
    ]
