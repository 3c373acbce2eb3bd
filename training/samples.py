"""What a run writes at its end: text after each prompt, and how much of it is Python.

All processes draw it together, on the mesh that they trained on and with the weights where they lie; the
primary writes the files.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.tokens.tokenizer import Tokenizer
from serving.generator import Generator
from serving.python_share import parse_share
from serving.text import complete
from training.config import Config
from training.program import Program

# After two blank lines, as a function at the top level stands in a file: at the very start of one the model
# expects a docstring, and writes a method.
PYTHON_PROMPT = "\n\n\ndef "


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
