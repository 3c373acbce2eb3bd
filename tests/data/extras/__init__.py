"""What the tests of optional sources need: skipped where it is absent, unless every extra must be there."""

import importlib
import os
from types import ModuleType

import pytest


def require(module: str, extra: str) -> ModuleType:
    """Import a module of an extra; without it skip, or fail under CAMBRIAN_REQUIRE_EXTRAS=1."""
    try:
        return importlib.import_module(module)
    except ImportError:
        if os.environ.get("CAMBRIAN_REQUIRE_EXTRAS") == "1":
            pytest.fail(f"needs the extra {extra}")
        pytest.skip(f"needs the extra {extra}", allow_module_level=True)
