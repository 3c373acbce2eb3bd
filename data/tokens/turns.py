"""Whether a model speaks in turns, and by which template: what every command that opens one asks."""

from pathlib import Path

from data.config import DataConfig, components
from data.tokens.chat import ChatEncoder
from data.tokens.chat_template import find_template, has_template
from data.tokens.tokenizer import Tokenizer

CHAT = ("auto", "true", "false")


def speaks_in_turns(data: DataConfig | None, tokenizer_path: Path) -> bool:
    """Whether a model was taught by a chat template, so that a prompt is put to it by the same.

    data: of a run, every format of which but `text` is written by one (`completion` by default by one that
    frames nothing), in a mixture any component; None for published weights, which say it by the template
    that lies beside their tokenizer.
    """
    if data is None:
        return has_template(tokenizer_path)
    parts = [part.data for part in components(data).values()] if data.mixture else [data]
    return any(part.format != "text" for part in parts)


def give_chat(
    tokenizer: Tokenizer, tokenizer_path: Path, data: DataConfig | None, chat: str = "auto"
) -> ChatEncoder | None:
    """Give the tokenizer the template that lies beside its file, or take away the one that it has.

    chat: one of `CHAT`; auto is what `speaks_in_turns` says. Returns what the tokenizer has then. Raises
    DataError where a template is wanted and there is none.
    """
    wanted = chat == "true" or (chat == "auto" and speaks_in_turns(data, tokenizer_path))
    found = ChatEncoder(tokenizer, find_template(None, tokenizer_path, tokenizer)) if wanted else None
    tokenizer.chat = found
    return found
