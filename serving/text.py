"""Text in and text out: a prompt becomes tokens, the model goes on, and the tokens become text again."""

from collections.abc import Sequence

from data.tokens.tokenizer import Tokenizer
from serving.config import SampleConfig
from serving.generator import Generator
from serving.sampling import Sampling, sample_keys


def complete(
    generator: Generator,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    settings: SampleConfig,
    seed: int,
    numbers: Sequence[int] | None = None,
) -> tuple[list[str], list[bool]]:
    """Each prompt with its continuation, and whether the model itself ended it.

    numbers: of the samples, 0.. by default: one with the same number, prompt and seed comes out the same.
    """
    heads = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    keys = sample_keys(seed, range(len(prompts)) if numbers is None else numbers)
    # A padded vocabulary has rows that no token owns.
    sampling = Sampling(settings.temperature, settings.top_k, vocab_size=tokenizer.vocab_size)
    tails = generator.complete(
        heads, sampling, keys, max_new_tokens=settings.max_new_tokens, stop_id=stop_id(tokenizer)
    )
    texts = [shown(tokenizer, *parts) for parts in zip(prompts, heads, tails, strict=True)]
    return texts, [len(tail) < settings.max_new_tokens for tail in tails]


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Start-of-document and the prompt's tokens; for a model that was taught turns, a user's turn.

    A space at the end is left for the model to write: in a byte-level BPE it belongs to the next word, and a
    lone space token is something the model has hardly ever seen there.
    """
    if tokenizer.chat is not None:
        return tokenizer.chat.prompt([{"role": "user", "content": prompt}])
    text = prompt[:-1] if prompt.endswith(" ") and len(prompt) > 1 else prompt
    return [tokenizer.bos_id, *(int(token) for token in tokenizer.encode(text))]


def stop_id(tokenizer: Tokenizer) -> int:
    """The token that ends a text, or an assistant's turn."""
    return tokenizer.eos_id if tokenizer.chat is None else tokenizer.chat.stop_id


def shown(tokenizer: Tokenizer, prompt: str, head: Sequence[int], tail: Sequence[int]) -> str:
    """A prompt and what the model wrote: as one text, or an answer below its question."""
    if tokenizer.chat is not None:
        return f"{prompt}\n{tokenizer.decode(tail)}"
    return tokenizer.decode([*head[1:], *tail])
