from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from tests.unit.reports.conftest import ALL_ANSWERS, with_inversion

from llmos.errors import MeasurementError, VerificationFailed
from llmos.privacy import PrivacyLoss, PrivacyUnit
from llmos.reports.facts import CertificateFacts
from llmos.reports.page import evidence, promise, render, tier
from llmos.reports.questions import Answer
from llmos.reports.verification import VerifiedCertificate, verify_bundle

Documents = Callable[..., dict[str, Any]]
VOID = {"meta", "br", "link", "input", "img"}


class Structure(HTMLParser):
    """Collects what a browser would see, and checks that every element is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.ids: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="session")
def verified(certificate: bytes, public_keys: str) -> VerifiedCertificate:
    return verify_bundle(certificate, public_keys)


@pytest.fixture(scope="session")
def page(verified: VerifiedCertificate, facts: CertificateFacts, make_document: Documents) -> str:
    assert facts.leakage is not None
    return render(verified, [facts.leakage.document, make_document("plain", None, leaking=True)])


def test_the_page_is_whole_and_closed(page: str) -> None:
    structure = Structure(page)
    assert structure.open == []
    assert structure.tags.count("svg") == 4
    assert structure.tags.count("h1") == 1


def test_the_page_asks_nothing_of_anyone(page: str) -> None:
    structure = Structure(page)
    assert not {"script", "img", "link", "iframe", "object", "form"} & set(structure.tags)
    assert not [name for name, _ in structure.attributes if name.startswith("on")]
    links = [v for name, v in structure.attributes if name in {"href", "src", "xlink:href"}]
    assert links
    assert all(v is not None and v.startswith("#") for v in links)
    assert not re.search(r"url\((?!#)|@import", page)


def test_every_reference_inside_the_figures_has_its_target(page: str) -> None:
    structure = Structure(page)
    used = {
        (v or "")[1:] for name, v in structure.attributes if name in {"href", "xlink:href"}
    } | set(re.findall(r"url\(#([^)]+)\)", page))
    assert used <= set(structure.ids)
    assert len(structure.ids) == len(set(structure.ids))


def test_the_page_says_what_the_certificate_says(page: str, verified: VerifiedCertificate) -> None:
    text = Structure(page).text
    assert verified.loss.epsilon == pytest.approx(1.0747, abs=1e-3)
    assert "ε ≤ 1.08" in text  # rounded up: the page may not promise more than was proven
    assert "δ = 1e-5, per patient_id" in text
    for said in (
        verified.digest,
        "sensitive",
        "AES-256-CTR",
        "Poisson over units",
        "25.0 % is spent",
        "100.0 %",  # of the plain model's secrets
        *verified.predicate["not_protected"],
        *(s["text"] for layer in verified.predicate["assessment"] for s in layer["sentences"]),
        *(hazard["hazard"] for hazard in verified.predicate["hazards"]),
        *(question["question"] for question in verified.predicate["questions"]),
        "tier 0 of 3",
        "Patients' written consent of 2025.",
    ):
        assert str(said) in text
    assert "Not for production" not in text


def test_the_sections_follow_the_pyramid_from_its_top(page: str) -> None:
    ids = Structure(page).ids
    order = ["guarantee", "algorithms", "utility", "security", "side-channels", "data"]
    places = [ids.index(f"layer-{name}") for name in order]
    assert places == sorted(places)
    assert places[-1] < ids.index("hazards") < ids.index("questions") < ids.index("registry")


def test_each_sentence_links_to_what_it_rests_on(page: str, verified: VerifiedCertificate) -> None:
    links = {v for name, v in Structure(page).attributes if name == "href"}
    assert {f"#record-{name}" for name in verified.predicate["records"]} <= links
    assert {"#question-consent", "#questions", "#home", "#measured", "#not-protected"} <= links


@pytest.mark.parametrize(
    ("pointer", "label"),
    [
        ("/data/units", "log entry 12"),
        ("/algorithm/mechanism/steps", "log entry 14"),
        ("/measured_leakage/verdict", "log entry 16"),
        ("/measured_leakage/utility/heldout_loss", "measurement"),
        ("/guarantee/epsilon", "calculated again"),
        ("/guarantee/theorem", "said of the program"),
        ("/not_protected/3", "said of the program"),
        ("/budget/spent", "ledger"),
        ("/answers/consent/answer", "said by a person"),
        ("/answers", "open question"),
        ("/implementation/randomness", "signed by the home"),
    ],
)
def test_what_stands_behind_a_word_is_called_by_its_name(
    pointer: str, label: str, verified: VerifiedCertificate
) -> None:
    assert [link.label for link in evidence({"basis": [pointer]}, verified.predicate)] == [label]


def test_a_complete_record_is_called_so(
    make_bundle: Callable[..., bytes], facts: CertificateFacts, public_keys: str
) -> None:
    answered = verify_bundle(make_bundle(replace(facts, answers=ALL_ANSWERS)), public_keys)
    text = Structure(render(answered, [])).text
    assert "tier 3, complete" in text
    assert "14 of 14 are answered" in text


def test_a_certificate_of_version_1_has_no_page() -> None:
    folder = Path(__file__).parents[2] / "vectors" / "certificates" / "v1"
    old = verify_bundle(
        (folder / "private.certificate.json").read_bytes(), (folder / "home.pub").read_text()
    )
    with pytest.raises(VerificationFailed, match="version 1 has no page"):
        render(old, [])


def test_the_same_input_gives_the_same_page(
    page: str, verified: VerifiedCertificate, facts: CertificateFacts, make_document: Documents
) -> None:
    assert facts.leakage is not None
    again = render(verified, [facts.leakage.document, make_document("plain", None, leaking=True)])
    assert again == page


def test_a_seeded_training_is_marked(
    make_bundle: Callable[..., bytes], facts: CertificateFacts, public_keys: str
) -> None:
    seeded = replace(facts, training=replace(facts.training, production=False))
    assert "Not for production" in render(verify_bundle(make_bundle(seeded), public_keys), [])


HOSTILE = '<script>alert("$x$")</script>&\'"'


def test_names_cannot_break_out_of_the_page(
    make_bundle: Callable[..., bytes],
    facts: CertificateFacts,
    public_keys: str,
    make_document: Documents,
) -> None:
    hostile = replace(
        facts,
        leakage=None,
        answers={"consent": Answer(HOSTILE, HOSTILE)},
        model=replace(facts.model, name=HOSTILE),
        training=replace(
            facts.training,
            parameters={"expected_batch_units": 90, HOSTILE: HOSTILE},
            dtype_path="{0}" + HOSTILE,
        ),
        dataset=replace(facts.dataset, name=HOSTILE, purposes=(HOSTILE,)),
        budget=replace(facts.budget, charged={HOSTILE: facts.budget.charged["notes"]}),
    )
    certificate = verify_bundle(make_bundle(hostile, resource=f"Model::{HOSTILE}"), public_keys)
    page = render(certificate, [make_document(HOSTILE, None, leaking=False)])
    structure = Structure(page)
    assert "script" not in structure.tags
    assert HOSTILE in structure.text
    assert "{0}" + HOSTILE in structure.text
    assert structure.open == []


def test_without_a_certificate_nothing_is_claimed(make_document: Documents) -> None:
    text = Structure(render(None, [make_document("plain", None, leaking=True)])).text
    assert "No guarantee." in text
    assert "verified" not in text


def test_with_a_guarantee_and_no_certificate_the_page_says_why(
    make_document: Documents, loss: PrivacyLoss
) -> None:
    text = Structure(render(None, [make_document("m", loss, leaking=False)], reason="a & b")).text
    assert "No guarantee." not in text
    assert "No certificate.\na & b. Nothing on this page is certified" in text
    assert "1.08" in text


def test_what_messages_betray_is_a_section_of_the_page(make_document: Documents) -> None:
    plain = make_document("plain", None, leaking=True)
    assert "messages betray" not in render(None, [plain])
    structure = Structure(render(None, [plain, with_inversion({**plain}, 0.3)]))
    text = " ".join(structure.text.split())
    for seen in (
        "What this site's messages betray: plain",
        "Verdict on the masks: PASS.",
        "gradient, in the clear (control)100.0% of 901.00%1e-091.000",
        "one step's update, in the clear",
        "gradient as integers, before the mask",
        "gradient behind the mask100.0% of 901.00%0.31.000",
        "one private step's update, in the clear",
        "The coordinator of this job sees: gradient behind the mask.",
        "8 of 9 records were used",
        "at most 15 distinct tokens",
        "exact in the row 'gradient behind the mask'",
        "p = 0.5 over 123,456.",
    ):
        assert seen in text
    assert structure.ids.count("messages-1") == 1
    assert structure.open == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"p_value": 1e-9}, "Verdict on the masks: FAIL. The masks do not hide"),
        ({"aggregation": "plain"}, "NO-MASKS. The job has no masks: its coordinator sees each"),
        ({"arms": ()}, "PROVES-NOTHING. Without the mask the attack does not recover enough"),
    ],
)
def test_a_verdict_that_is_no_pass_cannot_be_overlooked(
    make_document: Documents, changes: dict[str, Any], said: str
) -> None:
    document = with_inversion(make_document("plain", None, leaking=True), **changes)
    page = render(None, [document])
    assert said in " ".join(Structure(page).text.split())
    assert page.count('class="alarm"') == (2 if "p_value" in changes else 1)


def test_names_in_an_inversion_report_cannot_break_out(make_document: Documents) -> None:
    document = with_inversion(make_document(HOSTILE, None, leaking=True))
    structure = Structure(render(None, [document]))
    assert "script" not in structure.tags
    assert f"messages betray: {HOSTILE}" in structure.text


def test_a_model_without_canaries_has_a_page(make_document: Documents) -> None:
    text = Structure(render(None, [make_document("m", None, leaking=False, canaries=False)])).text
    assert "AUC on records" in text


def test_another_leak_report_than_the_certified_one_is_refused(
    verified: VerifiedCertificate, facts: CertificateFacts
) -> None:
    assert facts.leakage is not None
    better = {**facts.leakage.document, "bound": None}
    with pytest.raises(VerificationFailed, match="not the one"):
        render(verified, [better])


@pytest.mark.parametrize("document", [{}, {"schema": "llmos.leak-report/v1"}])
def test_what_is_no_leak_report_is_refused(document: dict[str, Any]) -> None:
    with pytest.raises(MeasurementError):
        render(None, [document])


@pytest.mark.parametrize(
    ("epsilon", "percent"), [(1e-12, "50.01"), (math.log(3), "75"), (8.0, "99.97")]
)
def test_the_promise_is_in_numbers_that_one_can_check(epsilon: float, percent: str) -> None:
    assert f"at most {percent} %" in promise(PrivacyLoss(epsilon, 0.0, PrivacyUnit("id")))


def test_large_epsilons_are_called_weak() -> None:
    assert "strong" in tier(1.0)
    assert "reasonable" in tier(8.0)
    assert "weak" in tier(10.5)
    assert "weak" in tier(math.inf)
