"""The torch side of `benchmarks/versus_generate.py`: transformers' own `generate` on an exported directory.

    .venv-torch/bin/python -P benchmarks/torch_generation.py DIR float32|bfloat16 THREADS

Says on stdout, as a line of JSON, that it is ready; then for each line of JSON that is read, {"prompts": rows
of ids, "tokens": of each, to write}, a line with its seconds and the ids that it wrote, drawn greedily.
"""

import json
import os
import sys
import time

import torch
import transformers


def main(directory: str, precision: str, threads: str) -> None:
    """Serve over stdin and stdout."""
    answer = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is not an answer
    torch.set_num_threads(int(threads))
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, precision))
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    print(json.dumps({"ready": True, "versions": versions}), file=answer)
    for line in sys.stdin:
        asked = json.loads(line)
        prompts = torch.tensor(asked["prompts"])
        start = time.perf_counter()
        with torch.inference_mode():
            found = model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                do_sample=False,
                min_new_tokens=asked["tokens"],  # an end of text ends nothing here, nor in ours
                max_new_tokens=asked["tokens"],
                pad_token_id=0,
            )
        seconds = time.perf_counter() - start
        ids = found[:, prompts.shape[1] :].tolist()
        print(json.dumps({"seconds": seconds, "ids": ids}), file=answer)


if __name__ == "__main__":
    main(*sys.argv[1:])
