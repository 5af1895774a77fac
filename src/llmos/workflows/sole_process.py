"""One process a home for a site's part in a federation, and one for a coordinator.

Two agents would each take the other's steps for their own and charge one training for two, whose
noises differ; two coordinators would give two attempts one number. The lease ends with the process,
however that ends.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

from llmos.errors import JobBusy
from llmos.jobs import lease
from llmos.kernel.kernel import Kernel


def as_site(organisation: str, kernel: Kernel) -> AbstractContextManager[None]:
    """Be the only process that acts for this home in an organisation's federation, for a block.

    Raises:
        JobBusy: another process does, when the block is entered.
    """
    busy = JobBusy(
        f"this home takes part in the federation of {organisation} by another process already",
        hint="stop that one by Ctrl-C first: `llmos site up` or `llmos site join` runs there",
    )
    return _hold(f"site.{organisation}", busy, kernel)


def as_coordinator(kernel: Kernel) -> AbstractContextManager[None]:
    """Be the only coordinator of this home, for a block.

    Raises:
        JobBusy: another process is, when the block is entered.
    """
    busy = JobBusy(
        "another process runs this home's coordinator already",
        hint="stop that one by Ctrl-C first: `llmos coordinator up` runs there",
    )
    return _hold("coordinator", busy, kernel)


def _hold(name: str, busy: JobBusy, kernel: Kernel) -> AbstractContextManager[None]:
    return lease.hold(lease.place(kernel.store, kernel.config.home), name, busy)
