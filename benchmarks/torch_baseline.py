"""The same training step in PyTorch, as PyTorch's own users would write it. Imports only torch and numpy.

    .venv-torch/bin/python -P benchmarks/torch_baseline.py JOB eager|compile float32|bfloat16 THREADS

JOB is a directory made by `benchmarks/jax_worker.py`: job.json (sizes, optimizer, learning rates) and
arrays.npz (initial weights, tokens, rotation frequencies). Says on stdout, as one line of JSON, that it is
ready; then for each number of steps read from stdin, their mean seconds and their losses.

RMSNorm, rotary positions (plane i is made of elements i and i + H/2), grouped queries, SwiGLU; fused AdamW,
clipping by global norm, bfloat16 by autocast with float32 weights. Key and value, gate and up are one product
each, as in ours. B rows, T positions, N query heads, K key/value heads, H head size.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

LAYERS = "segments/0/0/"  # where ours keeps the stack of all layers


class TorchBlock(nn.Module):
    """One decoder layer of Llama's kind."""

    def __init__(self, model: dict[str, Any]):
        super().__init__()
        D, N, K, H = (model[key] for key in ("d_model", "num_heads", "num_kv_heads", "head_dim"))
        self.shape, self.eps = (N, K, H), model["norm_eps"]
        self.attention_norm, self.mlp_norm = nn.Parameter(torch.ones(D)), nn.Parameter(torch.ones(D))
        self.q = nn.Linear(D, N * H, bias=False)
        self.kv = nn.Linear(D, 2 * K * H, bias=False)
        self.o = nn.Linear(N * H, D, bias=False)
        self.up = nn.Linear(D, 2 * model["d_ff"], bias=False)
        self.down = nn.Linear(model["d_ff"], D, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """The residual stream [B, T, D] after this layer."""
        B, T, D = x.shape
        N, K, H = self.shape
        normed = F.rms_norm(x, (D,), self.attention_norm, self.eps)
        q = self.q(normed).view(B, T, N, H).transpose(1, 2)
        k, v = self.kv(normed).view(B, T, 2, K, H).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=N != K)
        x = x + self.o(mixed.transpose(1, 2).reshape(B, T, N * H))
        gate, up = self.up(F.rms_norm(x, (D,), self.mlp_norm, self.eps)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class Llama(nn.Module):
    """Tokens and targets [B, T] to the mean loss in nats."""

    def __init__(self, model: dict[str, Any], angles: Tensor):
        super().__init__()
        self.eps = model["norm_eps"]
        self.table = nn.Parameter(torch.empty(model["vocab_size"], model["d_model"]))
        self.blocks = nn.ModuleList(TorchBlock(model) for _ in range(model["num_layers"]))
        self.final_norm = nn.Parameter(torch.ones(model["d_model"]))
        self.head = None if model["tie_embeddings"] else nn.Parameter(torch.empty_like(self.table))
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """The mean cross-entropy of the next token, in nats."""
        x = F.embedding(tokens, self.table)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        x = F.rms_norm(x, (x.shape[-1],), self.final_norm, self.eps)
        logits = F.linear(x, self.table if self.head is None else self.head)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    @torch.no_grad()
    def load(self, arrays: Any) -> None:
        """Take the weights of `arrays`, which ours lays out [in, out] with layers stacked."""
        self.table.copy_(torch.from_numpy(arrays["embed/table"]))
        self.final_norm.copy_(torch.from_numpy(arrays["final_norm/scale"]))
        if self.head is not None:
            self.head.copy_(torch.from_numpy(arrays["head/table"]))
        for name in ("attention_norm", "mlp_norm"):
            scales = torch.from_numpy(arrays[f"{LAYERS}{name}/scale"])
            for block, scale in zip(self.blocks, scales, strict=True):
                getattr(block, name).copy_(scale)
        for room, name in (
            ("attention", "q"),
            ("attention", "kv"),
            ("attention", "o"),
            ("mlp", "up"),
            ("mlp", "down"),
        ):
            stack = torch.from_numpy(arrays[f"{LAYERS}{room}/{name}"])
            for block, weight in zip(self.blocks, stack, strict=True):
                linear = getattr(block, name)
                linear.weight.copy_(weight.reshape(linear.in_features, linear.out_features).T)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn [B, heads, T, H] in float32."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).type_as(x)


def make_step(
    job: dict[str, Any], arrays: Any, mode: str, precision: str, device: str
) -> Callable[[int], Tensor]:
    """`step(i)`: the i-th optimizer step, and its loss."""
    length = arrays["tokens"].shape[2] - 1
    angles = np.arange(length)[:, None] * arrays["frequencies"]
    model = Llama(job["model"], torch.from_numpy(angles).float()).to(device)
    model.load(arrays)
    run = torch.compile(model, dynamic=False) if mode == "compile" else model
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    optim = job["optim"]
    groups = [
        {"params": matrices, "weight_decay": optim["weight_decay"]},
        {"params": vectors, "weight_decay": 0.0},
    ]
    betas = (optim["b1"], optim["b2"])
    adamw = torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=optim["eps"], fused=True)
    tokens = torch.from_numpy(arrays["tokens"]).long().to(device)
    rates = job["learning_rates"]

    def step(i: int) -> Tensor:
        rows = tokens[i % len(tokens)]
        for group in adamw.param_groups:
            group["lr"] = rates[min(i, len(rates) - 1)]
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16"):
            loss = run(rows[:, :-1], rows[:, 1:])
        loss.backward()
        if optim["grad_clip"] is not None:
            nn.utils.clip_grad_norm_(model.parameters(), optim["grad_clip"])
        adamw.step()
        adamw.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def main(directory: str, mode: str, precision: str, threads: str) -> None:
    """Serve steps over stdin and stdout; see the head of this file."""
    answer = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is not an answer
    if int(threads):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int(threads)])
        torch.set_num_threads(int(threads))
    torch.set_float32_matmul_precision("high")  # TF32 on GPUs, as XLA has it; nothing on a CPU
    device = "cuda" if torch.cuda.is_available() else "cpu"
    job = json.loads(Path(directory, "job.json").read_text("utf-8"))
    with np.load(Path(directory, "arrays.npz")) as arrays:
        step = make_step(job, {name: arrays[name] for name in arrays.files}, mode, precision, device)
    done = 0
    ready = {
        "ready": True,
        "version": torch.__version__,
        "device": device,
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(ready), file=answer)
    for line in sys.stdin:
        start = time.perf_counter()
        losses = [step(done + i) for i in range(int(line))]
        values = [float(loss) for loss in losses]  # waits for the device
        seconds = (time.perf_counter() - start) / len(losses)
        done += len(losses)
        memory = (
            torch.cuda.max_memory_allocated()
            if device == "cuda"
            else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        )
        print(json.dumps({"seconds": seconds, "losses": values, "bytes": memory}), file=answer)


if __name__ == "__main__":
    main(*sys.argv[1:])
