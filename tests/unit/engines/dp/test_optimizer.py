"""AdamW with and without the correction for noise."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from llmos.engines.dp.optimizer import ProximalTerm, TrainingState, adamw, noise_variance
from llmos.engines.dp.plan import AdamWSettings, DPPlan, GaussianClipping

SETTINGS = AdamWSettings(weight_decay=0.1, beta2=0.95)


def test_without_noise_it_is_adamw() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(50, generator=generator)
    parameter = torch.nn.Parameter(weights.clone())
    betas = (SETTINGS.beta1, SETTINGS.beta2)
    theirs = torch.optim.AdamW([parameter], lr=0.01, betas=betas, weight_decay=0.1)
    state = TrainingState.start(weights)
    for _ in range(7):
        gradient = torch.randn(50, generator=generator)
        parameter.grad = gradient.clone()
        theirs.step()
        state = adamw(state, gradient, SETTINGS, rate=0.01, variance=0.0)
    assert state.step == 7
    torch.testing.assert_close(state.weights, parameter.detach(), rtol=1e-5, atol=1e-6)


def test_the_state_before_is_left_as_it_was() -> None:
    before = TrainingState.start(torch.ones(3))
    adamw(before, torch.ones(3), SETTINGS, rate=0.1, variance=0.0)
    assert before.step == 0
    assert torch.equal(before.weights, torch.ones(3))
    assert not before.first_moment.any()


def test_the_variance_of_the_noise_is_subtracted() -> None:
    settings = AdamWSettings(beta1=0.0, beta2=0.0, floor=0.25)
    gradient = torch.tensor([5.0, -5.0])
    after = adamw(TrainingState.start(torch.zeros(2)), gradient, settings, rate=1.0, variance=16.0)
    torch.testing.assert_close(after.weights, torch.tensor([-5 / 3, 5 / 3]))  # sqrt(25 - 16) = 3


def test_what_is_left_stays_above_the_floor() -> None:
    settings = AdamWSettings(beta1=0.0, beta2=0.0, floor=0.25)
    gradient = torch.tensor([1.0, 4.0])
    after = adamw(TrainingState.start(torch.zeros(2)), gradient, settings, rate=1.0, variance=16.0)
    torch.testing.assert_close(after.weights, torch.tensor([-0.5, -2.0]))  # sqrt(0.25 x 16) = 2


def test_variance_is_that_of_the_noisy_mean() -> None:
    plan = DPPlan(100, 10, 5, GaussianClipping(0.5, 3.0))
    assert noise_variance(plan) == pytest.approx((3.0 * 0.5 / 10) ** 2)
    assert noise_variance(replace(plan, privacy=None)) == 0


def test_the_proximal_term_pulls_back_to_the_centre() -> None:
    centre = torch.tensor([1.0, -2.0])
    weights = torch.tensor([3.0, -2.5], requires_grad=True)
    (0.3 / 2 * (weights - centre).square().sum()).backward()  # type: ignore[no-untyped-call]
    found = ProximalTerm(0.3, centre).gradient(weights.detach())
    torch.testing.assert_close(found, weights.grad)
    assert torch.equal(centre, torch.tensor([1.0, -2.0]))
