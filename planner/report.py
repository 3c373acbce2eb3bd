"""A plan: everything that is said of one step on one cluster, as data. `planner.screen` shows it."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from parallel.config import mesh_shape
from parallel.hardware import Machine
from planner.roofline import Prediction, predict
from planner.work import StepCost
from training.config import Config


@dataclass(frozen=True)
class Plan:
    """One step, and the run that it is a step of.

    how: "compiled" or "analytic". beside: the analytic figures where `work` was compiled. budget_tokens: of
    the whole run. money: of the whole run at `price` a device-hour, in whatever currency that was given.
    """

    name: str
    hardware: str
    devices: int
    nodes: int
    topology: str
    mesh: Mapping[str, int]
    precision: str
    attention: str
    attention_why: str
    optimizer: str
    rows: int
    seq_len: int
    parameters: int
    model_flops_per_token: Mapping[str, float]  # forward and backward: causal, full
    capacity: int  # bytes of a device that a program may fill
    work: StepCost
    beside: StepCost | None
    prediction: Prediction
    steps: int
    budget_tokens: int
    run_seconds: float
    device_hours: float
    price: float | None
    money: float | None
    compile_seconds: float | None
    compiler: str | None
    notes: tuple[str, ...] = ()
    refused: str | None = None  # why the compiler made no program, where it made none for want of memory

    @property
    def fits(self) -> bool:
        """Whether a device can hold the step."""
        return self.refused is None and self.work.memory.total <= self.capacity

    def json(self) -> dict[str, Any]:
        """Everything, with totals and the verdict; sizes in bytes, times in seconds."""
        memory = self.work.memory
        return {"fits": self.fits, "total_bytes": memory.total, **asdict(self)}


@dataclass(frozen=True)
class About:
    """What a program says of itself and a computed plan does not know."""

    attention: str
    attention_why: str
    compile_seconds: float | None = None
    compiler: str | None = None


def make_plan(
    config: Config,
    machine: Machine,
    work: StepCost,
    *,
    parameters: int,
    per_token: Mapping[str, float],
    about: About,
    beside: StepCost | None = None,
    price: float | None = None,
    budget_tokens: int | None = None,
    notes: tuple[str, ...] = (),
    refused: str | None = None,
) -> Plan:
    """From a step's work to the whole plan.

    parameters: of the model. per_token: FLOPs forward and backward, keys `causal` and `full`. price: of one
    device for an hour. budget_tokens: null takes the config's own, training.num_steps times the batch.
    """
    training = config.training
    tokens = training.global_batch_size * config.data.seq_len
    mesh = mesh_shape(config.mesh, machine.devices)
    prediction = predict(
        work, machine, mesh, tokens=tokens, flops_full=per_token["full"], flops_causal=per_token["causal"]
    )
    budget = training.num_steps * tokens if budget_tokens is None else budget_tokens
    steps = math.ceil(budget / tokens)
    seconds = steps * prediction.step_seconds
    hours = seconds * machine.devices / 3600
    return Plan(
        name=config.run.name,
        hardware=machine.name,
        devices=machine.devices,
        nodes=-(-machine.devices // machine.per_node),
        topology=machine.topology,
        mesh=mesh,
        precision=training.precision,
        attention=about.attention,
        attention_why=about.attention_why,
        optimizer=config.optim.name,
        rows=training.global_batch_size,
        seq_len=config.data.seq_len,
        parameters=parameters,
        model_flops_per_token=dict(per_token),
        capacity=machine.memory_bytes,
        work=work,
        beside=beside,
        prediction=prediction,
        steps=steps,
        budget_tokens=budget,
        run_seconds=seconds,
        device_hours=hours,
        price=price,
        money=None if price is None else price * hours,
        compile_seconds=about.compile_seconds,
        compiler=about.compiler,
        notes=notes,
        refused=refused,
    )
