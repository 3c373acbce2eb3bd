"""What a test that needs an extra begins with."""

import importlib
import os
from typing import Any

import pytest


def require(module: str, extra: str) -> Any:
    """Return the module; where it is absent skip the test, or fail it under CAMBRIAN_REQUIRE_EXTRAS=1."""
    try:
        return importlib.import_module(module)
    except ImportError:
        if os.environ.get("CAMBRIAN_REQUIRE_EXTRAS") == "1":
            pytest.fail(f"needs the extra {extra}")
        pytest.skip(f"needs the extra {extra}")
