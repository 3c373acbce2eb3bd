"""What a step is made of, one by one: attention backends, matrix products by dtype and layout, the loss.

    python -m benchmarks.kernels
    python -m benchmarks.kernels --precision bfloat16 --rows 8 --length 2048 --heads 16 --size 128

All cases take turns (`measure.alternate`), and ratios to the plain one are taken round by round. Attention is
over packed documents, forward and backward; a backend that cannot do what is asked is listed with its reason.
B rows, T positions, N query heads, K key/value heads, H head size, D model, V vocabulary.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import yaml

from benchmarks import measure
from benchmarks.peak import FORMS, matmul_peak, product, results_of
from benchmarks.workload import synthetic_batch
from common.host import keep_freed_memory
from configs.groups import CONFIG_DIR
from kernels.attention import Masks, Scores
from kernels.token_losses import chunked_cross_entropy
from parallel.attention.choose import build_attention
from parallel.mesh import build_layout
from training.config import ATTENTION, Config, TrainingConfig
from training.legal.attention import documents_of
from training.program import attention_of

Timed = Callable[[], float]  # seconds of one call


def ready(function: Callable[..., Any], *arguments: Any) -> Timed:
    """Compile, run once, and give a function that times one call."""
    compiled = jax.jit(function).lower(*arguments).compile()
    jax.block_until_ready(compiled(*arguments))
    return lambda: measure.timed(lambda: jax.block_until_ready(compiled(*arguments)))


def attention_cases(asked: argparse.Namespace) -> tuple[dict[str, Timed], dict[str, str]]:
    """Forward and gradient of every backend that `training.attention` names, and why others are left out."""
    cases, refused = {}, {}
    for name in (name for name in ATTENTION if name != "auto"):  # auto is one of the others
        try:
            cases[f"attention {name}"] = attention_case(name, asked)
        except (ValueError, NotImplementedError) as error:
            refused[f"attention {name}"] = str(error).strip().splitlines()[0]
    return cases, refused


def attention_case(name: str, asked: argparse.Namespace) -> Timed:
    """One backend as the step would call it. Raises ValueError where it cannot do this."""
    rows, length, size = asked.rows, asked.length, asked.size
    batch = synthetic_batch(rows, length, 128, seed=0, packed=True)
    config = Config(training=TrainingConfig(attention=name, max_documents=int(batch["segment_ids"].max())))
    config.mesh.rules = yaml.safe_load((CONFIG_DIR / "mesh/_rules.yaml").read_text("utf-8"))["rules"]
    layout, dtype = build_layout(config.mesh, jax.devices()[:1]), jnp.dtype(asked.precision)
    backend = attention_of(config, layout, dtype).name
    attention = build_attention(backend, layout, config.context, documents_of(config))
    keys = jax.random.split(jax.random.key(0), 3)
    heads = (asked.heads, asked.kv_heads, asked.kv_heads)
    qkv = [jax.random.normal(k, (rows, length, n, size), dtype) for k, n in zip(keys, heads, strict=True)]
    positions, segments = jnp.asarray(batch["positions"]), jnp.asarray(batch["segment_ids"])

    def loss(q: Any, k: Any, v: Any) -> Any:
        out = attention(q, k, v, Masks.of_rows(positions, segments), Scores(scale=size**-0.5))
        return jnp.sum(out.astype(jnp.float32))

    return ready(jax.grad(loss, argnums=(0, 1, 2)), *qkv)


def attention_flops(asked: argparse.Namespace) -> float:
    """FLOPs of forward and backward, causal: six products over half of T x T (`Model.flops_per_token`)."""
    return 6.0 * asked.rows * asked.heads * asked.size * asked.length**2


def matmul_cases(asked: argparse.Namespace, platform: str) -> tuple[dict[str, Timed], dict[str, float]]:
    """Square products by dtype, form and result, and the operations of each."""
    edge = asked.edge or (1024 if platform == "cpu" else 8192)
    cases: dict[str, Timed] = {}
    for dtype in ("float32", "bfloat16"):
        for form in FORMS:
            for out in results_of(dtype):
                cases[f"matmul {dtype} {form} to {out.name}"] = product(form, edge, dtype, out)
    return cases, dict.fromkeys(cases, 2.0 * edge**3)


def loss_cases(asked: argparse.Namespace) -> dict[str, Timed]:
    """The loss with its gradients: ours by chunks, and the plain one that holds all logits."""
    batch = synthetic_batch(asked.rows, asked.length, asked.vocab, seed=0, packed=True)
    targets, weights = jnp.asarray(batch["targets"]), jnp.asarray(batch["loss_weights"])
    width = asked.heads * asked.size
    x = jax.random.normal(jax.random.key(0), (asked.rows, asked.length, width), jnp.dtype(asked.precision))
    table = jax.random.normal(jax.random.key(1), (asked.vocab, width)) * 0.02

    def chunked(x: Any, table: Any) -> Any:
        return chunked_cross_entropy(x, table, targets, weights, chunk=asked.chunk)[0]

    def plain(x: Any, table: Any) -> Any:
        logits = jnp.einsum("BTD,VD->BTV", x, table.astype(x.dtype), preferred_element_type=jnp.float32)
        nll = (
            jax.nn.logsumexp(logits, axis=-1)
            - jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        )
        return jnp.sum(weights * nll)

    return {
        "loss plain": ready(jax.grad(plain, argnums=(0, 1)), x, table),
        "loss chunked": ready(jax.grad(chunked, argnums=(0, 1)), x, table),
    }


def measure_kernels(asked: argparse.Namespace) -> dict[str, Any]:
    """The result: every case timed in turn, beside the fastest product of its dtype."""
    platform = jax.devices()[0].platform
    attentions, refused = attention_cases(asked)
    losses = loss_cases(asked)
    products, flops = matmul_cases(asked, platform)
    flops |= dict.fromkeys(attentions, attention_flops(asked))
    tokens, width = asked.rows * asked.length, asked.heads * asked.size
    flops |= dict.fromkeys(losses, 6.0 * tokens * width * asked.vocab)
    samples = measure.alternate(attentions | losses | products, asked.rounds)
    peaks = {dtype: matmul_peak(dtype, platform) for dtype in ("float32", "bfloat16")}
    shape = {
        key: getattr(asked, key) for key in ("rows", "length", "heads", "kv_heads", "size", "vocab", "chunk")
    }
    return {
        "title": f"Kernels in {asked.precision}: {asked.rows} x {asked.length} tokens, {asked.heads} heads "
        f"({asked.kv_heads} of keys and values) of {asked.size}, vocabulary {asked.vocab}",
        "benchmark": "kernels",
        "workload": shape | {"precision": asked.precision},
        "measurement": {"rounds": asked.rounds},
        "seconds": {name: measure.summary(values) for name, values in samples.items()},
        "matmul_peak": peaks,
        "refused": refused,
        "ratios": ratios(samples),
        "table": [row(name, samples, flops, peaks, asked) for name in samples]
        + [{"kernel": name, "remark": reason} for name, reason in refused.items()],
    }


def ratios(samples: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """How many times faster each attention is than the reference, and the chunked loss than the plain one."""
    pairs = [(name, "attention reference") for name in samples if name.startswith("attention ")]
    pairs += [("loss chunked", "loss plain")]
    known = [(a, b) for a, b in pairs if a in samples and b in samples and a != b]
    return {f"{a} / {b}": measure.ratio(samples[a], samples[b]) for a, b in known}


def row(
    name: str,
    samples: dict[str, list[float]],
    flops: dict[str, float],
    peaks: dict[str, tuple[float, str]],
    asked: argparse.Namespace,
) -> dict[str, Any]:
    """The table's row of a kernel: its time, its speed, and how it stands to the plain one."""
    seconds = measure.summary(samples[name])
    dtype = name.split()[1] if name.startswith("matmul") else asked.precision
    speed = flops[name] / seconds["median"]
    remarks = [
        f"{times['median']:.3f} times as fast as {pair.split(' / ')[1]}"
        for pair, times in ratios(samples).items()
        if pair.startswith(f"{name} / ")
    ]
    return {
        "kernel": name,
        "ms": seconds["median"] * 1e3,
        "quartiles, ms": measure.quartiles(seconds, 1e3),
        "GFLOP/s": speed / 1e9,
        "of measured peak, %": 100 * speed / peaks[dtype][0],
        "remark": "; ".join(remarks) or None,
    }


def arguments() -> argparse.ArgumentParser:
    """The flags; the default shape is that of `versus_torch.py` on a CPU."""
    parser = measure.arguments(
        "kernels",
        __doc__,
        "kernels",
        rows=(16, "B"),
        length=(256, "T"),
        heads=(6, "N"),
        kv_heads=(2, "K"),
        size=(64, "H"),
        vocab=(4096, "V"),
        chunk=(512, "tokens of a chunk of the loss"),
        edge=(0, "of the square products; 0: 1024 on a CPU, else 8192"),
        rounds=(15, "times that each case is asked"),
    )
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    return parser


def main(argv: Sequence[str]) -> int:
    """Measure, print and write; the exit status."""
    asked = arguments().parse_args(argv)
    measure.publish(measure_kernels(asked), asked)
    return 0


if __name__ == "__main__":
    keep_freed_memory()  # as train.py does
    sys.exit(main(sys.argv[1:]))
