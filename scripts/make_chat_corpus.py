"""Conversations about the Python standard library: `python scripts/make_chat_corpus.py chat.jsonl`.

Questions about its functions and classes, answered by their own docstrings and signatures; a second turn asks
for the signature. Real text from this machine, nothing to download; the same Python gives the same file.
Exit status: 0 done, 2 bad input.
"""

import ast
import inspect
import json
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    import command

from scripts.command import run

LONGEST = 400  # characters of an answer: a docstring's first paragraph, left out where it is longer
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def conversations(root: Path) -> Iterator[dict[str, Any]]:
    """Yield one conversation for each documented, public definition of the modules under `root`, sorted."""
    from data.sources.files import list_stdlib

    for path in list_stdlib(root):
        module = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        if any(part.startswith("_") for part in module.split(".")):
            continue
        for name, node in _definitions(path):
            answer = _first_paragraph(node)
            if answer:
                yield {"messages": _turns(f"{module}.{name}", node, answer)}


def _definitions(path: Path) -> Iterator[tuple[str, Definition]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old modules have escapes that newer Pythons complain of
        tree = ast.parse(path.read_bytes())
    for node in tree.body:
        if isinstance(node, Definition) and not node.name.startswith("_"):
            yield node.name, node
        if isinstance(node, ast.ClassDef):
            for inner in node.body:
                if isinstance(inner, Definition) and not inner.name.startswith("_"):
                    yield f"{node.name}.{inner.name}", inner


def _first_paragraph(node: Definition) -> str:
    text = inspect.cleandoc(ast.get_docstring(node) or "").split("\n\n")[0]
    return " ".join(text.split()) if 10 <= len(text) <= LONGEST else ""


def _turns(name: str, node: Definition, answer: str) -> list[dict[str, str]]:
    kind = "class" if isinstance(node, ast.ClassDef) else "function"
    turns = [_turn("user", f"What does the {kind} {name} do?"), _turn("assistant", answer)]
    if not isinstance(node, ast.ClassDef):
        call = f"def {node.name}({ast.unparse(node.args)})"
        turns += [_turn("user", "How is it called?"), _turn("assistant", call)]
    return turns


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def write_corpus(arguments: Sequence[str]) -> int:
    """Write the file that is named. Raises ValueError where it is none of conversations, OSError."""
    from data.sources.corpus import stdlib_root

    if len(arguments) != 1 or not arguments[0].endswith(".jsonl"):
        raise ValueError("give the file to write, as in: make_chat_corpus.py chat.jsonl")
    lines = [json.dumps(one, ensure_ascii=False) for one in conversations(stdlib_root())]
    Path(arguments[0]).write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{arguments[0]}: {len(lines):,} conversations")
    return 0


def main(arguments: Sequence[str]) -> int:
    """The command; its exit status."""
    return run(write_corpus, arguments, __doc__)


if __name__ == "__main__":
    command.start(main)
