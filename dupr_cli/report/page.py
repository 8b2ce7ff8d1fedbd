"""The page of a report: tables and figures of its sources, filled into page.html.j2.

Every text passes through `html_text`, since names in it come from outside, and through
`without_secrets`, as on the terminal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from markupsafe import Markup

from dupr_cli import __version__
from dupr_cli.addresses import without_secrets
from dupr_cli.artifacts.label_curves import LabelCurves
from dupr_cli.artifacts.results import DatasetIdentity, Results, WeightsResult
from dupr_cli.outside_text import html_text
from dupr_cli.recipe import recipe_keys, recipe_value
from dupr_cli.report.figures import (
    PALETTE,
    Figure,
    difference_figure,
    filling,
    is_drawable,
    label_figures,
    run_figures,
)
from dupr_cli.report.galleries import Inlined
from dupr_cli.report.sources import Named, Run, Sources
from dupr_cli.report.summary import (
    Finding,
    deciding,
    labels_findings,
    results_findings,
    retrieval_rows,
    run_findings,
    study_findings,
    warnings,
)
from dupr_cli.study.report import ProtocolReport, StudyReport

GENERATOR = "dupr report"
_ABSENT = "-"
_MOST_CELL = 160  # characters of a recipe value in a table
_MOST_LABEL = 18  # and of a name in a figure


@dataclass(frozen=True)
class Table:
    """Rows of texts. numbers: the columns after this one are numbers. marked: rows in bold."""

    title: str
    heads: list[str]
    rows: list[list[str]]
    numbers: int = 1
    note: str = ""
    marked: tuple[int, ...] = ()


@dataclass(frozen=True)
class Key:
    """An entry of a legend. colour: number of the page's colour."""

    mark: str
    name: str
    colour: int


@dataclass(frozen=True)
class Part:
    """A part of a section: one evaluation, comparison or protocol. first: tables above figures."""

    title: str
    lines: list[str]
    first: list[Table]
    keys: list[Key]
    figures: list[Figure]
    tables: list[Table]
    folded: list[Table]


