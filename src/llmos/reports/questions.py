"""What no record of the system can answer: the questions, and people's signed-off answers to them.

A certificate shows an answer as what a person said, with the name that was given for it. The system
checks neither the answer nor the name; the principal who put them in is the actor of the log entry.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

from llmos.errors import DataError

LONGEST_ANSWER: Final = 4000  # characters
LONGEST_NAME: Final = 200


@dataclass(frozen=True, slots=True)
class Question:
    """One question, why it matters and who should answer it."""

    id: str
    question: str
    why: str
    who: str
    choices: tuple[str, ...] = ()  # where the registry takes only certain words


@dataclass(frozen=True, slots=True)
class Answer:
    """What a person said."""

    answer: str
    answered_by: str  # name and function, as the person signs


# Part of the predicate's version 2: see reports.sentences. The choices are the registry's.
QUESTIONS: Final = (
    Question(
        "curator",
        "Which organisation publishes this model and answers for it?",
        "The home knows an identifier and user names, no legal person.",
        "the data steward or the legal department",
    ),
    Question(
        "curator-type",
        "Of which kind is that organisation?",
        "The deployments registry asks for it.",
        "the data steward",
        ("Government", "Industry", "Nonprofit"),
    ),
    Question(
        "intended-use",
        "What is the model for, and who is to use it?",
        "Policy knows one word for a purpose; a guarantee that suits one use may not suit another.",
        "the owner of the product",
    ),
    Question(
        "region",
        "Which region do the data describe, and whose law applies?",
        "The duties towards the people in the data follow from it.",
        "the data protection officer",
    ),
    Question(
        "sector",
        "To which sector do the data belong?",
        "The deployments registry asks for it.",
        "the data steward",
        ("Technology", "Healthcare", "Education", "Government", "Energy", "Finance"),
    ),
    Question(
        "unit",
        "Does one value of the unit column stand for all of one person that could harm them?",
        "The guarantee holds for each value of that column. A person under two values, or a family "
        "under none, is protected less or not at all.",
        "who knows how the identifiers were given out",
    ),
    Question(
        "consent",
        "On which legal basis were the data collected, and does it cover this training?",
        "Differential privacy limits what the model betrays; it does not make a collection lawful.",
        "the data protection officer",
    ),
    Question(
        "overlap",
        "Are people of this dataset also in other datasets or releases, here or elsewhere?",
        "Their losses add up; the ledger adds up only what its pools know of.",
        "the data steward",
    ),
    Question(
        "lineage",
        "Was this dataset made from others, and were all of them named at its import?",
        "`--derived-from` is the declaration of whoever imported; nothing can check it. The "
        "certificate shows the dataset's own pool, not those of its ancestors.",
        "who prepared the data",
    ),
    Question(
        "preparation",
        "How were the data prepared and explored, and the settings chosen, before and outside of "
        "this home?",
        "What was learnt from these records by other means is in no account.",
        "the engineer who prepared the training",
    ),
    Question(
        "justification",
        "Who chose epsilon, delta and the unit, how, and why are they acceptable here?",
        "No number is acceptable by itself; people decide it and answer for it.",
        "who decided it, with the data protection officer",
    ),
    Question(
        "actors",
        "Who may use the model, what else do they know, and with what could they combine it?",
        "The guarantee holds against all of them; whether it suffices depends on who they are.",
        "the owner of the product",
    ),
    Question(
        "operator",
        "Why is the operator of this home, who holds its keys, trusted, and who witnesses its log?",
        "Root and the root key can read the data and write another history: THREAT_MODEL.md.",
        "the auditor",
    ),
    Question(
        "erasure",
        "What is done when a person asks to be erased after the model was trained?",
        "The model stays as it is; its guarantee is what the person has.",
        "the data protection officer",
    ),
)
_BY_ID: Final = {question.id: question for question in QUESTIONS}


def read_answers(data: bytes, *, toml: bool) -> dict[str, Answer]:
    """Read answers: for each question `answer` and `answered_by`; where both are empty it is open.

    Raises:
        DataError: the file is neither TOML nor JSON as named, or a question, a field or a
            choice in it is unknown.
    """
    try:
        tables = tomllib.loads(data.decode()) if toml else json.loads(data)
    except (ValueError, RecursionError) as error:
        kind = "TOML" if toml else "JSON"
        raise DataError(f"the answers are not {kind}: {error}") from error
    if not isinstance(tables, dict):
        raise DataError("the answers are no table of questions")
    given = {
        name: table for name, table in tables.items() if table != {"answer": "", "answered_by": ""}
    }
    return check_answers(given)


def check_answers(tables: Mapping[str, Any]) -> dict[str, Answer]:
    """Return the answers if each belongs to a question and is signed by a name.

    Raises:
        DataError: a question, a field or a choice is unknown, or a text is missing or too long.
    """
    answers = {}
    for name, table in tables.items():
        if name not in _BY_ID:
            raise DataError(f"there is no question {name!r}", hint=f"one of: {', '.join(_BY_ID)}")
        answers[name] = _answer(_BY_ID[name], table)
    return answers


def _answer(question: Question, table: Any) -> Answer:  # noqa: ANN401 - any JSON value may come
    match table:
        case {"answer": str(answer), "answered_by": str(name), **rest} if not rest:
            said = Answer(answer.strip(), name.strip())
        case _:
            raise DataError(
                f"the answer to {question.id!r} is not a text with a name",
                hint='write: answer = "..." and answered_by = "name, function"',
            )
    if not 0 < len(said.answer) <= LONGEST_ANSWER or not 0 < len(said.answered_by) <= LONGEST_NAME:
        raise DataError(
            f"the answer to {question.id!r} or the name under it is empty or too long",
            hint=f"at most {LONGEST_ANSWER} and {LONGEST_NAME} characters; leave out what is open",
        )
    if not (said.answer.replace("\n", "") + said.answered_by).isprintable():
        raise DataError(f"the answer to {question.id!r} has signs that cannot be printed")
    if question.choices and said.answer not in question.choices:
        raise DataError(
            f"{said.answer!r} is no answer to {question.id!r}",
            hint=f"one of: {', '.join(question.choices)}",
        )
    return said


def asked(answers: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return every question with its answer, or None where it is open."""
    return [
        {
            "id": question.id,
            "question": question.question,
            "why": question.why,
            "who": question.who,
            "answer": answers.get(question.id),
        }
        for question in QUESTIONS
    ]


def form() -> str:
    """Return a TOML file to fill in: every question, why it is asked, and whom."""
    parts = [
        "# Answers for `llmos report MODEL --answers FILE`. Leave open what you do not know.\n"
    ]
    for question in QUESTIONS:
        choices = f"# One of: {', '.join(question.choices)}\n" if question.choices else ""
        parts.append(
            f"# {question.question}\n# Why: {question.why}\n# Whom to ask: {question.who}\n"
            f'{choices}[{question.id}]\nanswer = ""\nanswered_by = ""\n'
        )
    return "\n".join(parts)


def to_dict(answers: Mapping[str, Answer]) -> dict[str, dict[str, str]]:
    """Return answers as JSON values."""
    return {name: asdict(answer) for name, answer in answers.items()}
