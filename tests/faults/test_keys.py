"""Objects and keys on a disk that fails: every object is readable or was never there."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.faults.disk import Fault
from tests.faults.injection import FAULTS, Injector, injector

pytestmark = pytest.mark.sqlite("the disk that fails is that of this process, not of a server")


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Injector]:
    with injector("keys", tmp_path_factory.mktemp("keys")) as made:
        yield made


@pytest.mark.parametrize("fault", FAULTS)
def test_no_object_or_key_is_lost_or_half_there(keys: Injector, fault: Fault) -> None:
    assert keys.sweep(fault) > 10
