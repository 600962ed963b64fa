"""Options that several commands share, each written once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RecipeOption = Annotated[
    str, typer.Option("--recipe", "-r", help="a shipped recipe (appo recipe list), or a .yaml file")
]
SetOption = Annotated[
    list[str],
    typer.Option("--set", "-s", metavar="KEY=VALUE", help="change a value of the recipe; may be repeated"),
]
FolderOption = Annotated[Path, typer.Option("--folder", "-f", help="folder of the run")]
OutOption = Annotated[Path, typer.Option("--out", "-o", help="folder that the result is written to")]
ManifestOption = Annotated[Path, typer.Option("--manifest", "-m", help="manifest.jsonl of an assembled set")]
