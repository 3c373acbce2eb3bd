"""Everything that is to be measured on a GPU, by one command; see benchmarks/README.md for what it expects.

    make torch-env && python benchmarks/gpu.py        # about half an hour on one H100 or H200
    python benchmarks/gpu.py --only 124m,fp8          # a part of it
    python benchmarks/gpu.py --list                   # what it would run

Each part is a command that can be run alone. A part that fails is named at the end, and the others still run.
"""

import argparse
import subprocess
import sys
from pathlib import Path

if __name__ == "__main__":  # found from a clone that was never installed, too
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import versus_torch

HERE = Path(__file__).resolve().parent
VERSUS = ("versus_torch.py", "--threads", "0", "--rounds", "15", "--steps", "20", "--warmup", "5")
AGAINST_TORCH = ("--variants", "jax:bfloat16,compile:bfloat16")


def step(shape: str, name: str, *flags: str) -> tuple[str, ...]:
    """`step.py` on a shape of `versus_torch.py`, in bfloat16."""
    words = (
        *versus_torch.COMMON,
        *versus_torch.SHAPES[shape],
        "training.precision=bfloat16",
        f"run.name={shape}",
    )
    return ("step.py", *words, "--unpacked", "--steps", "50", "--name", name, *flags)


def warm(shape: str, name: str) -> tuple[str, ...]:
    """The same through the compile cache; the second time everything is in it."""
    return step(shape, name, "--cache", "run.compile_cache=.cache/xla")


# Part -> the commands, in order. Targets on one H200: 450k tokens/s at 124M; 52 % MFU (full attention) at
# 1.34B; each 1.1 times PyTorch; a first step within 15 s with a warm cache.
PARTS: dict[str, tuple[tuple[str, ...], ...]] = {
    "124m": (
        step("124m", "step_124m_gpu"),
        (*VERSUS, *AGAINST_TORCH, "--shape", "124m", "--name", "versus_124m_gpu"),
    ),
    "1.34b": (
        step("1.34b", "step_1b_gpu", "training.global_batch_size=16"),
        (*VERSUS, *AGAINST_TORCH, "--shape", "1.34b", "--name", "versus_1b_gpu"),
    ),
    "fp8": ((*VERSUS, "--variants", "jax:bfloat16,jax:fp8", "--shape", "1.34b", "--name", "fp8_1b_gpu"),),
    "plans": (("predicted.py", "--hardware", "h200"),),
    "warm": (warm("124m", "warm_124m_gpu"), warm("124m", "warm_124m_gpu")),
    "kernels": (
        (
            *("kernels.py", "--precision", "bfloat16", "--rows", "8", "--length", "2048", "--heads", "16"),
            *(
                "--kv-heads",
                "16",
                "--size",
                "128",
                "--vocab",
                "50304",
                "--chunk",
                "8192",
                "--name",
                "kernels_gpu",
            ),
        ),
    ),
}


def has_gpu() -> bool:
    """Asked of another process: a GPU that this one held would lack memory for those it starts."""
    code = "import jax, sys; sys.exit(jax.default_backend() != 'gpu')"
    return subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 0


def main(argv: list[str]) -> int:
    """Run the parts and rewrite the tables; 0 where all went well, 1 where one did not, 2 without a GPU."""
    parser = argparse.ArgumentParser(
        prog="python benchmarks/gpu.py", description=str(__doc__).splitlines()[0]
    )
    parser.add_argument("--only", default=",".join(PARTS), help="parts, comma-separated")
    parser.add_argument("--list", action="store_true", help="print the commands, run none")
    asked = parser.parse_args(argv)
    chosen = asked.only.split(",")
    if unknown := [part for part in chosen if part not in PARTS]:
        print(f"error: --only={unknown[0]} is no part; use {', '.join(PARTS)}", file=sys.stderr)
        return 2
    commands = [command for part in chosen for command in PARTS[part]]
    if asked.list:
        print("\n".join(f"python benchmarks/{' '.join(command)}" for command in commands))
        return 0
    try:
        versus_torch.torch_python()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not has_gpu():
        print("error: JAX sees no GPU here; install it with pip install -e '.[cuda]'", file=sys.stderr)
        return 2
    return run_all(commands)


def run_all(commands: list[tuple[str, ...]]) -> int:
    """The commands one after another, then the tables."""
    failed = []
    for script, *words in [*commands, ("table.py",)]:
        print(f"=== {script} {' '.join(words)}", flush=True)
        if subprocess.run(
            [sys.executable, str(HERE / script), *words], cwd=HERE.parent, check=False
        ).returncode:
            failed.append(f"{script} {' '.join(words)}")
    for command in failed:
        print(f"FAILED: python benchmarks/{command}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
