"""The loop, to be read aloud: compose, resume, then step after step.

What happens once in a while stands there in sight. Every process of a job runs this; the primary alone
writes the run's directory and prints.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from typing import Any

from artifacts.checkpoints.manager import Checkpoints
from artifacts.directory import RunDirectory, open_run_together
from artifacts.exporter import Exporter, memory
from artifacts.ledger import STEPPING, Ledger
from artifacts.plots import plot_loss
from artifacts.summary import print_summary, summarize
from common.errors import RunFault
from data.loading.prefetch import Prefetcher
from kernels.attention_cudnn import check_documents
from parallel import processes
from parallel.partition import join
from training.autoscale.apply import scale
from training.compile_cache import start_compile_cache
from training.config import Config, inner_steps
from training.device_batches import arrived, of_all_hosts, placing, rows_here
from training.evaluate import Evaluation, evaluate, weighed
from training.legal.attention import documents_of
from training.objectives.next_token import NextToken
from training.opening.opened import open_model
from training.profiling import Profile, plan
from training.recorder import Recorder
from training.safety.faults import before_the_first_step, in_mid_run
from training.safety.replica_check import ReplicaCheck
from training.safety.rollback import ended_by, remedy
from training.safety.signals import Notices, Stopping
from training.safety.skip_updates import Trouble, trouble
from training.safety.watchdog import Watchdog
from training.samples import draw_samples, write_samples
from training.setup import Run, Setup, as_now, compose, go_back, say, start
from training.state import TrainState

CLOSING_SECONDS = 3600  # the others wait so long while the primary writes samples


def fit(config: Config, *, began: float | None = None) -> int:
    """Train as `config` says, or go on where an earlier start of the same run stopped; the exit status.

    `began`: when this start did, in seconds since 1970, where that was before this call.

    Raises ValueError and OSError for what the user can mend, before anything is written; RunFault in mid-run.
    """
    ledger = Ledger(began, memory)
    watch = start_compile_cache(config.run.compile_cache, names=config.profile)
    ledger.compiling = lambda: watch.seconds
    with Notices() as notices, ExitStack() as stack:
        directory = open_run_together(asdict(config), config.run.dir, partial(as_now, config=config))
        stack.callback(directory.close)
        stack.push(ledger.leave)
        if (summary := finished(directory, config)) is not None:
            show(summary)
            return 0
        exporter = open_exporter(config, stack)
        with before_the_first_step():
            setup = compose(directory, watch, ledger, scale(config, directory))
            watchdog = Watchdog(config.guard.stall_seconds, directory.path, processes.process_index())
            stack.enter_context(watchdog)
            run, state, first = start(setup, stack, watchdog.announce, open_model)
        if exporter is not None:
            exporter.show(run.recorder, config.training.num_steps)
        with in_mid_run(directory, run.checkpoints):
            with notices.steps():
                state = train_to_the_end(run, state, first, notices)
            return finish(run, state)


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


def train_to_the_end(run: Run, state: TrainState, first: int, notices: Notices) -> TrainState:
    """Train, and where too many updates in a row were skipped go back and train again."""
    while True:
        with ExitStack() as stack:
            ended = train(run, state, first, notices, stack)
        if not isinstance(ended, Trouble):
            return ended
        if not run.setup.config.guard.rollback_batches:
            raise ended_by(ended, run.recorder.last)
        del state  # or two of them would lie on the devices
        with run.recorder.outside_steps("rollback"):
            state, first = go_back(run, ended)


def train(
    run: Run, state: TrainState, first: int, notices: Notices, stack: ExitStack
) -> TrainState | Trouble:
    """From step `first` to the last, to a notice to leave, or to the trouble that the guard has met."""
    setup = run.setup
    config, recorder, checkpoints = setup.config, run.recorder, run.checkpoints
    last = config.training.num_steps
    rows = rows_here(setup.program.batch)
    rollouts = run.rollouts
    place = arrived(checked(setup, placing(setup.program.batch, rows)))
    feed = None
    if rollouts is None:
        feed = Prefetcher(run.loader, start=first, depth=config.data.prefetch, rows=rows, place=place)
        stack.callback(feed.close)
    profile = planned_profile(setup, first)
    stack.callback(profile.close)
    mesh = setup.program.layout.mesh if setup.program.votes else None
    stopping = Stopping(notices, mesh, inner_steps(config.local_sgd) if setup.program.replicas else 1)
    leaves = setup.train_step.leaves_of(state)
    setup.ledger.enter(STEPPING)
    stack.callback(setup.ledger.enter, "other")
    replicas, measured = replica_check(setup), tuple(evaluations(setup))
    postponed = False
    if first == 0 and setup.parent is not None:  # what the weights that it begins with are worth
        record_figures(run, 0, measured, state)
    recorder.start_clock()
    for step in range(first + 1, last + 1):
        if step > first + 1:  # the first batch may take an epoch's plan
            recorder.announce(f"step {step}")
        if profile.begins(step):
            with recorder.outside_steps("profile"):
                profile.start()

        stages: Mapping[str, float] = {}
        if feed is not None:
            batch, wait, run.position = feed.next()
            stages = feed.stages
        elif rollouts is not None:  # of these very weights, so that none can be made ahead
            with recorder.outside_steps("rollouts"):
                batch = rollouts.batch(step, setup.train_step.state_of(leaves).weights)
            wait, run.position = 0.0, {"mode": "cached", "step": step}
        leaves, metrics = setup.train_step.on_leaves(leaves, stopping.ballot(batch))
        recorder.push(step, metrics, wait, stages)
        leaving = stopping.agreed(step, recorder.read)
        if step == last or leaving:
            recorder.flush()
        if (stuck := in_trouble(run, step)) is not None:
            return stuck

        if profile.ends(step):
            with recorder.outside_steps("profile"):
                say(f"profile: {profile.stop(setup.train_step.as_text() or '')}")

        if due := [one for one in measured if every(one.every, step, last)]:
            record_figures(run, step, due, setup.train_step.state_of(leaves))

        saving = leaving or postponed or every(config.checkpoint.every, step, last)
        if replicas is not None and (saving or every(config.guard.replica_every, step, last)):
            with recorder.outside_steps("replica check"):
                replicas.look(step, leaves)

        if saving:
            with recorder.outside_steps("checkpoints"):
                # Those from before a trouble must not make room for those from within.
                postponed = not leaving and step < last and may_wait(run)
                if not postponed:
                    recorder.sync()  # a checkpoint is never ahead of its rows
                    state = setup.train_step.state_of(leaves)
                    whole = setup.program.stored(setup.program.to_canonical(state))
                    checkpoints.save(step, whole, record_of(run, recorder))
                    setup.ledger.save_began(step)
        if leaving:
            with recorder.outside_steps("checkpoints"):
                checkpoints.wait()
            raise stopping.said(step)
    with recorder.outside_steps("checkpoints"):
        checkpoints.wait(sent=True)  # what fails behind the loop must not come after the summary
    return setup.train_step.state_of(leaves)


def planned_profile(setup: Setup, first: int) -> Profile:
    """The trace that `profile=true` asks for, of what this start has left of its steps, by the primary."""
    config, steps, line = setup.config, range(0), None
    if config.profile:
        steps, line = plan(config.logging.profile_steps, first, config.training.num_steps)
    if line is not None:
        say(line)
    return Profile(setup.directory.path / "profile", steps if processes.is_primary() else range(0))


def record_of(run: Run, recorder: Recorder) -> dict[str, Any]:
    """What a checkpoint keeps beside the state."""
    setup = run.setup
    record = {"data": of_all_hosts(run.position), "tokens": recorder.tokens}
    rollbacks = {"rollbacks": setup.directory.rollbacks} if setup.directory.rollbacks else {}
    parent = {"parent": run.base} if run.base is not None else {}
    return record | {"data_digest": setup.prepared.digest} | rollbacks | parent


def replica_check(setup: Setup) -> ReplicaCheck | None:
    """What compares devices that hold the same, where the config asks for it."""
    program, period = setup.program, setup.config.guard.replica_every
    mesh = program.layout.mesh
    return ReplicaCheck(program.state, mesh) if period and mesh.size > 1 else None


def in_trouble(run: Run, step: int) -> Trouble | None:
    """What ends the steps here, the same on every process; read of the last step that has its row.

    Replicas that step alone read their own figures, so their hosts ask each other at outer steps.
    """
    config, row = run.setup.config, run.recorder.last
    mine = trouble(config.guard, row.get("step", 0), run.recorder.read, config.training.num_steps)
    if run.setup.program.replicas is None or processes.process_count() == 1:
        return mine
    if step % inner_steps(config.local_sgd):
        return None
    said = processes.exchange("skipped updates", mine.facts() if mine else None)
    return next((Trouble(*facts) for facts in said if facts), None)


def may_wait(run: Run) -> bool:
    """Whether a save waits for an update that is taken: the last ones were not."""
    return run.setup.program.replicas is None and run.recorder.in_a_row > 0


def checked(setup: Setup, place: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """`place`, after a look at what cuDNN's kernel, where it is the one that runs, must know of a row."""
    if setup.program.attention.name != "cudnn":
        return place

    def look(batch: Any) -> Any:
        check_documents(batch["segment_ids"], documents_of(setup.config))
        return place(batch)

    return look


