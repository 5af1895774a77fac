"""Export the audit log: verified entries, tiles for static hosting, or OCSF events."""

from __future__ import annotations

from pathlib import Path

from llmos.crypto.notes import Checkpoint
from llmos.kernel.identity import Principal
from llmos.kernel.policy import Action
from llmos.transparency import log_export
from llmos.transparency.log_export import ExportFormat
from llmos.workflows import outputs
from llmos.workflows.parts import Parts


def run(form: ExportFormat, folder: Path, who: Principal, parts: Parts) -> Checkpoint:
    """Write the log into a new folder and return the checkpoint up to which it was written.

    Raises:
        PermissionDenied: policy does not let this principal read the log.
        StorageError: something is there already, or the folder cannot be written.
        TamperedLog: the entries do not lead to the signed root; no folder was made.
    """
    monitor = parts.kernel.monitor
    monitor.authorize(who, Action.READ_LOG, parts.kernel.home)
    with outputs.new_folder(folder) as draft:
        head = log_export.write(parts.kernel.auditlog, form, draft)
        details = {"export": str(form), "entries": head.size}
        with monitor.act(who, Action.READ_LOG, parts.kernel.home, details=details):
            pass
    return head
