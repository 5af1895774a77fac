"""Export a trained adapter in PEFT format: the only way out of the vault in the clear."""

from __future__ import annotations

from pathlib import Path

from llmos.errors import ModelError, StorageError
from llmos.kernel.identity import Principal
from llmos.kernel.policy import Action
from llmos.models.registry import ModelKind
from llmos.workflows.parts import Parts


def run(model: str, folder: Path, who: Principal, parts: Parts) -> list[Path]:
    """Write the adapter's files to a new folder and return them.

    Raises:
        ModelError: the model is a base model, whose files are in the clear already.
        PermissionDenied: policy forbids it.
        StorageError: the folder holds something.
    """
    entry = parts.registry.model(model)
    if entry.kind is not ModelKind.ADAPTER:
        raise ModelError(
            f"{model} is a base model", hint=f"its files are in {parts.registry.folder(entry)}"
        )
    if folder.exists() and any(folder.iterdir()):
        raise StorageError(f"{folder} is not empty", hint="name a new folder")
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
        files = parts.registry.open_adapter(model, grant)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        written = [folder / name for name in sorted(files)]
        for path in written:
            path.write_bytes(files[path.name])
    return written
