"""An analysis -> the tables of the report: the main one, paired differences, flips, and the paper's Tables
A-F.
"""

from __future__ import annotations

from collections import Counter

from appo.reports import attention, paper, speed
from appo.reports.analysis import Analysis
from appo.reports.results import Item, label_name
from appo.reports.statistics import SEEDS_FOR_CLAIM, SeedSummary
from appo.reports.tables import UNKNOWN, Table, p_value, percent, points, with_spread


def main_table(analysis: Analysis) -> Table:
    """Accuracy before and after, throughput, ratio to DAPO, crucial frames: one row a method."""
    benchmark = analysis.main_benchmark
    start = analysis.start.get(benchmark)
    rows = []
    for method in analysis.methods:
        accuracy = method.accuracy.get(benchmark)
        gain = None if accuracy is None or start is None else accuracy.mean - start
        ratio = analysis.ratio_to_dapo(method)
        rows.append(
            (
                method.name,
                f"{percent(start)} → {with_spread(accuracy, scale=100)}",
                points(gain),
                with_spread(method.throughput, digits=2),
                UNKNOWN if ratio is None else f"{ratio.mean:.2f}",
                f"{_plain(method.before)} → {_plain(method.after)}",
            )
        )
    chances = [m.chance for m in analysis.methods if m.chance is not None]
    notes = [
        "Accuracy in percent, mean ± deviation over seeds (n−1). Samples per second: prompts trained on."
    ]
    if any(m.after for m in analysis.methods):
        chance = (
            f"; frames drawn blindly would reach {100 * sum(chances) / len(chances):.0f}" if chances else ""
        )
        notes.append(
            "Key frame found: of the held-out groups with a right completion, the percentage whose "
            "crucial frames "
            f"(ψ′) hold a true key frame, before and after training{chance}."
        )
    return Table(
        key="main",
        title=f"Result on {benchmark}",
        columns=(
            "method",
            "accuracy: start → after",
            "gain",
            "samples/s",
            "ratio to DAPO",
            "key frame found",
        ),
        rows=tuple(rows),
        notes=tuple(notes),
    )


def _plain(summary: SeedSummary | None) -> str:
    return UNKNOWN if summary is None else percent(summary.mean, 0)


def benchmark_table(analysis: Analysis) -> Table | None:
    """Accuracy of every method on every benchmark; None when the main table has said it all."""
    if len(analysis.benchmarks) < 2:
        return None
    rows = [("start", *(percent(analysis.start.get(name)) for name in analysis.benchmarks))]
    for method in analysis.methods:
        cells = [with_spread(method.accuracy.get(name), scale=100) for name in analysis.benchmarks]
        rows.append((method.name, *cells))
    return Table(
        "benchmarks", "Accuracy per benchmark, percent", ("method", *analysis.benchmarks), tuple(rows)
    )


def difference_table(analysis: Analysis) -> Table | None:
    """Paired differences with intervals, tests, and what they allow to be said."""
    if not analysis.differences:
        return None
    rows = []
    for d in analysis.differences:
        rows.append(
            (
                f"{label_name(d.first)} − {label_name(d.second)}, {d.benchmark}",
                points(d.mean),
                f"{points(d.low)} … {points(d.high)}",
                p_value(d.p_items),
                f"{p_value(d.p_seeds)} (≥ {p_value(d.p_seeds_least)})",
                f"{d.fixed:.1f} / {d.broken:.1f}",
                d.verdict,
            )
        )
    notes = [
        "Same questions, same seeds. Interval: 95 %, 10,000 bootstrap replicates over questions and "
        "seeds; with few "
        "seeds it is too narrow. p over questions: sign-flip permutation test for these very "
        "checkpoints. p over "
        "seeds: exact; in brackets the smallest value that so many seeds can give.",
        "Flips: questions per seed that only the first, only the second answers right.",
    ]
    if len(analysis.differences) > 1:
        notes.append(f"{len(analysis.differences)} comparisons: p values are not corrected for their number.")
    return Table(
        key="differences",
        title="Paired differences, points",
        columns=(
            "comparison",
            "difference",
            "95 % interval",
            "p, questions",
            "p, seeds",
            "flips",
            "what may be said",
        ),
        rows=tuple(rows),
        notes=tuple(notes),
    )


