"""A step's work by equations alone: milliseconds for any number of devices, and nothing is compiled.

    FLOPs      6 N a token forward and backward (Kaplan et al. 2020, arXiv:2001.08361), N as the model counts
               it (`Model.flops_per_token`: head in, embedding out, chosen experts only), and attention's;
               again what rematerialization makes a second time: `full` all products but the one back from
               the width F, `attention` the wide ones and the one behind attention, `dots` and `offload` that
               one alone; a pipeline one forward more
    attention  causal kernels compute the half of the square that the mask leaves, and five products backward
               for two forward (Dao et al. 2022, arXiv:2205.14135); `chunked`, `xla` and `reference` compute
               the whole
    bubble     of the schedule's own table (`parallel.schedules`): (P−1)/(M+P−1) for gpipe and 1f1b (Narayanan
               et al. 2021, arXiv:2104.04473)

Memory: `planner.analytic_memory`; collectives: `planner.analytic_traffic`.
"""

from kernels.backends import choose
from kernels.einsum_8bit import PRODUCTS
from kernels.names import PROJECTIONS
from parallel.config import mesh_shape
from parallel.hardware import Machine
from planner.analytic_memory import memory_of
from planner.analytic_traffic import traffic_of
from planner.described_devices import GPUS
from planner.sizes import Parameter, Sizes, parameters_of, part_of, sizes_of
from planner.work import StepCost
from training.config import Config
from training.legal.attention import wanted_attention
from training.precision import compute_dtype

HALVES = ("cudnn", "splash", "fused", "ring")  # compute only what a causal mask leaves
EXPERTS_DOWN = ("experts", "down")  # the end of its path: routed experts multiply by no named projection
OPTIMIZER_PASSES = 7  # parameter, two moments: read and written; gradient: read


def estimate(config: Config, machine: Machine) -> StepCost:
    """What one step asks of one device. config: with its vocabulary known; see `training.config.with_vocab`.

    Raises ValueError where mesh and sizes do not divide, or attention that was asked for cannot be had.
    """
    sizes = sizes_of(config, machine, attention_of(config, machine)[0])
    return StepCost(
        how="analytic",
        memory=memory_of(sizes),
        flops=flops_of(sizes),
        moved_bytes=moved_bytes(sizes),
        traffic=traffic_of(sizes),
        bubble=sizes.schedule.bubble if sizes.schedule is not None else 0.0,
    )


def attention_of(config: Config, machine: Machine) -> tuple[str, str]:
    """The backend that a run on these devices would choose, and why."""
    gpu = GPUS.get(machine.name)
    facts = {
        "platform": machine.kind,
        "capability": gpu.capability if gpu else None,
        "device": machine.name,
        "dtype": compute_dtype(config.training.precision, machine.kind).name,
        "devices": machine.devices,
    }
    context = mesh_shape(config.mesh, machine.devices)["context"]
    choice = choose(config.training.attention, wanted_attention(config, context, **facts))
    return choice.name, choice.why


def again_share(sizes: Sizes) -> float:
    """Of a layer's forward products, those that rematerialization makes a second time."""
    policy = sizes.config.training.remat
    if policy == "none":
        return 0.0
    matrices = [p for p in parameters_of(sizes.model) if p.segment is not None and p.role == "matrix"]
    active = {p.path: _active(sizes, p) for p in matrices}
    whole = sum(active.values())
    back = sum(active[p.path] for p in matrices if p.projection == "down" or p.path[-2:] == EXPERTS_DOWN)
    output = sum(active[p.path] for p in matrices if p.projection and not PROJECTIONS[p.projection].kept)
    attention = sum(size for path, size in active.items() if "attention" in path)
    share = {
        "full": whole - back,
        "offload": output,
        "dots": output,
        "attention": whole - back - attention + output,
    }
    return share[policy] / whole


def _active(sizes: Sizes, p: Parameter) -> float:
    """Elements that one token meets: of experts, the chosen ones."""
    moe = sizes.config.model.moe
    return p.size / moe.num_experts * moe.experts_per_token if "experts" in p.axes and moe else float(p.size)


def flops_of(sizes: Sizes) -> dict[str, float]:
    """Executed on one device, by precision."""
    config, training = sizes.config, sizes.config.training
    per_token = sizes.model.flops_per_token(config.data.seq_len)
    tokens = training.global_batch_size * config.data.seq_len / sizes.machine.devices
    head = 2 * config.model.vocab_size * config.model.d_model * (1 + config.model.mtp_depth)
    layers = per_token["matmul"] - head
    extra = again_share(sizes) + (1 if sizes.schedule is not None else 0)
    square = "attention_causal" if sizes.attention in HALVES else "attention_full"
    repeated = (training.remat == "full") + (sizes.schedule is not None)
    attention = per_token[square] * (3.5 + repeated)
    plain = "float32" if sizes.itemsize == 4 else "bfloat16"
    kind = training.precision if training.precision in PRODUCTS else plain
    found = {plain: (3 * head + attention) * tokens}
    found[kind] = found.get(kind, 0.0) + (3 + extra) * layers * tokens
    return found


def moved_bytes(sizes: Sizes) -> float:
    """Read from and written to the device's memory.

    Every activation of a layer is written once and read about once, forward and again, and twice as much
    backward; weights are read in each pass; the optimizer passes over its float32 arrays; logits are written
    and read twice.
    """
    s = sizes
    layer = (
        6 * s.whole + 2 * (s.mixer.queries + s.mixer.keys_values) + (s.gates + 2) * s.wide + 2 * s.dispatched
    )
    passes = 3 + again_share(s) + (1 if s.schedule is not None else 0)
    activations = 2 * passes * layer * s.layers * s.microbatches
    weights = passes * s.layer_weights * s.layers * s.microbatches
    shards = sum(part_of(p, s.layout) for p in parameters_of(s.model))
    vocabulary = s.config.model.vocab_size / s.layout.ways("act_vocab")
    logits = 4 * 4 * s.tokens * s.microbatches * vocabulary
    return (
        activations
        + weights
        + 4 * OPTIMIZER_PASSES * shards
        + logits
        + 2 * s.mixer.scores * passes * s.layers
    )
