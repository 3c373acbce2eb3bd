"""How the devices are laid out, and which logical axis of a tensor goes to which mesh axis."""

from dataclasses import dataclass, field

MESH_AXES = (
    "replica",
    "pipeline",
    "data",
    "fsdp",
    "expert",
    "context",
    "tensor",
)  # slowest link first


@dataclass
class MeshConfig:
    """Devices along each mesh axis; one axis may be -1 and takes what is left.

    `rules` maps a logical axis (of a parameter or an activation) to the mesh axes that split it; one not named is not split.
    """

    replica: int = 1
    pipeline: int = 1
    data: int = -1
    fsdp: int = 1
    expert: int = 1
    context: int = 1
    tensor: int = 1
    rules: dict[str, list[str]] = field(default_factory=dict)


@dataclass
class HardwareConfig:
    """The accelerator's datasheet: what MFU is a share of. `peak_tflops=null` measures a matrix product at start (CPU)."""

    name: str = "auto"
    peak_tflops: float | None = None  # dense bf16 (accelerators), or f32 (CPU), per device
