"""What a run writes at its end, by the primary alone: text after each prompt, and how much of it is Python.

The weights are gathered array by array, so the peak on every device is the largest array whole, and on the
primary's first device the whole model in float32. A model that does not fit there is not gathered.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from artifacts.load import LATEST, LoadedRun
from data.tokens.tokenizer import Tokenizer
from models.ops import Ops
from models.transformer import Model, build_model
from parallel import processes
from parallel.config import MeshConfig
from parallel.mesh import build_layout
from serving.python_share import parse_share
from serving.text import complete
from training.config import Config, with_vocab
from training.program import Program, build_ops, build_program
from training.state import is_info

ROOM = 0.8  # of what is free on a device; the rest is for the caches of generation
# After two blank lines, as a function at the top level stands in a file: at the very start of one the model
# expects a docstring, and writes a method.
PYTHON_PROMPT = "\n\n\ndef "


def on_one_device(program: Program, config: Config, params: Any) -> tuple[Program, Any]:
    """(program, parameters) on the primary's first device; the parameters are None elsewhere.

    All processes call it together. None everywhere, and a line that says so, where the device is too small.
    """
    params = program.to_canonical(params)
    needed = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    if not processes.from_primary("room for the samples", lambda: _fits(needed)):
        return program, None
    device = jax.local_devices()[0]
    whole = jax.jit(lambda x: x, out_shardings=program.layout.replicated())
    primary = processes.is_primary()

    def gather(leaf: jax.Array) -> Any:
        everywhere = whole(leaf)
        here = np.asarray(everywhere.addressable_data(0)) if primary else None
        everywhere.delete()
        return jax.device_put(here, device) if primary else None

    gathered = jax.tree.map(gather, params)
    if not primary:
        return program, None
    return single(config, device), gathered


def single(config: Config, device: Any) -> Program:
    """The same model's program on one device, layers as checkpoints have them."""
    mesh = MeshConfig(data=1, rules=config.mesh.rules)
    return build_program(replace(config, mesh=mesh), build_layout(mesh, [device]))


def trained_model(
    run: LoadedRun[Config], tokenizer_size: int, *, tensor: int = 1, step: str = LATEST, weights: str = "raw"
) -> tuple[Model, Ops, Any]:
    """(model, operations, verified parameters) of a run's checkpoint, over the first `tensor` devices here.

    Raises ValueError where there is no such checkpoint or not so many devices, RunFault where it is damaged.
    """
    if tensor > len(jax.devices()):
        raise ValueError(f"tensor={tensor} is more than the {len(jax.devices())} devices here; use fewer")
    config = with_vocab(run.config, tokenizer_size)
    mesh = MeshConfig(data=1, tensor=tensor, rules=config.mesh.rules)
    layout = build_layout(mesh, jax.devices()[:tensor])
    model = build_model(config.model)
    abstract = jax.tree.map(
        lambda info, sharding: jax.ShapeDtypeStruct(info.shape, info.dtype, sharding=sharding),
        model.info,
        layout.tree(model.info, is_info),
        is_leaf=is_info,
    )
    params = run.weights(abstract, step=step, weights=weights, mean_of=config.checkpoint.average_last)
    return model, build_ops(config, layout), params


def _fits(needed: int) -> bool:
    stats = jax.local_devices()[0].memory_stats() or {}
    free = stats.get("bytes_limit", np.inf) - stats.get("bytes_in_use", 0)
    if needed <= ROOM * free:
        return True
    print(
        f"no samples: the model's {needed / 2**30:.1f} GiB are more than the {free / 2**30:.1f} GiB free "
        "on one device; use scripts/generate.py with tensor=N"
    )
    return False


def write_samples(
    program: Program, params: Any, tokenizer: Tokenizer, config: Config, run_dir: Path
) -> dict[str, Any]:
    """Write `samples/STEP.txt` (and `STEP.python.txt`) under `run_dir`; return figures for the summary.

    Figures: `sample_text`, and with `sample.parse_snippets` also `parse_share` in [0, 1], `parse_passed`,
    `parse_total`.
    """
    settings, step = config.sample, config.training.num_steps
    folder = run_dir / "samples"
    folder.mkdir(exist_ok=True)
    figures: dict[str, Any] = {}
    count, snippets = len(settings.prompts), settings.parse_snippets
    prompts = [*settings.prompts, *[PYTHON_PROMPT] * snippets]
    numbers = [*range(count), *range(snippets)]  # each kind by itself: neither changes the other
    texts, ended = complete(
        program.model, params, program.ops, tokenizer, prompts, settings, config.seed, numbers
    )
    if count:
        _write(folder / f"{step}.txt", texts[:count])
        figures["sample_text"] = texts[0]
    if snippets:
        python = [text.lstrip("\n") for text in texts[count:]]
        _write(folder / f"{step}.python.txt", python)
        share, passed, total = parse_share(python, ended[count:])
        figures |= {"parse_share": share, "parse_passed": passed, "parse_total": total}
    return figures


def _write(path: Path, texts: Sequence[str]) -> None:
    path.write_text("\n\n".join(f"--- {i}\n{text}" for i, text in enumerate(texts)) + "\n", "utf-8")
