"""Export a trained adapter in PEFT format: the only way out of the vault in the clear."""

from __future__ import annotations

from pathlib import Path

from llmos.errors import ModelError
from llmos.kernel.identity import Principal
from llmos.kernel.policy import Action
from llmos.models.registry import ModelKind
from llmos.workflows import outputs
from llmos.workflows.parts import Parts


def run(model: str, folder: Path, who: Principal, parts: Parts) -> list[Path]:
    """Write the adapter's files to a new folder and return them.

    Raises:
        ModelError: the model is a base model, whose files are in the clear already.
        PermissionDenied: policy forbids it.
        StorageError: something is there already, or the folder cannot be written.
    """
    entry = parts.registry.model(model)
    if entry.kind is not ModelKind.ADAPTER:
        raise ModelError(
            f"{model} is a base model", hint=f"its files are in {parts.registry.folder(entry)}"
        )
    with parts.kernel.monitor.admit(
        who,
        Action.EXPORT_MODEL,
        entry.resource,
        key=f"export-{model}",
        objects=frozenset({entry.location}),
        charge=None,
        context={},
        details={"digest": entry.digest},
    ) as grant:
        return outputs.write_folder(folder, parts.registry.open_adapter(model, grant))
