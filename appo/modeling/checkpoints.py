"""What a path to a model names, and whether all of it is there: asked before anything is loaded or fetched.

Free of torch. Training, evaluation, `appo explain` and the checks of a recipe share it. A path is a folder of this
machine, an `s3://` prefix that a step fetches, or a name on the hub, which only loading can try.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from appo.errors import UserError, one_line
from appo.folders import COMPLETE, fetch_folder, is_published
from appo.hub import HubError, hub_name
from appo.storage import is_s3, read_bytes

CONFIG, ADAPTERS = "config.json", "adapter_config.json"
WHOLE = ("model.safetensors", "pytorch_model.bin")
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
TOKENIZERS = ({"tokenizer.json"}, {"vocab.json", "merges.txt"}, {"tokenizer.model"})
PROCESSORS = ("preprocessor_config.json", "processor_config.json")
TEMPLATES, TOKENIZER_CONFIG = ("chat_template.jinja", "chat_template.json"), "tokenizer_config.json"
# Those whose text attention has the masks and the scaling that `appo.modeling.attention` implements.
SUPPORTED_FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
REMEDY = "name a checkpoint folder, an s3:// prefix, or a hub name (OWNER/NAME)"
_LFS = b"version https://git-lfs"  # what git leaves in place of a large file that was not fetched


class CheckpointError(UserError, ValueError):
    """A path that names no whole checkpoint: the path, what it lacks, and the remedy."""


@dataclass(frozen=True)
class _Files:
    """A folder, here or in a store. sizes: bytes by name; read: the contents of a small file."""

    sizes: Mapping[str, int]
    read: Callable[[str], bytes]


def is_hub_name(path: str) -> bool:
    """OWNER/NAME or OWNER/NAME@REVISION, and no folder here (see `appo.hub.hub_name`)."""
    try:
        return hub_name(path) is not None
    except HubError:  # an @ that no revision follows
        return False


def check_model(path: str, *, adapters: bool = False) -> None:
    """Raise CheckpointError unless `path` is a whole checkpoint here or a name on the hub.

    adapters: whether LoRA adapters alone will do, as in evaluation, which merges them.
    """
    if problem := model_problem(path, adapters=adapters):
        raise CheckpointError(f"{path}: {problem}")


def model_problem(path: str, *, adapters: bool = False) -> str | None:
    """What a folder lacks, with the remedy; None for a whole one and for a hub name. For `s3://`: `stored_problem`."""
    folder = Path(path)
    if is_s3(path) or is_hub_name(path):
        return None
    if not folder.exists():
        home = " (~ is not expanded here; write the folder out)" if path.startswith("~") else ""
        return f"no such folder{home}, and no hub name; {REMEDY}"
    if not folder.is_dir():
        return f"is a file; {REMEDY}"
    sizes = {file.name: file.stat().st_size for file in folder.iterdir() if file.is_file()}
    files = _Files(sizes, lambda name: (folder / name).read_bytes())
    if problem := _lacks(files, adapters=adapters):
        return problem
    for name in sorted(sizes):
        if name.endswith(".safetensors") and (cut := _cut_off(folder / name)):
            return f"{name} {cut}; fetch it again"
    return None


def stored_problem(location: str) -> str | None:
    """What an `s3://` prefix lacks to be a whole checkpoint, with the remedy. Raises StoreError without a store."""
    from appo.objectstore import list_objects

    sizes = {name: int(stamp.partition("-")[0]) for name, stamp in list_objects(location)}
    if not sizes:
        return f"nothing is stored there; {REMEDY}"
    files = _Files(sizes, lambda name: read_bytes(f"{location.rstrip('/')}/{name}"))
    if problem := _lacks(files, adapters=False):
        return problem
    if not is_published(location, sizes):
        return f"has no {COMPLETE}, so its upload did not end; upload it whole, and an empty object of this name last"
    return None


def fetched(path: str) -> str:
    """The folder of a whole checkpoint, fetched from a store if need be; a hub name as it is. Raises CheckpointError."""
    if not is_s3(path):
        check_model(path)
        return path
    if problem := stored_problem(path):
        raise CheckpointError(f"{path}: {problem}")
    return str(fetch_folder(path))


def _lacks(files: _Files, *, adapters: bool) -> str | None:
    names = set(files.sizes)
    if CONFIG not in names and ADAPTERS in names:
        if adapters:
            return None
        return "holds LoRA adapters alone; name the merged-* folder that `appo evaluate` makes in it, or what they adapt"
    if CONFIG not in names:
        return f"holds no {CONFIG}; {REMEDY}"
    try:
        return _is_unknown(json.loads(files.read(CONFIG))) or _lacks_weights(files) or _lacks_processor(files)
    except ValueError as error:  # no UTF-8, or no JSON
        return f"one of its .json files is not JSON ({one_line(error, 120)}); fetch the checkpoint again"


def _is_unknown(config: Any) -> str | None:
    if not isinstance(config, dict):
        return f"{CONFIG} holds no JSON object; fetch it again"
    if (family := config.get("model_type")) not in SUPPORTED_FAMILIES:
        return (
            f"model_type={family!r} in its {CONFIG}: must be one of {', '.join(SUPPORTED_FAMILIES)}; {REMEDY}"
        )
    return None


def _lacks_weights(files: _Files) -> str | None:
    if any(name in files.sizes for name in WHOLE):
        return None
    index = next((name for name in INDEXES if name in files.sizes), None)
    if index is None:
        return f"has {CONFIG} and no weights ({WHOLE[0]}, or {INDEXES[0]} with its files); fetch the whole checkpoint"
    found = json.loads(files.read(index))
    shards = sorted(set(found["weight_map"].values())) if isinstance(found.get("weight_map"), dict) else []
    if not shards:
        return f"{index} names no files; fetch it again"
    if missing := [shard for shard in shards if shard not in files.sizes]:
        return (
            f"{index} names {len(shards)} files, and {_listed(missing)} not there; fetch the whole checkpoint"
        )
    total = (found.get("metadata") or {}).get("total_size")
    held = sum(files.sizes[shard] for shard in shards)
    if isinstance(total, int | float) and held < total:
        return f"its weights are {held:,} bytes, and {index} says {int(total):,}; fetch them again"
    return None


def _lacks_processor(files: _Files) -> str | None:
    names = set(files.sizes)
    if not any(one <= names for one in TOKENIZERS):
        return "has no tokenizer (tokenizer.json, or vocab.json and merges.txt); fetch the whole checkpoint"
    if not names & set(PROCESSORS):
        return f"has no processor of images and videos ({PROCESSORS[0]}); fetch the whole checkpoint"
    settings = [json.loads(files.read(name)) for name in (TOKENIZER_CONFIG, PROCESSORS[1]) if name in names]
    if not names & set(TEMPLATES) and not any(one.get("chat_template") for one in settings):
        return f"has no chat template ({TEMPLATES[0]}); take an Instruct checkpoint, or fetch the whole one"
    return None


def _cut_off(path: Path) -> str | None:
    """Why a safetensors file cannot be whole, by its first bytes and its size alone."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if start + file.read(len(_LFS) - 8) == _LFS:
            return "is git's placeholder of a file that was not fetched (git lfs pull)"
        file.seek(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or not 2 <= length <= size - 8:
            return "is cut off or no safetensors file"
        try:
            tensors = json.loads(file.read(length))
            ends = [entry["data_offsets"][1] for name, entry in tensors.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            return "is no safetensors file"
    wanted = 8 + length + max(ends, default=0)
    return None if size >= wanted else f"has {size:,} of its {wanted:,} bytes"


def _listed(names: Sequence[str]) -> str:
    return f"{names[0]} is" if len(names) == 1 else f"{names[0]} and {len(names) - 1} more are"


@contextmanager
def loading(path: str) -> Iterator[None]:
    """Inside, transformers reads `path`; what it cannot read is said in one line with the path.

    Only errors of files and of the hub are taken, weights that do not fit their configuration among them: a library
    that fails stays what it is.
    """
    try:
        yield
    except UserError:
        raise
    except RuntimeError as error:
        if "mismatched_sizes" not in str(error) and "size mismatch" not in str(error):
            raise
        raise CheckpointError(
            f"{path}: its weights have other sizes than its {CONFIG} says; fetch the checkpoint again"
        ) from error
    except (OSError, ValueError, KeyError, _unreadable()) as error:
        if is_hub_name(path):
            raise CheckpointError(
                f"{path}: is no folder here, and the hub does not give it ({one_line(error, 160)}); "
                "name a folder, or see that the hub is reached (HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE)"
            ) from error
        raise CheckpointError(
            f"{path}: transformers cannot read it: {one_line(error)}; fetch the checkpoint again"
        ) from error


def reach(path: str) -> None:
    """Fetch a hub name's smallest file, so that a hub that is away is noticed in seconds, not in minutes."""
    if not is_hub_name(path):
        return
    from huggingface_hub import hf_hub_download

    name, _, revision = path.partition("@")
    with loading(path):
        hf_hub_download(name, CONFIG, revision=revision or None)


def _unreadable() -> Any:
    from safetensors import SafetensorError

    return SafetensorError
