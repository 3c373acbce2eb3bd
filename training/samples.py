"""What a run writes at its end: text after each prompt, and how much of it is Python.

All processes draw it together, on the mesh that they trained on and with the weights where they lie; the
primary writes the files.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from artifacts.load import LATEST, LoadedRun
from data.tokens.tokenizer import Tokenizer
from models.ops import Ops
from models.transformer import Model, build_model
from parallel.axes import Layout
from parallel.config import MeshConfig
from parallel.mesh import build_layout
from serving.generator import Generator
from serving.python_share import parse_share
from serving.text import complete
from training.config import Config, TrainingConfig, with_vocab
from training.initial_weights import PublishedParent
from training.program import Program, build_ops
from training.state import is_info

# After two blank lines, as a function at the top level stands in a file: at the very start of one the model
# expects a docstring, and writes a method.
PYTHON_PROMPT = "\n\n\ndef "


def trained_model(
    run: LoadedRun[Config],
    tokenizer_size: int,
    *,
    fsdp: int = 1,
    tensor: int = 1,
    step: str = LATEST,
    weights: str = "raw",
) -> tuple[Model, Any, Ops, Layout]:
    """What a `Generator` is made of: a run's model and verified parameters, over the first devices.

    Raises ValueError where there is no such checkpoint or not so many devices, RunFault where it is damaged.
    """
    config = with_vocab(run.config, tokenizer_size)
    model, abstract, layout = _over_devices(config, fsdp, tensor)
    params = run.weights(abstract, step=step, weights=weights, mean_of=config.checkpoint.average_last)
    return model, params, build_ops(config, layout), layout


def published_model(
    parent: PublishedParent,
    rules: dict[str, list[str]],
    *,
    fsdp: int = 1,
    tensor: int = 1,
    precision: str = "auto",
) -> tuple[Model, Any, Ops, Layout]:
    """The same of weights that others publish, split by these rules of a mesh; ValueError as above."""
    training, mesh = TrainingConfig(precision=precision), MeshConfig(rules=rules)
    config = Config(model=parent.published.config, training=training, mesh=mesh)
    model, abstract, layout = _over_devices(config, fsdp, tensor)
    return model, parent.weights(abstract, model), build_ops(config, layout), layout


def _over_devices(config: Config, fsdp: int, tensor: int) -> tuple[Model, Any, Layout]:
    wanted = f"fsdp={fsdp} tensor={tensor}" if fsdp > 1 else f"tensor={tensor}"
    if fsdp * tensor > len(jax.devices()):
        raise ValueError(f"{wanted} is more than the {len(jax.devices())} devices here; use fewer")
    mesh = MeshConfig(data=1, fsdp=fsdp, tensor=tensor, rules=config.mesh.rules)
    layout = build_layout(mesh, jax.devices()[: fsdp * tensor])
    model = build_model(config.model)
    abstract = jax.tree.map(
        lambda info, sharding: jax.ShapeDtypeStruct(info.shape, info.dtype, sharding=sharding),
        model.info,
        layout.tree(model.info, is_info),
        is_leaf=is_info,
    )
    return model, abstract, layout


def draw_samples(
    program: Program, params: Any, tokenizer: Tokenizer, config: Config
) -> tuple[list[str], list[bool]]:
    """The texts that `config.sample` asks for, and whether the model itself ended each.

    Those of its prompts first, then the Python snippets. All processes call it together.
    """
    generator = Generator(program.model, program.to_canonical(params), program.ops, program.layout)
    settings = config.sample
    count, snippets = len(settings.prompts), settings.parse_snippets
    prompts = [*settings.prompts, *[PYTHON_PROMPT] * snippets]
    numbers = [*range(count), *range(snippets)]  # each kind by itself: neither changes the other
    return complete(generator, tokenizer, prompts, settings, config.seed, numbers)


def write_samples(
    texts: Sequence[str], ended: Sequence[bool], config: Config, run_dir: Path
) -> dict[str, Any]:
    """Write `samples/STEP.txt` (and `STEP.python.txt`) under `run_dir`; return figures for the summary.

    texts, ended: from `draw_samples`. Figures: `sample_text`, and with `sample.parse_snippets` also
    `parse_share` in [0, 1], `parse_passed`, `parse_total`.
    """
    count, step = len(config.sample.prompts), config.training.num_steps
    folder = run_dir / "samples"
    folder.mkdir(exist_ok=True)
    figures: dict[str, Any] = {}
    if count:
        _write(folder / f"{step}.txt", texts[:count])
        figures["sample_text"] = texts[0]
    if config.sample.parse_snippets:
        python = [text.lstrip("\n") for text in texts[count:]]
        _write(folder / f"{step}.python.txt", python)
        share, passed, total = parse_share(python, ended[count:])
        figures |= {"parse_share": share, "parse_passed": passed, "parse_total": total}
    return figures


def _write(path: Path, texts: Sequence[str]) -> None:
    path.write_text("\n\n".join(f"--- {i}\n{text}" for i, text in enumerate(texts)) + "\n", "utf-8")