def flip_rows(analysis: Analysis) -> list[dict[str, object]]:
    """Each question of each benchmark with its share of right answers by method: the data behind the
    flips.
    """
    rows: list[dict[str, object]] = []
    for benchmark, labels in analysis.items.items():
        ids = sorted({i for seeds in labels.values() for table in seeds.values() for i in table})
        for item_id in ids:
            row: dict[str, object] = {"benchmark": benchmark, "id": item_id}
            begun = analysis.start_items.get(benchmark, {}).get(item_id)
            row["start"] = None if begun is None else begun.score
            for label, seeds in labels.items():
                found = [table[item_id] for table in seeds.values() if item_id in table]
                row["answer"] = found[0].answer if found else row.get("answer")
                row[label] = sum(item.score for item in found) / len(found) if found else None
                row[f"{label} said"] = ", ".join(_said(item) for item in found)
            rows.append(row)
    return rows


def _said(item: Item) -> str:
    return "truncated" if item.truncated else "unparsed" if item.parsed is None else item.parsed


def _question_name(row: dict[str, object]) -> str:
    benchmark, item = str(row["benchmark"]), str(row["id"])
    return item if item.startswith(benchmark) else f"{benchmark} {item}"


def flip_table(analysis: Analysis, *, most: int = 10) -> Table | None:
    """The questions on which APPO and DAPO differ most; without those two, the first two methods."""
    labels = [m.label for m in analysis.methods]
    pair = ("appo", "dapo") if {"appo", "dapo"} <= set(labels) else tuple(labels[:2])
    if len(pair) < 2:
        return None
    first, second = pair
    rows = [r for r in flip_rows(analysis) if r.get(first) is not None and r.get(second) is not None]
    changed = [r for r in rows if r[first] != r[second]]
    if not changed:
        return None
    changed.sort(key=lambda r: (-abs(float(r[first]) - float(r[second])), str(r["id"])))  # type: ignore[arg-type]
    more = sum(float(r[first]) > float(r[second]) for r in changed)  # type: ignore[arg-type]
    return Table(
        key="flips",
        title=f"Questions that {label_name(first)} and {label_name(second)} answer differently",
        columns=("question", "answer", "start", f"{label_name(first)} said", f"{label_name(second)} said"),
        rows=tuple(
            (
                _question_name(r),
                str(r["answer"]),
                UNKNOWN if r["start"] is None else ("right" if float(r["start"]) >= 0.5 else "wrong"),  # type: ignore[arg-type]
                str(r[f"{first} said"]),
                str(r[f"{second} said"]),
            )
            for r in changed[:most]
        ),
        notes=(
            f"{len(changed)} of {len(rows)} questions: {more} more often right with {label_name(first)}, "
            f"{len(changed) - more} with {label_name(second)}. One answer a seed. All of them: flips.csv.",
        ),
    )


def table_a(analysis: Analysis) -> Table | None:
    """Share of groups by distance between the frames that right and wrong completions look at."""
    settings, rows, counted = analysis.recipe.perception, [], []
    for method in analysis.methods:
        groups = [g for t in method.trainings for g in attention.last_groups(t.groups)]
        found = attention.focus_distance(groups, k1=settings.k1, k2=settings.k2)
        if found is not None:
            rows.append((f"{method.name} (n={found.groups})", *(percent(s) for s in found.shares)))
            counted.append(
                f"{method.name}: mean {found.mean_s:.2f} s, {found.mean_share_of_video:.0%} of the video"
            )
    if not rows:
        return None
    rows.append((f"paper, {paper.TABLE_A_WHERE}", *(f"{v:.1f}" for v in paper.TABLE_A)))
    return Table(
        key="A",
        title="How far apart right and wrong completions look (as Table A), percent of groups",
        columns=("method", *paper.TABLE_A_BINS),
        rows=tuple(rows),
        notes=(
            f"n: held-out groups after training that hold right and wrong completions. {'; '.join(counted)}. "
            "Seconds depend on the length of the videos: compare the 0 s column, the share where the frames "
            "cannot tell right from wrong.",
        ),
        paper_rows=frozenset({len(rows) - 1}),
    )


