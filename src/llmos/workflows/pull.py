"""Pull a base model into the home: fetch, convert, hash, register, record."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from llmos.errors import ModelError, ModelExists, UnknownModel
from llmos.kernel.identity import Principal
from llmos.kernel.policy import Action, Resource
from llmos.models import hub
from llmos.models.registry import ModelEntry, Registry, check_name
from llmos.workflows.parts import Parts


@dataclass(frozen=True, slots=True)
class PullRequest:
    """What to pull and what to call it."""

    source: str  # smollm2-135m, a directory, or hf:ORG/NAME[@REVISION]
    name: str | None = None


def run(request: PullRequest, who: Principal, parts: Parts) -> ModelEntry:
    """Pull the model; pulling what is there already, unchanged, is no error.

    Raises:
        ModelError: the name is none.
        ModelExists: another model has this name.
        UnknownModel: the source names nothing that is known.
        HashMismatch: the download is not the pinned one.
        NetworkError: the source cannot be reached.
    """
    kernel, registry = parts.kernel, parts.registry
    name = default_name(request.source) if request.name is None else request.name
    check_name(name)  # before a folder of this name is removed
    if (present := _present(registry, name)) is not None:
        if present.card.get("source_requested") == request.source:
            return present
        raise ModelExists(f"a model {name!r} exists already", hint="choose another with --name")
    kernel.monitor.authorize(who, Action.PULL_MODEL, Resource("Model", name, {}))
    folder = kernel.config.home / "models" / name
    if folder.exists():  # left behind by a pull that died before it was registered
        shutil.rmtree(folder)
    pulled = hub.pull(request.source, folder, kernel.config.cache)
    card = {
        "source": pulled.source,
        "source_requested": request.source,
        "licence": pulled.licence,
    }
    try:
        with kernel.monitor.act(
            who,
            Action.PULL_MODEL,
            Resource("Model", name, {}),
            details={**card, "sha256": pulled.digest},
        ) as conn:
            registry.register_base(conn, name, f"models/{name}", pulled.digest, card)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return registry.model(name)


def default_name(source: str) -> str:
    """Derive a model's name from where it comes from.

    Raises:
        ModelError: nothing usable is left of the source.
    """
    last = Path(source.removeprefix("hf:").split("@")[0]).name.lower()
    name = re.sub(r"[^a-z0-9.-]+", "-", last).strip("-.")
    if not name:
        raise ModelError(f"no name can be derived from {source!r}", hint="give one with --name")
    return name


def _present(registry: Registry, name: str) -> ModelEntry | None:
    try:
        return registry.model(name)
    except UnknownModel:
        return None
