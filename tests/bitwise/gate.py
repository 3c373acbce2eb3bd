"""Programs and losses against those that are committed: `make test-bitwise`, the gate of every refactor.

Each case is a command line. Its step and its evaluation are lowered, and the sha256 of their text, with
symbol names normalized, is compared with `golden.json`: seconds a case, and it says whether the mathematics
is the same. Then ten steps are run, and their losses and gradient norms compared as hexadecimal floats: that
says whether the numbers are. Programs depend on the version of JAX, numbers on the kind of processor too, so
each is kept by that name; of a kind that is not there nothing is compared, and the gate says so.

    python -m tests.bitwise.gate              compare; exit status 1 where anything differs
    python -m tests.bitwise.gate --only moe   the cases whose name contains a word
    python -m tests.bitwise.gate --programs   without the steps
    python -m tests.bitwise.gate --part 1/3   steps of that part of the cases alone
    python -m tests.bitwise.gate --write      record what is here as golden, where a change is meant to be one
"""

import argparse
import hashlib
import json
import math
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # compiled as anybody's, unlike in the suite, and before jax reads them
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import jaxlib
import numpy as np

from parallel.config import MESH_AXES
from parallel.mesh import build_layout
from tests.configs.composing import config as composed
from tests.parallel.small import packed_batch
from tests.parts import part_of, read_part
from training.program import Program, build_program
from training.state import shardings
from training.step import make_eval_step

GOLDEN = Path(__file__).with_name("golden.json")
STEPS, ROWS, LENGTH, VOCAB = 10, 8, 32, 384
SHAPE = (
    f"training.num_steps={STEPS}",
    f"training.global_batch_size={ROWS}",
    f"data.seq_len={LENGTH}",
    f"model.vocab_size={VOCAB}",
    "training.loss_chunk=64",
    "schedule.warmup_steps=2",
    "mesh.data=1",
)
DENSE = ("+experiment=debug", *SHAPE)
MOE = ("+experiment=debug_moe", *SHAPE)
DEEP = (*DENSE, "model.num_layers=4", "mesh.pipeline=2", "pipeline.microbatches=4")
CASES: dict[str, tuple[str, ...]] = {
    "dense": DENSE,
    "gpt2": (
        *DENSE,
        "model.norm=layernorm",
        "model.position=learned",
        "model.bias=true",
        "model.activation=gelu",
        "training.remat=full",
        "training.scan_layers=false",
    ),
    "gemma": (
        *DENSE,
        "model.window=8",
        "model.window_pattern=[local,global]",
        "model.qk_norm=true",
        "model.post_norms=true",
        "model.norm_unit_offset=true",
        "model.activation=geglu",
        "model.embed_scale=true",
        "model.rope_local_theta=1000",
        "model.attention_softcap=50",
        "model.logit_softcap=30",
        "training.z_loss=0.001",
    ),
    "chunked_attention": (*DENSE, "training.attention=chunked", "training.remat=dots"),
    "moe_mla_mtp": MOE,
    "moe_capacity_experts": (*MOE, "model.moe.dispatch=capacity", "mesh.expert=2", "mesh.data=2"),
    "adamw_bf16_moments": (*DENSE, "optim.moment_dtype=bfloat16"),
    "muon_bf16_moments": (*DENSE, "optim=muon", "optim.moment_dtype=bfloat16"),
    "guard_ema": (*DENSE, "guard.skip_sigma=6", "training.ema_decay=0.99"),
    "accumulation": (*DENSE, "training.accumulation_steps=2", "training.remat=attention"),
    "gpipe": (*DEEP, "pipeline.schedule=gpipe"),
    "1f1b": DEEP,
    "interleaved": (*DEEP, "pipeline.schedule=interleaved_1f1b", "pipeline.virtual_stages=2"),
    "zero_bubble": (*DEEP, "pipeline.schedule=zero_bubble"),
    "moe_pipeline": (*MOE, "mesh.pipeline=2", "pipeline.microbatches=4"),
    "ring_zigzag": (*DENSE, "mesh.context=2", "context.attention=ring"),
    "ulysses": (*DENSE, "mesh.context=2", "training.attention=chunked"),
    "fsdp_tensor": (*DENSE, "mesh.fsdp=2", "mesh.tensor=2", "optim=muon"),
    "hybrid": ("+experiment=debug", "model=hybrid_debug", *SHAPE, "model.num_layers=4", "mesh.tensor=2"),
    "local_sgd": (*DENSE, "mesh.replica=2", "local_sgd.inner_steps=2", "local_sgd.exchange=int8"),
    "fp8": (*DENSE, "training.precision=fp8"),
    "int8": (*DENSE, "training.precision=int8"),
    "bfloat16": (*DENSE, "training.precision=bfloat16"),
}


