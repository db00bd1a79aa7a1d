"""A run as one page that stands alone: no script, no request, readable in ten years."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from profiling_agent.records.common import Interval, Machine
from profiling_agent.records.profile import GroupCost, ModuleCost, Profile
from profiling_agent.records.trial import RunRecord, Trial, Verdict
from profiling_agent.records.workload import Task
from profiling_agent.report.chart import scatter
from profiling_agent.report.page import as_definitions, as_list, as_table, below, cell, page, words
from profiling_agent.report.profile_view import (
    DEPLOYED_TITLES,
    deployed_row,
    divergence_name,
    gaps_of,
    module_name,
    schemes_in_words,
    slowest_modules,
    taken_when,
    whole_and_parts,
)
from profiling_agent.report.summary import (
    HeadlineRow,
    TrialRow,
    advice_in_words,
    bottleneck_in_words,
    evidence_in_words,
    facts_of_data,
    gain_in_words,
    headline,
    loss_in_words,
    not_measured,
    trial_rows,
)
from profiling_agent.report.wording import (
    DASH,
    POINTS,
    as_count,
    as_range,
    as_ratio,
    as_share,
    describe_metric,
    describe_plan,
    drop_name,
    drop_range,
    in_budget,
    in_drop,
    in_megabytes,
    in_metric,
    in_ms,
    in_seconds,
    lower_is_better,
    metric_name,
    of_metric,
    printable,
    significant,
)

NUM_BOTTLENECKS: Final = 12
_MOST_RATIOS: Final = 8


def render_html(record: RunRecord, profile: Profile | None = None) -> str:
    """The page; a pure function of the two records, so that it can be redrawn at any time."""
    title = f"{record.workload.name}: {record.verdict.kind if record.verdict else 'running'}"
    sections = [
        _verdict(record),
        _headline(record),
        _chart(record),
        _trials(record),
        _rejections(record),
        _advice(record),
        *(_profile_sections(record, profile) if profile is not None else []),
        _not_measured(record, profile),
        _method(record),
        _circumstances(record),
        _data(record),
    ]
    return page(title, (f"<h1>{words(record.workload.name)}</h1>\n", *sections))


def _verdict(record: RunRecord) -> str:
    verdict = record.verdict
    notes = as_list(filter(None, (bottleneck_in_words(record), *record.warnings)))
    if verdict is None:
        return (
            '<section class="verdict"><h2>No verdict yet</h2>'
            f"<p>The run has not ended; start it again to go on.</p>{notes}</section>\n"
        )
    return (
        f'<section class="verdict {verdict.kind}"><h2>{verdict.kind}</h2>'
        f"{as_definitions(_verdict_pairs(record, verdict))}{notes}</section>\n"
    )


def _verdict_pairs(record: RunRecord, verdict: Verdict) -> list[tuple[str, str]]:
    return [
        ("gain", gain_in_words(verdict)),
        ("loss", loss_in_words(verdict, record.workload.task)),
        ("evidence", evidence_in_words(verdict)),
        ("reason", verdict.reason),
        ("next step", verdict.next_step),
        ("artefact", record.artefact or ""),
        ("handed over", verdict.trial_id or "the original"),
        ("size", _of_original(verdict.size_ratio)),
        ("memory", _of_original(verdict.memory_ratio)),
        ("candidates opened on test", str(verdict.candidates_tested)),
    ]


def _of_original(ratio: float | None) -> str:
    return f"{ratio:.2f} of the original's" if ratio is not None else ""


def _headline(record: RunRecord) -> str:
    rows, task = headline(record), record.workload.task
    titles = ["", "latency", "p90", "speed-up", _metric_title(task), drop_name(task)]
    titles += ["size", "memory"]
    notes = [f"{DASH} {row.name}: {note}" for row in rows for note in row.footnotes]
    return (
        "<h2>Original, off the shelf, ours</h2>\n"
        f"{as_table(titles, (_headline_row(row, task.unit) for row in rows))}{as_list(notes)}"
    )


def _metric_title(task: Task) -> str:
    return "\n".join(filter(None, (metric_name(task), lower_is_better(task))))


def _headline_row(row: HeadlineRow, unit: str) -> str:
    accuracy = row.accuracy
    drop = accuracy.drop if accuracy else None
    reference = row.role == "original"
    tags = "".join(
        f' <span class="tag">{tag}</span>'
        for tag, holds in (
            ("best control", row.is_best_control),
            ("handed over", row.is_handed_over),
        )
        if holds
    )
    seen = f"{accuracy.split}, {accuracy.num_samples} samples" if accuracy else ""
    cells = [
        f'<td class="name">{words(row.name)}{tags}{below(row.how)}</td>',
        cell(in_ms(row.timing.median_ms if row.timing else None), _timing_range(row)),
        cell(in_ms(row.timing.p90_ms if row.timing else None)),
        cell("reference" if reference else _estimate(row.speedup), as_range(row.speedup)),
        cell(in_metric(accuracy.value if accuracy else None, unit), seen),
        cell("reference", "") if reference else _drop_cell(drop, unit),
        cell(in_megabytes(row.size_bytes), _of_original(row.size_ratio)),
        cell(in_megabytes(row.memory_bytes), _of_original(row.memory_ratio)),
    ]
    kind = ' class="ours"' if row.is_handed_over else ""
    return f"<tr{kind}>{''.join(cells)}</tr>"


def _timing_range(row: HeadlineRow) -> str:
    return as_range(row.timing.interval_ms, 3) if row.timing else ""


def _estimate(interval: Interval | None) -> str:
    return as_ratio(interval.estimate) if interval is not None else DASH


def _drop_cell(drop: Interval | None, unit: str) -> str:
    return cell(in_drop(drop.estimate if drop else None, unit), drop_range(drop, unit))


def _chart(record: RunRecord) -> str:
    drawing = scatter(record)
    if not drawing:
        return ""
    return (
        f"<h2>What is lost, against time</h2>\n<figure>{drawing}<figcaption>Drops of "
        f"{words(of_metric(record.workload.task))}, as measured during the search; positive is a "
        "loss. Squares: off-the-shelf controls; circles: trials; joined: the trials "
        "that no other feasible one beats in both; ring: handed over; hollow, on the upper edge: "
        "a larger drop than the axis shows.</figcaption></figure>\n"
    )


def _trials(record: RunRecord) -> str:
    if not record.trials:
        return ""
    task = record.workload.task
    titles = ["trial", "plan", "latency", "predicted", "speed-up", _metric_title(task)]
    titles += [drop_name(task), "size"]
    rows = (_trial_row(row, task.unit) for row in trial_rows(record))
    return f"<h2>All trials</h2>\n{as_table(titles, rows, num_words=2)}"


def _trial_row(row: TrialRow, unit: str) -> str:
    accuracy = row.accuracy
    tags = "".join(
        f' <span class="tag">{tag}</span>'
        for tag, holds in (("Pareto", row.is_pareto), ("handed over", row.is_handed_over))
        if holds
    )
    outcome = row.author if row.status == "done" else f"{row.author}, {row.status}"
    cells = [
        f'<td class="name">{words(row.trial_id)}{tags}{below(outcome)}</td>',
        f'<td class="words">{words(row.plan)}{below(row.why)}{below(row.reason)}</td>',
        cell(in_ms(row.measured_ms)),
        cell(in_ms(row.predicted_ms)),
        cell(_estimate(row.speedup), as_range(row.speedup)),
        cell(
            in_metric(accuracy.value if accuracy else None, unit),
            accuracy.split if accuracy else "",
        ),
        _drop_cell(accuracy.drop if accuracy else None, unit),
        cell(in_megabytes(row.size_bytes)),
    ]
    kind = "ours" if row.is_handed_over else row.status
    return f'<tr class="{kind}">{"".join(cells)}</tr>'


def _rejections(record: RunRecord) -> str:
    if not record.rejections:
        return ""
    lines = [
        f"{rejection.author}: {rejection.reason}"
        + (f" ({describe_plan(rejection.plan)})" if rejection.plan else "")
        for rejection in record.rejections
    ]
    return f"<h2>Plans not carried out</h2>\n{as_list(lines)}"


def _profile_sections(record: RunRecord, profile: Profile) -> list[str]:
    summary = as_definitions(
        [
            ("time", whole_and_parts(profile)),
            ("work", f"{as_count(profile.total_macs)} MACs"),
            ("parameters", as_count(profile.num_parameters)),
            ("peak activations", in_megabytes(profile.peak_activation_bytes)),
            ("runtimes", schemes_in_words(profile)),
            *([("profiled", when)] if (when := taken_when(profile)) else []),
        ]
    )
    modules = slowest_modules(profile, NUM_BOTTLENECKS)
    titles = ["module", "self time", "share", "own MACs", "parameters", "peak activations"]
    bottlenecks = (
        f"<h2>Where the original's time goes</h2>\n{summary}"
        f"{as_table(titles, map(_module_row, modules))}"
    )
    return [bottlenecks, _deployed(profile), _groups(record, profile)]


def _deployed(profile: Profile) -> str:
    if not profile.deployed:
        return ""
    rows: list[str] = []
    for deployed in profile.deployed:
        name, *numbers, slowest = deployed_row(deployed)
        cells = [f'<td class="name">{words(name)}</td>', *map(cell, numbers)]
        rows.append(f"<tr>{''.join(cells)}<td>{words(slowest)}</td></tr>")
    return (
        "<h2>Where the artefacts' time goes</h2>\n"
        "<p>Off-the-shelf artefacts, operator by operator, as their runtimes time themselves after "
        "their own fusions. The operators are timed in other calls than the whole.</p>\n"
        f"{as_table(DEPLOYED_TITLES, rows)}"
    )


def _module_row(module: ModuleCost) -> str:
    share = min(max(module.share or 0.0, 0.0), 1.0)
    bar = f'<span class="bar" style="width:{120 * share:.1f}px"></span> ' if module.share else ""
    cells = [
        f'<td class="name">{words(module_name(module))}{below(module.type)}</td>',
        cell(in_ms(module.self_time.median_ms if module.self_time else None)),
        f'<td class="number">{bar}{words(as_share(module.share))}</td>',
        cell(as_count(module.self_macs)),
        cell(as_count(module.num_parameters)),
        cell(in_megabytes(module.peak_activation_bytes)),
    ]
    return f"<tr>{''.join(cells)}</tr>"


def _groups(record: RunRecord, profile: Profile) -> str:
    if not profile.groups:
        return ""
    ratios = _shown_ratios(profile.groups)
    widths = _widths_handed_over(record)
    titles = ["group", "width", "kept", "self time", "MACs a unit", "parameters a unit"]
    name, meaning = divergence_name(profile)
    titles += [f"{name} at {ratio:.2f}" for ratio in ratios]
    rows = (_group_row(group, ratios, widths.get(group.id)) for group in profile.groups)
    return (
        "<h2>Groups and how sensitive they are</h2>\n"
        f"<p>Layers of a group can only be pruned together. The {name}: {meaning} when this "
        "group alone loses that share of its units, after repair.</p>\n"
        f"{as_table(titles, rows)}"
    )


def _group_row(group: GroupCost, ratios: Sequence[float], widths: tuple[int, int] | None) -> str:
    by_ratio = {point.ratio: point for point in group.sensitivity}
    cells = [
        f'<td class="name"><code>{words(group.id)}</code></td>',
        cell(str(group.width)),
        cell(str(widths[1]) if widths else DASH),
        cell(in_ms(group.self_ms)),
        cell(as_count(group.macs_per_unit)),
        cell(as_count(group.parameters_per_unit)),
    ]
    for ratio in ratios:
        point = by_ratio.get(ratio)
        error = f"± {significant(point.kl_error, 2)}" if point else ""
        cells.append(cell(significant(point.kl, 2) if point else DASH, error))
    return f"<tr>{''.join(cells)}</tr>"


def _shown_ratios(groups: Sequence[GroupCost]) -> list[float]:
    ratios = sorted({point.ratio for group in groups for point in group.sensitivity})
    step = max(1, -(-len(ratios) // _MOST_RATIOS))
    return ratios[::step]


def _widths_handed_over(record: RunRecord) -> dict[str, tuple[int, int]]:
    chosen = record.verdict.trial_id if record.verdict else None
    trial = next((t for t in record.trials if t.trial_id == chosen), None)
    return trial.achieved.widths if trial and trial.achieved else {}


def _not_measured(record: RunRecord, profile: Profile | None) -> str:
    lines = [*not_measured(record), *(gaps_of(profile) if profile is not None else ())]
    body = as_list(lines) if lines else "<p>Nothing that was asked for is missing.</p>\n"
    return f"<h2>Not measured, and why</h2>\n{body}"


def _advice(record: RunRecord) -> str:
    """What a language model contributed, and every time that a guard stepped in."""
    lines = advice_in_words(record)
    if not lines:
        return ""
    rows = [
        f"<tr>{cell(guard.action, kind='words')}{cell(guard.trial_id or '', kind='words')}"
        f"{cell(guard.reason, kind='words')}</tr>"
        for guard in record.guards
    ]
    table = as_table(("what", "trial", "why"), rows, num_words=3) if rows else ""
    return f"<h2>Language model</h2>\n{as_list(lines)}{table}"


def _method(record: RunRecord) -> str:
    settings = record.settings
    deployment, task = settings.deployment, record.workload.task
    timing = record.baseline_timing or record.baseline.timing
    counted = (
        f" {timing.num_calls} calls in {timing.num_blocks} blocks for the original."
        if timing
        else ""
    )
    lines = [
        f"Everything at batch size {deployment.batch_size} with {deployment.threads} threads on "
        f"{deployment.device}, the {printable(task.metric, 40)} too.",
        "Latency: median of one call, from blocks that alternate between the two artefacts "
        f"compared; its interval is a bootstrap over blocks.{counted}",
        "Speed-up: ratio of two latencies from one such measurement; above 1 is faster.",
        f"Scored by {describe_metric(task)}. Drop: {_difference(task)}; positive is a loss.",
        "Size: bytes of the model files. Memory: peak anonymous memory less that of an empty "
        "process with the runtime loaded.",
    ]
    isolated_not = [t.trial_id for t in record.trials if _in_process(t)]
    if isolated_not:
        lines.append(f"Carried out inside the calling process: {', '.join(isolated_not)}.")
    return f"<h2>How it was measured</h2>\n{as_list(lines)}"


def _difference(task: Task) -> str:
    """Which way the drop is taken, so that a loss is positive."""
    order = "original minus artefact" if task.higher_is_better else "artefact minus original"
    words = f"{order} on the same samples"
    return f"{words}, in {printable(task.unit, 40)}" if task.unit else words


def _in_process(trial: Trial) -> bool:
    return trial.isolation == "none"


def _circumstances(record: RunRecord) -> str:
    settings, budget = record.settings, record.settings.budget
    pairs = [
        ("version", f"profiling-agent {record.package_version}"),
        ("budget", f"drop at most {in_budget(budget.max_drop, record.workload.task.unit)}"),
        ("objective", budget.objective),
        ("evidence wanted", budget.evidence),
        ("time", f"{in_seconds(record.seconds)} of {in_seconds(budget.time_s)}"),
        ("trials", f"{len(record.trials)} carried out, max-trials {budget.max_trials}"),
        ("planner", settings.planner),
        ("seed", str(settings.seed)),
        ("runtimes", ", ".join(settings.runtimes)),
        *_machine_pairs(record.machine),
    ]
    return f"<h2>Machine and settings</h2>\n{as_definitions(pairs)}"


def _machine_pairs(machine: Machine) -> list[tuple[str, str]]:
    quota = f", {machine.cpu_quota:g} granted" if machine.cpu_quota is not None else ""
    return [
        ("processor", f"{machine.processor} ({machine.architecture})"),
        ("cores", f"{machine.num_cores}{quota}"),
        ("features", ", ".join(machine.features)),
        ("memory", in_megabytes(machine.memory_bytes)),
        ("system", machine.system),
        ("software", ", ".join(f"{k} {v}" for k, v in sorted(machine.versions.items()))),
    ]


def _data(record: RunRecord) -> str:
    workload, source = record.workload, record.workload.source
    shapes = [f"{i.name} {list(i.shape)} {i.dtype} (from {i.found_by})" for i in workload.inputs]
    pairs = [
        ("model", source.model or "a live object"),
        ("weights", source.weights or ""),
        ("data", source.data or ""),
        ("test data", source.test_data or ""),
        ("inputs", "; ".join(shapes)),
        ("list of classes", source.classes or ""),
        ("metric", describe_metric(workload.task)),
        ("metric from", source.metric if workload.task.unit != POINTS else ""),
    ]
    for split in workload.splits:
        labels = "labelled" if split.labelled else "no labels"
        digest = f"sha256 {split.sha256}"
        pairs.append((f"{split.name} split", f"{split.num_samples} samples, {labels}, {digest}"))
    pairs += facts_of_data(workload)
    return f"<h2>Model and data</h2>\n{as_definitions(pairs)}"
