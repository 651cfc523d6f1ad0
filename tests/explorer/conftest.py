"""One toy index for all tests of the explorer."""

import pytest

from explorer import desk


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return desk.build(tmp_path_factory.mktemp("explorer") / "index")
