"""The system's parts that workflows join: the kernel beside the catalogue of data and models."""

from __future__ import annotations

from dataclasses import dataclass

from llmos.data.datasets import Datasets
from llmos.jobs.jobs import Jobs
from llmos.kernel.identity import Principal
from llmos.kernel.kernel import Kernel
from llmos.models.registry import Registry


@dataclass(frozen=True, slots=True)
class Parts:
    """What a workflow may use; made once by `system.boot`."""

    kernel: Kernel
    datasets: Datasets
    registry: Registry
    jobs: Jobs

    @property
    def who(self) -> Principal:
        """Return who this process acts as."""
        return self.kernel.principal()
