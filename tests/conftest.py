"""Eight devices on a CPU for every test, set before JAX is imported.

The tests compile hundreds of small programs and run each a few times, so LLVM's optimizations are left out:
the suite takes half the time. Bitwise equality is tested in runs of `train.py` itself, which are optimized.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
