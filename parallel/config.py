"""How the devices are laid out, and which logical axis of a tensor goes to which mesh axis."""

from dataclasses import dataclass, field

MESH_AXES = ("replica", "pipeline", "data", "fsdp", "expert", "context", "tensor")  # slowest link first


@dataclass
class MeshConfig:
    """Devices along each mesh axis; one axis may be -1 and takes what is left.

    `rules` maps a logical axis (of a parameter or an activation) to the mesh axes that split it; one that is
    not named is not split.
    """

    replica: int = 1  # synchronous data parallel across slices or sites
    pipeline: int = 1  # stages of layers
    data: int = -1  # rows of the batch; parameters whole
    fsdp: int = 1  # rows of the batch; parameters, gradients and moments in parts
    expert: int = 1  # experts of a mixture
    context: int = 1  # positions of a row
    tensor: int = 1  # heads, feed-forward width and vocabulary
    rules: dict[str, list[str]] = field(default_factory=dict)
    dcn: dict[str, int] = field(default_factory=dict)  # of an axis: the factor of its size that crosses slices


@dataclass
class PipelineConfig:
    """In what order stages work on microbatches; only read where mesh.pipeline is above 1."""

    schedule: str = "1f1b"  # gpipe | 1f1b | interleaved_1f1b | zero_bubble
    microbatches: int = 8  # parts of the batch that follow each other through the stages
    virtual_stages: int = 1  # chunks of layers a device holds (interleaved_1f1b: 2 or more)


@dataclass
class ContextConfig:
    """How attention crosses positions that lie on other devices; only read where mesh.context is above 1."""

    attention: str = "ulysses"  # ulysses | allgather | ring
    zigzag: bool = True  # allgather and ring: early and late positions paired, so that causal work is even


@dataclass
class HardwareConfig:
    """The accelerator's datasheet: what MFU is a share of. `peak_tflops=null` measures at start (CPU)."""

    name: str = "auto"  # for tables; chosen with hardware=NAME
    peak_tflops: float | None = None  # dense bf16 (accelerators), or f32 (CPU), per device
