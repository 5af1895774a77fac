"""A home that is made, and data that are imported, on a disk that fails: whole or not there."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.faults.disk import Fault
from tests.faults.injection import FAULTS, Injector, injector

pytestmark = pytest.mark.sqlite("the disk that fails is that of this process, not of a server")


@pytest.fixture(scope="module", params=["making", "import"])
def making(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Injector]:
    with injector(request.param, tmp_path_factory.mktemp(request.param)) as made:
        yield made


@pytest.mark.parametrize("fault", FAULTS)
def test_a_home_or_a_dataset_is_whole_or_not_there(making: Injector, fault: Fault) -> None:
    assert making.sweep(fault) > 5