def render(
    sources: Sources, galleries: Sequence[Inlined], title: str, notes: Sequence[str] = ()
) -> str:
    """The page as text.

    title: its heading; by default the names of what it is about. notes: besides those of sources.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    names = [each.name for each in sources.runs]
    names += [each.name for each in sources.labels] + [each.name for each in sources.studies]
    names += [each.name for each in sources.results if not _is_part(each, sources)]
    return environment.get_template("page.html.j2").render(
        generator=GENERATOR,
        version=__version__,
        written=datetime.now().astimezone().isoformat(timespec="minutes"),
        title=title or f"{', '.join(names[:3])}{', ...' * (len(names) > 3)}",
        findings=_findings(sources),
        run_keys=_keys([_short(run) for run in sources.runs], sources.runs),
        overview=_overview(sources.runs),
        retrieval=_retrieval_table(sources.runs),
        figures=run_figures(sources.runs),
        galleries=galleries,
        has_runs=bool(sources.runs),
        evaluations=[_evaluation(each) for each in sources.results],
        labels=[_labels(each.name, each.content) for each in sources.labels],
        studies=[part for each in sources.studies for part in _study(each)],
        recipes=_recipe_tables(sources),
        environments=_environment_table(sources),
        warnings=[text for run in sources.runs for text in warnings(run)],
        notes=[*_notes(sources), *notes],
    )


def _shown(value: object) -> object:
    """What the template prints: texts made safe; SVG, which is made here, as it is."""
    if isinstance(value, Markup):
        return value
    return Markup(html_text(without_secrets(str(value))))


def _is_part(named: Named[Results], sources: Sources) -> bool:
    """Whether an evaluation belongs to a comparison over labels that is named already."""
    return any(named.path.parent == of.path for of in sources.labels)


def _findings(sources: Sources) -> list[Finding]:
    found = [finding for run in sources.runs for finding in run_findings(run)]
    for labels in sources.labels:
        found += labels_findings(labels)
    for results in sources.results:
        found += results_findings(results)
    for study in sources.studies:
        found += study_findings(study)
    return found


def _keys(names: Sequence[str], runs: Sequence[Run] = ()) -> list[Key]:
    marks = [run.letter for run in runs] or [chr(ord("a") + i % 26) for i in range(len(names))]
    entries = enumerate(zip(marks, names, strict=True))
    return [Key(mark, name, number % PALETTE) for number, (mark, name) in entries]


def _short(run: Run) -> str:
    return f"{run.name}: {run.method}, {run.recipe.get('model.backbone', 'unknown backbone')}"


def _overview(runs: Sequence[Run]) -> Table | None:
    """One column for each run."""
    if not runs:
        return None
    rows = [
        ["images", *(_number((run.environment.get("data") or {}).get("images")) for run in runs)],
        ["steps", *(_steps(run) for run in runs)],
        ["passes over the images", *(_figure(run.last("epoch"), ".2f") for run in runs)],
        ["images/s, mean", *(_figure(_mean(run, "images_per_second"), ",.0f") for run in runs)],
        ["waiting for data", *(_share(_mean(run, "data_wait")) for run in runs)],
        ["queues full at step", *(_queues(run) for run in runs)],
        ["last loss", *(_figure(run.last("loss"), ".3f") for run in runs)],
        ["lowest spread", *(_figure(_lowest(run), ".2f") for run in runs)],
        ["skipped steps", *(_figure(run.last("bad_steps"), ".0f") for run in runs)],
        ["checkpoints kept", *(str(len(run.checkpoints)) for run in runs)],
    ]
    heads = ["", *(run.title for run in runs)]
    return Table("Runs side by side", heads, rows)


def _steps(run: Run) -> str:
    done = run.lines[-1]["step"] if run.lines else 0
    planned = run.recipe.get("train.steps")
    return f"{done:,.0f} of {planned:,}" if isinstance(planned, int) else f"{done:,.0f}"


def _queues(run: Run) -> str:
    filled = run.last_of("queue_fill/")
    if not filled:
        return _ABSENT
    if min(filled.values()) < 1:
        return "not yet"
    return f"{max(filling(run, name.removeprefix('queue_fill/')) for name in filled):,.0f}"


def _lowest(run: Run) -> float | None:
    return min(run.last_of("spread/").values(), default=None)


def _mean(run: Run, name: str) -> float | None:
    values = [value for _, value in run.points(name)]
    return sum(values) / len(values) if values else None


def _number(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else _ABSENT


def _figure(value: float | None, layout: str) -> str:
    return _ABSENT if value is None else format(value, layout)


def _share(value: float | None) -> str:
    return _ABSENT if value is None else f"{100 * value:.0f} %"


def _retrieval_table(runs: Sequence[Run]) -> Table | None:
    rows = [row for run in runs for row in retrieval_rows(run)]
    if not rows:
        return None
    cells = [
        [
            row.run, row.level, row.case, f"{row.untrained:.1f} %", f"{row.last:.1f} %",
            row.factor, "better" if row.better else "no better", _number(row.patches),
        ]
        for row in rows
    ]  # fmt: skip
    heads = ["run", "level", "views", "untrained", "now", "factor", "verdict", "patches"]
    return Table(
        "Is it learning? Patches found again in another view of their image",
        heads,
        cells,
        3,
        "Better: at least 1.2 times the share of the same network before training, and more than "
        "two standard errors above it. Patches of one image are not independent, so a close call "
        "may still be chance.",
    )


def _described(used: DatasetIdentity) -> str:
    return f"{used.images:,} images, {used.objects:,} objects: {used.address}, split {used.split}"


def _name_of(entry: WeightsResult) -> str:
    return str(entry.extra.get("folder", entry.weights))


def _is_baseline(entry: WeightsResult) -> bool:
    return entry.weights_sha256 is None or ":" in entry.weights


def _evaluation(named: Named[Results]) -> Part:
    results = named.content
    main = [m for m in ("AP", "AP50", "AP75") if all(m in r.metrics for r in results.results)]
    main = main or list(results.results[0].metrics)[:3]
    rows = [
        [_name_of(entry), _origin(entry), entry.architecture,
         *(_with_spread(entry, metric) for metric in main)]
        for entry in results.results
    ]  # fmt: skip
    count = len(results.seeds)
    spread = "One seed: a difference may be chance."
    if count > 1:
        spread = f"Means over {count} seeds, with standard deviations."
    first = [Table("Results", ["weights", "from", "backbone", *main], rows, 3, spread)]
    tables = []
    differences = [each for each in deciding(results) if is_drawable(each)]
    figures = []
    if differences:
        names = [f"{_brief(each.first)} -\n{_brief(each.second)}" for each in differences]
        figures.append(difference_figure(differences, names))
    if results.differences:
        tables.append(_differences_table(results))
    lines = [
        f"{results.protocol}: {results.metric}",
        f"Trained on {_described(results.train)}",
        f"Tested on {_described(results.test)}",
        *(
            f"Changed: {key} is {recipe_value(values[1])}; "
            f"{results.protocol} has {recipe_value(values[0])}"
            for key, values in results.changes.items()
            if len(values) == 2
        ),
    ]
    return Part(named.name, lines, first, [], figures, tables, _more_tables(results, main))


def _brief(name: str) -> str:
    """A name that leaves room for the figure; the table below it has the whole."""
    return name if len(name) <= _MOST_LABEL else name[: _MOST_LABEL - 1] + "…"


def _origin(entry: WeightsResult) -> str:
    return f"{entry.weights} (baseline)" if _is_baseline(entry) else entry.weights


def _with_spread(entry: WeightsResult, metric: str) -> str:
    value = _figure(entry.metrics.get(metric), ".1f")
    deviation = entry.deviations.get(metric)
    return value if deviation is None else f"{value} ± {deviation:.1f}"


def _signed(value: float) -> str:
    """With its sign and one decimal; 0.0 has none."""
    text = f"{value:+z.1f}"
    return "0.0" if text == "+0.0" else text


def _differences_table(results: Results) -> Table:
    rows = [
        [
            f"{each.first} - {each.second}", each.metric, _signed(each.mean),
            f"{_signed(each.low)} to {_signed(each.high)}",
            _ABSENT if each.adjusted_p is None else f"{each.adjusted_p:.3f}",
            "" if each.adjusted_p is None else "real" if each.is_real else "may be chance",
        ]
        for each in results.differences
    ]  # fmt: skip
    percent = 100 * results.differences[0].confidence
    heads = ["difference", "metric", "mean", f"{percent:.0f} % interval", "p, corrected", "verdict"]
    note = "Paired by seed. Only the metric that was named beforehand decides (Holm)."
    return Table("Paired differences", heads, rows, 2, note)


def _more_tables(results: Results, main: Sequence[str]) -> list[Table]:
    heads = ["", *(_name_of(entry) for entry in results.results)]
    rest = [name for name in results.results[0].metrics if name not in main]
    tables = []
    if rest:
        rows = [
            [name, *(_figure(entry.metrics.get(name), ".1f") for entry in results.results)]
            for name in rest
        ]
        tables.append(Table("Further metrics", heads, rows))
    rows = [
        [name, *(_figure(entry.per_class.get(name, {}).get("AP"), ".1f")
                 for entry in results.results)]
        for name in results.classes
    ]  # fmt: skip
    if any(cell != _ABSENT for row in rows for cell in row[1:]):
        tables.append(Table("AP of each class", heads, rows))
    return tables


def _labels(name: str, curves: LabelCurves) -> Part:
    first = next(iter(curves.curves.values()))
    counts = [point.labels for point in next(iter(first.values()))]
    tables = []
    for metric, of_weights in curves.curves.items():
        rows = [
            [weights, *(f"{p.mean:.1f} [{p.low:.1f}, {p.high:.1f}]" for p in points)]
            for weights, points in of_weights.items()
        ]
        heads = [f"{metric} with labels", *map(str, counts)]
        tables.append(Table(f"{metric} by number of labels", heads, rows))
    saved = [
        [row.weights, metric, str(row.baseline_labels), f"{row.target:.1f}", row.described(curves)]
        for metric, rows in curves.saved.items()
        for row in rows
    ]
    if saved:
        heads = ["weights", "metric", f"labels of {curves.baseline}", "its figure", "labels needed"]
        tables.append(Table("Labels saved", heads, saved, 2))
    line = (
        f"{curves.protocol}: {curves.metric}. {len(curves.seeds)} seeds, {curves.test_images:,} "
        f"images tested; the baseline is {curves.baseline}."
    )
    return Part(name, [line], [], _keys(list(first)), label_figures(curves), tables, [])


def _study(named: Named[StudyReport]) -> list[Part]:
    report = named.content
    parts = [_protocol(named.name, protocol) for protocol in report.protocols]
    if report.retrieval:
        levels = sorted({level for of in report.retrieval.values() for level in of})
        rows = [
            [run, *(_figure(of.get(level), ".1f") for level in levels)]
            for run, of in report.retrieval.items()
        ]
        table = Table("Top-1 at the end of each run, %", ["run", *levels], rows)
        name = f"{named.name}: held-out patch retrieval"
        parts.append(Part(name, [], [table], [], [], [], []))
    return parts


def _protocol(study: str, protocol: ProtocolReport) -> Part:
    part = _labels(f"{study}: {protocol.name}", protocol.curves)
    rows = [
        [f"{d.first} - {d.second}", str(count), d.metric, _signed(d.mean),
         f"{_signed(d.low)} to {_signed(d.high)}",
         "" if d.adjusted_p is None else "real" if d.is_real else "may be chance"]
        for count, of in protocol.differences.items() for d in of
    ]  # fmt: skip
    heads = ["difference", "labels", "metric", "mean", "interval", "verdict"]
    if rows:
        part.tables.append(Table("Differences from the baseline, paired by seed", heads, rows, 1))
    return part


def _recipe_tables(sources: Sources) -> list[Table]:
    """Keys that differ between runs, and between evaluations; of one alone, all its keys."""
    of_runs = {run.title: run.recipe for run in sources.runs}
    of_results = {each.name: recipe_keys(each.content.recipe) for each in sources.results}
    tables = []
    for what, recipes in (("runs", of_runs), ("evaluations", of_results)):
        if not recipes:
            continue
        keys = sorted({key for recipe in recipes.values() for key in recipe})
        title, note = f"Recipe of the {what[:-1]}", ""
        if len(recipes) > 1:
            keys = [k for k in keys if len({str(r.get(k, _ABSENT)) for r in recipes.values()}) > 1]
            title = f"Recipe keys in which the {what} differ"
            note = "" if keys else "They have the same recipe."
        rows = [[key, *(_value(recipe, key) for recipe in recipes.values())] for key in keys]
        tables.append(Table(title, ["key", *recipes], rows, 99, note))
    return tables


def _value(recipe: Mapping[str, object], key: str) -> str:
    text = recipe_value(recipe.get(key, _ABSENT))
    return text if len(text) <= _MOST_CELL else text[: _MOST_CELL - 3] + "..."


def _environment_table(sources: Sources) -> Table | None:
    of: dict[str, Mapping[str, object]] = {run.title: run.environment for run in sources.runs}
    of |= {each.name: each.content.environment for each in sources.results}
    facts = {
        name: {key: str(value) for key, value in environment.items() if not _is_nested(value)}
        for name, environment in of.items()
    }
    keys = list(dict.fromkeys(key for environment in facts.values() for key in environment))
    if not keys:
        return None
    rows = [[key, *(each.get(key, _ABSENT) for each in facts.values())] for key in keys]
    return Table("Environment", ["", *facts], rows, 99)


def _is_nested(value: object) -> bool:
    return isinstance(value, dict | list)


def _notes(sources: Sources) -> list[str]:
    notes = [f"{each.name}: {note}" for each in sources.results for note in each.content.notes]
    notes += [f"{each.name}: {note}" for each in sources.labels for note in each.content.notes]
    return list(dict.fromkeys(notes))
