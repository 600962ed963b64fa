"""Outputs of trainings and evaluations -> a terminal table, one HTML page, Markdown, and MLflow.

The last step of the pipeline. Reads only finished files, so that it can be run again at any time.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from appo.config import Recipe
from appo.reports import figures, page, speed, summary_tables
from appo.reports.analysis import Analysis, analyse, limits
from appo.reports.tables import Table, to_markdown, to_terminal
from appo.storage import write_atomic

log = logging.getLogger("appo.reports")
LIMITS_TITLE = "What this comparison can and cannot show"


@dataclass(frozen=True, slots=True)
class Comparison:
    """Where the results lie. table: what a terminal shows."""

    html: Path
    markdown: Path
    table: str
    numbers: Path


def compare(
    runs: Sequence[Path],
    evaluations: Path,
    out: Path,
    *,
    recipe: Recipe,
    manifest_path: Path | None = None,
    run_dir: Path | None = None,
) -> Comparison:
    """Compare finished trainings. Writes report.html, report.md, flips.csv and numbers.json into `out`.

    runs: output folders of trainings. evaluations: output folder of an evaluation. manifest_path: for
    pictures along the heat maps; None looks for it near the runs. run_dir: folder with mlflow.db; None looks
    for it upwards from `out`. Raises ReportError for outputs that are missing, broken or cannot be compared;
    MLflow being away is a warning.
    """
    out.mkdir(parents=True, exist_ok=True)
    analysis = analyse(runs, evaluations, recipe)
    # run_dir last: an experiment's runs are fetched from MLflow, its data lies where it was assembled.
    places = [*map(Path, runs), out, *([run_dir] if run_dir else [])]
    manifest_path = manifest_path or find_manifest(places, analysis.manifest_digest)
    pictures = figures.Pictures(manifest_path, recipe)
    main = summary_tables.main_table(analysis)
    html_path, markdown_path, numbers_path = out / "report.html", out / "report.md", out / "numbers.json"
    composition = _composition(manifest_path)
    write_atomic(html_path, build_page(analysis, pictures, composition))
    write_atomic(markdown_path, build_markdown(analysis, composition))
    write_atomic(out / "flips.csv", _csv(summary_tables.flip_rows(analysis)))
    write_atomic(numbers_path, json.dumps(numbers(analysis), indent=2) + "\n")
    text = to_terminal(main) + "\n" + _bullets(limits(analysis))
    from appo.reports.to_mlflow import log_comparison

    log_comparison(analysis, recipe, out, run_dir or find_run_dir(out))
    return Comparison(html_path, markdown_path, text, numbers_path)


def build_page(analysis: Analysis, pictures: figures.Pictures, composition: Counter[str] | None) -> str:
    """The whole page as text."""
    recipe, tables = analysis.recipe, summary_tables
    curves = figures.curve_figures(analysis)
    sections = [
        page.section(
            "result",
            "Result",
            tables.main_table(analysis),
            figures.accuracy_figure(analysis),
            tables.benchmark_table(analysis),
            page.callout(LIMITS_TITLE, limits(analysis)),
        ),
        page.section("learning", "Learning", page.grid(curves)),
        page.section(
            "differences", "Differences", tables.difference_table(analysis), tables.flip_table(analysis)
        ),
        page.section(
            "attention",
            "Attention",
            figures.attention_figure(analysis, pictures),
            tables.table_a(analysis),
            page.grid(figures.curve_figures(analysis, own=True)),
        ),
        page.section("side-by-side", "Side by side", figures.side_by_side(analysis, pictures)),
        page.section(
            "throughput",
            "Throughput",
            tables.table_f(analysis),
            figures.phase_figure(analysis),
            speed.phase_table(analysis),
        ),
        page.section("stability", "Stability", tables.table_e(analysis), tables.table_d(analysis)),
        page.section("paper", "Beside the paper", tables.paper_table(), tables.table_c(composition)),
        page.section("provenance", "Where this comes from", provenance(analysis)),
    ]
    seeds = sorted({t.seed for m in analysis.methods for t in m.trainings})
    facts = [
        ("recipe", f"{recipe.name} ({recipe.digest})"),
        ("seeds", ", ".join(map(str, seeds))),
        ("manifest", (analysis.manifest_digest or "unknown")[:12]),
        ("questions", _questions(analysis)),
    ]
    if analysis.base:
        facts.insert(1, ("base model", analysis.base))
    return page.render(
        title=f"{', '.join(m.name for m in analysis.methods)} on {', '.join(analysis.benchmarks)}",
        lead=recipe.description or "Algorithms compared on the same data, seeds and rollout budget.",
        facts=facts,
        sections=sections,
        footer=[
            "Made by <code>appo compare</code> from the files named above; the same numbers are in MLflow "
            "(<code>appo ui</code>), in <code>report.md</code> and in <code>numbers.json</code>."
        ],
    )


def provenance(analysis: Analysis) -> str:
    """Folders, steps and times of each training."""
    rows = []
    for method in analysis.methods:
        for t in method.trainings:
            s = t.summary
            rows.append(
                (
                    f"{method.name} seed {t.seed}",
                    str(s.get("steps", "–")),
                    f"{s['wall_s']:.0f}" if isinstance(s.get("wall_s"), int | float) else "–",
                    str(s.get("mlflow_run_id") or "–"),
                    "/".join(t.folder.parts[-3:]),
                )
            )
    table = Table(
        "trainings", "Trainings", ("training", "steps", "seconds", "MLflow run", "folder"), tuple(rows)
    )
    settings = escape(analysis.recipe.to_yaml())
    return (
        page._block(table)
        + f"<details><summary>The recipe in full</summary><pre><code>{settings}</code></pre></details>"
    )


def build_markdown(analysis: Analysis, composition: Counter[str] | None) -> str:
    """The tables of the page as Markdown."""
    tables = summary_tables
    found = [
        tables.main_table(analysis),
        tables.benchmark_table(analysis),
        tables.difference_table(analysis),
        tables.flip_table(analysis),
        tables.table_a(analysis),
        tables.table_d(analysis),
        tables.table_e(analysis),
        tables.table_f(analysis),
        speed.phase_table(analysis),
        tables.paper_table(),
        tables.table_c(composition),
    ]
    names = ", ".join(m.name for m in analysis.methods)
    recipe = f"Recipe {analysis.recipe.name} ({analysis.recipe.digest})."
    if analysis.base:
        recipe += f" Base model: {analysis.base}."
    head = f"# {names} on {', '.join(analysis.benchmarks)}\n\n{recipe}"
    honest = f"## {LIMITS_TITLE}\n\n" + "\n".join(f"- {line}" for line in limits(analysis))
    first, *rest = [to_markdown(t) for t in found if t is not None]
    return "\n\n".join([head, first.rstrip(), honest, *(text.rstrip() for text in rest)]) + "\n"


def numbers(analysis: Analysis) -> dict[str, object]:
    """Everything a program would want of the comparison."""
    methods = {}
    for m in analysis.methods:
        ratio = analysis.ratio_to_dapo(m)
        methods[m.label] = {
            "seeds": [t.seed for t in m.trainings],
            "accuracy": {b: _summary(s) for b, s in m.accuracy.items()},
            "accuracy_by_seed": {b: {str(k): v for k, v in seeds.items()} for b, seeds in m.by_seed.items()},
            "samples_per_second": _summary(m.throughput),
            "mfu": _summary(speed.over_seeds(m, "mfu")),
            "ratio_to_dapo": _summary(ratio),
            "crucial_hit_rate_before": _summary(m.before),
            "crucial_hit_rate_after": _summary(m.after),
            "crucial_hit_rate_by_chance": m.chance,
        }
    differences = [
        {
            "first": d.first,
            "second": d.second,
            "benchmark": d.benchmark,
            "mean": d.mean,
            "interval": [d.low, d.high],
            "p_items": d.p_items,
            "p_seeds": d.p_seeds,
            "seeds": d.seeds,
            "items": d.items,
            "fixed": d.fixed,
            "broken": d.broken,
            "verdict": d.verdict,
        }
        for d in analysis.differences
    ]
    return {
        "recipe": analysis.recipe.name,
        "recipe_digest": analysis.recipe.digest,
        "manifest_digest": analysis.manifest_digest,
        "base_models": analysis.base_models,
        "start": analysis.start,
        "methods": methods,
        "differences": differences,
        "limits": limits(analysis),
    }


def _summary(summary: object) -> dict[str, object] | None:
    return None if summary is None else {k: getattr(summary, k) for k in ("mean", "std", "n")}


def _questions(analysis: Analysis) -> str:
    counts = {
        b: max(len(table) for seeds in labels.values() for table in seeds.values())
        for b, labels in analysis.items.items()
    }
    return ", ".join(f"{count} {name}" for name, count in counts.items()) or "unknown"


def _csv(rows: Sequence[dict[str, object]]) -> str:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _composition(manifest_path: Path | None) -> Counter[str] | None:
    """Samples of the train split by source."""
    if manifest_path is None:
        return None
    try:
        from appo.data.manifest import read_manifest

        return Counter(sample.source for sample in read_manifest(manifest_path).split("train"))
    except (OSError, ValueError) as error:
        log.warning("no composition of the data: %s", error)
        return None


def _bullets(lines: Sequence[str]) -> str:
    wrapped = (textwrap.fill(line, 112, initial_indent="* ", subsequent_indent="  ") for line in lines)
    return "\n".join(wrapped) + "\n"


def find_manifest(folders: Sequence[Path], digest: str | None) -> Path | None:
    """The manifest with this digest, beside the runs or in a folder of data up to four levels above them."""
    from appo.storage import sha256_file

    looked_at: set[Path] = set()
    for folder in folders:
        for parent in [folder, *folder.resolve().parents[:4]]:
            for path in sorted([*parent.glob("manifest.jsonl"), *parent.glob("data*/manifest.jsonl")]):
                if path.resolve() in looked_at:
                    continue
                looked_at.add(path.resolve())
                if digest is None or sha256_file(path) == digest:
                    return path
    return None


def find_run_dir(folder: Path) -> Path | None:
    """The nearest folder upwards that holds mlflow.db."""
    return next((p for p in [folder, *folder.resolve().parents[:4]] if (p / "mlflow.db").is_file()), None)
