"""Compilers for devices that are not here: 5 GB that a laptop's `make test` does not ask for.

Whoever has none skips. `make test-plan`, a step of CI, installs them, and there a skip is a failure.
"""

import os

import pytest


def skip_without(error: ImportError) -> None:
    """Skip the test for want of a compiler, or fail where CAMBRIAN_REQUIRE_PLAN says that there is one."""
    if os.environ.get("CAMBRIAN_REQUIRE_PLAN"):
        raise error
    pytest.skip(f"NOT COMPILED HERE, make test-plan does: {error}")
