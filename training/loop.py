"""The loop, to be read aloud: compose, resume, then step after step.

What happens once in a while stands there in sight. Every process of a job runs this; the primary alone
writes the run's directory and prints.
"""

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

from artifacts.checkpoints.manager import Checkpoints
from artifacts.directory import RunDirectory, open_run_together
from artifacts.exporter import Exporter, memory
from artifacts.ledger import STEPPING, Ledger
from artifacts.plots import plot_loss
from artifacts.summary import print_summary, summarize
from common.errors import RunFault
from data.loading.loader import Prefetcher
from kernels.backends import documents_of
from parallel import processes
from parallel.attention.cudnn import check_documents
from training.autoscale.apply import Rules, scale
from training.compile_cache import start_compile_cache
from training.config import Config, inner_steps
from training.device_batches import arrived, of_all_hosts, placing, rows_here
from training.evaluate import evaluate, weighed
from training.gather_to_one import on_one_device
from training.profiling import Profile, plan
from training.recorder import Recorder
from training.safety.replica_check import ReplicaCheck
from training.safety.rollback import ended_by, go_back, remedy
from training.safety.signals import Notices, Stopping
from training.safety.skip_updates import Trouble, reason_of, trouble
from training.safety.watchdog import Watchdog
from training.setup import Job, before_the_first_step, compose, in_mid_run, say, start
from training.state import TrainState

Sampler = Callable[..., dict[str, Any]]

CLOSING_SECONDS = 3600  # the others wait so long while the primary writes samples


def fit(
    config: Config, sample: Sampler | None = None, legal: Rules | None = None, *, began: float | None = None
) -> int:
    """Train as `config` (the root Config) says, or go on where an earlier start of the same run stopped.

    `sample(program, params, tokenizer, config, run_dir)` writes generated text at the end and returns figures
    for the summary, and `legal(config, devices)` says why a config cannot run on so many, which autoscale
    asks; both are handed in because they stand above training. `began`: when this start did, in seconds since
    1970, where that was before this call. Returns the exit status.

    Raises ValueError and OSError for what the user can mend, before anything is written; RunFault in mid-run.
    """
    ledger = Ledger(began, memory)
    watch = start_compile_cache(config.run.compile_cache, names=config.profile)
    ledger.compiling = lambda: watch.seconds
    with Notices() as notices, ExitStack() as stack:
        run = open_run_together(asdict(config), config.run.dir)
        stack.callback(run.close)
        stack.push(ledger.leave)
        if (summary := finished(run, config)) is not None:
            show(summary)
            return 0
        exporter = open_exporter(config, stack)
        with before_the_first_step():
            scaled = scale(config, run, legal)
            job = compose(scaled.config, run, watch, ledger, scaled)
            watchdog = Watchdog(config.guard.stall_seconds, run.path, processes.process_index())
            stack.enter_context(watchdog)
            state, first = start(job, stack, watchdog.announce)
        if exporter is not None:
            exporter.show(job.recorder, config.training.num_steps)
        with in_mid_run(job):
            with notices.steps():
                state = train_to_the_end(job, state, first, notices)
            return finish(job, state, sample)


def open_exporter(config: Config, stack: ExitStack) -> Exporter | None:
    """The endpoint that logging.prometheus_port asks for, by the primary; nothing has been written yet."""
    if config.logging.prometheus_port is None:
        return None
    with processes.all_or_none("the port for Prometheus"):
        if not processes.is_primary():
            return None
        exporter = Exporter(config.logging.prometheus_port, config.run.name)
    stack.callback(exporter.close)
    say(f"monitoring {exporter.address}")
    return exporter


def train_to_the_end(job: Job, state: TrainState, first: int, notices: Notices) -> TrainState:
    """Train, and where too many updates in a row were skipped go back and train again."""
    assert job.recorder is not None
    while True:
        with ExitStack() as stack:
            ended = train(job, state, first, notices, stack)
        if not isinstance(ended, Trouble):
            return ended
        if not job.config.guard.rollback_batches:
            raise ended_by(job, ended)
        del state  # or two of them would lie on the devices
        with job.recorder.outside_steps("rollback"):
            state, first = go_back(job, ended)


