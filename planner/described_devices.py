"""Devices that are not here: GPUs and TPUs by name, to compile for and read the result, never to run on.

XLA needs no device to compile for one, only its description. For GPUs the descriptions stand here; for TPUs
libtpu knows them. What comes back are devices like any other: `build_layout(config.mesh, devices)`.
"""

import contextlib
import importlib.util
import math
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from jax.experimental import topologies

from common.checks import nearest
from common.text import first_line

# Without a device there is nothing to time kernels on; and only without Triton do matrix products become the
# library calls that a run on the real device would mostly choose.
GPU_COMPILER_OPTIONS = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}
# To libtpu's own names; tpu7x is one that people know as well.
TPU_NAMES = {"v4": "v4", "v5e": "v5e", "v5p": "v5p", "v6e": "v6e", "v7x": "tpu7x", "tpu7x": "tpu7x"}
TORI = ("v5e", "v6e")  # in two dims; all others' have three
# Else libtpu describes a chip's two cores; a job on v4 has them as one device.
TPU_OPTIONS: dict[str, dict[str, Any]] = {"v4": {"chip_config_name": "megacore"}}
TPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",  # else it asks the cloud's metadata server, and waits
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",  # else a second process on this machine is refused
}


@dataclass(frozen=True)
class Gpu:
    """What XLA's cost models and kernel choices need to know of a GPU.

    Facts of one SXM part each, as openxla/xla has them (xla/backends/gpu/target_config/specs, read in 2026).
    """

    kind: str
    capability: tuple[int, int]
    cores: int  # streaming multiprocessors
    memory_bytes: int
    bandwidth: int  # bytes a second
    l2_bytes: int
    clock_ghz: float
    per_host: int = 8
    lanes: int = 128  # float32 units a core
    shared_per_core: int = 233_472
    shared_per_block: int = 232_448
    cudnn: tuple[int, int] = (9, 10)

    def target_config(self) -> str:
        """XLA's GpuTargetConfigProto as text."""
        major, minor = self.capability
        accelerated = "feature_extension: ACCELERATED_FEATURES" if major >= 9 else ""
        return f"""
            gpu_device_info {{
              threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
              shared_memory_per_block: 49152 shared_memory_per_block_optin: {self.shared_per_block}
              shared_memory_per_core: {self.shared_per_core}
              core_count: {self.cores} fpus_per_core: {self.lanes} clock_rate_ghz: {self.clock_ghz}
              block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
              memory_bandwidth: {self.bandwidth} device_memory_size: {self.memory_bytes}
              l2_cache_size: {self.l2_bytes}
              registers_per_core_limit: 65536 registers_per_block_limit: 65536
              cuda_compute_capability {{ major: {major} minor: {minor} {accelerated} }}
            }}
            platform_name: "CUDA"
            dnn_version_info {{ major: {self.cudnn[0]} minor: {self.cudnn[1]} }}
            runtime_version {{ major: 13 }}
            device_description_str: "{self.kind}"
        """


GPUS = {
    "a100": Gpu(
        kind="NVIDIA A100-SXM4-80GB",
        capability=(8, 0),
        cores=108,
        memory_bytes=85_100_068_864,
        bandwidth=2_039_040_000_000,
        l2_bytes=41_943_040,
        clock_ghz=1.41,
        lanes=64,
        shared_per_core=167_936,
        shared_per_block=166_912,
    ),
    "a100_40": Gpu(
        kind="NVIDIA A100-SXM4-40GB",
        capability=(8, 0),
        cores=108,
        memory_bytes=42_297_786_368,
        bandwidth=1_555_200_000_000,
        l2_bytes=41_943_040,
        clock_ghz=1.41,
        lanes=64,
        shared_per_core=167_936,
        shared_per_block=166_912,
    ),
    "h100": Gpu(
        kind="NVIDIA H100 80GB HBM3",
        capability=(9, 0),
        cores=132,
        memory_bytes=84_942_979_072,
        bandwidth=3_352_320_000_000,
        l2_bytes=52_428_800,
        clock_ghz=1.98,
    ),
    "h200": Gpu(
        kind="NVIDIA H200 141GB HBM3e",
        capability=(9, 0),
        cores=132,
        memory_bytes=151_397_597_184,
        bandwidth=4_800_000_000_000,
        l2_bytes=52_428_800,
        clock_ghz=1.98,
    ),
    "b200": Gpu(
        kind="NVIDIA B200",
        capability=(10, 0),
        cores=148,
        memory_bytes=191_514_411_008,
        bandwidth=7_672_320_000_000,
        l2_bytes=132_644_864,
        clock_ghz=1.965,
    ),
    "gb200": Gpu(
        kind="NVIDIA GB200",
        capability=(10, 0),
        cores=152,
        memory_bytes=197_897_748_480,
        bandwidth=7_928_064_000_000,
        l2_bytes=135_528_448,
        clock_ghz=2.062,
        per_host=4,
    ),
}


