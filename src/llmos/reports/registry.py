"""The certificate as a record of the DP Deployments Registry, with who stands for each field.

The record has the form of `schemas/deployments-schema.yaml` of opendp/deployments-registry-data
(see `SCHEMA`; tiers after arXiv:2509.13509). A field is the system's, a person's, or open; the tier
is the highest one of which no field is open, and 0 while even the first is incomplete.
"""

from __future__ import annotations

import re
from typing import Any, Final

from llmos.reports.registry_fields import Field, fields_of
from llmos.reports.sentences import Predicate

SCHEMA: Final = {
    "repository": "https://github.com/opendp/deployments-registry-data",
    "path": "schemas/deployments-schema.yaml",
    "commit": "057e5d81cf60150dd3307e0cf4504b957802fb3b",
}
HIGHEST_TIER: Final = 3
_EVIDENCE: Final = "Authorized organizational attestation"


def registry(predicate: Predicate) -> dict[str, Any]:
    """Return the record, its tier, and for each field who stands for it.

    Raises:
        KeyError, ValueError, TypeError: the predicate lacks a record.
    """
    answers = predicate["answers"]
    fields = fields_of(predicate)
    standings = [field.standing(answers) for field in fields]
    open_tiers = [found["tier"] for found in standings if found["missing"]]
    tier = min([HIGHEST_TIER, *(n - 1 for n in open_tiers)])
    return {
        "schema": SCHEMA,
        "tier": tier,
        "complete": tier == HIGHEST_TIER,
        "missing": list(dict.fromkeys(name for s in standings for name in s["missing"])),
        "fields": standings,
        "record": _record(predicate, fields, tier),
    }


def _record(p: Predicate, fields: tuple[Field, ...], tier: int) -> dict[str, Any]:
    deployment: dict[str, Any] = {}
    for field in fields:
        if field.value is not None:
            group, name = field.path.split("/")
            deployment.setdefault(group, {})[name] = field.value
    authors = dict.fromkeys(answer["answered_by"] for answer in p["answers"].values())
    deployment["administrative"] = {
        "evidence_sources": {
            "llmos_certificate": {
                "evidence_source_type": _EVIDENCE,
                "misc": {
                    "title": f"Privacy certificate of {p['deployment']['model']}",
                    "author": p["issuer"],
                    "note": "signed and logged; check it offline with `llmos verify`",
                    "year": p["issued_at"][:4],
                },
            }
        },
        "status": "Draft",
        "registry_authors": list(authors),
    } | ({"tier": tier} if tier else {})
    curator = p["answers"].get("curator", {"answer": p["issuer"]})["answer"]
    words = f"{p['deployment']['model']} {curator} {p['issued_at'][:4]}".lower()
    slug = re.sub(r"[^a-z0-9]+", "-", words).strip("-")
    return {"url_slug": slug, "deployment": deployment}
