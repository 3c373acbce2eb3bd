"""Everything that is to be measured on a GPU, by one command; see benchmarks/README.md for what it expects.

    make torch-env && python -m benchmarks.gpu        # about half an hour on one H100 or H200
    python -m benchmarks.gpu --only 124m,fp8          # a part of it
    python -m benchmarks.gpu --list                   # what it would run

Each part is a command that can be run alone. A part that fails is named at the end, and the others still run.
"""

import argparse
import subprocess
import sys
from collections.abc import Sequence

from benchmarks import versus_torch
from benchmarks.measure import ROOT, guarded

Command = tuple[str, ...]  # a module of benchmarks/ and its words
VERSUS = ("versus_torch", "--threads", "0", "--rounds", "15", "--steps", "20", "--warmup", "5")
AGAINST_TORCH = (*VERSUS, "--variants", "jax:bfloat16,compile:bfloat16")


def step(shape: str, name: str, *flags: str) -> Command:
    """`benchmarks/step.py` on a shape of `versus_torch`, in bfloat16."""
    words = (*versus_torch.COMMON, *versus_torch.SHAPES[shape], "training.precision=bfloat16")
    return ("step", *words, f"run.name={shape}", "--unpacked", "--steps", "50", "--name", name, *flags)


# Through the compile cache; the second time everything is in it.
WARM = step("124m", "warm_124m_gpu", "--cache", "run.compile_cache=.cache/xla")
# Part -> the commands, in order. Targets on one H200: 450k tokens/s at 124M; 52 % MFU (full attention) at
# 1.34B; each 1.1 times PyTorch; a first step within 15 s with a warm cache.
PARTS: dict[str, tuple[Command, ...]] = {
    "124m": (
        step("124m", "step_124m_gpu"),
        (*AGAINST_TORCH, "--shape", "124m", "--name", "versus_124m_gpu"),
    ),
    "1.34b": (
        step("1.34b", "step_1b_gpu", "training.global_batch_size=16"),
        (*AGAINST_TORCH, "--shape", "1.34b", "--name", "versus_1b_gpu"),
    ),
    "fp8": ((*VERSUS, "--variants", "jax:bfloat16,jax:fp8", "--shape", "1.34b", "--name", "fp8_1b_gpu"),),
    "plans": (("planner", "predicted", "--hardware", "h200"),),
    "warm": (WARM, WARM),
    "kernels": (
        (
            *("kernels", "--precision", "bfloat16", "--rows", "8", "--length", "2048", "--heads", "16"),
            *("--kv-heads", "16", "--size", "128", "--vocab", "50304", "--chunk", "8192"),
            *("--name", "kernels_gpu"),
        ),
    ),
}


@guarded
def main(argv: Sequence[str]) -> int:
    """Run the parts and rewrite the tables; 0 where all went well, 1 where one did not, 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--only", default=",".join(PARTS), help="parts, comma-separated")
    parser.add_argument("--list", action="store_true", help="print the commands, run none")
    asked = parser.parse_args(argv)
    chosen = asked.only.split(",")
    if unknown := [part for part in chosen if part not in PARTS]:
        raise ValueError(f"--only={unknown[0]} is no part; use {', '.join(PARTS)}")
    commands = [command for part in chosen for command in PARTS[part]]
    if asked.list:
        print("\n".join(f"python -m benchmarks.{' '.join(command)}" for command in commands))
        return 0
    versus_torch.torch_python()
    # Asked of another process: a GPU that this one held would lack memory for those it starts.
    code = "import jax, sys; sys.exit(jax.default_backend() != 'gpu')"
    if subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode:
        raise ValueError("JAX sees no GPU here; install it with pip install -e '.[cuda]'")
    failed = [command for command in [*commands, ("table",)] if run(command)]
    for command in failed:
        print(f"FAILED: python -m benchmarks.{' '.join(command)}", file=sys.stderr)
    return 1 if failed else 0


def run(command: Command) -> int:
    """Run a command in a process of its own; its exit status."""
    module, *words = command
    print(f"=== {' '.join(command)}", flush=True)
    return subprocess.run(
        [sys.executable, "-m", f"benchmarks.{module}", *words], cwd=ROOT, check=False
    ).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
