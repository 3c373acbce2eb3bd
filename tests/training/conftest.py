"""One ground for all end-to-end tests, so that data and executables are made once."""

import gc

import pytest

from tests.training.ground import Ground, make_ground


@pytest.fixture(scope="session")
def ground(tmp_path_factory) -> Ground:
    return make_ground(tmp_path_factory.mktemp("ground"))


@pytest.fixture
def dropped_reads():
    """What Orbax leaves behind at a failed read is collected here, where its complaint is expected."""
    yield
    gc.collect()
