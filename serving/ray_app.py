"""Replicas of a server under Ray Serve: each is a process with an engine of its own, and their number follows
the requests that are under way.

Ray's proxy shares requests out by the replicas' queues. What a replica answers does not depend on how many
there are, since it does not depend on its neighbours. Where one card is too small: docs/serving-deploy.md.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.checks import require, within
from common.errors import RunFault
from common.text import first_line
from serving.http.server import Service, application

APPLICATION = "cambrian"
ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class ReplicaConfig:
    """How many replicas there are, what each may use, and when there are more."""

    least: int = 1
    most: int = 1
    target: int = 6  # requests under way for each, on average; more bring another replica
    limit: int = 64  # that one replica is given at once; further ones wait at Ray's proxy
    gpus: float = 0.0  # of a replica
    cpus: float = 1.0
    up_seconds: float = 10.0  # that there must have been too many before one more comes
    down_seconds: float = 300.0  # that fewer must have been enough before one goes
    drain_seconds: float = 600.0  # that one which goes has for its last answers
    address: str | None = None  # of a Ray cluster; None: RAY_ADDRESS, or a Ray of this machine alone

    def __post_init__(self) -> None:
        """Each value, and the most against the least."""
        within("least", self.least, 1)
        require(self.most >= self.least, "most", self.most, f"least={self.least} or more")
        within("target", self.target, 1)
        require(self.limit >= self.target, "limit", self.limit, f"target={self.target} or more")
        for key in ("gpus", "cpus", "up_seconds", "down_seconds", "drain_seconds"):
            within(key, getattr(self, key), 0)


def replicas(build: Callable[[], Service], config: ReplicaConfig) -> Any:
    """An application for `ray.serve.run`. build: called in each replica; gives a service that is ready."""
    from ray import serve

    @serve.ingress()
    class Replica:
        def __init__(self) -> None:
            self._service = build()  # warm: Ray sends nothing here before this returns

        def __serve_build_asgi_app__(self) -> Any:
            return application(self._service)

        def check_health(self) -> None:
            """Raises where only a new replica will help; Ray then makes one."""
            if self._service.engine.failed is not None:
                raise RuntimeError(self._service.engine.failed)

        def __del__(self) -> None:
            # Ray has waited for the last answers by now.
            if service := getattr(self, "_service", None):
                service.engine.stop()
                service.close()

    deployment = serve.deployment(
        Replica,
        name="replica",
        max_ongoing_requests=config.limit,
        ray_actor_options={"num_cpus": config.cpus, "num_gpus": config.gpus},
        graceful_shutdown_timeout_s=config.drain_seconds,
        autoscaling_config={
            "min_replicas": config.least,
            "max_replicas": config.most,
            "target_ongoing_requests": config.target,
            "upscale_delay_s": config.up_seconds,
            "downscale_delay_s": config.down_seconds,
            "metrics_interval_s": 1.0,
            "look_back_period_s": max(2.0, min(config.up_seconds, 30.0)),  # what a mean is taken over
        },
    )
    return deployment.bind()


def run_replicas(
    build: Callable[[], Service], config: ReplicaConfig, name: str, host: str, port: int
) -> None:
    """Serve by replicas until SIGTERM or SIGINT, and end when what runs is answered. Raises RunFault."""
    import ray
    from ray import serve

    # Replicas find our code where this process did: the clone need not be installed.
    code = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    ray.init(address=config.address, runtime_env={"env_vars": {"PYTHONPATH": code}})
    # After ray.init, whose own handler ends the process three seconds after a SIGTERM.
    over = threading.Event()
    for notice in (signal.SIGTERM, signal.SIGINT):
        signal.signal(notice, lambda number, frame: over.set())
    try:
        serve.start(http_options={"host": host, "port": port})
        serve.run(replicas(build, config), name=APPLICATION)
        print(f"http://{host}:{port} serves {name}", file=sys.stderr)
        over.wait()
        serve.delete(APPLICATION)  # waits for the last answers, which a shutdown alone would cut off
    except RuntimeError as error:  # Ray's word for replicas that do not start
        raise RunFault(f"{first_line(error)}; the replicas' own words are above") from None
    finally:
        serve.shutdown()
        ray.shutdown()
