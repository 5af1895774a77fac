"""The page of a federated model: who is protected from whom, and what each site has stated."""

from __future__ import annotations

from llmos.reports.federated_verification import VerifiedFederation
from llmos.reports.page import page_environment


def render(certificate: VerifiedFederation) -> str:
    """Return the page; only a verified certificate can be shown."""
    template = page_environment().get_template("federated.html")
    return template.render(
        certificate=certificate,
        predicate=certificate.predicate,
        rounds=certificate.rounds,
        parts=list(certificate.parts.values()),
    )
