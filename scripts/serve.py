"""A model behind HTTP, as OpenAI's clients speak to it: `python scripts/serve.py RUN`.

    RUN                   a directory in runs/, a path to one, or published weights (with config.json)
    host=127.0.0.1        address to listen at; 0.0.0.0 for all
    port=8000             0: any that is free, told on stderr
    slots=8               texts that are written at a time
    max_len=0             tokens of a prompt and its answer; 0: as many as the model was made for
    page=64               tokens of a page of the cache
    chunk=128             tokens of a prompt that are read at once, a multiple of page
    prefill_every=1       tokens of every text that are written between two chunks
    pages=0               of the cache; 0: as many as all slots need for the longest texts
    guesses=0             tokens that are guessed and read with the next one
    speculate=ngram       guessed from the text itself; mtp: by the model's own layer for further tokens
    prefix_cache=true     keep what prompts have in common
    packed=false          true: quantized weights stay so in memory, and every product dequantizes its own
    cache_bits=null       8: keys and values as int8 levels and a scale a vector; null: as they are computed
    queue_requests=256    that may wait; behind them 503 with Retry-After
    queue_tokens=1048576  of prompts and answers that may wait
    queue_seconds=60      that one may have to wait, as predicted
    precision=auto        float32, bfloat16; auto: a run's own, of published weights bfloat16, on CPU float32
    weights=raw           of a run: raw, ema (training.ema_decay), or mean (of the last checkpoints)
    step=latest           of a run: or a step that has a checkpoint
    follow=false          of a run: go on with each newer checkpoint, once it is verified
    chat=auto             true, false; auto: where a chat template taught a run, or lies beside weights
    bos=auto              begin texts with bos: true, false; auto: as published weights do, and true for runs
    name=null             what clients call the model; null: the directory's name
    api_key_file=null     a file whose first line clients must send as their key
    url_file=null         where to write the server's URL once it is ready; removed at its end
    ray=false             true: replicas under Ray Serve, as docs/serving-deploy.md says, by least=1 most=1
                          target=6 limit=64 gpus=0 cpus=1 up_seconds=10 down_seconds=300 drain_seconds=600
                          address=null

SIGTERM, SIGUSR1 or Ctrl-C: /ready answers 503, nothing new is taken on, what runs is answered, then it ends;
a second one ends it at once. Exit status: 0 done, 75 the same in a job of Slurm, to be started again, 1 a
checkpoint that cannot be trusted, 2 bad input.
"""

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":
    import command

from artifacts.load import BOS, LATEST, PRECISIONS, WEIGHTS
from common.checks import choice, within
from common.errors import Requeue
from common.files import write_text
from data.tokens.turns import CHAT, give_chat
from scripts.command import parse, run
from serving.settings import ServeConfig

if TYPE_CHECKING:
    from serving.engine import Engine
    from serving.follow import Followed, Follower
    from serving.http.server import Service
    from training.opening.opened import OpenedModel

LINE = 10**12  # above any number of steps: what a run of a line counts more than the one before
FOLLOW_SECONDS = 5.0  # between two looks for a newer checkpoint
# Python's own 5 ms between two turns of its threads are longer than a step of a small model.
SWITCH_SECONDS = 0.0005


@dataclass(frozen=True, kw_only=True)
class ServeOptions(ServeConfig):
    """The command line, each key with its type, the engine's among them; see the module's docstring."""

    run: str
    host: str = "127.0.0.1"
    port: int = 8000
    precision: str = "auto"
    weights: str = "raw"
    step: str = LATEST
    follow: bool = False
    chat: str = "auto"
    bos: str = "auto"
    name: str | None = None
    api_key_file: Path | None = None
    url_file: Path | None = None


def engine_settings(options: ServeOptions) -> ServeConfig:
    """What of the command line is the engine's."""
    return ServeConfig(**{field.name: getattr(options, field.name) for field in fields(ServeConfig)})


def parse_options(arguments: Sequence[str]) -> ServeOptions:
    """The command line, each value in its range. ValueError, in one line, for anything else."""
    options = parse(arguments, ServeOptions)
    known = {"weights": WEIGHTS, "chat": CHAT, "bos": BOS, "precision": PRECISIONS}
    for key, values in known.items():
        choice(key, getattr(options, key), values)
    within("port", options.port, 0, 65535)
    if options.follow:
        from training.opening.opened import is_run

        if options.step != LATEST or not is_run(options.run):
            raise ValueError(
                f"follow=true goes with a run and step=latest, not {options.run} step={options.step}"
            )
    return options


def open_model(options: ServeOptions, step: str | None = None) -> "OpenedModel":
    """The model to serve, its tokenizer with a template where it speaks in turns."""
    from configs.groups import mesh_rules
    from training.opening.opened import is_run, open_published, open_run

    if is_run(options.run):
        step = step or options.step
        opened = open_run(options.run, step=step, weights=options.weights, precision=options.precision)
    else:
        opened = open_published(options.run, mesh_rules(), precision=options.precision)
    data = opened.config.data if opened.config else None
    give_chat(opened.tokenizer, opened.tokenizer_path, data, options.chat)
    add_bos = opened.add_bos if options.bos == "auto" else options.bos == "true"
    return replace(opened, add_bos=add_bos)


def build_engine(options: ServeOptions, opened: "OpenedModel") -> "Engine":
    """The engine of that model: neither warm nor started."""
    from serving.engine import Engine

    model, params, ops, layout = opened.trained
    settings, size = engine_settings(options), opened.tokenizer.vocab_size
    return Engine(model, params, ops, settings, layout, version=opened.version, vocab_size=size)


