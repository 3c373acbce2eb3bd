"""The learning rate over steps, as a share of its peak: a warm-up, then one of four shapes."""

import optax

from optim.config import (
    ConstantConfig,
    CosineConfig,
    LinearConfig,
    ScheduleConfig,
    WSDConfig,
)


def make_schedule(config: ScheduleConfig, *, num_steps: int) -> optax.Schedule:
    """A function of the number of updates already made, 0..num_steps, to a multiplier in [0, 1].

    Update s (0-based) uses multiplier(s). The warm-up gives (s + 1) / warmup_steps: a first update multiplied
    by zero would be a step wasted. A decaying shape reaches `final_fraction` at s = num_steps, one past
    the last update, so that a decay to zero does not waste that one either.
    Raises ValueError where warm-up (and WSD's decay) do not fit into num_steps.
    """
    warmup = config.warmup_steps
    if warmup > num_steps:
        raise ValueError(
            f"schedule.warmup_steps={warmup} is more than training.num_steps={num_steps}; "
            f"use at most {num_steps}"
        )
    after = _shape(config, num_steps - warmup, num_steps)
    if warmup == 0:
        return after
    # optax calls a ramp over zero steps (a warm-up of one) an error, so that case is a constant.
    ramp = optax.linear_schedule(1 / warmup, 1.0, warmup - 1) if warmup > 1 else optax.constant_schedule(1.0)
    return optax.join_schedules([ramp, after], [warmup])


def _shape(config: ScheduleConfig, steps: int, num_steps: int) -> optax.Schedule:
    match config:
        case ConstantConfig():
            return optax.constant_schedule(1.0)
        case CosineConfig():
            return optax.cosine_decay_schedule(1.0, max(steps, 1), alpha=config.final_fraction)
        case LinearConfig():
            return optax.linear_schedule(1.0, config.final_fraction, max(steps, 1))
        case WSDConfig():
            return _stable_then_decay(config, steps, num_steps)
    raise ValueError(f"schedule.name={config.name} is unknown; use constant, cosine, linear or wsd")


def _stable_then_decay(config: WSDConfig, steps: int, num_steps: int) -> optax.Schedule:
    decay = round(config.decay_fraction * num_steps)
    if decay > steps:
        raise ValueError(
            f"schedule.decay_fraction={config.decay_fraction} of training.num_steps={num_steps} is {decay}, "
            f"but schedule.warmup_steps={config.warmup_steps} leaves {steps}; shorten one of the two"
        )
    if decay == 0:
        return optax.constant_schedule(1.0)
    return optax.linear_schedule(1.0, config.final_fraction, decay, transition_begin=steps - decay)
