"""Adapters as PEFT keeps them, both ways: adapter_config.json and adapter_model.safetensors.

Their names and the order of their dims follow from the rule of the weight that they adapt: lora_A is [R, in]
and lora_B [out, R] there, and DoRA's magnitudes are [out]. Here keys and values, gate and up are pairs that
share a weight, there they are modules of their own: where PEFT adapts one of a pair alone, the other has
zeros, which is the same model.
"""

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from interop.families import Rules
from interop.places import Place
from interop.rules import Read, Slot, Stacked, arrays, letters, read, slots, their_shape
from interop.safetensors import Tensors, write_tensors
from models.weights import Adapters, LowRank, kind_of

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX, RANK = "base_model.model.", "Z"
# Of adapter_config.json: what is read, and what says nothing of the function from tokens to logits. Any other
# key must be empty: each changes what is computed.
READ = {"peft_type", "r", "lora_alpha", "target_modules", "use_rslora", "use_dora"}
HARMLESS = set(
    """
    auto_mapping base_model_name_or_path revision inference_mode lora_dropout task_type init_lora_weights
    peft_version bias megatron_core qalora_group_size ensure_weight_tying
    """.split()
)


@dataclass(frozen=True)
class _Factors:
    """A model of which only the factors are seen."""

    segments: tuple[Any, ...]
    info: Any


def _factors(model: Any, adapters: Adapters) -> _Factors:
    def of(tree: Any) -> Any:
        if isinstance(tree, LowRank):
            return {part: info for part in "abm" if (info := getattr(tree, part)) is not None}
        if not isinstance(tree, dict):
            return None
        return {name: found for name, inner in tree.items() if (found := of(inner)) is not None}

    return _Factors(model.segments, of(adapters.info(model.info)))


def factor_rules(rules: Rules) -> Iterator[Any]:
    """The rules of factors, from those of the weights that are modules of their own."""
    for rule in rules:
        if rule.part or rule.cut or not all(name.endswith(".weight") for name in rule.names):
            continue  # of a weight that is a part of theirs the factors would be no part of theirs
        groups, ours = letters(rule)
        if len(groups) != 2 or "E" in ours:
            continue
        out, into = groups
        first = min(into, key=ours.index)
        a = [d for d in ours if d not in out] + [RANK]
        b = [RANK if d == first else d for d in ours if d == first or d not in into]
        m = [d for d in ours if d not in into]
        for ours_of, kind, dims, pairs in (
            ("a", "A.weight", f"{RANK} ({' '.join(into)}) -> {' '.join(a)}", None),
            ("b", "B.weight", f"({' '.join(out)}) {RANK} -> {' '.join(b)}", rule.pairs),
            ("m", "magnitude_vector", f"({' '.join(out)}) -> {' '.join(m)}", rule.pairs),
        ):
            names = tuple(f"{PREFIX}{name.removesuffix('.weight')}.lora_{kind}" for name in rule.names)
            yield replace(rule, ours=f"{rule.ours}/{ours_of}", theirs=names, dims=dims, pairs=pairs)


def module_of(name: str) -> str:
    """The module that a factor belongs to, as target_modules calls it."""
    return name.removesuffix(".weight").rsplit(".", 2)[1]


