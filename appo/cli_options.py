"""Options that several commands share, each written once, with what can be said about a path before a command runs."""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer


def file_to_read(path: Path | None) -> Path | None:
    """A file that is there and may be read; typer names the option it belongs to."""
    if path is not None:
        if path.is_dir():
            raise typer.BadParameter(f"{path}: is a folder; name the file in it")
        if not path.exists():
            raise typer.BadParameter(f"{path}: no such file; see that the path is right")
        _readable(path)
    return path


def file_or_folder(path: Path | None) -> Path | None:
    """A file or a folder that is there and may be read."""
    if path is not None:
        if not path.exists():
            raise typer.BadParameter(f"{path}: no such file or folder; see that the path is right")
        _readable(path)
    return path


def folder_to_write(path: Path | None) -> Path | None:
    """A folder that may be made, or written into."""
    if path is None:
        return path
    place = next(place for place in (path, *path.absolute().parents) if os.path.lexists(place))
    if not place.is_dir():
        raise typer.BadParameter(f"{path}: {place} is a file; name a folder")
    try:  # the only question that a read-only disk, another user's folder and /proc all answer
        with TemporaryDirectory(prefix=".appo-", dir=place):
            return path
    except OSError as error:
        raise typer.BadParameter(
            f"{path}: cannot be written to ({error.strerror}); name a folder that can"
        ) from error


def file_to_write(path: Path | None) -> Path | None:
    """A file that may be made, or replaced."""
    if path is not None:
        if path.is_dir():
            raise typer.BadParameter(f"{path}: is a folder; name the file to write")
        folder_to_write(path.parent)
    return path


def _readable(path: Path) -> None:
    if not os.access(path, os.R_OK | (os.X_OK if path.is_dir() else 0), effective_ids=True):
        raise typer.BadParameter(f"{path}: permission denied; give this user the right to read it")


RecipeOption = Annotated[
    str, typer.Option("--recipe", "-r", help="a shipped recipe (appo recipe list), or a .yaml file")
]
SetOption = Annotated[
    list[str],
    typer.Option("--set", "-s", metavar="KEY=VALUE", help="change a value of the recipe; may be repeated"),
]
FolderOption = Annotated[Path, typer.Option("--folder", "-f", help="folder of the run")]
OutOption = Annotated[
    Path, typer.Option("--out", "-o", help="folder that the result is written to", callback=folder_to_write)
]
ManifestOption = Annotated[
    Path, typer.Option("--manifest", "-m", help="manifest.jsonl of an assembled set, or its folder")
]
