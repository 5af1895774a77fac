"""What the coordinator does with a round's updates: their mean, then a step of the global vector.

State in, state out. An update is what a site adds to the global vector: its own minus the global
one. `FedAvg` adds the mean (McMahan et al. 2017, arXiv:1602.05629), `FedAvgM` with momentum (Hsu et
al. 2019, arXiv:1909.06335, section 4.3), `FedAdam` scales each entry (Reddi et al. 2020,
arXiv:2003.00295, Algorithm 2). After clipped and noised updates these cost no more privacy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from safetensors import SafetensorError

from llmos.errors import EngineError

_VECTORS: Final = ("weights", "first_moment", "second_moment")


@dataclass(frozen=True, slots=True)
class FedAvg:
    """The mean of the updates, times a learning rate."""

    learning_rate: float = 1.0


@dataclass(frozen=True, slots=True)
class FedAvgM:
    """FedAvg with momentum."""

    learning_rate: float = 1.0
    momentum: float = 0.9


@dataclass(frozen=True, slots=True)
class FedAdam:
    """Adam on the mean of the updates, without bias correction, as published."""

    learning_rate: float = 1e-2
    beta1: float = 0.9
    beta2: float = 0.99
    adaptivity: float = 1e-3  # tau: added to the root of the second moment


ServerOptimizer = FedAvg | FedAvgM | FedAdam


@dataclass(frozen=True, slots=True, eq=False)
class ServerState:
    """The global vector and the optimizer's memory, (P,) each."""

    round: int  # rounds that went into it
    weights: NDArray[np.float32]
    first_moment: NDArray[np.float32]
    second_moment: NDArray[np.float32]


def initial_state(weights: NDArray[np.float32], optimizer: ServerOptimizer) -> ServerState:
    """Return the state before the first round (v_-1 = tau^2: Reddi et al., Algorithm 2)."""
    start = optimizer.adaptivity**2 if isinstance(optimizer, FedAdam) else 0.0
    second = np.full(weights.shape, start, dtype=np.float32)
    return ServerState(0, weights.astype(np.float32), np.zeros_like(second), second)


def weighted_mean(
    updates: Sequence[NDArray[np.float32]], weights: Sequence[float]
) -> NDArray[np.float32]:
    """Return sum(n_k x_k) / sum(n_k), added in the order given and in float64.

    Raises:
        EngineError: there is nothing to average, or a weight is none.
    """
    if not updates or not all(math.isfinite(w) and w > 0 for w in weights):
        raise EngineError("a mean needs updates, and weights that are finite and above 0")
    total = np.zeros(updates[0].shape, dtype=np.float64)
    for update, weight in zip(updates, weights, strict=True):
        total += weight * update.astype(np.float64)
    return (total / math.fsum(weights)).astype(np.float32)


def step(optimizer: ServerOptimizer, state: ServerState, mean: NDArray[np.float32]) -> ServerState:
    """Return the state after a round whose updates have this mean.

    Raises:
        EngineError: the mean has another shape, or is not finite.
    """
    if mean.shape != state.weights.shape or not np.isfinite(mean).all():
        raise EngineError("the mean of the updates does not fit the global vector")
    first, second = state.first_moment, state.second_moment
    match optimizer:
        case FedAvg():
            direction = mean
        case FedAvgM():
            direction = first = np.float32(optimizer.momentum) * first + mean
        case FedAdam():
            beta1, beta2 = np.float32(optimizer.beta1), np.float32(optimizer.beta2)
            first = beta1 * first + np.float32(1 - optimizer.beta1) * mean
            second = beta2 * second + np.float32(1 - optimizer.beta2) * (mean * mean)
            root = np.sqrt(second).astype(np.float32)
            direction = first / (root + np.float32(optimizer.adaptivity))
    weights = state.weights + np.float32(optimizer.learning_rate) * direction
    return ServerState(state.round + 1, weights, first, second)


def encode(state: ServerState) -> bytes:
    """Write a state as safetensors, for a checkpoint."""
    vectors = {name: np.ascontiguousarray(getattr(state, name)) for name in _VECTORS}
    return safetensors.numpy.save({"round": np.array([state.round], dtype=np.int64), **vectors})


def decode(checkpoint: bytes, *, entries: int) -> ServerState:
    """Read a state back.

    Raises:
        EngineError: it is unreadable, of another shape, or not finite.
    """
    try:
        tensors = safetensors.numpy.load(checkpoint)
    except SafetensorError as error:
        raise EngineError(f"the checkpoint cannot be read: {error}") from error
    if set(tensors) != {"round", *_VECTORS} or tensors["round"].shape != (1,):
        raise EngineError("the checkpoint is no state of a coordinator")
    vectors = [tensors[name] for name in _VECTORS]
    if any(v.shape != (entries,) or v.dtype != np.float32 for v in vectors):
        raise EngineError("the checkpoint belongs to an update of another shape")
    if not all(np.isfinite(v).all() for v in vectors):
        raise EngineError("the checkpoint holds numbers that are not finite")
    return ServerState(int(tensors["round"][0]), *vectors)
