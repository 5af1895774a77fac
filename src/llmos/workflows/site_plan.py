"""What a site admits of a federated job: the mechanism, its noise, and what policy is asked."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Final

from llmos.data.datasets import DatasetCard
from llmos.engines.dp.plan import AdamWSettings, DPPlan, GaussianClipping
from llmos.errors import InvalidPrivacyParameter
from llmos.federations import invitations
from llmos.federations.invitations import Invitation, SitePlan
from llmos.federations.manifest import Manifest, Masked
from llmos.kernel import accounting
from llmos.kernel.identity import Kind, Principal, Role
from llmos.workflows.calibration import calibrate_noise
from llmos.workflows.parts import Parts

_MILLION: Final = 1_000_000


def coordinator_principal(manifest: Manifest) -> Principal:
    """Return the coordinator as policies see it: a site of another organisation, not a user."""
    name = manifest.coordinator
    return Principal(name, name, frozenset({Role.SITE}), kind=Kind.SERVICE)


def make_plan(manifest: Manifest, card: DatasetCard) -> SitePlan:
    """Fix what this site runs and is charged for: its units and the noise that they need.

    Raises:
        InvalidPrivacyParameter: no unit is left, no noise gives the asked epsilon, or that of all
            sites does not.
    """
    units, privacy = card.units_left, manifest.privacy
    if units < 1:
        raise InvalidPrivacyParameter(f"the units left in {card.name}", units, "at least 1")
    if privacy is None:
        return SitePlan(card.fingerprint, units, None, None)
    batch = min(manifest.local.batch, units)
    if privacy.shared is None:
        noise = calibrate_noise(batch / units, manifest.most_steps, privacy.epsilon, privacy.delta)
    else:
        noise = privacy.shared.multiplier
    plan = SitePlan(card.fingerprint, units, noise, None)
    mechanism = training_plan(manifest, plan).mechanism
    assert mechanism is not None  # noqa: S101 - there is noise
    epsilon = accounting.epsilon(mechanism, privacy.delta)
    if epsilon > privacy.epsilon:
        raise InvalidPrivacyParameter(
            "epsilon",
            epsilon,
            f"at most the job's {privacy.epsilon:g}: with {units} units this site takes more "
            "noise than all share",
        )
    return SitePlan(card.fingerprint, units, noise, epsilon)


def training_plan(manifest: Manifest, plan: SitePlan) -> DPPlan:
    """Return the engine's plan: sampler, noise and the charged mechanism all derive from it."""
    privacy = manifest.privacy
    noisy = privacy is not None and plan.noise_multiplier is not None
    return DPPlan(
        units=plan.units,
        expected_batch_units=float(min(manifest.local.batch, plan.units)),
        steps=manifest.most_steps,
        privacy=GaussianClipping(privacy.clip, plan.noise_multiplier)  # type: ignore[union-attr, arg-type]
        if noisy
        else None,
        max_records_per_unit=manifest.local.max_records_per_unit,
        optimizer=AdamWSettings(learning_rate=manifest.local.learning_rate),
    )


def policy_context(
    job: Invitation, plan: SitePlan, consent: str | None, parts: Parts, *, at: datetime
) -> dict[str, Any]:
    """Return what the site's policy is asked about a job, besides who asks and the dataset.

    The epsilon of the year is that up to the job's admission: what is admitted later is judged with
    it, and ends nothing that was admitted before.

    Args:
        job: that is asked for.
        plan: what it would cost, or what was admitted.
        consent: who approved it, if it takes anybody.
        parts: of the site.
        at: now, or when it was admitted, for what only ends it.
    """
    manifest = job.manifest
    since = at if plan.admitted_at is None else datetime.fromisoformat(plan.admitted_at)
    others = invitations.epsilon_of_year(
        parts.kernel.store, manifest.dataset, since, besides=job.id
    )
    year = others + (plan.epsilon or 0.0)
    context: dict[str, Any] = {
        "purpose": manifest.purpose,
        "method": manifest.adapter.parametrisation,
        "private": manifest.privacy is not None,
        "epsilon_millionths": round((plan.epsilon or 0.0) * _MILLION),
        "epsilon_year_millionths": round(year * _MILLION),
        "minimum_sites": manifest.minimum_sites,
        "secure_aggregation": isinstance(manifest.aggregation, Masked),
        "shared_noise": manifest.shared_noise is not None,
        "hour_utc": at.hour,
    }
    if consent is not None:
        context["consent"] = consent
    return context


def context_of_admission(job: Invitation, parts: Parts) -> dict[str, Any]:
    """Return the context in which a job was admitted, to settle and publish what it has run.

    That takes no data, and must not wait for the hours at which policy admits jobs.
    """
    plan = job.plan
    assert plan is not None  # noqa: S101 - it was admitted
    assert plan.admitted_at is not None  # noqa: S101
    at = datetime.fromisoformat(plan.admitted_at)
    return policy_context(job, plan, plan.consent, parts, at=at)