def processor() -> str:
    """The kind of processor as its maker numbers it; code that XLA generates depends on it."""
    try:
        text = Path("/proc/cpuinfo").read_text("utf-8")
    except OSError:
        return "unknown"
    found = [
        re.search(rf"^{key}\s*: (.*)$", text, re.MULTILINE) for key in ("vendor_id", "cpu family", "model")
    ]
    return ", ".join(match.group(1) for match in found if match) or "unknown"


def program_of(words: tuple[str, ...]) -> Program:
    """The program of a command line, on as many devices as its mesh asks for."""
    config = composed(*words)
    devices = math.prod(getattr(config.mesh, axis) for axis in MESH_AXES)
    return build_program(config, build_layout(config.mesh, jax.devices()[:devices]))


def normalized(text: str) -> str:
    """A lowered program without what only names things: functions in order of appearance, no result paths."""
    names: dict[str, str] = {}
    text = re.sub(r'jax\.result_info = "[^"]*"', "", text)
    text = re.sub(r"^module @\S+", "module", text)
    return re.sub(r'@(?:[A-Za-z0-9_.$-]+|"[^"]*")', lambda m: names.setdefault(m[0], f"@f{len(names)}"), text)


def fingerprint(program: Program) -> str:
    """sha256 of the step's and the evaluation's text."""
    evaluate = make_eval_step(program.model, program.strategy, program.ops)
    batch, digest = program.batch, hashlib.sha256()
    for step, first in ((program.train_step, program.state), (evaluate, program.state.params)):
        jitted = jax.jit(step, in_shardings=(shardings(first), shardings(batch)))
        digest.update(normalized(jitted.lower(first, batch).as_text()).encode())
    return digest.hexdigest()


def figures(program: Program) -> list[str]:
    """Loss and gradient norm of each step, then the evaluation's sum, as hexadecimal floats."""
    step, state, found = program.compile_train(), program.init_state(0), []
    for number in range(STEPS):
        batch: Any = jax.device_put(packed_batch(number, ROWS, LENGTH, VOCAB), shardings(program.batch))
        state, metrics = step(state, batch)
        found += [float(np.asarray(metrics[name]).ravel()[0]).hex() for name in ("loss", "grad_norm")]
    sums = program.compile_eval()(
        state.params, jax.device_put(packed_batch(99, ROWS, LENGTH, VOCAB), shardings(program.batch))
    )
    return [*found, float(sums["nll"]).hex()]


def compare(golden: dict[str, Any], kind: str, name: str, value: Any, *, write: bool) -> str:
    """`equal`, `DIFFERS`, `written` or `no golden` for a value of a case."""
    known = golden.setdefault(kind, {})
    if write:
        known[name] = value
        return "written"
    if name not in known:
        return "no golden"
    return "equal" if known[name] == value else "DIFFERS"


def main(argv: list[str] | None = None) -> int:
    """Compare, or write, and print a line a case."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--programs", action="store_true", help="lower, and run no step")
    parser.add_argument("--part", type=read_part, help="run the steps of the K-th of N parts of the cases")
    parser.add_argument("--write", action="store_true", help="record as golden")
    args = parser.parse_args(argv)
    golden = json.loads(GOLDEN.read_text("utf-8")) if GOLDEN.exists() else {"programs": {}, "figures": {}}
    jax_version = f"jax {jax.__version__}, jaxlib {jaxlib.__version__}"
    kind = f"{jax_version}, {processor()}, {os.cpu_count()} cores"
    print(kind)
    outcomes: list[str] = []
    for name, words in CASES.items():
        if args.only not in name:
            continue
        began = time.monotonic()
        program = program_of(words)
        outcome = [compare(golden["programs"], jax_version, name, fingerprint(program), write=args.write)]
        if not args.programs and (args.part is None or part_of(name, args.part[1]) == args.part[0]):
            outcome.append(compare(golden["figures"], kind, name, figures(program), write=args.write))
        print(
            f"{name:<24} program {' losses '.join(outcome):<28} {time.monotonic() - began:5.1f} s", flush=True
        )
        outcomes += outcome
    if args.write:
        GOLDEN.write_text(json.dumps(golden, indent=1, sort_keys=True) + "\n", "utf-8")
    counts = {word: outcomes.count(word) for word in ("equal", "written", "no golden", "DIFFERS")}
    print(", ".join(f"{count} {word}" for word, count in counts.items() if count))
    if counts["no golden"]:
        print("nothing is golden for what says so: compare the parent commit with --write on this machine")
    return 1 if counts["DIFFERS"] or not outcomes else 0


if __name__ == "__main__":
    sys.exit(main())