def table_c(manifest_counts: Counter[str] | None) -> Table | None:
    """Composition of the training data beside the paper's subset."""
    if not manifest_counts:
        return None
    rows = [(source, str(count), UNKNOWN) for source, count in sorted(manifest_counts.items())]
    rows += [(name, UNKNOWN, f"~{thousands}K") for name, thousands in paper.TABLE_C.items()]
    first = len(manifest_counts)
    return Table(
        key="C",
        title="Training data by source (as Table C), samples",
        columns=("source", "this run", "paper"),
        rows=tuple(rows),
        paper_rows=frozenset(range(first, len(rows))),
    )


def table_d(analysis: Analysis) -> Table | None:
    """Selection strategies; only when a comparison holds variants of APPO."""
    variants = [m for m in analysis.methods if m.algorithm == "appo"]
    if len(variants) < 2:
        return None
    rows = [
        (m.name, *(with_spread(m.accuracy.get(b), scale=100) for b in analysis.benchmarks)) for m in variants
    ]
    said = "; ".join(f"{name}: {'/'.join(map(str, values))}" for name, values in paper.TABLE_D.items())
    return Table(
        key="D",
        title="Ablation of APPO (as Table D), percent",
        columns=("method", *analysis.benchmarks),
        rows=tuple(rows),
        notes=(f"The paper's, SEED-Bench-R1 L1/L2/L3 with 7B: {said}.",),
    )


def table_e(analysis: Analysis) -> Table:
    """Deviation over seeds per benchmark, in points."""
    rows = []
    for method in analysis.methods:
        found = [method.accuracy.get(name) for name in analysis.benchmarks]
        cells = [UNKNOWN if s is None or s.std is None else f"{100 * s.std:.3f} (n={s.n})" for s in found]
        rows.append((method.name, *cells))
    said = "; ".join(
        f"{size}: " + ", ".join(f"{c} {v}" for c, v in zip(paper.TABLE_E_COLUMNS, values, strict=True))
        for size, values in paper.TABLE_E.items()
    )
    few = analysis.seeds < SEEDS_FOR_CLAIM
    notes = [f"The paper's APPO over {SEEDS_FOR_CLAIM} seeds, {said}."]
    if few:
        notes.insert(
            0,
            "One seed has no deviation."
            if analysis.seeds == 1
            else f"A deviation over {analysis.seeds} seeds is itself uncertain by half its size or more.",
        )
    return Table(
        key="E",
        title="Deviation over seeds (as Table E), points",
        columns=("method", *analysis.benchmarks),
        rows=tuple(rows),
        notes=tuple(notes),
    )


def table_f(analysis: Analysis) -> Table:
    """Throughput and its ratio to DAPO, the paper's beside."""
    rows = []
    for method in analysis.methods:
        ratio = analysis.ratio_to_dapo(method)
        mfu = with_spread(speed.over_seeds(method, "mfu"), scale=100)
        rows.append(
            (method.name, with_spread(method.throughput, digits=3), mfu, with_spread(ratio, scale=100))
        )
    own = len(rows)
    for size, (dapo, appo, share) in paper.TABLE_F.items():
        rows.append((f"paper, DAPO {size}", f"{dapo}", UNKNOWN, "100"))
        rows.append((f"paper, APPO {size}", f"{appo}", UNKNOWN, f"{100 * share:.0f}"))
    return Table(
        key="F",
        title="Training throughput (as Table F)",
        columns=("method", "samples per second", "MFU, percent", "percent of DAPO"),
        rows=tuple(rows),
        notes=(
            "The paper's on 16 GPUs with eager attention and no vLLM: other hardware, only ratios compare.",
        ),
        paper_rows=frozenset(range(own, len(rows))),
    )


def paper_table() -> Table:
    """The paper's main results, all of them the paper's."""
    rows = [
        (f"paper, {label_name(label)} {size}", *(f"{v:.1f}" for v in values))
        for size, methods in paper.MAIN.items()
        for label, values in methods.items()
    ]
    return Table(
        key="paper",
        title="The paper's main results, percent (not measured here)",
        columns=("method", *paper.MAIN_COLUMNS),
        rows=tuple(rows),
        notes=(f"{paper.SOURCE}. SEED-Bench-R1 is the average of L1-L3.",),
        paper_rows=frozenset(range(len(rows))),
    )