def train(
    job: Job, state: TrainState, first: int, notices: Notices, stack: ExitStack
) -> TrainState | Trouble:
    """From step `first` to the last, to a notice to leave, or to the trouble that the guard has met."""
    config, recorder, checkpoints = job.config, job.recorder, job.checkpoints
    assert recorder is not None and checkpoints is not None
    last = config.training.num_steps
    rows = rows_here(job.program.batch)
    feed = Prefetcher(
        job.loader,
        start=first,
        depth=config.data.prefetch,
        rows=rows,
        place=arrived(checked(job, placing(job.program.batch, rows))),
    )
    stack.callback(feed.close)
    profile = planned_profile(job, first)
    stack.callback(profile.close)
    mesh = job.program.layout.mesh if job.program.votes else None
    stopping = Stopping(notices, mesh, inner_steps(config.local_sgd) if job.program.replicas else 1)
    leaves = job.train_step.leaves_of(state)
    job.ledger.enter(STEPPING)
    stack.callback(job.ledger.enter, "other")
    replicas = replica_check(job)
    postponed = False
    recorder.start_clock()
    for step in range(first + 1, last + 1):
        if step > first + 1:  # the first batch may take an epoch's plan
            recorder.announce(f"step {step}")
        if profile.begins(step):
            with recorder.outside_steps("profile"):
                profile.start()

        batch, wait, job.position = feed.next()
        leaves, metrics = job.train_step.on_leaves(leaves, stopping.ballot(batch))
        recorder.push(step, metrics, wait, feed.stages)
        leaving = stopping.agreed(step, recorder.read)
        if step == last or leaving:
            recorder.flush()
        if (stuck := in_trouble(job, step)) is not None:
            return stuck

        if profile.ends(step):
            with recorder.outside_steps("profile"):
                say(f"profile: {profile.stop(job.train_step.as_text() or '')}")

        if every(config.eval.every, step, last):
            with recorder.outside_steps("evaluation"):
                figures = held_out_figures(job, job.train_step.state_of(leaves)) | read_so_far(job, step)
                check_finite(job, step, figures)
                recorder.event(step, figures)
                job.held_out_at = step, figures

        saving = leaving or postponed or every(config.checkpoint.every, step, last)
        if replicas is not None and (saving or every(config.guard.replica_every, step, last)):
            with recorder.outside_steps("replica check"):
                replicas.look(step, leaves)

        if saving:
            with recorder.outside_steps("checkpoints"):
                # Those from before a trouble must not make room for those from within.
                postponed = not leaving and step < last and may_wait(job)
                if not postponed:
                    recorder.sync()  # a checkpoint is never ahead of its rows
                    state = job.train_step.state_of(leaves)
                    checkpoints.save(step, job.program.to_canonical(state), record_of(job, recorder))
                    job.ledger.save_began(step)
        if leaving:
            with recorder.outside_steps("checkpoints"):
                checkpoints.wait()
            raise stopping.said(step)
    with recorder.outside_steps("checkpoints"):
        checkpoints.wait(sent=True)  # what fails behind the loop must not come after the summary
    return job.train_step.state_of(leaves)


def planned_profile(job: Job, first: int) -> Profile:
    """The trace that `profile=true` asks for, of what this start has left of its steps, by the primary."""
    config, steps, line = job.config, range(0), None
    if config.profile:
        steps, line = plan(config.logging.profile_steps, first, config.training.num_steps)
    if line is not None:
        say(line)
    return Profile(job.run.path / "profile", steps if processes.is_primary() else range(0))


def record_of(job: Job, recorder: Recorder) -> dict[str, Any]:
    """What a checkpoint keeps beside the state."""
    record = {"data": of_all_hosts(job.position), "tokens": recorder.tokens}
    rollbacks = {"rollbacks": job.run.rollbacks} if job.run.rollbacks else {}
    return record | {"data_digest": job.prepared.digest} | rollbacks


def replica_check(job: Job) -> ReplicaCheck | None:
    """What compares devices that hold the same, where the config asks for it."""
    mesh = job.program.layout.mesh
    return ReplicaCheck(job.program.state, mesh) if job.config.guard.replica_every and mesh.size > 1 else None


def in_trouble(job: Job, step: int) -> Trouble | None:
    """What ends the steps here, the same on every process; read of the last step that has its row.

    Replicas that step alone read their own figures, so their hosts ask each other at outer steps.
    """
    assert job.recorder is not None
    config, row = job.config, job.recorder.last
    mine = trouble(config.guard, row.get("step", 0), job.recorder.read, config.training.num_steps)
    if job.program.replicas is None or processes.process_count() == 1:
        return mine
    if step % inner_steps(config.local_sgd):
        return None
    said = processes.exchange("skipped updates", mine.facts() if mine else None)
    return next((Trouble(*facts) for facts in said if facts), None)


def may_wait(job: Job) -> bool:
    """Whether a save waits for an update that is taken: the last ones were not."""
    assert job.recorder is not None
    return job.program.replicas is None and reason_of(job.recorder.read) is not None


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


