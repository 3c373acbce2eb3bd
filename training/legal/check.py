"""The checks that need more than one value of a config: what cannot be had together, whatever the devices.

A config passes three gates: each value by itself (`__post_init__` beside its consumer), values against each
other (here), and tensors against the mesh (`parallel.axes`).
"""

from common.checks import INT32, ConfigError, did_you_mean
from data.config import shards_problem
from kernels.names import LOGICAL_AXES
from parallel.config import MESH_AXES, MeshConfig
from training.config import Config
from training.legal.mesh_case import known_sizes
from training.legal.nearest import refusal


def check(config: Config, device_count: int | None) -> None:
    """Raise ConfigError where two values cannot both be had; `device_count=None` before devices are known."""
    if config.seed < 0:
        _refuse(f"seed={config.seed} is negative; use 0 to {INT32}")
    _check_model(config)
    _check_vocabulary(config)
    _check_adapter(config)
    _check_steps(config)
    _check_rollback(config)
    _check_rules(config.mesh)
    if reason := shards_problem(config.data.virtual_shards, config.training.global_batch_size):
        _refuse(reason)
    if reason := refusal(config, device_count):
        _refuse(reason)


def _refuse(message: str) -> None:
    raise ConfigError(message)


def _check_model(config: Config) -> None:
    m = config.model
    if m.window is not None and "local" not in m.window_pattern:
        _refuse(
            f"model.window={m.window} has no effect: no layer of model.window_pattern={m.window_pattern} "
            "is local; add local to the pattern or set model.window=null"
        )
    if m.position == "learned" and config.data.seq_len > m.max_seq_len:
        _refuse(
            f"data.seq_len={config.data.seq_len} is longer than the learned position table, "
            f"model.max_seq_len={m.max_seq_len}; lower the one or raise the other"
        )
    is_longrope = m.rope_scaling is not None and m.rope_scaling.kind == "longrope"
    if is_longrope and config.data.seq_len > m.max_seq_len:
        _refuse(
            f"data.seq_len={config.data.seq_len} is longer than model.max_seq_len={m.max_seq_len}, by which "
            "longrope takes its factors; lower the one or raise the other"
        )
    if m.rope_scaling is not None and m.position != "rope":
        _refuse(f"model.rope_scaling.kind={m.rope_scaling.kind} needs model.position=rope, not {m.position}")


def _check_vocabulary(config: Config) -> None:
    t, m = config.tokenizer, config.model
    if t.kind == "inherit" and config.init_from is None:
        _refuse(
            "tokenizer.kind=inherit takes the tokenizer of another run; give init_from=RUN, or tokenizer=bpe"
        )
    if t.chat_template is not None and config.data.format == "text":
        _refuse(
            f"tokenizer.chat_template={t.chat_template} has no effect on data.format={config.data.format}; "
            "set data.format=chat, or tokenizer.chat_template=null"
        )
    least = {"bpe": t.vocab_size, "byte": 257}.get(t.kind, 0)
    if 0 < m.vocab_size < least:
        _refuse(
            f"model.vocab_size={m.vocab_size} is smaller than the tokenizer's {least}; "
            f"use {-(-least // 128) * 128}, or -1 to take it from the tokenizer"
        )


def _check_adapter(config: Config) -> None:
    a = config.adapter
    if a is not None and config.init_from is None:
        _refuse(
            f"adapter.rank={a.rank} learns beside weights that are there, and init_from is null; give "
            "init_from=RUN or a published model, or train all weights with adapter=null"
        )
    if a is not None and config.freeze:
        _refuse(
            f"freeze=[{','.join(config.freeze)}] beside adapter.rank={a.rank}, which freezes all weights; "
            "drop one of the two"
        )


def _check_steps(config: Config) -> None:
    steps, schedule = config.training.num_steps, config.schedule
    if schedule.warmup_steps > steps:
        _refuse(
            f"schedule.warmup_steps={schedule.warmup_steps} is more than training.num_steps={steps}; "
            f"use at most {steps}"
        )
    # In steps, not shares: the shortest warm-up of a long run and the longest decay may still meet.
    decay = getattr(schedule, "decay_fraction", 0.0) * steps
    if schedule.warmup_steps + decay > steps:
        _refuse(
            f"schedule.warmup_steps={schedule.warmup_steps} and schedule.decay_fraction="
            f"{schedule.decay_fraction} of training.num_steps={steps} overlap; "  # type: ignore[attr-defined]
            f"use at most {int(steps - decay)} warm-up steps"
        )


def _check_rollback(config: Config) -> None:
    batches, least = config.guard.rollback_batches, config.checkpoint.every + config.guard.max_skips
    if 0 < batches < least:
        _refuse(
            f"guard.rollback_batches={batches} may not reach past the batches that were skipped: with "
            f"checkpoint.every={config.checkpoint.every} and guard.max_skips={config.guard.max_skips} use "
            f"{least} or more, or 0 (the run ends)"
        )


def _check_rules(mesh: MeshConfig) -> None:
    for axis, targets in mesh.rules.items():
        if axis not in LOGICAL_AXES:
            _refuse(f"mesh.rules.{axis} is no logical axis; {did_you_mean(axis, LOGICAL_AXES)}")
        for target in targets:
            if target not in MESH_AXES:
                _refuse(f"mesh.rules.{axis} names {target}; {did_you_mean(target, MESH_AXES)}")
        if len(set(targets)) < len(targets):
            _refuse(f"mesh.rules.{axis}={targets} names an axis twice; name each once")


def mesh_sizes(mesh: MeshConfig, device_count: int | None) -> dict[str, int] | None:
    """Devices along each mesh axis, -1 filled in; None where that needs the device count and it is not known.

    Raises ConfigError where the sizes and the devices do not multiply out.
    """
    try:
        return known_sizes(mesh, device_count)
    except ValueError as error:
        raise ConfigError(str(error)) from error
