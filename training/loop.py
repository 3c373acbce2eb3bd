"""The loop, to be read aloud: compose, resume, then step after step.

What happens once in a while stands there in sight.
"""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax

from data.loader import EvalBatches, Loader, Prefetcher, eval_batches
from data.pipeline import Prepared, prepare
from parallel.mesh import build_layout
from training.checkpoint import Checkpoints
from training.compile_cache import CacheWatch, start_compile_cache
from training.errors import RunFault
from training.evaluate import evaluate
from training.flops import Flops, peak_flops, training_flops
from training.manifest import build_manifest
from training.metrics import MetricsLog
from training.parent import Parent, check_tokenizer, find_parent, same_parent
from training.plots import plot_loss
from training.program import Program, build_program, padded_vocab
from training.progress import Progress, human, startup_table
from training.recorder import Recorder
from training.run_directory import RunDirectory, open_run
from training.state import TrainState, init_state, shardings
from training.summary import print_summary, summarize
from training.tensorboard import TensorBoard

Sampler = Callable[..., dict[str, Any]]


def fit(config: Any, sample: Sampler | None = None) -> int:
    """Train as `config` (the root Config) says, or go on where an earlier start of the same run stopped.

    `sample(program, params, tokenizer, config, run_dir)` writes generated text at the end and returns figures
    for the summary; it is handed in because serving stands above training. Returns the exit status.

    Raises ValueError and OSError for what the user can mend, before anything is written; RunFault in mid-run.
    """
    began = time.perf_counter()
    watch = start_compile_cache(config.run.compile_cache)
    with ExitStack() as stack:
        run = open_run(asdict(config), config.run.dir)
        stack.callback(run.close)
        if (summary := finished(run.path, config)) is not None:
            print_summary(summary)
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
        step = 0
        if job.checkpoints is not None:
            job.checkpoints.wait()
            step = max(job.checkpoints.steps(), default=0)
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
    layout = build_layout(config.mesh)
    parent = None if run.resuming else find_parent(config)
    prepared = prepare(config.data, config.tokenizer)
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
    manifest = build_manifest(
        asdict(config),
        prepared_digest=job.prepared.digest,
        tokenizer_digest=job.prepared.tokenizer.digest,
        mesh=dict(program.layout.mesh.shape),
        data=job.prepared.description,
        parent=job.parent.facts() if job.parent else None,
        extra={
            "compute_dtype": str(program.ops.compute_dtype),
            "compiler_options": dict(program.compiler_options),
        },
    )
    first, tokens = 0, 0
    state: TrainState | None = None
    if run.resuming:
        checkpoints = open_checkpoints(job, stack)
        if (found := checkpoints.restore_newest(program.state)) is not None:
            state, record, quarantined = found
            first, tokens = record["step"], record["tokens"]
            job.loader.restore(record["data"])
            for reason in quarantined:
                print(f"quarantined: {reason}")
    if first > config.training.num_steps:
        raise ValueError(
            f"training.num_steps={config.training.num_steps}, but {run.path} is at step {first}; "
            f"use {first} or more"
        )
    if state is None:  # before anything is written: a parent may be of another shape, or damaged
        state = fresh_state(job)
    run.begin(manifest, resume_step=first)
    with in_mid_run(job):
        open_outputs(job, first, tokens, stack)
    return state, first


def open_outputs(job: Job, first: int, tokens: int, stack: ExitStack) -> None:
    """What the run writes to, continued behind step `first` or begun."""
    config, run = job.config, job.run
    if not run.resuming:
        open_checkpoints(job, stack)
    job.prepared.tokenizer.save(run.path / "tokenizer.json")
    log = MetricsLog.open(run.path / "metrics.jsonl", resume_step=first)
    stack.callback(log.close)
    if log.missing:
        print(
            f"metrics.jsonl lacks {log.missing} of the {first} steps behind this checkpoint; it was altered"
        )
    board = TensorBoard(run.path / "tensorboard", first) if config.logging.tensorboard else None
    if board:
        stack.callback(board.close)
    progress = Progress(
        config.training.num_steps, start_step=first, live=config.logging.live, every=config.logging.every
    )
    stack.callback(progress.close)
    job.recorder = Recorder(log, job.flops, progress, board, tokens=tokens, every=config.logging.every)


