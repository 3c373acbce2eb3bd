"""A model behind several replicas under Ray Serve: `python scripts/serve_ray.py RUN most=4 gpus=1`.

    RUN                   as for scripts/serve.py; its words are taken too, but for follow and url_file
    least=1               replicas that are always there
    most=1                replicas at a peak
    target=6              requests under way for each replica, on average; more bring another one
    limit=64              that one replica is given at once
    gpus=0                of a replica
    cpus=1                of a replica
    up_seconds=10         that there must have been too many requests before one more comes
    down_seconds=300      that fewer must have been enough before one goes
    drain_seconds=600     that one which goes has for its last answers
    address=null          of a Ray cluster; null: RAY_ADDRESS, or a Ray of this machine alone

SIGTERM or Ctrl-C ends it when what runs is answered. Needs the extras `ray` and `serve`; see
docs/serving-deploy.md.
"""

import signal
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

if __name__ == "__main__":
    import command

from scripts.command import parse, run
from scripts.serve import ServeOptions, build_engine, open_model, parse_options, read_key

if TYPE_CHECKING:
    from serving.http.server import Service

EXTRA = "scripts/serve_ray.py needs the extras ray and serve: pip install -e '.[ray,serve]'"


def service_of(options: ServeOptions) -> "Service":
    """A service that is ready, in the process that asks for it."""
    from serving.http.server import Service
    from serving.offline import show_purity

    opened = open_model(options)
    engine = build_engine(options, opened)
    key, name = read_key(options.api_key_file), options.name or opened.path.resolve().name
    made = Service(engine, opened.tokenizer, name, add_bos=opened.add_bos, api_key=key, page=options.page)
    engine.warm()
    show_purity(engine)
    engine.start()
    made.ready = True
    return made


def serve(arguments: Sequence[str]) -> int:
    """Serve until a signal; the exit status. Raises ValueError for bad input."""
    try:
        import ray
        from ray import serve as ray_serve

        from serving.ray_app import ReplicaConfig, replicas
    except ModuleNotFoundError as error:
        raise ValueError(f"{EXTRA} ({error.name} is missing)") from None

    @dataclass(frozen=True)
    class RayOptions(ReplicaConfig):
        """The words of this command that are not scripts/serve.py's."""

        address: str | None = None

    keys = {field.name for field in fields(RayOptions)}
    ours = [word for word in arguments if word.partition("=")[0] in keys]
    options, config = parse_options([w for w in arguments if w not in ours]), parse(ours, RayOptions, ())
    if options.follow or options.url_file is not None:
        raise ValueError(
            "follow=true and url_file= are scripts/serve.py's alone; this command again takes newer weights"
        )
    over = threading.Event()
    for notice in (signal.SIGTERM, signal.SIGINT):
        signal.signal(notice, lambda number, frame: over.set())
    ray.init(address=config.address, log_to_driver=True)
    try:
        ray_serve.start(http_options={"host": options.host, "port": options.port})
        ray_serve.run(replicas(lambda: service_of(options), config), name=options.run.replace("/", "-"))
        print(f"http://{options.host}:{options.port} serves {options.run}", file=sys.stderr)
        over.wait()
    finally:
        ray_serve.shutdown()
        ray.shutdown()
    return 0


def main(arguments: Sequence[str]) -> int:
    """The command; its exit status."""
    return run(serve, arguments, __doc__)


if __name__ == "__main__":
    command.start(main)
