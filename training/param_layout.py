"""Parameters as they lie in memory, what of them trains, and the abstract state that a checkpoint has.

Adapters (`adapter.*`) put factors beside frozen weights, `freeze` leaves parameters out of what trains: to
all that reads `info` both are one partition.
"""

from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import jax
from jaxtyping import Array

from common.checks import ConfigError, did_you_mean
from models.transformer import Model
from models.weights import Adapters, kind_of
from parallel.axes import Layout
from parallel.config import main_segment
from parallel.schedules.stage_layout import Arrangement
from training.config import AdapterConfig, Config
from training.state import TrainState, is_info, placed_like, split


@dataclass(frozen=True)
class ParamLayout:
    """Parameters as they lie in memory: their certificates and how they are made.

    inherits: whether what is frozen is the parent's of `init_from`, so that a checkpoint only names it.
    """

    model: Model
    arrangement: Arrangement | None = None
    adapters: Adapters | None = None
    freeze: tuple[str, ...] = ()
    inherits: bool = False

    @property
    def chunks(self) -> int:
        """Virtual stages; above 1 layers lie on other stages in memory than in a checkpoint."""
        return self.arrangement.chunks if self.arrangement is not None else 1

    @property
    def info(self) -> Any:
        """ParamInfo by path."""
        return self._adapted(self._plain)

    @property
    def trained(self) -> Any:
        """Those of what trains; None in the place of all else."""
        return split(self.info, self.info)[0]

    @property
    def canonical_info(self) -> Any:
        """The same of the stacks in a checkpoint."""
        return self._adapted(self.canonical_plain)

    @property
    def canonical_plain(self) -> Any:
        """Of the model's own weights there, whole and without adapters: what a parent gives."""
        if self.arrangement is None:
            return self.model.info
        return self.arrangement.on_disk(self.model.info, is_info)

    @property
    def _plain(self) -> Any:
        if self.arrangement is None:
            return self.model.info
        return self.arrangement.in_memory(self.model.info, is_info)

    def _adapted(self, info: Any) -> Any:
        # In memory's form: factors have the dims of layers that their weight has, whatever these are.
        return frozen(info, self.freeze) if self.adapters is None else self.adapters.info(info)

    def init(self, key: Array) -> Any:
        """The values, the same on any mesh and for any schedule."""
        arranged = () if self.arrangement is None else (self.arrangement.layers,)
        params = self.model.init(key, *arranged)
        return params if self.adapters is None else self.adapters.make(self._plain, params, key)

    def begin_at(self, params: Any, key: Array) -> tuple[Any, Any]:
        """What trains and what is frozen, canonical, of a parent's weights; factors as `init` draws them."""
        if self.adapters is not None:
            params = self.adapters.make(self.canonical_plain, params, key)
        return split(self.canonical_info, params)


def adapters_of(config: AdapterConfig | None) -> Adapters | None:
    """The low-rank factors that `adapter.*` asks for."""
    if config is None:
        return None
    scale, targets = config.alpha / config.rank, tuple(config.targets)
    return Adapters(config.rank, scale, targets, config.bits, config.group, config.kind == "dora")


def param_layout(config: Config, model: Model, arrangement: Arrangement | None = None) -> ParamLayout:
    """What a config says of a model's parameters. ConfigError for adapters and names that do not fit it."""
    adapters, freeze = adapters_of(config.adapter), tuple(config.freeze)
    placement = ParamLayout(model, arrangement, adapters, freeze, config.init_from is not None)
    if adapters is not None:
        there = {kind_of(info) for info in jax.tree.leaves(model.info) if info.role == "matrix"} - {None}
        if missing := [name for name in adapters.names if name not in there]:
            raise ConfigError(
                f"adapter.targets={missing[0]} is no projection of this model; use some of "
                f"[{','.join(sorted(filter(None, there)))}]"
            )
    try:
        infos = jax.tree.leaves(placement.info)
    except ConfigError:
        raise
    except ValueError as error:  # of one matrix: its rank, bits or group
        raise ConfigError(f"adapter.{error}") from error
    if not any(info.trained for info in infos):
        raise ConfigError(f"freeze=[{','.join(freeze)}] leaves nothing to train; name fewer parameters")
    return placement


def frozen(infos: Any, patterns: tuple[str, ...]) -> Any:
    """Certificates, those of parameters that a pattern names untrained.

    A pattern names a run of a path's parts: `embed`, `segments.0`, `attention.q`, `*norm*`. ConfigError for
    one that names none.
    """
    if not patterns:
        return infos
    left = set(patterns)

    def of(path: Any, info: Any) -> Any:
        parts = jax.tree_util.keystr(path, simple=True, separator=".").split(".")
        runs = [".".join(parts[i:j]) for j in range(len(parts) + 1) for i in range(j)]
        named = {pattern for pattern in patterns if any(fnmatchcase(run, pattern) for run in runs)}
        left.difference_update(named)
        return replace(info, trained=False) if named else info

    marked = jax.tree_util.tree_map_with_path(of, infos, is_leaf=is_info)
    if left:
        paths = jax.tree_util.tree_leaves_with_path(infos, is_leaf=is_info)
        names = {jax.tree_util.keystr((key,), simple=True) for path, _ in paths for key in path}
        words = sorted(name for name in names if not name.isdecimal())
        word = min(left)
        raise ConfigError(f"freeze={word} names no parameter of this model; {did_you_mean(word, words)}")
    return marked


def arrange(config: Config, model: Model, layout: Layout) -> ParamLayout:
    """Layers in stages where mesh.pipeline asks for them."""
    stages = layout.mesh.shape["pipeline"]
    if stages == 1:
        return param_layout(config, model)
    # Only the longest run of equal layers is cut into stages; what stands before and behind it is computed
    # with the embedding and the head.
    main = str(main_segment(model.segments))
    return param_layout(config, model, Arrangement(stages, config.pipeline.virtual_stages, main))


def abstract_params(info: Any, layout: Layout) -> Any:
    """Shapes, dtypes and shardings of parameters with these certificates."""
    return jax.tree.map(
        lambda one, place: jax.ShapeDtypeStruct(one.shape, one.dtype, sharding=place),
        info,
        layout.tree(info, is_info),
        is_leaf=is_info,
    )


def canonical_state(placement: ParamLayout, state: TrainState, layout: Layout) -> TrainState:
    """The abstract state that checkpoints restore into, placed on this mesh."""
    if placement.arrangement is None:
        return state
    # Moments and averages are trees of the parameters' paths, so they are joined and placed like them.
    joined = jax.eval_shape(placement.arrangement.join, state)
    return placed_like(joined, layout.tree(placement.canonical_info, is_info), layout)
