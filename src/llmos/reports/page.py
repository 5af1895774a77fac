"""The certificate and the leak reports as one self-contained HTML page for people."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from llmos.errors import VerificationFailed
from llmos.kernel import accounting
from llmos.privacy import PrivacyLoss
from llmos.reports import inversions, plots
from llmos.reports.arms import Arm, Attack, Secrets, at_least, at_most, read_arm
from llmos.reports.conclusions import FIXED
from llmos.reports.evidence import CALCULATED, LOGGED
from llmos.reports.sentences import Predicate, Sentence
from llmos.reports.verification import VerifiedCertificate

SPENT_POINTS: Final = 6  # of the curve of epsilon over steps; each costs one accounting

# Ranges of "How to DP-fy ML" (arXiv:2303.00654), section 5.1.
_TIERS: Final = (
    (1.0, "a strong formal guarantee"),
    (10.0, "a reasonable guarantee, the range most deployed models lie in"),
    (math.inf, "weak as a formal guarantee; rely on what was measured as well"),
)


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table that sets the models side by side."""

    label: str
    chance: str  # what a model that betrays nothing would show
    values: tuple[str, ...]  # one per model


@dataclass(frozen=True, slots=True)
class Link:
    """A place on the page, and in words what is there."""

    target: str
    label: str


_LINKS: Final = {
    "records": Link("records", "log entries"),
    "answers": Link("questions", "open question"),
    "budget": Link("layer-guarantee", "ledger"),
    "measured_leakage": Link("measured", "measurement"),
    "issuer": Link("home", "key of the home"),
}