def follower(options: ServeOptions, engine: "Engine") -> "Follower":
    """What hands each newer checkpoint of the run to the engine."""
    from artifacts.load import find_run, open_saved, steps_until
    from serving.follow import Follower

    def saved_at(step: int) -> float:
        return open_saved(find_run(options.run)).saved_at(step)

    def load(mark: int) -> tuple[Any, str, float]:
        opened = open_model(options, str(mark % LINE))
        return opened.trained[1], opened.version, saved_at(mark % LINE)

    def mark(step: int) -> int:
        # Of a line (scripts/retrain.py) the run in use is one of a growing number, whose steps begin anew.
        run = find_run(options.run)
        number = run.resolve().name.rpartition(".")[2] if run.is_symlink() else ""
        return step + LINE * int(number if number.isdecimal() else 0)

    def newest() -> int:
        return mark(steps_until(open_saved(find_run(options.run)))[-1])

    step = int(engine.version.partition("-")[0])
    return Follower(engine, mark(step), saved_at(step), newest, load, FOLLOW_SECONDS)


def steps_of_a_run(followed: "Followed") -> "Followed":
    """The same by the steps that a run counts, whichever of its line it is."""
    return replace(followed, step=followed.step % LINE, newest=followed.newest % LINE)


def listen(host: str, port: int) -> tuple[socket.socket, str]:
    """A socket that listens there, and the URL that leads to it. ValueError where none can."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(f"host={host} port={port}: {reason}; choose another port, or 0 for any") from None
    shown = socket.gethostname() if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
    return listener, f"http://{shown}:{listener.getsockname()[1]}"


def read_key(path: Path | None) -> str | None:
    """The key that clients must send: a file's first line. ValueError where that is empty."""
    if path is None:
        return None
    key = path.read_text("utf-8").partition("\n")[0].strip()
    if not key:
        raise ValueError(f"api_key_file={path} is empty; write the key into its first line")
    return key


def service_of(options: ServeOptions) -> tuple["Service", "Engine", "Follower | None"]:
    """A service and its engine: alive, and not ready before `make_ready`; what follows the run, if asked."""
    from artifacts.config import RunConfig
    from serving.http.server import Service
    from training.compile_cache import start_compile_cache

    start_compile_cache(RunConfig().compile_cache)
    opened, key = open_model(options), read_key(options.api_key_file)
    name = options.name or opened.path.resolve().name
    engine = build_engine(options, opened)
    made = Service(engine, opened.tokenizer, name, add_bos=opened.add_bos, api_key=key, page=options.page)
    if not options.follow:
        return made, engine, None
    following = follower(options, engine)
    made.metrics.followed = lambda: steps_of_a_run(following.followed)
    return made, engine, following


def make_ready(service: "Service", engine: "Engine") -> "Service":
    """The service with all compiled, the engine's law shown, and its thread begun."""
    from serving.offline import show_purity

    engine.warm()
    show_purity(engine)
    engine.start()
    sys.setswitchinterval(SWITCH_SECONDS)
    service.ready = True
    return service


def serve(arguments: Sequence[str]) -> int:
    """Serve until a signal; the exit status. ValueError for bad input, RunFault for a bad checkpoint."""
    if "ray=true" in arguments:
        return serve_replicas([word for word in arguments if word != "ray=true"])
    options = parse_options(arguments)
    with extra("serve"):
        from serving.http.server import server_of
    read_key(options.api_key_file)  # before anything that takes long
    listener, url = listen(options.host, options.port)
    with listener:
        service, engine, following = service_of(options)
        server = server_of(service)
        over, faults = threading.Event(), list[BaseException]()

        def prepare() -> None:
            try:
                make_ready(service, engine)
                if options.url_file is not None:
                    write_text(options.url_file, f"{url}\n")
                print(f"{url} serves {service.name}, {engine.version}", file=sys.stderr)
                if following is not None:
                    following.follow(over)
            except BaseException as error:  # told by the main thread
                faults.append(error)
                server.should_exit = True

        # Alive from here on, ready when all is compiled.
        thread = threading.Thread(target=prepare)
        thread.start()
        signal.signal(signal.SIGUSR1, server.handle_exit)  # Slurm's word that the time is nearly over
        server.run(sockets=[listener])
        over.set()
        thread.join()
        if options.url_file is not None:
            options.url_file.unlink(missing_ok=True)
        engine.stop()
        service.close()
    if faults:
        raise faults[0]
    return Requeue.status if "SLURM_JOB_ID" in os.environ else 0


def serve_replicas(arguments: Sequence[str]) -> int:
    """Serve by replicas under Ray until a signal; the exit status. ValueError for bad input."""
    with extra("ray,serve"):
        import ray  # noqa: F401

        from serving.ray_app import ReplicaConfig, run_replicas
    keys = {field.name for field in fields(ReplicaConfig)}
    ours = [word for word in arguments if word.partition("=")[0] in keys]
    options, config = parse_options([w for w in arguments if w not in ours]), parse(ours, ReplicaConfig, ())
    if options.follow or options.url_file is not None:
        raise ValueError(
            "follow=true and url_file= do not go with ray=true; the same command again takes newer weights"
        )
    run_replicas(
        lambda: make_ready(*service_of(options)[:2]), config, options.run, options.host, options.port
    )
    return 0


@contextlib.contextmanager
def extra(names: str) -> Iterator[None]:
    """Raise ValueError with the command that installs what is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ValueError(
            f"scripts/serve.py: {error.name} is not installed; pip install -e '.[{names}]'"
        ) from None


def main(arguments: Sequence[str]) -> int:
    """The command; its exit status."""
    return run(serve, arguments, __doc__)


if __name__ == "__main__":
    command.start(main)
