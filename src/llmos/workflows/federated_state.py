"""What a federated job has learnt so far: the server optimiser's state, encrypted in the vault."""

from __future__ import annotations

import hashlib
from functools import cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

from llmos.engines.federated import server_optimizer
from llmos.engines.federated.server_optimizer import FedAdam, FedAvg, FedAvgM, ServerState
from llmos.federations.manifest import Server, ServerOptimizer
from llmos.federations.register import FederatedJob
from llmos.kernel.identity import Principal
from llmos.kernel.policy import Action
from llmos.workflows.parts import Parts

CHECKPOINT_OBJECT: Final = "federated-checkpoint"  # the vault's kind of object


def load(job: FederatedJob, who: Principal, parts: Parts) -> ServerState:
    """Return the state of a job's newest round, or that before the first one.

    Raises:
        PermissionDenied: policy does not let `who` coordinate.
        TamperedObject, EngineError: the checkpoint was changed.
    """
    kernel, manifest = parts.kernel, job.manifest
    if job.checkpoint is None:
        return server_optimizer.initial_state(
            _start(manifest.parameters), optimizer(manifest.server)
        )
    with kernel.monitor.admit(
        who, Action.COORDINATE, kernel.home, key=job.id, objects={job.checkpoint}, charge=None
    ) as grant:
        content = kernel.vault.read(job.checkpoint, CHECKPOINT_OBJECT, grant)
    return server_optimizer.decode(content, entries=manifest.parameters)


@cache
def start_sha256(entries: int) -> str:
    """Return the SHA-256, in hex, of the weights (P,) that every job's first round starts from.

    Weights that another job has learnt bring losses that are none of this job's.
    """
    return hashlib.sha256(_bytes(_start(entries))).hexdigest()


def optimizer(asked: Server) -> server_optimizer.ServerOptimizer:
    """Return the server optimiser that a manifest asks for."""
    rate = asked.learning_rate
    match asked.optimizer:
        case ServerOptimizer.AVERAGE:
            return FedAvg(rate)
        case ServerOptimizer.MOMENTUM:
            return FedAvgM(rate)
        case ServerOptimizer.ADAM:
            return FedAdam(rate)


def weights_bytes(state: ServerState) -> bytes:
    """Return the global weights (P,) as float32, little-endian: what sites fetch."""
    return _bytes(state.weights)


def weights_sha256(state: ServerState) -> str:
    """Return the SHA-256 of `weights_bytes`, in hex."""
    return hashlib.sha256(weights_bytes(state)).hexdigest()


def _start(entries: int) -> NDArray[np.float32]:
    """Return zeros (P,): B, or R, is zero, so that it is the base model as it is."""
    return np.zeros(entries, dtype=np.float32)


def _bytes(weights: NDArray[np.float32]) -> bytes:
    return weights.astype("<f4").tobytes()