def every(period: int, step: int, last: int) -> bool:
    """True once in a while, and at the last step; a period of 0 leaves only the last."""
    return step == last or (period > 0 and step % period == 0)


def evaluations(setup: Setup) -> Iterator[Evaluation]:
    """What is measured while this run trains: a new kind of evaluation is one more here, and nothing else."""
    yield Evaluation(setup.config.eval.every, partial(held_out_loss, setup))
    if setup.suite is not None:
        yield Evaluation(setup.config.eval.suite_every, setup.suite.measure)
    if setup.rewarded is not None:
        yield Evaluation(setup.config.eval.every, setup.rewarded)


def record_figures(run: Run, step: int, due: Iterable[Evaluation], state: TrainState) -> None:
    """Measure what is due after a step, and write it down. Raises RunFault where it is no number."""
    with run.recorder.outside_steps("evaluation"):
        figures = figures_of(due, state) | read_so_far(run, step)
        check_finite(run, step, figures)
        run.recorder.event(step, figures)
        run.measured_at = step, figures


def figures_of(wanted: Iterable[Evaluation], state: TrainState) -> dict[str, float]:
    """What these evaluations measure of the weights, and of their average where one is kept."""
    figures: dict[str, float] = {}
    for one in wanted:
        figures |= one.measure(state.weights)
        if state.ema is not None:
            figures |= {f"{name}_ema": value for name, value in one.measure(state.average).items()}
    return figures


