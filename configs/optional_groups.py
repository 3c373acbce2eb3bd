"""Parts of a config that are null until somebody wants them, and how a command line opens one.

OmegaConf cannot set `model.moe.num_experts=16` where `model.moe` is null. So a word that sets something in
such a part comes with one that merges an empty part first: what an experiment has set there stays, all else
has its default, and `model.moe=null` closes it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import is_dataclass
from typing import Any, get_args, get_type_hints

from hydra.core.config_store import ConfigStore

from configs.text_words import as_typed

GROUP = "_room"  # of the words that open; nobody types them


def optional_rooms(room: type, prefix: str = "") -> Iterator[str]:
    """Keys of the dataclasses in a dataclass that may be null, such as `model.moe`."""
    for name, kind in get_type_hints(room).items():
        for part in (kind, *get_args(kind)):
            if is_dataclass(part):
                if type(None) in get_args(kind):
                    yield prefix + name
                yield from optional_rooms(part, f"{prefix}{name}.")  # type: ignore[arg-type]


def register_rooms(root: type) -> None:
    """Put what opens each part in Hydra's store."""
    for key in optional_rooms(root):
        node: dict[str, Any] = {}
        for name in reversed(key.split(".")):
            node = {name: node}
        ConfigStore.instance().store(group=GROUP, name=key, node=node, package="_global_")


def opened(words: Sequence[str], root: type) -> list[str]:
    """The overrides of a command as Hydra is told them: text as it was typed, behind a word that opens the
    parts of `root` that they set something in.
    """
    words, wanted = as_typed(words, root), []
    for key in optional_rooms(root):
        for word in words:
            name, _, value = word.lstrip("+").partition("=")
            if name.startswith(f"{key}.") or (name == key and value.lstrip().startswith("{")):
                wanted.append(key)
                break
    return [f"+{GROUP}=[{','.join(wanted)}]", *words] if wanted else words
