"""Compilers for devices that are not here: whoever has none skips, but `make test-plan` has all of them."""

import os

import pytest


def skip_without(error: ImportError) -> None:
    """Skip the test for want of a compiler, or fail where CAMBRIAN_REQUIRE_PLAN says that there is one."""
    if os.environ.get("CAMBRIAN_REQUIRE_PLAN"):
        raise error
    pytest.skip(f"NOT COMPILED: {error}")
