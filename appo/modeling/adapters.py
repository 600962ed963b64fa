"""A folder that holds only LoRA adapters -> a whole checkpoint, merged once, for engines that want one.

Training with `model.lora` saves the adapters and the name of what they were trained on. The merged checkpoint lies in
the adapters' own folder, under a name made of both, and appears there when it is complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from appo.errors import UserError, one_line
from appo.handover import checkpoint_of
from appo.modeling.checkpoints import check_model, loading
from appo.storage import sha256_file

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


class AdapterError(UserError, ValueError):
    """Adapters that cannot be merged: the folder, the reason, the remedy."""


def is_adapter(path: str | Path) -> bool:
    """Whether the folder holds adapters without the weights that they change."""
    return (Path(path) / CONFIG).is_file() and not (Path(path) / "config.json").is_file()


def whole_checkpoint(path: str, base: Callable[[], str | None] = lambda: None) -> str:
    """The checkpoint itself, or the folder with its adapters merged, which is made when it is not there yet.

    base: asked for the checkpoint that the adapters belong to where the one that they name is not here, and where no
    commit on the hub was written down with them. Raises AdapterError.
    """
    if not is_adapter(path):
        return path
    folder = Path(path)
    named = _named_base(folder)
    origin = named if _is_there(named) else _recorded(folder) or base()
    if origin is None:
        raise AdapterError(
            f"{folder}: holds adapters of {named}, which is not here; "
            "say where it lies with --set model.path=FOLDER"
        )
    merged = _place(folder) / f"merged-{_digest(folder, origin)}"
    if not merged.is_dir():
        scratch = Path(tempfile.mkdtemp(prefix=".merging-", dir=merged.parent))
        try:
            _merge(folder, origin, scratch)
            scratch.chmod(0o755)
            os.replace(scratch, merged)
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            if not merged.is_dir():  # else another process was first: its folder holds the same
                raise
    return str(merged)


def _merge(folder: Path, origin: str, out: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    from appo.modeling.generation import save_with_its_settings
    from appo.modeling.loading import load_processor

    check_model(origin)
    with loading(origin):
        model = AutoModelForImageTextToText.from_pretrained(origin, dtype="auto")
    try:
        adapted = PeftModel.from_pretrained(model, str(folder))
    except (RuntimeError, ValueError) as error:  # other shapes, or modules that are not there
        reason = " ".join(str(error).split())[:300]
        raise AdapterError(f"{folder}: its adapters do not fit {origin}: {reason}") from error
    _check_complete(folder, adapted, origin)
    save_with_its_settings(adapted.merge_and_unload(), out)
    try:
        processor = load_processor(str(folder))
    except (OSError, ValueError):  # the folder has none of its own
        processor = load_processor(origin)
    processor.save_pretrained(out)


def _check_complete(folder: Path, adapted: Any, origin: str) -> None:
    """PEFT leaves adapters that it finds no place for out, with a warning."""
    from peft import get_peft_model_state_dict
    from safetensors import safe_open

    with safe_open(folder / WEIGHTS, framework="pt") as file:
        saved = set(file.keys())
    placed = set(get_peft_model_state_dict(adapted))
    if saved != placed:
        odd = min(saved ^ placed)
        raise AdapterError(f"{folder}: its adapters do not fit {origin}: {odd} is in only one of the two")


def _named_base(folder: Path) -> str:
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        named = config.get("base_model_name_or_path")
    except (ValueError, AttributeError) as error:
        raise AdapterError(
            f"{folder / CONFIG}: is no JSON object ({one_line(error, 120)}); fetch it again"
        ) from error
    if config.get("peft_type") != "LORA" or not named:
        raise AdapterError(
            f"{folder / CONFIG}: peft_type={config.get('peft_type')!r}, base_model_name_or_path={named!r}: "
            "must be LORA, with the name of a checkpoint"
        )
    if not (folder / WEIGHTS).is_file():
        raise AdapterError(f"{folder}: has {CONFIG} and lacks {WEIGHTS}; fetch the whole checkpoint")
    return str(named)


def _is_there(name: str) -> bool:
    """A folder, or what can only be a name on the hub."""
    return Path(name).is_dir() or (name.count("/") == 1 and not name.startswith((".", "/")))


def _recorded(folder: Path) -> str | None:
    """The folder of the hub's commit that the training started from; None where it started from something else."""
    record = folder / "base_model.json"
    told = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    return checkpoint_of(f"{told['model']}@{told['commit']}") if told.get("commit") else None


def _digest(folder: Path, origin: str) -> str:
    digest = hashlib.sha256(f"{sha256_file(folder / CONFIG)} {sha256_file(folder / WEIGHTS)}\n".encode())
    files = sorted(Path(origin).glob("*.safetensors"))
    digest.update("".join(f"{file.name} {sha256_file(file)}\n" for file in files).encode() or origin.encode())
    return digest.hexdigest()[:16]


def _place(folder: Path) -> Path:
    """The adapters' folder, or the machine's temporary one where that cannot be written to."""
    return folder if os.access(folder, os.W_OK) else Path(tempfile.gettempdir())