def check_finite(run: Run, step: int, figures: Mapping[str, float]) -> None:
    """Raise RunFault for weights of no use, which a run of skipped updates would otherwise end with."""
    bad = next((name for name, value in figures.items() if not math.isfinite(value)), None)
    if bad is not None:
        raise RunFault(f"{bad}={figures[bad]} at step {step}; {remedy(run.recorder.last)}")


def read_so_far(run: Run, step: int) -> dict[str, float]:
    """Of a mixture, each component's share of the rows so far."""
    return {f"mixture/{name}": share for name, share in run.loader.shares(step).items()}


def held_out_loss(setup: Setup, params: Any) -> dict[str, float]:
    """`eval/loss` and `eval/bits_per_byte` of some weights; of a mixture, of each component as well."""
    rows = rows_here(setup.program.batch)
    place = checked(setup, placing(setup.program.text_batch, rows))
    figures = {
        name: evaluate(setup.eval_step, params, map(place, held_out.batches(rows)), held_out.num_bytes)
        for name, held_out in setup.held_out.items()
    }
    shares = setup.prepared.description.get("final_shares")
    if shares is None:
        return figures[""]
    sizes = {name: held_out.num_bytes / held_out.num_tokens for name, held_out in setup.held_out.items()}
    return weighed(figures, shares, sizes)


