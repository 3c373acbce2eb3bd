"""The same tasks through lm-evaluation-harness: a run of ours, or a directory in its own HFLM.

python tests/evaluation/harness_oracle.py ours RUN FOLDER BOS SITE
python tests/evaluation/harness_oracle.py theirs DIRECTORY FOLDER BOS

FOLDER has tasks as YAML and data as JSON; answers go there, to NAME-BOS.json. SITE: our requirements, where
the environment that has lm-eval lacks them.
"""

import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def ours(run: str, bos: bool):
    """A run, as scripts open one."""
    from artifacts.load import load
    from data.tokens.tokenizer import load_tokenizer
    from evaluation.harness import harness_model
    from serving.generator import Generator
    from training.config import from_stored
    from training.opening.opened import trained_model

    loaded = load(run, from_stored)
    tokenizer = load_tokenizer(loaded.path / "tokenizer.json")
    return harness_model(Generator(*trained_model(loaded, tokenizer.vocab_size)), tokenizer, add_bos=bos)


def theirs(directory: str, bos: bool):
    """The harness's own model over transformers, in float32."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=directory, device="cpu", dtype="float32", batch_size=3, add_bos_token=bos)


def main(kind: str, source: str, folder: Path, bos: bool) -> None:
    """Evaluate, and write what was answered, document by document."""
    os.environ |= {"HF_HOME": str(folder / "hub"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    model = (ours if kind == "ours" else theirs)(source, bos)
    tasks = sorted(path.stem for path in folder.glob("*.yaml") if not (bos and path.stem == "rolling"))
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    found = simple_evaluate(
        model=model, tasks=tasks, task_manager=manager, bootstrap_iters=0, log_samples=True
    )
    samples = {
        task: [one["filtered_resps"] for one in sorted(rows, key=lambda one: one["doc_id"])]
        for task, rows in found["samples"].items()
    }
    about = {"max_length": model.max_length, "eot": model.eot_token_id, "prefix": model.prefix_token_id}
    text = json.dumps({"samples": samples, "results": found["results"], "about": about}, default=str)
    (folder / f"{kind}-{bos}.json").write_text(text)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.path.extend(sys.argv[5:])
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), sys.argv[4] == "True")
