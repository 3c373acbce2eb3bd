"""What the kernels of a compiled program are called, and how many operations are in them.

Matrix products stand in the text in four forms: `dot`, calls of cuBLAS and cuBLASLt, and on TPUs
`convolution`. Attention kernels are calls whose text tells their operands, so that their products can be
counted too, each two operations a multiply-add:

    forward                    Q K^T, P V
    backward, cuDNN            Q K^T and dO V^T again, then dQ, dK and dV
    backward, splash           dq: Q K^T, dO V^T, dQ; dkv: Q K^T, dO V^T, dK, dV

B batch, T query position, S key position, N query heads, H query and key head size, W value head size.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from planner.hlo.text import Instruction, shapes

Table = Mapping[str, Instruction]
CALLS = {
    "__cudnn$fmhaSoftmax": "cuDNN attention forward",
    "__cudnn$fmhaSoftmaxBackward": "cuDNN attention backward",
    "__cublas$gemm": "cuBLAS",
    "__cublas$lt$matmul": "cuBLASLt",
    "__cublas$lt$matmul$f8": "cuBLASLt fp8",
}
PALLAS = "tpu_custom_call"
SPLASH = {"fwd": "splash forward", "dq": "splash dq", "dkv": "splash dkv"}
# Calls that compute nothing: XLA's way to reserve memory, to view several arrays as one, and to promise.
NO_KERNELS = ("AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound", "Sharding")


def kernel_name(target: str) -> str | None:
    """What a call's target is known as; None for calls that launch nothing, or a kernel with its own name."""
    if target == PALLAS or target.startswith(NO_KERNELS):
        return None
    return CALLS.get(target, target)


def pallas_name(name: str) -> str:
    """What a Pallas kernel is known as: `splash_mha_dkv_segmented_no_residuals` is splash's `dkv`."""
    part = _splash_part(name)
    return SPLASH[part] if part else re.sub(r"(\.\d+)+$", "", name)


def _splash_part(name: str) -> str | None:
    found = re.match(r"splash_m[hq]a_(fwd|dq|dkv)_", name)
    return found[1] if found else None


def kernels_of(custom_calls: Mapping[str, int], pallas: Mapping[str, int]) -> dict[str, int]:
    """Executions a step by name, from a `Reading`'s `custom_calls` and `kernels`."""
    named: Counter[str] = Counter()
    for target, times in custom_calls.items():
        if name := kernel_name(target):
            named[name] += times
    for kernel, times in pallas.items():
        named[pallas_name(kernel)] += times
    return dict(sorted(named.items()))


def product_flops(instruction: Instruction, table: Table) -> int:
    """Of a matrix product, in whatever form the backend writes it; 0 for anything else."""
    if instruction.opcode == "dot":
        dims = instruction.attribute(r"lhs_contracting_dims=\{([\d,]*)\}")
        contracted = [int(n) for n in (dims or "").split(",") if n]
    elif (
        "dot_dimension_numbers" in instruction.attributes and "gemm_backend_config" in instruction.attributes
    ):
        contracted = _gemm_contracted(instruction.attributes)
    elif instruction.opcode == "convolution":
        return _convolution_flops(instruction, table)
    else:
        return 0
    left = shapes(table[instruction.operands[0]].type)[0][1]
    result = shapes(instruction.type)[0][1]
    return 2 * math.prod(result) * math.prod(left[dim] for dim in contracted)


def factor_type(instruction: Instruction, table: Table) -> str:
    """Element type of a product's first factor: bf16, f8e4m3fn, s8, f32."""
    return shapes(table[instruction.operands[0]].type)[0][0]


def _backend_config(attributes: str) -> Any:
    text = attributes[attributes.index("backend_config=") + len("backend_config=") :]
    return json.JSONDecoder().raw_decode(text)[0]


def _gemm_contracted(attributes: str) -> list[int]:
    numbers = _backend_config(attributes)["gemm_backend_config"]["dot_dimension_numbers"]
    return [int(n) for n in numbers["lhs_contracting_dimensions"]]