def check_finite(job: Job, step: int, figures: Mapping[str, float]) -> None:
    """Raise RunFault for weights of no use, which a run of skipped updates would otherwise end with."""
    bad = next((name for name, value in figures.items() if not math.isfinite(value)), None)
    if bad is not None:
        raise RunFault(f"{bad}={figures[bad]} at step {step}; {remedy(job)}")


def read_so_far(job: Job, step: int) -> dict[str, float]:
    """Of a mixture, each component's share of the rows so far."""
    return {f"mixture/{name}": share for name, share in job.loader.shares(step).items()}


def held_out_loss(job: Job, params: Any) -> dict[str, float]:
    """`eval/loss` and `eval/bits_per_byte` of some weights; of a mixture, of each component as well."""
    rows = rows_here(job.program.batch)
    place = checked(job, placing(job.program.batch, rows))
    figures = {
        name: evaluate(job.eval_step, params, map(place, held_out.batches(rows)), held_out.num_bytes)
        for name, held_out in job.held_out.items()
    }
    shares = job.prepared.description.get("final_shares")
    if shares is None:
        return figures[""]
    sizes = {name: held_out.num_bytes / held_out.num_tokens for name, held_out in job.held_out.items()}
    return weighed(figures, shares, sizes)


def finish(job: Job, state: TrainState, sample: Sampler | None) -> int:
    """Averages, samples, plot and summary; all of it can be made again from what is on disk."""
    config, recorder, checkpoints = job.config, job.recorder, job.checkpoints
    assert recorder is not None and checkpoints is not None
    recorder.progress.close()
    job.ledger.enter("samples")  # the averages, the plot and the summary are with them
    with recorder.outside_steps("evaluation"):
        figures = final_figures(job, state, checkpoints)
    program, params = job.program, state.params
    if sample is not None and program.layout.mesh.size > 1:
        program, params = on_one_device(job.program, config, params)
    recorder.announce("the end")

    def write() -> None:
        written = {}
        if sample is not None and params is not None:
            recorder.announce("samples")
            written = sample(program, params, job.prepared.tokenizer, config, job.run.path)
            recorder.announce("the end")
        show(report(job, recorder, figures | written))

    processes.from_primary("the samples and the summary", write, CLOSING_SECONDS)
    return 0


def final_figures(job: Job, state: TrainState, checkpoints: Checkpoints) -> dict[str, Any]:
    """Held-out figures after the last step, and of the mean of the last checkpoints."""
    last = job.config.training.num_steps
    figures: dict[str, Any]
    if job.held_out_at is not None and job.held_out_at[0] == last:
        figures = dict(job.held_out_at[1])
    else:  # all steps were done at an earlier start
        figures = held_out_figures(job, state)
    if job.config.checkpoint.average_last > 0:
        steps = processes.from_primary("the checkpoints to average", checkpoints.steps)
        steps = steps[-job.config.checkpoint.average_last :]
        mean = job.program.from_canonical(checkpoints.mean_weights(steps, job.program.canonical.params))
        figures |= {f"{name}_mean": value for name, value in held_out_loss(job, mean).items()}
    return figures


def report(job: Job, recorder: Recorder, figures: dict[str, Any]) -> dict[str, Any]:
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
            **packing_figures(job),
            **({"rollbacks": len(run.rollbacks)} if run.rollbacks else {}),
            "train_seconds": recorder.seconds,
            "goodput": recorder.goodput(),
            "wall_seconds": sum(job.ledger.seconds().values()),
            "compile_seconds": job.compile_seconds,
            "compile_cache": job.watch.outcome(),
            "parameters": job.program.model.num_params(),
            "peak_flops": job.flops.peak,
        },
    )


def packing_figures(job: Job) -> dict[str, Any]:
    """How full the rows are, where that is known, and of a mixture what each component's share came to."""
    full, shares = job.loader.fill_rate(), job.loader.shares(job.config.training.num_steps)
    figures: dict[str, Any] = {"packing": job.config.data.packing}
    if full is not None:
        figures["rows_full"] = full
    return figures | ({"mixture": shares} if shares else {})


def finished(run: RunDirectory, config: Config) -> dict[str, Any] | None:
    """The summary of a run that has reached its last step; None where there is work to do."""
    summary = run.summary
    return summary if summary and summary.get("step") == config.training.num_steps else None


def show(summary: dict[str, Any]) -> None:
    """Print the summary, once in a job."""
    if processes.is_primary():
        print_summary(summary)
