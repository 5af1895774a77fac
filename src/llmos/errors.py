"""Every error that LLMOS raises on purpose, with exit status, HTTP status and a hint.

LlmosError
  ConfigError
  AccessError:     AuthenticationError, WrongPassphrase, TokenUnavailable, UnsafeKeyFile,
                   PermissionDenied, PolicyError, UnknownPrincipal, PrincipalExists, UnknownKey,
                   UnknownApproval, ApprovalConflict, UnknownPartner, PartnerExists,
                   UnknownParty, PartyExists, JoinRefused, CertificateRefused
  BudgetError:     InvalidPrivacyParameter, BudgetExceeded, UnaccountableMechanism, LedgerConflict
  DataError:       MalformedRecord, UnknownDataset, DatasetExists
  ModelError:      UnknownModel, ModelExists, UnsupportedModel
  EngineError:     SelfTestFailed, AggregationAborted
  IntegrityError:  TamperedObject, TamperedLog, VerificationFailed, HashMismatch,
                   CheckpointRefused, StaleCheckpoint, UpdateRefused
  StorageError:    StorageFull, HomeExists, HomeMissing
  NetworkError
  JobError:        UnknownJob, JobBusy, JobOvertaken, JobCancelled, JobInterrupted
  RequestError:    InvalidField, PromptTooLong, RequestTooLarge, TooManyRequests
  MeasurementError
  LeakFound
"""

from __future__ import annotations

import errno
from typing import ClassVar


class LlmosError(Exception):
    """Base of all deliberate errors; printed only by cli/main.py and server/app.py."""

    exit_status: ClassVar[int] = 1
    http_status: ClassVar[int] = 500

    def __init__(self, message: str, *, hint: str = "") -> None:
        """Keep the message and an optional hint that says what to do next."""
        super().__init__(message)
        self.message = message
        self.hint = hint


class ConfigError(LlmosError):
    """A setting is missing, unknown or out of range."""

    exit_status = 3


class AccessError(LlmosError):
    """Someone may not do what they asked for."""

    exit_status = 4
    http_status = 403


class AuthenticationError(AccessError):
    """The caller could not be identified."""

    http_status = 401


class WrongPassphrase(AuthenticationError):
    """The passphrase, PIN or key file does not open this home."""


class TokenUnavailable(AuthenticationError):
    """The PKCS#11 module, token or key that opens this home is not there or does not work."""


class UnsafeKeyFile(AccessError):
    """Others on this machine can read or change the key file."""


class PermissionDenied(AccessError):
    """Policy does not allow this principal to do this act on this resource."""

    exit_status = 5

    def __init__(self, principal: str, action: str, resource: str, *, reason: str = "") -> None:
        """Name who wanted to do what to which resource, and why it was refused."""
        detail = f": {reason}" if reason else ""
        super().__init__(
            f"{principal} may not {action} {resource}{detail}",
            hint="ask a steward for the right, or see `llmos policy show`",
        )
        self.principal, self.action = principal, action
        self.resource, self.reason = resource, reason


class PolicyError(AccessError):
    """The policy files do not parse or do not fit their schema; everything is denied."""


class UnknownPrincipal(AccessError):
    """No principal of this name exists."""

    http_status = 404


class PrincipalExists(AccessError):
    """A principal of this name exists already."""

    http_status = 409


class UnknownKey(AccessError):
    """No API key of this id exists."""

    http_status = 404


class UnknownApproval(AccessError):
    """No approval of this id exists."""

    http_status = 404


class ApprovalConflict(AccessError):
    """An approval cannot be asked for or decided like this, or by this person."""

    http_status = 409


class UnknownPartner(AccessError):
    """No partner of this name, or of this log's origin, was added."""

    http_status = 404


class PartnerExists(AccessError):
    """A partner of this name, or of this log's origin, was added already."""

    http_status = 409


class UnknownParty(AccessError):
    """No party, membership or trusted organisation of this name exists, or no party CA."""

    http_status = 404


class PartyExists(AccessError):
    """A party CA, a party that is not revoked, or an organisation of this name exists already."""

    http_status = 409


class JoinRefused(AccessError):
    """A join token is unknown, used, out of date, or another party's."""


class CertificateRefused(AccessError):
    """A party's certificate, the request for one, or a revocation list cannot be accepted."""


class BudgetError(LlmosError):
    """Something is wrong with a privacy parameter, a pool or a reservation."""

    exit_status = 6
    http_status = 403


class InvalidPrivacyParameter(BudgetError):
    """A privacy parameter lies outside the range for which a guarantee exists."""

    http_status = 400

    def __init__(self, name: str, value: object, expected: str) -> None:
        """Name the parameter, what was given and what is allowed."""
        super().__init__(f"{name} must be {expected}, not {value!r}")
        self.name, self.value, self.expected = name, value, expected


class BudgetExceeded(BudgetError):
    """The pool cannot pay for the planned mechanism."""

    def __init__(
        self,
        pool: str,
        message: str,
        *,
        hint: str = "`llmos budget what-if` prices smaller jobs",
        feasible: dict[str, float] | None = None,
    ) -> None:
        """Say which pool refuses and, where it is known, what would still fit.

        `feasible` maps `epsilon`, `steps` and `noise_multiplier` to the largest epsilon, the most
        steps and the smallest noise multiplier that the pool could still pay for.
        """
        super().__init__(message, hint=hint)
        self.pool = pool
        self.feasible = feasible or {}


