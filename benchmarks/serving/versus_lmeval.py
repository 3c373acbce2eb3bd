"""Requests per second of our scorer and of lm-evaluation-harness's own model, on the same weights.

    make torch-env smollm2 eval-data
    python -m benchmarks.serving.versus_lmeval  # SmolLM2-135M, float32, on PIQA, ARC-E and HellaSwag

Both answer the same (context, continuation) pairs through the harness's `loglikelihood`, each in a process of
its own, one after the other: without examples, and behind five, the same for each document of a task. The
ratio of processor seconds holds on a machine that others use too. Beside it stands whether both agree: sums
of log-probabilities in nats, and whether a continuation is the greedy one.
"""

import json
import os
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from benchmarks import measure
from benchmarks.measure import ROOT, arguments, publish
from benchmarks.versus_torch import TORCH_PYTHON, torch_python

TASKS = ("piqa/rc_{}shot", "arc_easy/rc_{}shot", "hellaswag/rc_{}shot")
SHOTS = {0: 1, 5: 5}  # examples, and how many times fewer documents: each is so much longer
GGUF = ROOT / ".cache/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
BATCH = 8  # of the harness's model


def answer(kind: str, name: str) -> None:
    """Answer the pairs of a folder, and write answers and seconds there; in the peer's environment."""
    folder, source = Path(name), f"{name}/model"
    os.environ |= {"HF_HOME": str(folder / "hub"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    from lm_eval.api.instance import Instance

    asked = json.loads((folder / "pairs.json").read_text("utf-8"))
    if kind == "ours":
        from configs.groups import mesh_rules
        from evaluation.harness import harness_model
        from serving.generator import Generator
        from training.opening.opened import open_published

        opened = open_published(source, mesh_rules(), precision="float32")
        model = harness_model(Generator(*opened.trained), opened.tokenizer, add_bos=False)
    else:
        from lm_eval.models.huggingface import HFLM

        model = HFLM(pretrained=source, device="cpu", dtype="float32", batch_size=BATCH, add_bos_token=False)
    said = {}
    for shots, pairs in asked.items():
        requests = [
            Instance(request_type="loglikelihood", doc={}, arguments=tuple(pair), idx=i)
            for i, pair in enumerate(pairs)
        ]
        for _ in range(2):  # the first compiles, or warms up
            begin, cpu = time.perf_counter(), time.process_time()
            found = model.loglikelihood(requests, disable_tqdm=True)
            took = time.perf_counter() - begin, time.process_time() - cpu
        said[shots] = {"answers": found, "seconds": took[0], "processor": took[1]}
    (folder / f"{kind}.json").write_text(json.dumps(said), "utf-8")


def pairs_of(limit: int, shots: int) -> list[tuple[str, str]]:
    """What is asked: of each task the first documents, a pair for each of their continuations."""
    from evaluation.olmo import fetch, read_olmo

    tasks = [task.format(shots) for task in TASKS]
    found = [request for task in tasks for request in islice(read_olmo(fetch(), task), limit)]
    return [pair for request in found for pair in request.pairs()]


def export_published(source: Path, output: Path) -> None:
    """Published weights as a directory that transformers opens, in float32."""
    import jax

    from configs.groups import mesh_rules
    from interop.write import export, reader
    from training.opening.opened import open_published

    opened = open_published(str(source), mesh_rules(), precision="float32")
    model, params, *_ = opened.trained
    beside = opened.tokenizer_path.parent
    files = {path.name: path.read_bytes() for path in beside.iterdir() if path.name.startswith("tokenizer")}
    export(output, model.config, model, reader(jax.device_get(params)), files=files)


@measure.guarded
def main(argv: Sequence[str]) -> int:
    """Measure, print and write; the exit status."""
    asked = arguments("versus_lmeval", __doc__, "versus_lmeval", documents=(40, "of each task")).parse_args(
        argv
    )
    python = torch_python(os.environ.get(TORCH_PYTHON))
    pairs = {shots: pairs_of(-(-asked.documents // fewer), shots) for shots, fewer in SHOTS.items()}
    said: dict[str, Any] = {}
    with TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "pairs.json").write_text(json.dumps(pairs), "utf-8")
        export_published(GGUF, folder / "model")
        for kind in ("ours", "theirs"):
            # Ours needs what it is made of beside the harness.
            path = [str(ROOT), *([sysconfig.get_paths()["purelib"]] if kind == "ours" else [])]
            call = f"from {__spec__.name} import answer; answer({kind!r}, {name!r})"
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
            subprocess.run([str(python), "-c", call], cwd=ROOT, check=True, env=environment)
            said[kind] = json.loads((folder / f"{kind}.json").read_text("utf-8"))
    rows = [_row(shots, said["ours"][str(shots)], said["theirs"][str(shots)]) for shots in SHOTS]
    publish(
        {
            "title": f"Scoring SmolLM2-135M in float32, HFLM with batches of {BATCH}",
            "machine": measure.describe_machine(),
            "workload": {"tasks": list(TASKS)},
            "table": rows,
        },
        asked,
    )
    return 0


def _row(shots: int, ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    sums, greedy = (
        [np.array([answer[i] for answer in side["answers"]]) for side in (ours, theirs)] for i in (0, 1)
    )
    count = len(ours["answers"])
    return {
        "examples": shots,
        "requests": count,
        "ours, requests/s": count / ours["seconds"],
        "HFLM, requests/s": count / theirs["seconds"],
        "over HFLM": theirs["seconds"] / ours["seconds"],
        "in processor seconds": theirs["processor"] / ours["processor"],
        "largest difference, nats": float(np.max(np.abs(sums[0] - sums[1]))),
        "same greedy, %": 100 * float(np.mean(greedy[0] == greedy[1])),
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
