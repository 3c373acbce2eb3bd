"""What `scripts/checkpoint.py` says of checkpoints: damage, differences, weights for elsewhere.

Works on the names and types in a checkpoint's own record, so it needs no model; arrays are read some at a
time, on one device.
"""

import json
import math
import os
import shutil
import struct
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from artifacts.checkpoints.digest import differing, digests
from artifacts.checkpoints.errors import CorruptCheckpoint
from artifacts.checkpoints.files import LIST, SMALL, bad_files, read_list
from artifacts.checkpoints.manager import Checkpoints
from artifacts.checkpoints.record import state_digest
from data.tokens.tokenizer import agreeing

EXPORTED = ("config.yaml", "tokenizer.json", "tokenizer_config.json")
_KINDS = {"float32": "F32", "bfloat16": "BF16"}


def bad_parts(checkpoints: Checkpoints, step: int, scratch: Path, part: int) -> tuple[dict[str, str], str]:
    """File or array → what is wrong with it, and in words what was looked at.

    scratch: where what only the bucket has is put for the while. part: bytes of arrays read at a time.
    """
    directory = checkpoints.directory / str(step)
    if not directory.is_dir() and checkpoints.remote is not None:
        bad = checkpoints.remote.bad_files(step, scratch)
        return bad, f"{len(checkpoints.remote.listed(step))} files by sha256, in {checkpoints.remote.url}"
    try:
        listed = read_list(directory)
        bad = bad_files(directory, listed) if listed is not None else {}
        record = checkpoints.record(step)
    except CorruptCheckpoint as error:
        return {"record": str(error)}, "the record and the list of files"
    files = f"no {LIST}" if listed is None else f"{len(listed)} files by sha256"
    for names in parts(record["types"], part):
        bad |= _bad_arrays(checkpoints, step, names, record["digests"])
    return bad, f"{files}, {len(record['digests'])} arrays by digest"


def _bad_arrays(
    checkpoints: Checkpoints, step: int, names: list[str], saved: Mapping[str, int]
) -> dict[str, str]:
    try:
        found = digests(checkpoints.read(step, names))
    except CorruptCheckpoint as error:
        return {names[0] + (f" or one of {len(names) - 1} read with it" if names[1:] else ""): f"({error})"}
    return {name: "is altered (digest)" for name in differing({n: saved[n] for n in names}, found)}


def parts(types: Mapping[str, str], size: int) -> Iterator[list[str]]:
    """Names of arrays in groups of one item and of about so many bytes."""
    group: list[str] = []
    held = 0
    for name in sorted(types):
        if group and (held >= size or name.split(".")[0] != group[0].split(".")[0]):
            yield group
            group, held = [], 0
        group.append(name)
        held += num_bytes(types[name])
    if group:
        yield group


def num_bytes(kind: str) -> int:
    """Of an array, as the record writes its type: `float32[8, 16]`."""
    dtype, _, shape = kind.partition("[")
    return math.prod(json.loads(f"[{shape}")) * jnp.dtype(dtype).itemsize


@dataclass(frozen=True)
class Listing:
    """A checkpoint in a listing; `tokens` is None where the record cannot be read."""

    step: int
    num_bytes: int
    date: str
    tokens: int | None
    state: str
    damaged: bool = False


def overview(checkpoints: Checkpoints, *, quick: bool = False) -> list[Listing]:
    """Every step, oldest first, those in quarantine after them; `quick` leaves large files unread."""
    there = checkpoints.remote.steps() if checkpoints.remote is not None else []
    here = checkpoints.local_steps()
    rows = [_row(checkpoints, step, quick, step in there) for step in here]
    alone = "in the bucket alone; verify reads it"
    rows += [Listing(step, 0, "", None, alone) for step in there if step not in here]
    quarantine = checkpoints.quarantine
    apart = sorted(quarantine.iterdir()) if quarantine.is_dir() else []
    return sorted(rows, key=lambda row: row.step) + [_apart(path) for path in apart if path.name.isdecimal()]


def _row(checkpoints: Checkpoints, step: int, quick: bool, sent: bool) -> Listing:
    directory = checkpoints.directory / str(step)
    tokens = None
    try:
        tokens = checkpoints.record(step)["tokens"]
        listed = read_list(directory)
        bad = bad_files(directory, listed, SMALL if quick else None) if listed is not None else {}
        state = f"no {LIST} yet" if listed is None else f"{'small files' if quick else 'files'} verified"
        if bad:
            name, verdict = next(iter(bad.items()))
            state = f"DAMAGED: {len(bad)} files, first {name}, which {verdict}"
    except CorruptCheckpoint as error:
        bad, state = {"record": str(error)}, f"DAMAGED: {error}"
    state += ", also in the bucket" if sent else ""
    return Listing(step, *_size_and_date(directory), tokens, state, bool(bad))


