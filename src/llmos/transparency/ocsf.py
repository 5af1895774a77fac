"""Log entries as events of the Open Cybersecurity Schema Framework, https://schema.ocsf.io/1.8.0.

An act on a dataset is Datastore Activity (6005), one that makes a person or a key of a person is
Account Change (3001), every other one API Activity (6003). There is no Authentication (3002): the
log records acts, and the check of a key is none. The log does not record from where an act came,
and the event says so where the class demands a source.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any, Final

from llmos.kernel.auditlog import LogEntry
from llmos.kernel.monitor import Outcome
from llmos.kernel.policy import Action

OCSF_VERSION: Final = "1.8.0"
ACCOUNT_CHANGE: Final = 3001
API_ACTIVITY: Final = 6003
DATASTORE_ACTIVITY: Final = 6005

_CREATE_ACCOUNT: Final = 1
_OTHER: Final = 99
_DATASTORE: Final[dict[str, int]] = {  # action -> activity_id of class 6005
    Action.READ_DATA: 1,
    Action.TRAIN_PRIVATE: 1,
    Action.TRAIN_WITHOUT_PRIVACY: 1,
    Action.FEDERATE: 1,
    Action.MEASURE: 1,
    Action.MANAGE_BUDGET: 2,
    Action.IMPORT_DATA: 6,
}
_API: Final[dict[str, int]] = {  # action -> activity_id of class 6003
    "init": 1,
    Action.PULL_MODEL: 1,
    Action.REPORT: 1,
    Action.LIST_MODELS: 2,
    Action.READ_LOG: 2,
    Action.PLAN: 2,
    Action.EXPORT_MODEL: 2,
    Action.MANAGE_KEYS: 3,
    Action.MANAGE_JOBS: 3,
}
_NOT_DONE: Final = frozenset({Outcome.DENIED, Outcome.REFUSED, Outcome.FAILED})
_INFORMATIONAL, _LOW = 1, 2  # severity_id
_SUCCESS, _FAILURE = 1, 2  # status_id


def event(entry: LogEntry, data: bytes, origin: str) -> dict[str, Any]:
    """Return the event of one entry; `raw_data` holds the entry's own bytes, which are hashed."""
    fields = entry.fields
    kind, _, name = str(fields["resource"]).partition("::")
    class_uid, activity, special = _classify(fields, kind, name)
    not_done = fields["outcome"] in _NOT_DONE
    user = {"name": fields["actor"]}
    if (key := fields["details"].get("api_key")) is not None:
        user["credential_uid"] = key
    return {
        "activity_id": activity,
        "activity_name": fields["action"],
        "actor": {"user": user},
        "category_uid": class_uid // 1000,
        "class_uid": class_uid,
        "message": f"{fields['actor']}: {fields['action']} {fields['resource']}",
        "metadata": {
            "log_name": origin,
            "original_time": fields["at"],
            "product": {"name": "LLMOS", "vendor_name": "The LLMOS authors"},
            "sequence": entry.index,
            "uid": f"{origin}#{entry.index}",
            "version": OCSF_VERSION,
        },
        "raw_data": data.decode(),
        "severity_id": _LOW if not_done else _INFORMATIONAL,
        "status_detail": fields["outcome"],
        "status_id": _FAILURE if not_done else _SUCCESS,
        "time": round(datetime.fromisoformat(fields["at"]).timestamp() * 1000),
        "type_uid": class_uid * 100 + activity,
        **special,
    }


def _classify(fields: dict[str, Any], kind: str, name: str) -> tuple[int, int, dict[str, Any]]:
    """Return class, activity and the attributes that this class demands."""
    action, details = fields["action"], fields["details"]
    source = {"src_endpoint": {"name": "not recorded"}}
    if action == Action.MANAGE_KEYS and "user" in details:
        return ACCOUNT_CHANGE, _CREATE_ACCOUNT, {"user": {"name": details["user"]}}
    if action == Action.MANAGE_KEYS and "owner" in details:
        return ACCOUNT_CHANGE, _OTHER, {"user": {"name": details["owner"]}}
    if kind == "Dataset":
        return (
            DATASTORE_ACTIVITY,
            _DATASTORE.get(action, _OTHER),
            {"table": {"name": name}, **source},
        )
    resources = {"resources": [{"type": kind, "name": name}]}
    return (
        API_ACTIVITY,
        _API.get(action, _OTHER),
        {"api": {"operation": action}, **resources, **source},
    )
