"""A model's name on the hub, perhaps with `@REVISION` -> the commit that it means, and a folder that holds it.

The only place that reads such names. A run looks its commit up once (`appo.steps.base_model`) and hands
`ORG/NAME@COMMIT` on, so that every pod trains and scores the same weights, whatever is pushed to the hub meanwhile;
the rest of the package sees folders. With HF_HUB_OFFLINE=1 nothing is asked: commit and files are the local cache's,
or it is an error. A hub that cannot be reached is an error too: whoever wants the cache instead says so with that
variable.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from appo.errors import SettingError

# Both parts as the hub allows them; a revision is a branch, a tag, `refs/pr/1` or a commit.
_NAME = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>.*))?", re.DOTALL)
_REVISION = re.compile(r"[\w][\w./-]*")
_COMMIT = re.compile(r"[0-9a-f]{7,40}")
# What a checkpoint needs of a repository; others hold the same weights in other formats.
FILES = ("*.json", "*.safetensors", "*.txt", "*.jinja", "*.model")
TIMEOUT_S = 30.0


class HubError(SettingError):
    """A model on the hub that is not there or not to be had: its name, the reason, the remedy."""


@dataclass(frozen=True, slots=True)
class HubName:
    """`ORG/NAME@REVISION`. revision: None where none was given."""

    repo: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.repo if self.revision is None else f"{self.repo}@{self.revision}"


def hub_name(path: str) -> HubName | None:
    """The name if `path` is one on the hub; None for an s3:// prefix, for a folder, an `@` in its name or not, and for
    a path below a folder that is here.

    Raises HubError for an `@` that no revision follows.
    """
    match = _NAME.fullmatch(path)
    if match is None or Path(path).exists() or _is_a_slip(Path(path.partition("/")[0])):
        return None
    revision = match["revision"]
    if revision is not None and not _REVISION.fullmatch(revision):
        raise HubError(
            f"model {path!r}: {revision!r} is no revision; write ORG/NAME@REVISION with a branch, a tag or a commit"
        )
    return HubName(match["repo"], revision)


def _is_a_slip(owner: Path) -> bool:
    """Whether the first part is a folder here that holds no models: a path with a slip then, and no hub's name."""
    return owner.is_dir() and not any(owner.glob("*/config.json"))


def pinned(path: str) -> str:
    """`ORG/NAME@COMMIT` for a name on the hub, whatever it says now; anything else as it is. Raises HubError."""
    name = hub_name(path)
    return path if name is None else str(HubName(name.repo, commit_of(name)))


def commit_of(name: HubName) -> str:
    """The commit (40 hex digits) that the name means now; offline, in the local cache. Raises HubError."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return _cached(name).name
    from huggingface_hub import HfApi

    found = _asked(name, HfApi().model_info, name.repo, revision=name.revision, timeout=TIMEOUT_S).sha
    if not found:
        raise HubError(f"model '{name}': {constants.ENDPOINT} names no commit of it; is that a model hub?")
    return str(found)


def download(name: HubName) -> Path:
    """The folder of the local cache that holds the checkpoint, fetched where it is not there yet. Raises HubError."""
    from huggingface_hub import constants, snapshot_download

    if constants.HF_HUB_OFFLINE:
        return _cached(name)
    return Path(
        _asked(name, snapshot_download, name.repo, revision=name.revision, allow_patterns=list(FILES))
    )


def told(location: str) -> dict[str, str | None]:
    """What a checkpoint, a summary and a report say of the weights that they came from: `model` and `commit`.

    location: as the step that names the base model hands it on. commit: None for what is not on the hub.
    """
    name = hub_name(location)
    return {
        "model": location if name is None else name.repo,
        "commit": None if name is None else name.revision,
    }


def _cached(name: HubName) -> Path:
    """The local cache's folder of the revision. The start of a commit does, as it does on the hub."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name.repo, repo_type="model")
    revision = name.revision or constants.DEFAULT_REVISION
    reference = folder / "refs" / revision
    commit = reference.read_text(encoding="utf-8").strip() if reference.is_file() else revision
    known = list((folder / "snapshots").glob("*")) if _COMMIT.fullmatch(commit) else []
    found = [path for path in known if path.name.startswith(commit)]
    if len(found) != 1 or not (found[0] / "config.json").is_file():
        raise HubError(
            f"model '{name}': HF_HUB_OFFLINE=1 is set, and {folder} holds no revision {revision} of it; "
            f"fetch it with `hf download {name.repo} --revision {revision}`, or unset HF_HUB_OFFLINE"
        )
    return found[0]


def _asked(name: HubName, call: Any, *arguments: Any, **more: Any) -> Any:
    from huggingface_hub import constants, errors

    try:
        return call(*arguments, **more)
    except errors.GatedRepoError as error:
        reason = "is gated; accept its terms on its page and set HF_TOKEN"
        raise HubError(f"model '{name}': {reason}") from error
    except errors.RepositoryNotFoundError as error:
        raise HubError(
            f"model '{name}': {constants.ENDPOINT} has no such model, or it is private; there is no folder of this "
            "name here either. Check the name, or set HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise HubError(
            f"model '{name}': {name.repo} has no revision {name.revision!r}; name a branch, a tag or a commit of it"
        ) from error
    except _unreachable() as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise HubError(
            f"model '{name}': {constants.ENDPOINT} cannot be asked: {reason}; try again, or set HF_HUB_OFFLINE=1 to "
            "take what the local cache holds"
        ) from error


def _unreachable() -> tuple[type[Exception], ...]:
    """What the hub's client raises when the hub does not answer, or not as a hub."""
    from huggingface_hub import errors

    found: tuple[type[Exception], ...] = (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, OSError)
    try:
        import httpx
    except ImportError:  # before its version 1 it spoke through requests, whose errors are OSErrors
        return found
    return (*found, httpx.HTTPError)