def _convolution_flops(instruction: Instruction, table: Table) -> int:
    """TPUs write matrix products so, with dims that several factors share as a window's.

    Only pairs of a place in the result and one in the window that meet an element of the input are counted:
    a projection [B, D] x [D, N, H] is a window of N over an input of 1, padded by N - 1 on both sides.
    """
    found = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    if found is None:
        return 0
    arrays = (*(table[name].type for name in instruction.operands[:2]), instruction.type)
    inputs, kernel, result = (
        dict(zip(labels, shapes(array)[0][1], strict=False))
        for labels, array in zip(found.groups(), arrays, strict=True)
    )
    window = instruction.attribute(r"window=\{([^}]*)\}") or ""
    pairs = 1
    for place, dim in enumerate(sorted(label for label in result if label.isdigit())):
        pairs *= _meetings(inputs[dim], kernel[dim], result[dim], window, place)
    return 2 * result["b"] * result["f"] * kernel["i"] * pairs


def _meetings(inputs: int, kernel: int, result: int, window: str, place: int) -> int:
    def option(key: str, default: int) -> int:
        said = re.search(rf"\b{key}=(\S+)", window)
        return int(said[1].split("x")[place].split("_")[0]) if said else default

    stride, low = option("stride", 1), option("pad", 0)
    spread, apart = option("lhs_dilate", 1), option("rhs_dilate", 1)
    places = (o * stride + k * apart - low for o in range(result) for k in range(kernel))
    return sum(0 <= at <= (inputs - 1) * spread and at % spread == 0 for at in places)


def attention_flops(instruction: Instruction, table: Table) -> int:
    """Of an attention kernel; 0 for anything else.

    Causal ones compute half of the square, ones with a window less. Rows of several documents count as one
    document: how long documents are is in the data, so this is the most that the kernel may do.
    """
    if instruction.opcode != "custom-call":
        return 0
    target = instruction.attribute(r'custom_call_target="([^"]*)"') or ""
    if target in ("__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"):
        return _cudnn_flops(instruction, table, backward=target.endswith("Backward"))
    part = _splash_part(instruction.name)
    return _splash_flops(part, instruction, table) if part else 0


def _cudnn_flops(instruction: Instruction, table: Table, *, backward: bool) -> int:
    config = _backend_config(instruction.attributes)["cudnn_fmha_backend_config"]
    batch, heads, queries, keys = (int(n) for n in config["intermediate_tensor_shape"]["dimensions"])
    # The head size is last in queries, keys and values: XLA hands them over as [B, T, N, H].
    query, _, value = (shapes(table[name].type)[0][1] for name in instruction.operands[:3])
    pairs = queries * keys
    if "CAUSAL" in config["mask_type"]:
        window = min(int(config.get("sliding_window_length", 0)) or keys, keys)
        pairs = queries * window - window * window // 2
    size, width = query[-1], value[-1]
    once = 3 * size + 2 * width if backward else size + width
    return 2 * batch * heads * pairs * once


def _splash_flops(part: str, instruction: Instruction, table: Table) -> int:
    arrays = [shapes(table[name].type)[0] for name in instruction.operands if name in table]
    grid = next(sizes for kind, sizes in arrays if kind.startswith("s") and len(sizes) >= 3)
    query, key, value = [sizes for kind, sizes in arrays if kind[0] in "bf" and len(sizes) >= 3][:3]
    queries, keys, size, width = query[-2], key[-2], query[-1], value[-1]
    once = {"fwd": size + width, "dq": 2 * size + width, "dkv": 2 * size + 2 * width}[part]
    outer = math.prod(query[:-2])  # batch and heads
    return 2 * outer * splash_pairs(part, grid[-2:], queries, keys) * once


def splash_pairs(part: str, grid: tuple[int, ...], queries: int, keys: int) -> int:
    """Query-key pairs of one head, of a causal mask, from the kernel's grid of blocks.

    grid: [query blocks, key blocks that one of them visits], for `dkv` [query blocks that one visits, key
    blocks]; a window leaves fewer visits than there are blocks.
    """
    blocks, visited = (grid[1], grid[0]) if part == "dkv" else (grid[0], grid[1])
    length, other = (keys, queries) if part == "dkv" else (queries, keys)
    block = length // blocks
    if visited * block >= other:
        return queries * keys // 2
    window = visited * block
    return length * window - window * window // 2
