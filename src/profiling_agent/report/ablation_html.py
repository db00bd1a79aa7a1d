"""A comparison of planners as one page that stands alone."""

from __future__ import annotations

from profiling_agent.records.ablation import AblationRecord, Arm
from profiling_agent.report.ablation_chart import gains_chart
from profiling_agent.report.ablation_summary import (
    Row,
    findings,
    name_of,
    rows_of,
    titles_of,
)
from profiling_agent.report.page import as_definitions, as_list, as_table, cell, page, words
from profiling_agent.report.wording import DASH, as_ratio, in_budget, in_drop, in_seconds, with_unit


def render_ablation_html(record: AblationRecord) -> str:
    """The page; a pure function of the record."""
    name = record.workload.name
    sections = [
        f"<h1>{words(name)}: planners compared</h1>\n",
        as_list(record.warnings),
        _rows(record),
        f"<figure>{gains_chart(record)}</figure>\n",
        as_list(findings(record)),
        _attempts(record),
        _circumstances(record),
    ]
    return page(f"{name}: planners compared", sections)


def _rows(record: AblationRecord) -> str:
    titles = ("planner", *titles_of(record), "notes")
    return as_table(titles, (_row(row) for row in rows_of(record)))


def _row(row: Row) -> str:
    cells = "".join(cell(value, under) for value, under in row.cells)
    name = cell(row.name, row.under, kind="name")
    return f"<tr>{name}{cells}{cell(row.note, kind='words')}</tr>"


def _attempts(record: AblationRecord) -> str:
    rows = [row for arm in record.arms for row in _attempts_of(record, arm)]
    if not rows:
        return ""
    titles = ("arm", "trial", "plan", "drop", "speed-up")
    return f"<h2>All trials</h2>\n{as_table(titles, rows, num_words=3)}"


def _attempts_of(record: AblationRecord, arm: Arm) -> list[str]:
    planner, asked = name_of(arm)
    name = f"{planner}, seed {arm.seed}"
    unit = record.workload.task.unit
    rows: list[str] = []
    for attempt in arm.attempts:
        trial = attempt.trial
        number = str(attempt.number)
        if trial is None:
            facts = (cell(attempt.reason, "no trial", kind="words"), cell(DASH), cell(DASH))
        else:
            accuracy = trial.on_search
            drop = accuracy.drop.estimate if accuracy and accuracy.drop else None
            speed = trial.evaluation.speedup if trial.evaluation else None
            measured = f"measured as {attempt.measured_as}"
            known = f"{measured}, as in an arm before" if attempt.is_cached else measured
            words_ = f"{trial.author}: {trial.label}, {len(trial.plan.pruning)} pruning lines"
            facts = (
                cell(words_, trial.reason or known, kind="words"),
                cell(DASH if drop is None else with_unit(in_drop(drop, unit), unit)),
                cell(as_ratio(speed.ratio.estimate if speed else None)),
            )
        rows.append(
            f"<tr>{cell(name, asked, kind='name')}{cell(number, kind='words')}{''.join(facts)}</tr>"
        )
    return rows


def _circumstances(record: AblationRecord) -> str:
    search, machine = record.settings.search, record.machine
    pairs = [
        ("version", f"profiling-agent {record.package_version}"),
        ("budget", f"drop at most {in_budget(search.budget.max_drop, record.workload.task.unit)}"),
        ("objective", search.budget.objective),
        ("batch size, threads", f"{search.deployment.batch_size}, {search.deployment.threads}"),
        ("time", f"{in_seconds(record.seconds)} of {in_seconds(record.settings.time_s)}"),
        ("processor", f"{machine.processor} ({machine.architecture}), {machine.num_cores} cores"),
        ("software", ", ".join(f"{k} {v}" for k, v in sorted(machine.versions.items()))),
    ]
    return f"<h2>Machine and settings</h2>\n{as_definitions(pairs)}"
