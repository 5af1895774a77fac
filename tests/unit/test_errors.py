from __future__ import annotations

import errno
import inspect
import os
from pathlib import Path

import pytest

from llmos import errors
from llmos.errors import (
    BudgetExceeded,
    InvalidField,
    InvalidPrivacyParameter,
    LlmosError,
    MalformedRecord,
    PermissionDenied,
    StaleCheckpoint,
    StorageError,
    StorageFull,
)

CLASSES = [
    cls
    for _, cls in inspect.getmembers(errors, inspect.isclass)
    if issubclass(cls, LlmosError) and cls is not LlmosError
]


def test_an_error_keeps_its_message_and_hint() -> None:
    error = LlmosError("it broke", hint="mend it")
    assert (str(error), error.message, error.hint) == ("it broke", "it broke", "mend it")
    assert LlmosError("it broke").hint == ""


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_error_has_statuses_that_its_callers_can_tell_apart(cls: type[LlmosError]) -> None:
    assert cls.exit_status not in {0, 1}, "0 is success, 1 is an error that nobody thought of"
    assert 2 <= cls.exit_status <= 15
    assert cls.http_status in {400, 401, 403, 404, 409, 413, 422, 429, 500, 502, 507}
    assert cls.__doc__


def test_families_of_errors_have_exit_statuses_of_their_own() -> None:
    families = [cls for cls in CLASSES if cls.__base__ is LlmosError]
    assert len({cls.exit_status for cls in families}) == len(families) > 10


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (errors.AuthenticationError("who?"), 401),
        (PermissionDenied("ada", "train", "Dataset::notes"), 403),
        (errors.UnknownModel("no model"), 404),
        (errors.DatasetExists("there"), 409),
        (errors.LedgerConflict("other plan"), 409),
        (errors.RequestTooLarge("2 MB"), 413),
        (errors.TooManyRequests("busy"), 429),
    ],
    ids=lambda value: type(value).__name__,
)
def test_http_statuses_are_those_of_rfc_9110(error: LlmosError, status: int) -> None:
    assert error.http_status == status


def test_permission_denied_says_who_what_and_why() -> None:
    denied = PermissionDenied("ada", "export-model", "Model::m", reason="an auditor only reads")
    assert denied.message == "ada may not export-model Model::m: an auditor only reads"
    assert (denied.principal, denied.action, denied.resource, denied.reason) == (
        "ada",
        "export-model",
        "Model::m",
        "an auditor only reads",
    )
    assert "steward" in denied.hint
    assert PermissionDenied("ada", "chat", "Model::m").message == "ada may not chat Model::m"
    assert denied.exit_status != errors.AccessError.exit_status


def test_a_refused_parameter_is_named_with_its_value_and_range() -> None:
    refused = InvalidPrivacyParameter("delta", 2.0, "above 0 and below 1")
    assert refused.message == "delta must be above 0 and below 1, not 2.0"
    assert (refused.name, refused.value, refused.expected) == ("delta", 2.0, "above 0 and below 1")


def test_a_refused_charge_says_what_would_fit() -> None:
    refused = BudgetExceeded("notes", "too dear", hint="use fewer steps", feasible={"steps": 12})
    assert (refused.pool, refused.feasible) == ("notes", {"steps": 12})
    assert (refused.message, refused.hint) == ("too dear", "use fewer steps")


def test_a_malformed_record_is_found_by_file_and_line() -> None:
    error = MalformedRecord("notes.csv", 7, "no unit")
    assert error.message == "notes.csv, line 7: no unit; nothing was imported"
    assert (error.line, error.reason) == (7, "no unit")
    assert error.hint == "correct that line and import the file again"
    assert MalformedRecord("notes.csv", 7, "no unit", hint="name it").hint == "name it"


def test_a_stale_checkpoint_says_what_was_seen_last() -> None:
    error = StaleCheckpoint(7)
    assert (error.size, error.http_status) == (7, 409)
    assert "has 7 entries" in error.message


@pytest.mark.parametrize("field", ["messages.0.content", None])
def test_an_invalid_field_is_named(field: str | None) -> None:
    error = InvalidField(field, "it is missing", hint="add it")
    assert (error.field, error.message, error.hint) == (field, "it is missing", "add it")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_limit_that_was_reached_is_storage_full(number: int) -> None:
    error = StorageError.of(OSError(number, os.strerror(number)), "a new object")
    assert type(error) is StorageFull
    assert "no room for a new object" in error.message
    assert "free some space" in error.hint


def test_another_refusal_of_the_system_says_what_it_was(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="directory") as refused:
        tmp_path.read_bytes()
    error = StorageError.of(refused.value, "the key file")
    assert type(error) is StorageError
    assert error.message == "the key file cannot be used: Is a directory"


def test_a_refused_update_names_its_site() -> None:
    refused = errors.UpdateRefused("spiffe://research.example/party/north", "it is cut off")
    assert refused.site == "spiffe://research.example/party/north"
    assert refused.message == (
        "a message of spiffe://research.example/party/north is refused: it is cut off"
    )