def page_environment() -> Environment:
    """Return what pages are made with: everything that is filled in is escaped."""
    environment = Environment(
        loader=PackageLoader("llmos.reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"figure": figure, "at_most": at_most, "at_least": at_least}
    return environment


def render(
    certificate: VerifiedCertificate | None,
    documents: Sequence[Mapping[str, Any]],
    *,
    reason: str | None = None,
) -> str:
    """Return the page; only a verified certificate can be shown, or none.

    Args:
        certificate: of the model whose leak report comes first.
        documents: leak reports as JSON documents, one per model to show side by side.
        reason: why there is no certificate.

    Raises:
        MeasurementError: a document is no leak report.
        VerificationFailed: the certified model's leak report is not the one it was certified with,
            or the certificate is of version 1, which has no sentences to show.
    """
    if certificate is not None and certificate.records_checked is None:
        raise VerificationFailed(
            "a certificate of version 1 has no page any more", hint="make the report again"
        )
    arms = [read_arm(document) for document in documents]
    if certificate is not None:
        for arm in arms:
            _check_arm(arm, certificate)
    environment = page_environment()
    environment.filters["evidence"] = evidence
    return environment.get_template("page.html").render(
        title=certificate.model if certificate else ", ".join(arm.model for arm in arms),
        certificate=certificate,
        reason=reason,
        columns=inversions.COLUMNS,
        predicate=certificate.predicate if certificate else None,
        sentence=promise(certificate.loss) if certificate else "",
        tier=tier(certificate.loss.epsilon) if certificate else "",
        arms=arms,
        rows=comparison(arms),
        drawings=_drawings(certificate, arms),
    )


def figure(value: object) -> str:
    """Write one value for people: floats short, lists joined, nothing as a dash.

    >>> [figure(v) for v in (1e-06, 0.25, 3, None, True, [1, "x"])]
    ['1e-6', '0.25', '3', '–', 'yes', '1, x']
    """
    match value:
        case None:
            return "–"
        case bool():
            return "yes" if value else "no"
        case float():
            return f"{value:.4g}".replace("e-0", "e-").replace("e+0", "e+").replace("inf", "∞")
        case list() | tuple():
            return ", ".join(figure(item) for item in value)
        case _:
            return str(value)


def evidence(said: Sentence, predicate: Predicate) -> list[Link]:
    """Return where on the page what a sentence rests on can be looked up, each place once."""
    links = [_link(pointer, predicate) for pointer in said["basis"]]
    return list(dict.fromkeys(links))


def _link(pointer: str, predicate: Predicate) -> Link:
    section, name = [*pointer.split("/")[1:], ""][:2]
    record = name if section == "records" else _record_of(pointer)
    if record in predicate["records"]:
        return Link(f"record-{record}", f"log entry {predicate['records'][record]['log_index']}")
    if section == "answers" and name:
        return Link(f"question-{name}", "said by a person")
    if pointer in CALCULATED:
        return Link("home", "calculated again")
    if pointer in FIXED or section == "not_protected":
        return Link("not-protected", "said of the program")
    return _LINKS.get(section, Link("home", "signed by the home"))


def _record_of(pointer: str) -> str:
    """Return the record that holds what stands at a pointer, or what it is a part of."""
    while pointer and pointer not in LOGGED:
        pointer = pointer.rpartition("/")[0]
    return LOGGED.get(pointer, "")


def tier(epsilon: float) -> str:
    """Say in words how strong an epsilon is."""
    return next(words for limit, words in _TIERS if epsilon <= limit)


def promise(loss: PrivacyLoss) -> str:
    """Say what the guarantee means for one guess about one unit.

    From 50:50, (epsilon, delta) lets nobody be right more often than (e^eps + delta) / (1 + e^eps)
    (Kairouz, Oh, Viswanath 2015, arXiv:1311.0776, for the trade-off region).
    """
    odds = math.exp(min(loss.epsilon, 700.0))
    right = (odds + loss.delta) / (1 + odds)
    return (
        f"Someone who knows everything but whether one given {loss.unit.column} was in the data, "
        f"and holds that to be even, can after studying this model be right in at most "
        f"{at_most(100 * right)} % of cases."
    )


def comparison(arms: Sequence[Arm]) -> list[Row]:
    """Set the models side by side, line by line."""

    def row(label: str, chance: str, value: Callable[[Arm], str]) -> Row:
        return Row(label, chance, tuple(value(arm) for arm in arms))

    def secret(label: str, chance: str, value: Callable[[Secrets], str]) -> Row:
        return row(label, chance, lambda arm: "–" if arm.secrets is None else value(arm.secrets))

    rows = [
        row("Guaranteed: epsilon at most", "", _upper),
        row("Measured: epsilon at least", "0", _lower),
        row("Right guesses about coin flips", "half", lambda a: f"{a.correct} of {a.guesses}"),
        secret("Planted secrets given back", "0 %", lambda s: _percent(s.extraction_planted)),
        secret("Unplanted secrets given back", "0 %", lambda s: _percent(s.extraction_unplanted)),
        secret("AUC on secrets", "0.5", lambda s: _auc(s.attack)),
        secret("Exposure of secrets, bits", "", _exposure),
        row("AUC on records, gain over base (headline)", "0.5", lambda a: _auc(a.records)),
        row("AUC on records, raw loss", "0.5", lambda a: _auc(a.records_raw)),
        row("True positives at 1 % false ones", "1 %", lambda a: _tpr(a.records)),
        row("Perplexity, records of others", "", lambda a: figure(a.heldout_perplexity)),
        row("Perplexity, training records", "", lambda a: figure(a.member_perplexity)),
        row("Perplexity of the base model", "", lambda a: figure(a.base_perplexity)),
        row("Answers right word for word", "", lambda a: _percent(a.heldout_exact)),
        row("... by the base model", "", lambda a: _percent(a.base_heldout_exact)),
    ]
    if any(arm.heldout_category is not None for arm in arms):
        rows.append(row("Category right", "", _category))
    return rows


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _exposure(secrets: Secrets) -> str:
    chance, most = secrets.chance_exposure_bits, secrets.largest_exposure_bits
    return f"{secrets.exposure_bits:.2f} (chance {chance:.2f}, most {most:.2f})"


def _upper(arm: Arm) -> str:
    return "–" if arm.epsilon is None else at_most(arm.epsilon)


def _lower(arm: Arm) -> str:
    if arm.epsilon_lower is None or arm.confidence is None:
        return "–"
    return f"{at_least(arm.epsilon_lower)} ({arm.confidence:.0%})"


def _auc(attack: Attack) -> str:
    margin = plots.CONFIDENCE_Z * attack.standard_error
    spread = f" ± {margin:.3f}" if margin else ""  # no overlap leaves no variance to estimate
    return f"{attack.auc:.3f}{spread} ({attack.members} against {attack.nonmembers})"


def _tpr(attack: Attack) -> str:
    if attack.tpr_at_1_percent_fpr is None:
        return f"– (needs 100 non-members, has {attack.nonmembers})"
    return _percent(attack.tpr_at_1_percent_fpr)


def _category(arm: Arm) -> str:
    return "–" if arm.heldout_category is None else _percent(arm.heldout_category)


def _check_arm(arm: Arm, certificate: VerifiedCertificate) -> None:
    measured = certificate.predicate["measured_leakage"]
    if arm.digest != certificate.digest or measured is None:
        return
    if measured["leak_report_sha256"] != arm.report_sha256:
        raise VerificationFailed(
            f"the leak report of {arm.model} is not the one that its certificate was made with",
            hint="make the report again after measuring",
        )


def _drawings(certificate: VerifiedCertificate | None, arms: Sequence[Arm]) -> dict[str, Markup]:
    """Draw what there is to draw; the SVG is our own and needs no escaping."""
    drawn: dict[str, str] = {}
    if arms:
        drawn["comparison"] = plots.leak_comparison(arms)
    if any(arm.secrets is not None for arm in arms):
        drawn["secrets"] = plots.secret_distributions(arms)
        drawn["scale"] = plots.epsilon_scale(arms)
    if certificate is not None and certificate.mechanism.steps > 0:
        drawn["spent"] = plots.epsilon_spent(_spent(certificate), certificate.loss.epsilon)
    return {name: Markup(svg) for name, svg in drawn.items()}  # noqa: S704


def _spent(certificate: VerifiedCertificate) -> list[tuple[int, float]]:
    mechanism, loss = certificate.mechanism, certificate.loss
    counts = sorted(
        {math.ceil(mechanism.steps * part / SPENT_POINTS) for part in range(1, SPENT_POINTS + 1)}
    )
    return [
        (steps, accounting.epsilon(mechanism.after(steps), loss.delta, loss.neighboring))
        for steps in counts
    ]