def finish(run: Run, state: TrainState) -> int:
    """Averages, samples, plot and summary; all of it can be made again from what is on disk."""
    setup = run.setup
    config, recorder, checkpoints = setup.config, run.recorder, run.checkpoints
    recorder.progress.close()
    setup.ledger.enter("samples")  # the averages, the plot and the summary are with them
    with recorder.outside_steps("evaluation"):
        figures = final_figures(run, state, checkpoints)
    samples = None
    if config.sample.prompts or config.sample.parse_snippets > 0:
        recorder.announce("samples")
        samples = draw_samples(setup.program, state.weights, setup.prepared.tokenizer, config)
    recorder.announce("the end")

    def write() -> None:
        written = {} if samples is None else write_samples(*samples, config, setup.directory.path)
        show(report(run, recorder, figures | written))

    processes.from_primary("the samples and the summary", write, CLOSING_SECONDS)
    return 0


def final_figures(run: Run, state: TrainState, checkpoints: Checkpoints) -> dict[str, Any]:
    """What evaluations say after the last step, and of the mean of the last checkpoints."""
    setup = run.setup
    last = setup.config.training.num_steps
    figures: dict[str, Any]
    if run.measured_at is not None and run.measured_at[0] == last:
        figures = dict(run.measured_at[1])
    else:  # all steps were done at an earlier start
        figures = dict(figures_of(evaluations(setup), state))
    if setup.config.checkpoint.average_last > 0:
        steps = processes.from_primary("the checkpoints to average", checkpoints.steps)
        steps = steps[-setup.config.checkpoint.average_last :]
        mean = setup.program.from_canonical(checkpoints.mean_weights(steps, setup.program.canonical.params))
        mean = join(mean, state.frozen)
        for one in evaluations(setup):
            figures |= {f"{name}_mean": value for name, value in one.measure(mean).items()}
    return figures


def report(run: Run, recorder: Recorder, figures: dict[str, Any]) -> dict[str, Any]:
    """The plot, and the summary with these figures in it."""
    setup = run.setup
    config, directory = setup.config, setup.directory
    bigram = setup.prepared.bigram_bits_per_byte()
    picture = directory.path / "plots" / "loss.png"
    plot_loss(directory.path / "metrics.jsonl", picture, title=config.run.name, bigram_bits_per_byte=bigram)
    return summarize(
        directory.path,
        figures
        | {
            "step": config.training.num_steps,
            "num_steps": config.training.num_steps,
            "tokens": recorder.tokens,
            **(
                {}
                if isinstance(setup.program.objective, NextToken)
                else {"objective": config.objective["name"]}
            ),
            "bigram_bits_per_byte": bigram,
            **packing_figures(run),
            **({"rollbacks": len(directory.rollbacks)} if directory.rollbacks else {}),
            "train_seconds": recorder.seconds,
            "goodput": recorder.goodput(),
            "wall_seconds": sum(setup.ledger.seconds().values()),
            "compile_seconds": setup.compile_seconds,
            "compile_cache": setup.watch.outcome(),
            "parameters": setup.program.model.num_params(),
            "peak_flops": setup.flops.peak,
        },
    )


def packing_figures(run: Run) -> dict[str, Any]:
    """How full the rows are, where that is known, and of a mixture what each component's share came to."""
    full, shares = run.loader.fill_rate(), run.loader.shares(run.setup.config.training.num_steps)
    figures: dict[str, Any] = {"packing": run.setup.config.data.packing}
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
