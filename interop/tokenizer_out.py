"""A tokenizer as the files of Hugging Face's layout that transformers and vLLM want beside the weights."""

import json
from typing import Any

from data.tokens.tokenizer import Tokenizer
from interop.gguf_tokenizer import framed


def hub_files(
    text: str, tokenizer: Tokenizer, template: str | None, stop_id: int | None, max_length: int
) -> dict[str, bytes]:
    """Contents by name: the tokenizer.json (its `text`), and what says its separators, template and limits.

    stop_id: what ends an assistant's turn, where that is another token than the end of a document.
    """
    bos, eos = (tokenizer.token(index) for index in (tokenizer.bos_id, tokenizer.eos_id))
    whole = json.loads(text)
    if whole.get("post_processor") is None or whole["post_processor"]["type"] == "ByteLevel":
        # Every document of a run begins with it, and nobody else would put it there.
        whole["post_processor"] = framed(bos, tokenizer.bos_id)
    ends = [tokenizer.eos_id, *([] if stop_id in (None, tokenizer.eos_id) else [stop_id])]
    about: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "pad_token": eos,
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
    }
    generation = {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": ends if len(ends) > 1 else ends[0],
        "pad_token_id": tokenizer.eos_id,
    }
    specials = {key: about[key] for key in ("bos_token", "eos_token", "pad_token")}
    files: dict[str, Any] = {
        "tokenizer.json": whole,
        "tokenizer_config.json": about,
        "special_tokens_map.json": specials,
        "generation_config.json": generation,
    }
    found = {name: json.dumps(x, indent=2, ensure_ascii=False).encode() + b"\n" for name, x in files.items()}
    if template is not None:
        found["chat_template.jinja"] = template.encode()
    return found