class UnaccountableMechanism(BudgetError):
    """No theorem in the ledger covers this mechanism, unit or adjacency."""


class LedgerConflict(BudgetError):
    """A reservation is asked to do something that its state or its plan forbids."""

    http_status = 409


class DataError(LlmosError):
    """Input data cannot be used."""

    exit_status = 7
    http_status = 400


class MalformedRecord(DataError):
    """One record cannot be read; nothing was imported."""

    def __init__(self, source: str, line: int, reason: str, *, hint: str = "") -> None:
        """Name the file, the 1-based line (or row) and what is wrong with it."""
        super().__init__(
            f"{source}, line {line}: {reason}; nothing was imported",
            hint=hint or "correct that line and import the file again",
        )
        self.line, self.reason = line, reason


class UnknownDataset(DataError):
    """No dataset of this name exists."""

    http_status = 404


class DatasetExists(DataError):
    """A dataset of this name exists already."""

    http_status = 409


class ModelError(LlmosError):
    """A model cannot be found, read or converted."""

    exit_status = 8
    http_status = 400


class UnknownModel(ModelError):
    """No model of this name exists."""

    http_status = 404


class ModelExists(ModelError):
    """A model of this name exists already."""

    http_status = 409


class UnsupportedModel(ModelError):
    """The model's architecture has no layers that can be adapted."""


class EngineError(LlmosError):
    """An engine cannot do its work on this model, data or machine."""

    exit_status = 9


class SelfTestFailed(EngineError):
    """The engine's own check of its first step failed; the job was stopped."""


class AggregationAborted(EngineError):
    """Fewer sites than the threshold contributed; nothing was unmasked and nothing is learned."""


class IntegrityError(LlmosError):
    """Stored or received bytes are not what was written or signed."""

    exit_status = 10


class TamperedObject(IntegrityError):
    """An encrypted object was changed, cut, swapped or is opened with a wrong key."""


class TamperedLog(IntegrityError):
    """The log's rows, tree and signed checkpoint do not agree."""


class VerificationFailed(IntegrityError):
    """A certificate or proof does not verify; the message says which check failed."""


class HashMismatch(IntegrityError):
    """A download's SHA-256 differs from the pinned one; it was deleted."""


class CheckpointRefused(IntegrityError):
    """A witness does not cosign: the checkpoint does not continue what it saw before."""

    http_status = 422


class StaleCheckpoint(CheckpointRefused):
    """A witness does not cosign: the proof begins elsewhere than at what it saw last."""

    http_status = 409

    def __init__(self, size: int) -> None:
        """Say how many entries the witness saw last."""
        super().__init__(f"the checkpoint that was witnessed last has {size} entries")
        self.size = size


class UpdateRefused(IntegrityError):
    """A site's update or message is malformed, of the wrong shape, replayed or forged."""

    http_status = 422

    def __init__(self, site: str, reason: str) -> None:
        """Name the site, or `coordinator`, and say what is wrong with what it sent."""
        super().__init__(f"a message of {site} is refused: {reason}")
        self.site = site


class StorageError(LlmosError):
    """The home's disk or database cannot be used."""

    exit_status = 12
    http_status = 507

    @staticmethod
    def of(error: OSError, what: str) -> StorageError:
        """Say that the system refuses `what`; a limit that was reached is `StorageFull`."""
        if error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
            return StorageFull(
                f"there is no room for {what}: {error.strerror}; nothing was changed",
                hint="free some space, or raise the quota or file-size limit, and try again",
            )
        return StorageError(f"{what} cannot be used: {error.strerror}")


class StorageFull(StorageError):
    """There is no room left on the device; what was there before is unchanged."""


class HomeExists(StorageError):
    """`llmos init` was asked to make a home where one is already."""


class HomeMissing(StorageError):
    """There is no home at this place."""


class NetworkError(LlmosError):
    """Something outside this machine could not be reached."""

    exit_status = 13
    http_status = 502


class JobError(LlmosError):
    """A job cannot be found, started, resumed or cancelled."""

    exit_status = 11
    http_status = 409


class UnknownJob(JobError):
    """No job of this id exists."""

    http_status = 404


class JobBusy(JobError):
    """Another live process is running this job."""


class JobOvertaken(JobError):
    """A later run of this job has begun; the earlier one can write nothing any more."""


class JobCancelled(JobError):
    """The job was asked to stop and did, at a step boundary."""


class JobInterrupted(JobError):
    """The job stopped at a step boundary because its process was asked to; it can be resumed."""


class RequestError(LlmosError):
    """An HTTP request is malformed or asks for something that is not offered."""

    exit_status = 2
    http_status = 400


class MeasurementError(LlmosError):
    """Leakage cannot be measured from these scores, or a leak report cannot be read."""

    exit_status = 15
    http_status = 400


class InvalidField(RequestError):
    """A field of the request's body is missing, unknown or out of range."""

    def __init__(self, field: str | None, message: str, *, hint: str = "") -> None:
        """Name the field, dotted, or None when the whole body is meant."""
        super().__init__(message, hint=hint)
        self.field = field


class PromptTooLong(RequestError):
    """The conversation and the tokens asked for do not fit into the model's context."""


class RequestTooLarge(RequestError):
    """The request's body is larger than the server reads."""

    http_status = 413


class TooManyRequests(RequestError):
    """The server works on as many requests as it may; try again soon."""

    http_status = 429


class LeakFound(LlmosError):
    """A measured lower bound on epsilon lies above what the ledger promises."""

    exit_status = 14