def open_checkpoints(job: Job, stack: ExitStack) -> Checkpoints:
    """The run's checkpoints, closed with it."""
    job.checkpoints = Checkpoints(job.run.path / "checkpoints", job.config.checkpoint)
    stack.callback(job.checkpoints.close)
    return job.checkpoints


def fresh_state(job: Job) -> TrainState:
    """Step 0: random weights, or the parent's with a new optimizer, schedule and data position."""
    ema = job.config.training.ema_decay is not None
    state = init_state(job.program.model, job.program.tx, job.program.state, seed=job.config.seed, ema=ema)
    jax.block_until_ready(state)  # so that too little memory is said before anything is written
    parent = same_parent(job.config, job.run) if job.run.resuming else job.parent
    if parent is None:
        return state
    params = parent.checkpoints.restore_weights(parent.step, job.program.state.params)
    average = jax.tree.map(lambda x: x.copy(), params) if ema else None
    return state.replace(params=params, ema=average)


def train(job: Job, state: TrainState, first: int, stack: ExitStack) -> TrainState:
    """From step `first` to the last."""
    config, recorder, checkpoints = job.config, job.recorder, job.checkpoints
    assert recorder is not None and checkpoints is not None
    last = config.training.num_steps
    placed = shardings(job.program.batch)
    feed = Prefetcher(
        job.loader, start=first, depth=config.data.prefetch, place=lambda batch: jax.device_put(batch, placed)
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
            recorder.log.sync()  # a checkpoint is never ahead of its rows
            record = {"data": job.position, "tokens": recorder.tokens, "data_digest": job.prepared.digest}
            checkpoints.save(step, state, record)
            recorder.resume_clock()
    recorder.flush()
    checkpoints.wait()
    return state


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
    placed = shardings(job.program.batch)
    batches = (jax.device_put(batch, placed) for batch in job.held_out)
    return evaluate(job.eval_step, params, batches, job.held_out.num_bytes)


def finish(job: Job, state: TrainState, sample: Sampler | None, began: float) -> int:
    """Averages, samples, plot and summary; all of it can be made again from what is on disk."""
    config, run, recorder, checkpoints = job.config, job.run, job.recorder, job.checkpoints
    assert recorder is not None and checkpoints is not None
    recorder.progress.close()
    figures: dict[str, Any] = held_out_figures(job, state)
    if config.checkpoint.average_last > 0:
        steps = checkpoints.steps()[-config.checkpoint.average_last :]
        mean = checkpoints.mean_weights(steps, job.program.state.params)
        figures |= {f"{name}_mean": value for name, value in held_out_loss(job, mean).items()}
    if sample is not None:
        figures |= sample(job.program, state.params, job.prepared.tokenizer, config, run.path)
    bigram = job.prepared.bigram_bits_per_byte()
    picture = run.path / "plots" / "loss.png"
    plot_loss(run.path / "metrics.jsonl", picture, title=config.run.name, bigram_bits_per_byte=bigram)
    summary = summarize(
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
    print_summary(summary)
    return 0


def finished(path: Path, config: Any) -> dict[str, Any] | None:
    """The summary of a run that has reached its last step; None where there is work to do."""
    try:
        summary = json.loads((path / "summary.json").read_text())
    except (OSError, ValueError):
        return None
    return summary if summary.get("step") == config.training.num_steps else None


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
    return [
        ("run", config.run.dir, "going on" if run.resuming else "new"),
        ("devices", f"{devices.size} x {devices.flat[0].device_kind}", peak),
        ("mesh", ", ".join(f"{a}={n}" for a, n in mesh.items()) or "one device", "mesh.*"),
        ("model", f"{config.model.name}, {human(counts['total'])} parameters", "model="),
        ("precision", f"{program.ops.compute_dtype} compute, float32 masters", training.precision),
        ("attention", training.attention, "training.attention"),
        ("layers", remat, "training.remat, training.scan_layers"),
        ("optimizer", f"{config.optim.name}, {config.schedule.name} schedule", "optim=, schedule="),
        ("batch", f"{training.global_batch_size} x {config.data.seq_len} = {tokens:,} tokens", "a step"),
        ("data", loader.describe(), f"data.mode={config.data.mode}"),
        ("disk", f"{free / 2**30:.0f} GiB free", "for checkpoints"),
    ]
