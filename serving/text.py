"""What a run writes at its end: text after each prompt, and how much of its Python is Python."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from serving.generator import generate
from serving.python_share import parse_share

# After two blank lines, as a function at the top level stands in a file: at the very start of one the model
# expects a docstring, and writes a method.
PYTHON_PROMPT = "\n\n\ndef "


def write_samples(program: Any, params: Any, tokenizer: Any, config: Any, run_dir: Path) -> dict[str, Any]:
    """Write `samples/STEP.txt` (and `STEP.python.txt`) under `run_dir`; return figures for the summary.

    program: `training.program.Program`; config: the root Config. Figures: `sample_text`, and with
    `sample.parse_snippets` also `parse_share` in [0, 1], `parse_passed`, `parse_total`.
    """
    settings, step = config.sample, config.training.num_steps
    folder = run_dir / "samples"
    folder.mkdir(exist_ok=True)
    figures: dict[str, Any] = {}
    count, snippets = len(settings.prompts), settings.parse_snippets
    prompts = [*settings.prompts, *[PYTHON_PROMPT] * snippets]
    numbers = [*range(count), *range(snippets)]  # each kind by itself: neither changes the other
    texts, ended = complete(program, params, tokenizer, prompts, settings, config.seed, numbers)
    if count:
        _write(folder / f"{step}.txt", texts[:count])
        figures["sample_text"] = texts[0]
    if snippets:
        python = [text.lstrip("\n") for text in texts[count:]]
        _write(folder / f"{step}.python.txt", python)
        share, passed, total = parse_share(python, ended[count:])
        figures |= {"parse_share": share, "parse_passed": passed, "parse_total": total}
    return figures


def complete(
    program: Any,
    params: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    settings: Any,
    seed: int,
    numbers: Sequence[int] | None = None,
) -> tuple[list[str], list[bool]]:
    """Each prompt with its continuation, and whether the model itself ended it.

    numbers: of the samples, 0.. by default, see `serving.generator`.
    """
    heads = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    tails = generate(
        program.model,
        params,
        program.ops,
        heads,
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        top_k=settings.top_k,
        eos_id=stop_id(tokenizer),
        seed=seed,
        sample_ids=numbers,
        vocab_size=tokenizer.vocab_size,
    )
    texts = [shown(tokenizer, *parts) for parts in zip(prompts, heads, tails, strict=True)]
    return texts, [len(tail) < settings.max_new_tokens for tail in tails]


def encode_prompt(tokenizer: Any, prompt: str) -> list[int]:
    """Start-of-document and the prompt's tokens; for a model that was taught turns, a user's turn.

    A space at the end is left for the model to write: in a byte-level BPE it belongs to the next word, and a
    lone space token is something the model has hardly ever seen there.
    """
    if tokenizer.chat is not None:
        return tokenizer.chat.prompt([{"role": "user", "content": prompt}])
    text = prompt[:-1] if prompt.endswith(" ") and len(prompt) > 1 else prompt
    return [tokenizer.bos_id, *(int(token) for token in tokenizer.encode(text))]


def stop_id(tokenizer: Any) -> int:
    """The token that ends a text, or an assistant's turn."""
    return tokenizer.eos_id if tokenizer.chat is None else tokenizer.chat.stop_id


def shown(tokenizer: Any, prompt: str, head: Sequence[int], tail: Sequence[int]) -> str:
    """A prompt and what the model wrote: as one text, or an answer below its question."""
    if tokenizer.chat is not None:
        return f"{prompt}\n{tokenizer.decode(tail)}"
    return tokenizer.decode([*head[1:], *tail])


def _write(path: Path, texts: Sequence[str]) -> None:
    path.write_text("\n\n".join(f"--- {i}\n{text}" for i, text in enumerate(texts)) + "\n")
