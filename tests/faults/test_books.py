"""The ledger and the log on a disk that fails: what was told stays, nothing is half done."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.faults.disk import Fault
from tests.faults.injection import FAULTS, Injector, injector

pytestmark = pytest.mark.sqlite("the disk that fails is that of this process, not of a server")


@pytest.fixture(scope="module", params=["ledger", "log"])
def books(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Injector]:
    with injector(request.param, tmp_path_factory.mktemp(request.param)) as made:
        yield made


@pytest.mark.parametrize("fault", FAULTS)
def test_no_reservation_or_record_is_lost_or_half_there(books: Injector, fault: Fault) -> None:
    assert books.sweep(fault) > 5