def write_adapter(
    output: Path, model: Stacked, rules: Rules, adapters: Adapters, read: Read, base: str | None = None
) -> None:
    """Write the factors of a model; the directory gets its name when it is whole.

    read: a factor by its path (behind the weight's, "a", "b" or "m"), one layer of it by row. base: where the
    weights lie that they stand on. Raises ValueError for what PEFT has no modules for, such as experts and
    fused arrays, or where `output` is taken.
    """
    if output.exists():
        raise ValueError(f"output={output} is there already; remove it or choose another")
    found = list(slots(_factors(model, adapters), list(factor_rules(rules))))
    shapes = {source.name: their_shape(source, slot.shape) for slot in found for source in slot.sources}
    values = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": adapters.rank,
        "lora_alpha": adapters.scale * adapters.rank,
        "target_modules": sorted({module_of(name) for name in shapes}),
        "bias": "none",
        "lora_dropout": 0.0,
        "inference_mode": True,
        "use_dora": adapters.dora,
    }
    aside = output.with_name(f".{output.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        (aside / CONFIG).write_text(json.dumps(values, indent=2) + "\n", "utf-8")
        (file,) = write_tensors(aside, shapes, arrays(found, read, shapes), np.float32, shard=1 << 60)
        os.replace(aside / file, aside / WEIGHTS)
        os.replace(aside, output)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def factor_reader(trained: Any) -> Read:
    """`Read` of the factors in a tree of `LowRank`."""

    def read(path: tuple[str, ...], row: int | None) -> np.ndarray:
        leaf = trained
        for name in path[:-1]:
            leaf = leaf[name]
        factor = getattr(leaf, path[-1])
        return np.asarray(factor if row is None else factor[row])

    return read


def read_adapter(path: Place, model: Any, rules: Rules) -> tuple[Adapters, "Adapted"]:
    """The adapters of a directory for a model, and their factors, checked before any is read.

    Raises ValueError for a kind that is not supported, and for arrays that are missing, strange or of another
    shape.
    """
    try:
        values = json.loads((path / CONFIG).read_text("utf-8"))
        rank, alpha = int(values["r"]), float(values["lora_alpha"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path / CONFIG} cannot be read ({error}); write it again") from error
    strange = sorted(key for key, value in values.items() if value and key not in READ | HARMLESS)
    wrong = {"peft_type": "LORA", "bias": "none"}
    strange += [key for key, only in wrong.items() if values.get(key, only) != only]
    if strange:
        raise ValueError(
            f"{path / CONFIG}: {strange[0]}={values[strange[0]]} is not supported; only LoRA and DoRA are"
        )
    tensors = Tensors(path / WEIGHTS)
    modules = {module_of(name) for name in tensors}
    targets = values.get("target_modules")
    if isinstance(targets, list) and (other := {t.rsplit(".", 1)[-1] for t in targets} ^ modules):
        raise ValueError(f"{path}: target_modules and {WEIGHTS} disagree about {sorted(other)[0]}")
    table = list(factor_rules(rules))
    adapted = {
        rule.ours.rsplit("/", 1)[0] for rule in table for name in rule.names if module_of(name) in modules
    }
    kinds = {
        kind_of(info)
        for keys, info in jax.tree_util.tree_flatten_with_path(model.info)[0]
        if "/".join(str(key.key) for key in keys).endswith(tuple(f"/{ours}" for ours in adapted))
    }
    scale = alpha / (rank**0.5 if values.get("use_rslora") else rank)
    names = tuple(sorted(kind for kind in kinds if kind))
    adapters = Adapters(rank=rank, scale=scale, names=names, dora=bool(values.get("use_dora")))
    found = list(slots(_factors(model, adapters), table))
    used = set()
    for slot in found:
        for source in slot.sources:
            if module_of(source.name) not in modules:
                if adapters.dora:  # without a magnitude of its own it has no direction
                    raise ValueError(
                        f"{path}: DoRA of one of a pair alone is not supported: {source.name} is missing"
                    )
                continue
            wanted = their_shape(source, slot.shape)
            if source.name not in tensors.entries:
                raise ValueError(f"{path}: {source.name} is missing; write the adapter again")
            if (there := tensors.entries[source.name][2]) != wanted:
                raise ValueError(
                    f"{path}: {source.name} is {list(there)}, and this model's is {list(wanted)}"
                )
            used.add(source.name)
    if unused := sorted(set(tensors) - used):
        raise ValueError(f"{path}: {unused[0]} is not part of this model; is it another one's?")
    return adapters, Adapted(tensors, found)


@dataclass(frozen=True)
class Adapted:
    """The factors in a directory, each a slot."""

    tensors: Tensors
    slots: list[Slot]

    def applied(self, model: Any, adapters: Adapters, params: Any) -> Any:
        """The model's weights with these factors beside them, in float32."""

        def beside(factors: Any, weight: Any) -> Any:
            return weight if factors is None else replace(factors, w=weight)

        alone = self.alone(model, adapters)
        return jax.tree.map(beside, alone, params, is_leaf=lambda x: x is None or isinstance(x, LowRank))

    def alone(self, model: Any, adapters: Adapters) -> Any:
        """These factors in float32, without the weights beside them; None for what has none."""
        shapes = {
            source.name: their_shape(source, slot.shape) for slot in self.slots for source in slot.sources
        }

        def get(name: str) -> np.ndarray:
            there = name in self.tensors.entries  # or it is a pair's half that they leave as it is
            return self.tensors[name] if there else np.zeros(shapes[name], np.float32)

        factors: dict[tuple[str, ...], list[np.ndarray]] = {}
        for slot in self.slots:  # a stack's layers come in order
            factors.setdefault(slot.path, []).append(read(slot, get))

        def of(keys: Any, info: Any) -> Any:
            path = tuple(str(key.key) for key in keys)
            if not isinstance(info, LowRank):
                return None
            parts: dict[str, Any] = {
                part: np.stack(found) if path[0] == "segments" else found[0]
                for part in "abm"
                if (found := factors.get((*path, part))) is not None
            }
            return replace(info, w=None, **parts)

        infos = adapters.info(model.info)
        return jax.tree_util.tree_map_with_path(of, infos, is_leaf=lambda x: isinstance(x, LowRank))
