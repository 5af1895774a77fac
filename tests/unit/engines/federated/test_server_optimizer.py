from __future__ import annotations

import numpy as np
import pytest
import safetensors.numpy
import torch

from llmos.engines.federated.server_optimizer import (
    FedAdam,
    FedAvg,
    FedAvgM,
    ServerOptimizer,
    decode,
    encode,
    initial_state,
    step,
    weighted_mean,
)
from llmos.errors import EngineError

START = np.array([1.0, -2.0, 3.0], dtype=np.float32)
MEANS = [np.array(row, dtype=np.float32) for row in ([0.1, 0.0, -1.0], [0.2, 0.5, 0.5], [0, 1, 0])]


def after(optimizer: ServerOptimizer) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    state = initial_state(START, optimizer)
    for mean in MEANS:
        state = step(optimizer, state, mean)
    assert state.round == len(MEANS)
    return state.weights


def test_the_mean_is_weighted() -> None:
    updates = [np.array([1.0, 0.0], dtype=np.float32), np.array([4.0, 9.0], dtype=np.float32)]
    assert weighted_mean(updates, [20, 10]).tolist() == [2.0, 3.0]
    assert weighted_mean(updates[:1], [0.3]).tolist() == [1.0, 0.0]


@pytest.mark.parametrize("weights", [[1, 0], [1, -1], [1, np.nan], [1, np.inf]])
def test_weights_that_are_none_are_refused(weights: list[float]) -> None:
    with pytest.raises(EngineError, match="weights"):
        weighted_mean([START, START], weights)
    with pytest.raises(EngineError, match="updates"):
        weighted_mean([], [])


def test_fedavg_adds_the_mean() -> None:
    np.testing.assert_allclose(after(FedAvg()), START + sum(MEANS), rtol=1e-6)
    np.testing.assert_allclose(after(FedAvg(0.5)), START + 0.5 * sum(MEANS), rtol=1e-6)


def test_fedavgm_is_torchs_sgd_on_the_negative_mean() -> None:
    weights = torch.nn.Parameter(torch.tensor(START))
    peer = torch.optim.SGD([weights], lr=0.7, momentum=0.8)
    for mean in MEANS:
        weights.grad = -torch.tensor(mean)
        peer.step()
    np.testing.assert_allclose(after(FedAvgM(0.7, 0.8)), weights.detach().numpy(), rtol=1e-6)


def test_fedadam_is_algorithm_2_of_reddi_et_al() -> None:
    m, v, x = np.zeros(3), np.full(3, 0.1**2), START.astype(np.float64)
    for mean in MEANS:
        m = 0.9 * m + 0.1 * mean
        v = 0.99 * v + 0.01 * mean.astype(np.float64) ** 2
        x = x + 0.3 * m / (np.sqrt(v) + 0.1)
    found = after(FedAdam(learning_rate=0.3, beta1=0.9, beta2=0.99, adaptivity=0.1))
    np.testing.assert_allclose(found, x, rtol=1e-5)


@pytest.mark.parametrize("optimizer", [FedAvg(), FedAvgM(), FedAdam()], ids=str)
def test_a_stored_state_goes_on_like_an_uninterrupted_one(optimizer: ServerOptimizer) -> None:
    state = initial_state(START, optimizer)
    kept = initial_state(START, optimizer)
    for mean in MEANS:
        state = step(optimizer, state, mean)
        kept = decode(encode(step(optimizer, kept, mean)), entries=3)
    assert kept.round == state.round == 3
    for name in ("weights", "first_moment", "second_moment"):
        assert np.array_equal(getattr(kept, name), getattr(state, name))


def test_a_step_changes_nothing_that_it_was_given() -> None:
    for optimizer in (FedAvg(), FedAvgM(), FedAdam()):
        state = initial_state(START, optimizer)
        before = encode(state)
        step(optimizer, state, MEANS[0])
        assert encode(state) == before


@pytest.mark.parametrize("mean", [np.zeros(2), np.array([0, np.nan, 0]), np.array([0, np.inf, 0])])
def test_a_mean_that_does_not_fit_is_refused(
    mean: np.ndarray[tuple[int], np.dtype[np.float64]],
) -> None:
    with pytest.raises(EngineError, match="does not fit"):
        step(FedAvg(), initial_state(START, FedAvg()), mean.astype(np.float32))


def test_checkpoints_that_are_none_are_refused() -> None:
    whole = encode(initial_state(START, FedAvg()))
    with pytest.raises(EngineError, match="cannot be read"):
        decode(whole[:-1], entries=3)
    with pytest.raises(EngineError, match="another shape"):
        decode(whole, entries=4)
    with pytest.raises(EngineError, match="no state"):
        decode(safetensors.numpy.save({"weights": START}), entries=3)
    tensors = safetensors.numpy.load(whole)
    with pytest.raises(EngineError, match="no state"):
        decode(safetensors.numpy.save({**tensors, "round": np.zeros(2, dtype=np.int64)}), entries=3)
    with pytest.raises(EngineError, match="another shape"):
        decode(safetensors.numpy.save({**tensors, "weights": START.astype(np.float64)}), entries=3)
    with pytest.raises(EngineError, match="not finite"):
        decode(safetensors.numpy.save({**tensors, "weights": START * np.inf}), entries=3)
