"""What a record of conversations holds, by `data.format`: one answer, two to choose between, or a judged one.

    chat        {"messages": [...]}, or ShareGPT's `conversations`
    completion  {"prompt", "completion"}: as `chat`, without the frame of turns
    pairs       {"prompt" | "messages", "chosen", "rejected"}: the better answer and the worse one
    labels      {"prompt" | "messages", "completion", "label"}: an answer, and whether it was wanted

A prompt is a text (the user's) or a list of messages; an answer is a text, a message, or a list of messages,
which may repeat the prompt's (as UltraFeedback's do). Each record becomes canonical JSON, so that documents
stay texts, and that becomes its conversations again, each with what its answer's tokens are marked by.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from data.errors import DataError
from data.formats import FORMS, UNWANTED, WANTED

Refuse = Callable[[str], DataError]
Check = Callable[[Mapping[str, Any]], dict[str, Any]]  # a record's conversation, checked, its keys in order


def canonical_text(record: Mapping[str, Any], form: str, checked: Check, refuse: Refuse) -> str:
    """Return a record as the JSON that its document is. Raises what `refuse` makes of a reason."""
    if form == "chat":
        return _json(checked(record), refuse)
    if form == "completion" and "messages" in record:
        return _json(checked(record), refuse)
    prompt = record.get("prompt", record.get("messages"))
    if prompt is None:
        raise refuse(f"has no prompt ({FORMS[form]})")
    answers = {
        key: record.get(key) for key in (("chosen", "rejected") if form == "pairs" else ("completion",))
    }
    for key, answer in answers.items():
        if not answer or not isinstance(answer, str | Mapping | Sequence):
            raise refuse(f"has no {key} ({FORMS[form]})")
    said = {
        key: checked({**record, "messages": _turns(prompt, "user", answer)})
        for key, answer in answers.items()
    }
    if form == "completion":
        return _json(said["completion"], refuse)
    if form == "labels":
        if not isinstance(record.get("label"), bool):
            raise refuse(f"has label {record.get('label')!r}, where true or false belongs")
        return _json({**said, "label": record["label"]}, refuse)
    return _json(said, refuse)


def _turns(prompt: Any, role: str, answer: Any) -> list[Any]:
    """The messages of a prompt and its answer, the prompt's not twice."""
    asked = [{"role": role, "content": prompt}] if isinstance(prompt, str) else list(prompt)
    if isinstance(answer, str):
        return [*asked, {"role": "assistant", "content": answer}]
    replied = [answer] if isinstance(answer, Mapping) else list(answer)
    return replied if replied[: len(asked)] == asked else [*asked, *replied]


def _json(value: Mapping[str, Any], refuse: Refuse) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
        text.encode()
    except TypeError as error:  # a whole number too long for Python, or a date of parquet's
        raise refuse(f"has what cannot be written as JSON ({error})") from None
    except UnicodeEncodeError:  # "\ud800" is legal JSON but no character
        raise refuse("has half a surrogate pair") from None
    return text


def conversations(document: Mapping[str, Any], form: str) -> list[tuple[Mapping[str, Any], int]]:
    """Return the conversations of a canonical record, each with the mark of its last answer's tokens."""
    if form == "pairs":
        return [(document["chosen"], WANTED), (document["rejected"], UNWANTED)]
    if form == "labels":
        return [(document["completion"], WANTED if document["label"] else UNWANTED)]
    return [(document, WANTED)]


def said_in(document: Mapping[str, Any]) -> Iterable[str]:
    """Yield what is said in a canonical record, for a tokenizer to be trained on."""
    parts = [part for part in document.values() if isinstance(part, Mapping)]
    for part in parts or [document]:
        yield from (f"{m['role']}\n{m['content']}" for m in part["messages"])