def _apart(path: Path) -> Listing:
    reason = path / "REASON"
    said = reason.read_text("utf-8").strip() if reason.exists() else "no reason given"
    return Listing(int(path.name), *_size_and_date(path), None, f"quarantined: {said}")


def _size_and_date(directory: Path) -> tuple[int, str]:
    total = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    return total, time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(directory.stat().st_mtime))


Side = tuple[Checkpoints, int]


def differences(a: Side, b: Side) -> tuple[list[str], int]:
    """A line for each array that differs, and how many do not.

    Digests say which; those alone are read. The relative difference is the largest |a - b| over the largest
    magnitude in either, so that a weight near zero does not count for more than it does.
    """
    records = [checkpoints.record(step) for checkpoints, step in (a, b)]
    names = differing(*(r["digests"] for r in records))
    same = len(records[0]["digests"].keys() & records[1]["digests"].keys() - set(names))
    return [_difference(name, a, b, [r["types"].get(name) for r in records]) for name in names], same


def _difference(name: str, a: Side, b: Side, kinds: list[str | None]) -> str:
    if kinds[0] != kinds[1]:
        return f"{name}: {kinds[0] or 'absent'} and {kinds[1] or 'absent'}"
    x, y = (
        np.asarray(checkpoints.read(step, [name])[name]).astype(np.float64) for checkpoints, step in (a, b)
    )
    apart = np.abs(x - y)
    largest = max(np.abs(x).max(), np.abs(y).max())
    relative = float(apart.max() / largest) if largest > 0 else 0.0
    return f"{name}: {kinds[0]}, {np.count_nonzero(apart):,} of {x.size:,} values, relative {relative:.3g}"


def export_weights(
    run: Path, checkpoints: Checkpoints, step: int, output: Path, *, item: str, dtype: str
) -> list[str]:
    """Write verified weights as `model.safetensors` beside the run's config and tokenizer; the files' names.

    item: params or ema. Floating arrays become `dtype`. The directory gets its name when it is whole. Raises
    ValueError where it is taken or there is no such item, CorruptCheckpoint where an array is altered.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"--output={output} is there already; remove it or choose another")
    checkpoints.bring(step)
    record = checkpoints.record(step)
    types = {name: kind for name, kind in record["types"].items() if name.split(".")[0] == item}
    if not types:
        raise ValueError(
            f"step {step} has no {item}; set training.ema_decay to keep one, or take --weights=raw"
        )
    if "parent" in record or any(name.startswith("frozen.") for name in record["types"]):
        raise ValueError(
            f"step {step} has weights that do not train beside its {item}, which alone are no model; "
            f"python scripts/export.py {run.name} output=PATH writes all of them, merged"
        )
    aside = output.with_name(f".{output.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        named = {name.partition(".")[2]: kind for name, kind in types.items()}
        header = {"step": str(step), "item": item, "state_digest": state_digest(record)}
        with open(aside / "model.safetensors", "wb") as file:
            for chunk in safetensors(named, dtype, header, _verified(checkpoints, step, item, record)):
                file.write(chunk)
        written = [name for name in EXPORTED if (run / name).exists()]
        for name in written:
            shutil.copyfile(run / name, aside / name)
        if "tokenizer.json" in written:  # a run's own may be of the time when it contradicted itself
            text = (aside / "tokenizer.json").read_bytes().decode("utf-8")
            (aside / "tokenizer.json").write_bytes(agreeing(text).encode("utf-8"))
        os.replace(aside, output)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return ["model.safetensors", *written]


def _verified(checkpoints: Checkpoints, step: int, item: str, record: Mapping[str, Any]) -> Any:
    def read(name: str) -> np.ndarray:
        full = f"{item}.{name}"
        leaves = checkpoints.read(step, [full])
        if digests(leaves)[full] != record["digests"][full]:
            raise CorruptCheckpoint(f"{checkpoints.directory}/{step}: {full} is altered")
        return np.asarray(leaves[full])

    return read


def safetensors(
    types: Mapping[str, str], dtype: str, header: Mapping[str, str], read: Any
) -> Iterable[bytes]:
    """A safetensors file in pieces: 8 bytes of length, a JSON header, then the arrays one after the other.

    Written here and not by its library, which holds a whole model in memory and is one more dependency.
    types: name → type as the record has it; read(name) gives each array in its turn.
    """
    table: dict[str, Any] = {"__metadata__": dict(header)}
    end = 0
    for name in sorted(types):
        shape = json.loads("[" + types[name].partition("[")[2])
        begin, end = end, end + math.prod(shape) * jnp.dtype(dtype).itemsize
        table[name] = {"dtype": _KINDS[dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(table).encode()
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text))
    yield text
    for name in sorted(types):
        yield np.ascontiguousarray(read(name).astype(jnp.dtype(dtype))).tobytes()
