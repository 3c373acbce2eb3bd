"""What a device holds of a model and its optimizer, by the rules of the mesh alone: no device, no array.

The parameters' birth certificates (`models.param`) say shapes and logical axes, the mesh's rules into how
many parts.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh

from models.config import ModelConfig
from models.transformer import Model, build_model
from optim.optimizers import make_optimizer
from optim.schedules import make_schedule
from parallel.axes import Layout
from parallel.config import MeshConfig, mesh_shape
from parallel.schedules.stage_layout import main_segment
from training.config import Config
from training.state import balance_mask, decay_mask, is_info, make_state, matrix_dims

Path = tuple[str, ...]
_KEPT: dict[tuple[str, ...], Any] = {}  # what is the same for every mesh, by the configs that it depends on
MOST_KEPT = 64


@dataclass(frozen=True)
class Parameter:
    """One array of the parameter tree. segment: of layers that it is stacked in; None outside of them."""

    path: Path
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    role: str
    segment: int | None

    @property
    def size(self) -> int:
        """Elements of the whole."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Stored:
    """One array of the state that is no parameter; owner: the parameter that it is placed like, if any."""

    shape: tuple[int, ...]
    itemsize: int
    owner: Path | None


def kept(make: Callable[[], Any], *configs: Any) -> Any:
    """What `make` gives, made once for configs that read alike."""
    key = (make.__qualname__, *map(repr, configs))
    if key not in _KEPT:
        if len(_KEPT) >= MOST_KEPT:
            _KEPT.pop(next(iter(_KEPT)))
        _KEPT[key] = make()
    return _KEPT[key]


def model_of(config: ModelConfig) -> Model:
    """The model of these values, built once a process."""
    return kept(lambda: build_model(config), config)


def parameters_of(model: Model) -> tuple[Parameter, ...]:
    """All of them, layers stacked; in the segment that a pipeline splits the first axis is `stages`."""

    def read() -> tuple[Parameter, ...]:
        found = []
        main = main_segment(model.segments)
        for path, leaf in jax.tree_util.tree_leaves_with_path(model.info, is_leaf=is_info):
            names = _names(path)
            segment = int(names[1]) if names[0] == "segments" else None
            axes = ("stages", *leaf.axes[1:]) if segment == main else leaf.axes
            found.append(Parameter(names, leaf.shape, axes, leaf.role, segment))
        return tuple(found)

    return kept(read, model.config)


def stored_of(config: Config, model: Model) -> tuple[Stored, ...]:
    """Moments, average, counters and the guard's figures."""

    def read() -> tuple[Stored, ...]:
        tx = make_optimizer(
            config.optim,
            make_schedule(config.schedule, num_steps=config.training.num_steps),
            decay_mask=decay_mask(model.info),
            matrices=matrix_dims(model.info),
            balance=balance_mask(model.info),
            balance_rate=config.model.moe.bias_update_rate if config.model.moe else 0.0,
            parts=None,
            muon_dtype=np.dtype("float32"),
            seed=config.seed,
        )
        ema = config.training.ema_decay is not None
        state = jax.eval_shape(lambda key: make_state(model.init(key), tx, ema), jax.random.key(0))
        owners = {p.path for p in parameters_of(model)}
        found = []
        for path, leaf in jax.tree_util.tree_leaves_with_path(state.replace(params=None)):
            names = _names(path)
            owner = next((names[i:] for i in range(len(names)) if names[i:] in owners), None)
            found.append(Stored(leaf.shape, np.dtype(leaf.dtype).itemsize, owner if leaf.ndim else None))
        return tuple(found)

    moments = (config.optim, config.schedule, config.training.ema_decay is None, config.training.num_steps)
    return kept(read, config.model, *moments)


def _names(path: Any) -> Path:
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def abstract_layout(config: MeshConfig, devices: int) -> Layout:
    """The mesh's sizes and rules, over devices that nobody has. ValueError where they do not multiply out."""
    sizes = mesh_shape(config, devices)
    mesh: Any = AbstractMesh(tuple(sizes.values()), tuple(sizes))
    return Layout(mesh, {name: tuple(axes) for name, axes in config.rules.items()})


def part_of(parameter: Parameter, layout: Layout, leave: tuple[str, ...] = ()) -> int:
    """Elements of a parameter on one device; `leave`: mesh axes along which it was gathered."""
    spec = layout.spec(parameter.axes, parameter.shape, "/".join(parameter.path))
    ways = 1
    for entry in spec:
        names = (entry,) if isinstance(entry, str) else entry or ()
        ways *= math.prod(layout.mesh.shape[name] for name in names if name not in leave)
    return parameter.size // ways


def state_bytes(config: Config, model: Model, layout: Layout) -> tuple[int, int]:
    """(parameters, all else of the state) on one device."""
    parts: Mapping[Path, tuple[int, int]] = {
        p.path: (p.size, part_of(p, layout)) for p in parameters_of(model)
    }
    others = 0
    for array in stored_of(config, model):
        size = math.prod(array.shape)
        if array.owner is not None:
            whole, part = parts[array.owner]
            size = size * part // whole
        others += size * array.itemsize
    return 4 * sum(part for _, part in parts.values()), others