def described_devices(name: str, topology: str | int) -> list[Any]:
    """Devices of a cluster that need not be here, in the order of their ids.

    name: a GPU (h200) or a TPU generation (v5p). topology: for GPUs their number, or hosts x GPUs a host
    (`8x8`), or slices before both (`2x4x8`); for TPUs the torus (`4x4x4`), or slices and torus (`2*4x4x4`).
    Raises ValueError for names and shapes that there are not, and ImportError, with the install command,
    where the compiler is missing.
    """
    if name in GPUS:
        return _described_gpus(GPUS[name], gpu_topology(name, topology))
    if name in TPU_NAMES:
        return _described_tpus(name, str(topology))
    known = (*GPUS, *TPU_NAMES)
    near = nearest(name, known)
    hint = f"; did you mean {near}?" if near else ""
    raise ValueError(f"hardware={name} is none that can be described: {', '.join(known)}{hint}")


def gpu_topology(name: str, topology: str | int) -> tuple[int, int, int]:
    """Slices, hosts a slice and GPUs a host; ValueError where `topology` says no such thing."""
    parts = str(topology).lower().split("x")
    if not all(part.isdigit() and int(part) > 0 for part in parts) or len(parts) > 3:
        raise ValueError(
            f"hardware.topology={topology} must be a number of GPUs (64), hosts x GPUs a host (8x8), "
            "or slices x hosts x GPUs a host (1x8x8)"
        )
    sizes = [int(part) for part in parts]
    if len(sizes) > 1:
        return (*[1] * (3 - len(sizes)), *sizes)  # type: ignore[return-value]
    per_host = GPUS[name].per_host
    if sizes[0] > per_host and sizes[0] % per_host:
        near = sizes[0] // per_host * per_host
        raise ValueError(
            f"hardware.topology={topology} does not fill hosts of {per_host} {name}; use {near} or "
            f"{near + per_host}, or say hosts x GPUs a host, such as {sizes[0]}x1"
        )
    return 1, max(1, sizes[0] // per_host), min(sizes[0], per_host)


def _described_gpus(gpu: Gpu, sizes: tuple[int, int, int]) -> list[Any]:
    # The plugin looks for a driver when jax first looks for devices, and unregisters itself where there is
    # none.
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    with quiet():
        try:
            described = topologies.get_topology_desc(
                platform="cuda", target_config=gpu.target_config(), topology="x".join(map(str, sizes))
            )
        except NotImplementedError:  # what jax says where no plugin has registered the platform
            raise ImportError(_no_gpu_compiler()) from None
    devices = list(described.devices)
    assert len(devices) == math.prod(sizes), (len(devices), sizes)
    return devices


def _no_gpu_compiler() -> str:
    plugins = ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")
    try:
        there = any(importlib.util.find_spec(plugin) for plugin in plugins)
    except ModuleNotFoundError:  # not even the namespace
        there = False
    if there:
        return "NVIDIA's compiler is installed, but jax started without it: set JAX_PLATFORMS=cpu beforehand"
    return "describing NVIDIA GPUs takes their compiler, which needs no GPU: pip install -e '.[plan-gpu]'"


def _described_tpus(name: str, topology: str) -> list[Any]:
    slices, _, torus = topology.rpartition("*")
    for key, value in TPU_ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    options = {**TPU_OPTIONS.get(name, {}), **({"num_slices": int(slices)} if slices.isdigit() else {})}
    with quiet():
        try:
            described = topologies.get_topology_desc(f"{TPU_NAMES[name]}:{torus}", platform="tpu", **options)
        except RuntimeError as error:  # jax's own too
            if "not installed" in str(error):
                raise ImportError(
                    "describing TPUs takes their compiler, which needs no TPU: pip install -e '.[plan-tpu]'"
                ) from None
            raise ValueError(
                f"hardware.topology={topology} is no {name} torus ({first_line(error)}); such are "
                f"{'4x4, 8x8, 16x16' if name in TORI else '2x2x2, 4x4x4, 8x8x16'}"
            ) from None
    return list(described.devices)


def compiler_options(devices: list[Any]) -> dict[str, Any]:
    """What to hand to `lowered.compile` for devices that are only described."""
    return dict(GPU_COMPILER_OPTIONS) if devices[0].platform in ("gpu", "cuda") else {}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep from the reader what compilers write to stderr, and show all of it if one dies or raises.

    A compiler that aborts takes this process along, so another one, a shell, holds what was said: it prints
    it where the pipe ends without the word that all is well. ImportError and ValueError need no more words.
    """
    word = uuid.uuid4().hex
    script = f'said=$(cat); case "$said" in *{word}) ;; *) printf "%s\\n" "$said" >&2 ;; esac'
    sys.stderr.flush()
    with subprocess.Popen(["sh", "-c", script], stdin=subprocess.PIPE, start_new_session=True) as keeper:
        assert keeper.stdin is not None
        kept = os.dup(2)
        os.dup2(keeper.stdin.fileno(), 2)
        keeper.stdin.close()
        well = False
        try:
            yield
            well = True
        except (ImportError, ValueError):
            well = True
            raise
        finally:
            sys.stderr.flush()
            if well:
                os.write(2, word.encode())
            os.dup2(kept, 2)
            os.close(kept)
