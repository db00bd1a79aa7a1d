"""What a person is shown of a run: one record, three ways, and never an invented number."""

from __future__ import annotations

import html
import io
import re
from dataclasses import fields
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console, RenderableType

import record_factory as make
from profiling_agent.records.common import Budget, Deployment
from profiling_agent.records.plan import PruningLine
from profiling_agent.records.trial import Rejection, RunRecord, RunSettings
from profiling_agent.records.workload import ImageTransform, Preprocessing, Reading, Task
from profiling_agent.report import wording
from profiling_agent.report.chart import points_of, scatter
from profiling_agent.report.html import render_html
from profiling_agent.report.live import (
    LineProgress,
    RichProgress,
    SilentProgress,
    open_progress,
    quiet,
)
from profiling_agent.report.profile_view import render_profile
from profiling_agent.report.stage_view import render_evaluation
from profiling_agent.report.summary import bottleneck_in_words, headline, trial_rows
from profiling_agent.report.terminal import render_run

HOSTILE = "<script>alert(1)</script>[red]&\"'\x1b[2J\u202e"
VOID = {"meta", "br"}


class _Balance(HTMLParser):
    """Fails on a tag that is closed and not open; collects the tags seen."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        if tag not in VOID:
            self.open.append(tag)
        for name, _ in attrs:
            assert not name.startswith("on")
            assert name not in {"src", "href"}

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def shown(renderable: RenderableType, width: int = 100, *, terminal: bool = False) -> str:
    stream = io.StringIO()
    Console(file=stream, width=width, force_terminal=terminal).print(renderable)
    return stream.getvalue()


def hostile_run() -> RunRecord:
    plan = make.make_plan(
        pruning=(PruningLine(match=HOSTILE, ratio=0.5, why=HOSTILE),), why=HOSTILE
    )
    return make.make_run(
        workload=make.make_workload(
            name=HOSTILE,
            notes=(HOSTILE,),
            task=Task(
                metric=HOSTILE,
                num_classes=2,
                unit=HOSTILE,
                higher_is_better=False,
                class_names=(HOSTILE, "b"),
            ),
            preprocessing=Preprocessing(
                layout="hwc", source=HOSTILE, image=ImageTransform(source=HOSTILE)
            ),
            reading=Reading(samples_per_s=1.0, num_workers=1, num_unreadable=1),
        ),
        machine=make.make_machine(processor=HOSTILE, versions={HOSTILE: HOSTILE}),
        trials=(
            make.make_trial(HOSTILE, plan=plan, author=HOSTILE),
            make.make_trial("t2", plan=plan, status="failed", reason=HOSTILE),
        ),
        rejections=(Rejection(plan=plan, author=HOSTILE, reason=HOSTILE),),
        pareto=(HOSTILE,),
        final=(),
        verdict=make.make_verdict(trial_id=HOSTILE, reason=HOSTILE, next_step=HOSTILE),
        artefact=HOSTILE,
        warnings=(HOSTILE,),
    )


# --- words -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (wording.in_ms(None), "–"),
        (wording.in_ms(4.2149), "4.21 ms"),
        (wording.in_ms(0.03124), "0.0312 ms"),
        (wording.in_ms(1284.0), "1284 ms"),
        (wording.in_ms(0.0), "0 ms"),
        (wording.in_ms(99.96), "100 ms"),
        (wording.in_points(-0.001), "0.00"),
        (wording.in_points(-0.12), "-0.12"),
        (wording.in_megabytes(6_411_000), "6.41 MB"),
        (wording.in_megabytes(0), "0 kB"),
        (wording.in_megabytes(999), "0.999 kB"),
        (wording.as_count(1_630_000), "1.63 M"),
        (wording.as_count(97), "97"),
        (wording.as_share(0.4123), "41.2 %"),
        (wording.in_seconds(125.2), "2 min 05 s"),
        (wording.in_seconds(119.96), "2 min 00 s"),
        (wording.printable("a\x1b[2Jb\nc"), "a\\x1b[2Jb c"),
        (wording.printable("\ud800"), "\\ud800"),
        (wording.printable("x" * 300), "x" * 199 + "…"),
    ],
)
def test_numbers_and_names_are_written_one_way(said: str, expected: str) -> None:
    assert said == expected


def test_a_plan_in_words() -> None:
    assert wording.describe_plan(make.make_plan()) == (
        r"prune mlp:blocks\..* 40.0 % (obs); onnxruntime int8-dynamic, float: head; "
        "repair least-squares"
    )


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (wording.in_metric(91.934, "points"), "91.93 %"),
        (wording.in_metric(0.873, ""), "0.8730"),
        (wording.in_metric(12.3456, "px"), "12.35"),
        (wording.in_metric(15342.2, "px"), "15342"),
        (wording.in_metric(None, ""), "–"),
        (wording.in_drop(-0.001, "points"), "0.00"),
        (wording.in_drop(0.01, ""), "0.0100"),
        (wording.in_drop(-0.00123, ""), "-0.00123"),
        (wording.in_drop(-0.0, ""), "0"),
        (wording.in_drop(None, "px"), "–"),
        (wording.drop_range(make.make_interval(0.01, 0.02), ""), "[-0.0100, 0.0300]"),
        (wording.drop_range(make.make_interval(0.1, 0.2), "points"), "[-0.10, 0.30]"),
        (wording.drop_range(None, ""), ""),
        (wording.in_budget(0.5, "points"), "0.5 points"),
        (wording.in_budget(0.01, ""), "0.01"),
        (wording.in_budget(0.001, "points"), "0.001 points"),
        (wording.with_unit("0.00831", ""), "0.00831"),
    ],
)
def test_a_metric_is_written_in_its_own_unit(said: str, expected: str) -> None:
    assert said == expected


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        (Task(num_classes=10), "accuracy: percent of samples right"),
        (
            Task(metric="agreement", num_classes=10),
            "agreement: percent of samples answered as the original answers; no labels are used",
        ),
        (
            Task(metric="map50", unit="", num_classes=None),
            "map50: a function of the user's; higher is better",
        ),
        (
            Task(metric="error", unit="px", higher_is_better=False, num_classes=None),
            "error, px: a function of the user's; lower is better",
        ),
    ],
)
def test_a_metric_in_words(task: Task, expected: str) -> None:
    assert wording.describe_metric(task) == expected


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        (Task(num_classes=1000), "any of the 1,000 classes"),
        (
            Task(num_classes=1000, answers=tuple(range(10))),
            "one of the 10 classes present, of 1,000",
        ),
        (
            Task(metric="map50", unit="", num_classes=None),
            "the model's outputs as they are, scored by map50",
        ),
    ],
)
def test_which_classes_a_prediction_may_be(task: Task, expected: str) -> None:
    assert wording.describe_answers(task) == expected


def test_preprocessing_in_words() -> None:
    photo = make.make_photo_workload().preprocessing
    arithmetic = (
        "layout hwc, scale 1/255, mean (0.485, 0.456, 0.406), std (0.229, 0.224, 0.225) "
        "(from: the model's own)"
    )
    assert wording.describe_preprocessing(photo) == (
        "images: RGB, resize shorter side 256 bicubic, crop 224x224 "
        f"(from: timm's configuration); {arithmetic}"
    )
    whole = ImageTransform(mode="BGR", resize=(240, 320))
    other = photo.model_copy(update={"image": whole, "scale": 1.0, "mean": (1.0,) * 6})
    said = wording.describe_preprocessing(other)
    assert "BGR, resize 240x320 bilinear, no crop (from: none stated)" in said
    assert "scale 1, mean (1, 1, 1, 1 and 2 more)" in said
    assert wording.describe_preprocessing(Preprocessing()) == (
        "no arithmetic: inputs are passed on as they are"
    )


def test_reading_in_words() -> None:
    one = Reading(samples_per_s=812.4, num_workers=1)
    assert wording.describe_reading(one) == "812 samples/s with 1 worker"
    lost = Reading(samples_per_s=9.87, num_workers=4, num_unreadable=1200)
    assert wording.describe_reading(lost) == (
        "9.87 samples/s with 4 workers; 1,200 unreadable samples left out"
    )


# --- rows ------------------------------------------------------------------------------------


def test_headline_is_the_original_the_controls_and_ours() -> None:
    rows = headline(make.make_run())
    assert [(row.role, row.trial_id) for row in rows] == [
        ("original", None),
        ("control", "c1"),
        ("control", "c2"),
        ("ours", "t1"),
    ]
    assert [row.trial_id for row in rows if row.is_best_control] == ["c2"]
    assert [row.trial_id for row in rows if row.is_handed_over] == ["t1"]


def test_the_original_is_called_eager_once() -> None:
    for scheme in ("fp32", "eager fp32"):
        row = headline(make.make_run(baseline=make.make_evaluation(scheme=scheme), final=()))[0]
        assert row.how == "torch eager fp32"


def test_headline_prefers_the_final_stage_and_the_verdict() -> None:
    ours = headline(make.make_run())[-1]
    assert ours.accuracy is not None
    assert (ours.accuracy.split, ours.accuracy.value) == ("test", 91.9)
    assert ours.speedup is not None
    assert ours.speedup.estimate == 2.31


def test_headline_falls_back_to_the_search() -> None:
    rows = headline(make.make_run(final=(), verdict=None, artefact=None))
    assert [row.role for row in rows] == ["original", "control", "control"]
    assert {row.accuracy.split for row in rows if row.accuracy} == {"search"}


def test_a_speedup_over_something_else_is_not_shown_as_one_over_the_original() -> None:
    speedup = make.make_evaluation("t1").speedup
    assert speedup is not None
    other = make.make_evaluation("c1", speedup=speedup.model_copy(update={"over": "c2"}))
    control = make.make_control("c1", "onnxruntime", "fp32", evaluation=other)
    rows = headline(make.make_run(trials=(control,), final=(), verdict=None))
    assert rows[1].speedup is None
    assert "speed-up: not measured, and no reason was recorded" in rows[1].footnotes


def test_what_is_missing_is_none_with_the_recorded_reason() -> None:
    control = headline(make.make_run())[2]
    assert (control.memory_bytes, control.memory_ratio) == (None, None)
    assert control.footnotes == ("memory: the process ended before it was read",)


def test_a_failed_control_shows_its_reason_and_no_number() -> None:
    failed = make.make_control(
        "c1", "onnxruntime", "fp32", status="failed", reason="operator not supported"
    )
    row = headline(make.make_run(trials=(failed,), final=(), verdict=None))[1]
    assert row.footnotes == ("failed: operator not supported",)
    values = {field.name: getattr(row, field.name) for field in fields(row)}
    for name in ("timing", "speedup", "accuracy", "size_bytes", "size_ratio", "memory_bytes"):
        assert values[name] is None


def test_a_control_handed_over_is_not_listed_twice() -> None:
    verdict = make.make_verdict(kind="NO_GAIN", trial_id="c2")
    rows = headline(make.make_run(verdict=verdict))
    assert [row.trial_id for row in rows if row.is_handed_over] == ["c2"]
    assert len(rows) == 3


def test_all_trials_are_listed_with_reasons() -> None:
    rows = trial_rows(make.make_run())
    assert [(row.trial_id, row.status) for row in rows][2:] == [
        ("t1", "done"),
        ("t2", "screened"),
        ("t3", "failed"),
    ]
    assert rows[-1].measured_ms is None
    assert rows[-1].reason == "the worker ran out of memory"


# --- terminal --------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [80, 100, 140])
def test_terminal_fits_and_says_the_essentials(width: int) -> None:
    text = shown(render_run(make.make_run(), folder=Path("runs/demo")), width)
    assert max(len(line) for line in text.splitlines()) <= width
    for words in (
        "original",
        "best control",
        "handed over",
        "ACCEPT",
        "2.31x",
        "runs/demo/artefact",
    ):
        assert words in text
    assert "memory: the process ended" in text


def test_terminal_without_a_verdict_says_so() -> None:
    text = shown(render_run(make.make_run(verdict=None, final=(), artefact=None)))
    assert "no verdict" in text
    assert "ours" not in text


def test_infeasible_hands_over_the_original() -> None:
    verdict = make.make_verdict(
        kind="INFEASIBLE",
        evidence=None,
        trial_id=None,
        best_control_id=None,
        drop=None,
        drop_upper_bound=None,
        speedup=None,
        speedup_over_control=None,
        size_ratio=None,
        memory_ratio=None,
        reason="nothing stayed within 0.5 points",
    )
    record = make.make_run(verdict=verdict, artefact=None)
    text = shown(render_run(record))
    assert "INFEASIBLE" in text
    assert "nothing stayed within 0.5 points" in text
    assert "gain" not in text
    assert headline(record)[0].is_handed_over


def test_different_splits_are_named_in_each_cell() -> None:
    run = make.make_run()
    text = shown(render_run(make.make_run(final=run.final[3:])))
    assert "on test" in text
    assert "on search" in text


def test_an_empty_run_is_drawn() -> None:
    empty = make.make_run(
        trials=(), final=(), candidates=(), pareto=(), verdict=None, artefact=None
    )
    assert "original" in shown(render_run(empty))
    assert "<h2>All trials</h2>" not in render_html(empty)
    assert scatter(empty) == ""


def test_hostile_names_do_not_reach_the_terminal() -> None:
    for text in (
        shown(render_run(hostile_run())),
        shown(render_profile(make.make_profile(modules=(make.make_module(HOSTILE, 1.0),)))),
    ):
        assert "\x1b" not in text
        assert "\u202e" not in text
        assert "[red]" in text
        text.encode("utf-8")


# --- metrics of other kinds ------------------------------------------------------------------


def both(record: RunRecord) -> tuple[str, str]:
    """What the terminal shows in wide lines, and the page's words."""
    page = html.unescape(
        re.sub(r"<style>.*?</style>|<[^>]+>", " ", render_html(record), flags=re.S)
    )
    return shown(render_run(record), 400), page


@pytest.mark.parametrize("unit", ["", "px"])
def test_a_function_of_the_users_is_shown_in_its_own_unit(unit: str) -> None:
    record = make.make_own_metric_run(unit=unit)
    spaced = f" {unit}" if unit else ""
    for text in both(record):
        assert "map50" in text
        assert "0.8730" in text
        assert "0.8647" in text
        assert f"drop 0.00831 [-0.00120, 0.0178]{spaced} (map50)" in text
        assert "one-sided 95 % bound 0.0164" in text
        for wrong in ("accuracy", "Accuracy", "points", "0.87 %", "0.00 ", "lower is better"):
            assert wrong not in text
    assert f"drop at most 0.01{spaced}" in both(record)[1]
    assert "higher is better" in both(record)[1]
    assert "score.py:map50" in both(record)[1]


def test_a_metric_of_which_less_is_better_says_so_and_keeps_losses_positive() -> None:
    record = make.make_own_metric_run(higher_is_better=False, unit="px")
    terminal, page = both(record)
    for text in (terminal, page):
        assert "error, px" in text
        assert "drop 0.00831 [-0.00120, 0.0178] px (error, lower is better)" in text
    assert "; lower is better, and a positive drop is a loss." in terminal
    assert re.search(r"error, px\s+lower is better", page)
    assert "artefact minus original on the same samples, in px; positive is a loss" in page
    assert "drop, px (error, lower is better)" in scatter(record)


def test_agreement_is_in_points_and_never_called_accuracy() -> None:
    task = Task(metric="agreement", num_classes=10)
    for text in both(make.make_run(workload=make.make_workload(task=task))):
        assert "drop 0.12 [-0.08, 0.32] points (agreement)" in text
        assert "91.90 %" in text
        assert "accuracy" not in text.lower().replace("accuracy collapsed", "")


@pytest.mark.parametrize("width", [80, 100])
def test_a_long_metric_fits(width: int) -> None:
    task = Task(metric="mean_average_precision_at_50", unit="per mille", num_classes=None)
    record = make.make_own_metric_run(workload=make.make_workload(task=task))
    text = shown(render_run(record), width)
    assert max(len(line) for line in text.splitlines()) <= width


def test_a_missing_value_is_named_by_its_metric() -> None:
    trial = make.make_control("c1", "torch", "fp32", evaluation=make.make_evaluation(accuracy=()))
    record = make.make_own_metric_run(trials=(trial,), final=(), verdict=None)
    assert "map50: not measured, and no reason was recorded" in headline(record)[1].footnotes


def test_live_lines_have_the_metrics_unit() -> None:
    for unit, expected in (
        ("", "2.31x, drop 0.00831 (12.3 s)"),
        ("px", "drop 0.00831 px (12.3 s)"),
    ):
        stream = io.StringIO()
        LineProgress(stream, unit=unit).trial_finished(make.make_trial("t1"), 0.00831, 2.31)
        assert expected in stream.getvalue()


def test_one_evaluation_is_shown_in_the_metrics_unit() -> None:
    record = make.make_own_metric_run(higher_is_better=False, unit="px")
    text = shown(render_evaluation(record.final[-1], record.workload.task), 140)
    assert "error, px (test)" in text
    assert "0.8813 on 1,000 samples, drop 0.00831 px (-0.00120 to 0.0178)" in text
    assert "lower is better" in text
    text = shown(render_evaluation(make.make_run().final[-1]), 140)
    assert "91.90 % of 1,000 samples, drop 0.12 points (-0.08 to 0.32)" in text
    assert "lower is better" not in text


def test_a_profile_of_other_outputs_has_no_kl() -> None:
    assert "KL by ratio" in shown(render_profile(make.make_profile()))
    record = make.make_own_metric_run()
    profile = make.make_profile(workload=record.workload)
    assert "divergence by ratio" in shown(render_profile(profile))
    page = render_html(record, profile)
    assert "divergence at 0.50" in page
    assert "KL" not in page


# --- data ------------------------------------------------------------------------------------


def test_how_the_data_were_read_is_shown() -> None:
    reading = Reading(samples_per_s=812.4, num_workers=4, num_unreadable=3)
    task = Task(num_classes=1000, answers=(1, 2, 5))
    workload = make.make_photo_workload(reading=reading, task=task, notes=("names were guessed",))
    profile = shown(render_profile(make.make_profile(workload=workload)), 400)
    for text in (*both(make.make_run(workload=workload)), profile):
        assert wording.describe_preprocessing(workload.preprocessing) in text
        assert "one of the 3 classes present, of 1,000" in text
        assert "812 samples/s with 4 workers; 3 unreadable samples left out" in text
        assert "names were guessed" in text


def test_nothing_is_said_of_reading_that_was_not_measured() -> None:
    for text in both(make.make_run()):
        assert "samples/s" not in text
        assert "unreadable" not in text


@pytest.mark.parametrize(
    ("samples_per_s", "is_said"), [(100.0, True), (999.0, True), (1000.0, False), (9e5, False)]
)
def test_data_slower_than_twice_the_model_are_the_bottleneck(
    samples_per_s: float, is_said: bool
) -> None:
    fast = make.make_evaluation("t1", throughput_per_s=500.0)
    slow = make.make_evaluation("c1", throughput_per_s=10.0)
    unraced = make.make_evaluation("c2", throughput_per_s=None)
    workload = make.make_workload(reading=Reading(samples_per_s=samples_per_s, num_workers=2))
    record = make.make_run(workload=workload, final=(slow, fast, unraced))
    sentence = (
        "the data are the bottleneck: reading and decoding reaches "
        f"{samples_per_s:.0f} samples/s, less than twice the 500 of the model"
    )
    for text in both(record):
        assert (sentence in text) is is_said
    unknown = (make.make_run(workload=workload, final=(unraced,)), make.make_run(final=(fast,)))
    assert [bottleneck_in_words(record) for record in unknown] == ["", ""]


# --- page ------------------------------------------------------------------------------------


def test_page_is_whole_stands_alone_and_is_a_pure_function() -> None:
    page = render_html(make.make_run(), make.make_profile())
    parser = _Balance()
    parser.feed(page)
    assert parser.open == []
    assert not parser.seen & {"script", "link", "img", "iframe"}
    assert "http" not in page.replace('http-equiv="Content-Security-Policy"', "")
    assert "url(" not in page
    assert page == render_html(make.make_run(), make.make_profile())


def test_page_shows_every_part() -> None:
    page = render_html(make.make_run(), make.make_profile())
    for words in (
        "ACCEPT",
        "Original, off the shelf, ours",
        "All trials",
        "the worker ran out of memory",
        "blocks.0.mlp.fc1",
        "heads:blocks.1.attn.qkv",
        "KL at 0.50",
        "Not measured, and why",
        "aten::bucketize",
        "How it was measured",
        "ab" * 32,
        "Example CPU",
    ):
        assert words in page
    assert "Where the original" not in render_html(make.make_run())


def test_page_escapes_hostile_text() -> None:
    page = render_html(
        hostile_run(), make.make_profile(groups=(make.make_group("mlp:" + HOSTILE),))
    )
    parser = _Balance()
    parser.feed(page)
    assert "script" not in parser.seen
    assert "\x1b" not in page
    assert "\u202e" not in page
    page.encode("utf-8")


def test_page_without_a_verdict() -> None:
    assert "No verdict yet" in render_html(make.make_run(verdict=None, final=(), artefact=None))


# --- chart -----------------------------------------------------------------------------------


def test_chart_draws_only_what_was_measured() -> None:
    assert [point.trial_id for point in points_of(make.make_run())] == ["c1", "c2", "t1"]


def test_chart_keeps_collapsed_trials_on_the_edge() -> None:
    collapsed = make.make_evaluation("t9", accuracy=(make.make_accuracy("search", 10.0, 82.0),))
    trials = (make.make_trial("t1"), make.make_trial("t9", evaluation=collapsed))
    drawing = scatter(make.make_run(trials=trials))
    assert drawing.count('class="outside"') == 1
    heights = [float(y) for y in re.findall(r'cy="([-\d.]+)"', drawing)]
    assert all(0 <= y <= 340 for y in heights)


@pytest.mark.parametrize("max_drop", [0.0, 1e-6, 0.5, 100.0])
def test_chart_has_axes_for_any_budget(max_drop: float) -> None:
    settings = RunSettings(budget=Budget(max_drop=max_drop), deployment=Deployment())
    assert "<svg" in scatter(make.make_run(settings=settings))


def test_chart_writes_the_budget_and_the_drops_of_a_small_unit() -> None:
    drawing = scatter(make.make_own_metric_run())
    assert ">budget 0.01<" in drawing
    assert "drop 0.00831</title>" in drawing
    assert ">drop (map50)<" in drawing
    tiny = make.make_accuracy("search", 0.9, 2e-9)
    trial = make.make_trial("t1", evaluation=make.make_evaluation("t1", accuracy=(tiny,)))
    settings = RunSettings(budget=Budget(max_drop=1e-8, unit=""), deployment=Deployment())
    drawing = scatter(make.make_own_metric_run(trials=(trial,), settings=settings))
    heights = {
        float(y) for y in re.findall(r'class="(?:budget|reference)"[^>]* y1="([^"]+)', drawing)
    }
    assert max(heights) - min(heights) > 200
    ticks = re.findall(r'text-anchor="end">([^<]+)</text>', drawing)
    assert len(ticks) == len(set(ticks))


# --- profile ---------------------------------------------------------------------------------


def test_a_profile_of_an_earlier_run_says_so() -> None:
    when = "2026-11-27 07:00 UTC"
    for profile, words in (
        (make.make_profile(), ""),
        (make.make_profile(reused_from=when), f"by an earlier run on this machine, {when}"),
    ):
        for text in (shown(render_profile(profile)), render_html(make.make_run(), profile)):
            assert ("earlier run" in text) == bool(words)
            assert words in " ".join(text.split())


def test_profile_shows_whole_parts_order_and_gaps() -> None:
    text = shown(render_profile(make.make_profile()))
    assert "whole forward 4.00 ms [3.80, 4.40], sum of parts 3.60 ms (90.0 % of the whole)" in text
    assert text.index("blocks.0.mlp.fc1") < text.index("blocks.0.attn.qkv")
    for words in ("aten::bucketize", "channels:head can't be pruned", "below the clock's step"):
        assert words in text


def test_profile_without_times_has_dashes() -> None:
    profile = make.make_profile(
        total=None, sum_of_parts_ms=None, modules=(make.make_module("a", None),), groups=()
    )
    assert "whole forward –, sum of parts –" in shown(render_profile(profile))


# --- progress --------------------------------------------------------------------------------


def test_lines_are_held_while_paused() -> None:
    stream = io.StringIO()
    progress = LineProgress(stream)
    progress.stage("profile", "latency tables")
    before = stream.getvalue()
    with quiet(progress):
        with quiet(progress):
            progress.trial_finished(make.make_trial("t1"), 0.12, 2.31)
        progress.message("kept")
        assert stream.getvalue() == before
    after = stream.getvalue()
    assert "t1 solver, onnxruntime int8-dynamic: 2.31x, drop 0.12 points (12.3 s)" in after
    assert after.index("2.31x") < after.index("kept")


def test_a_failed_trial_is_told_with_its_reason() -> None:
    stream = io.StringIO()
    progress = LineProgress(stream)
    progress.trial_started("t3", "torch fp32")
    progress.trial_finished(make.make_trial("t3", status="failed", reason="crashed"), None, None)
    assert "failed, crashed" in stream.getvalue()


def test_a_reader_that_went_away_does_not_end_the_run() -> None:
    stream = io.StringIO()
    progress = LineProgress(stream)
    stream.close()
    progress.message("nobody reads this")
    progress.stage("evaluate")
    progress.close()


def test_live_display_writes_nothing_while_paused_and_cleans_up() -> None:
    stream = io.StringIO()
    progress = RichProgress(Console(file=stream, force_terminal=True, width=80), 180.0)
    progress.stage("evaluate", "controls")
    progress.trial_started("t1", "torch fp32")
    progress.pause()
    before = stream.getvalue()
    progress.trial_finished(make.make_trial("t1"), 0.12, 2.31)
    progress.stage("decide")
    progress.pause()
    progress.resume()
    assert stream.getvalue() == before
    progress.resume()
    assert "2.31x" in stream.getvalue()
    progress.pause()
    progress.close()
    progress.close()
    assert stream.getvalue().endswith(("\x1b[?25h", "\r", "\x1b[2K\r"))


def test_the_display_suits_the_stream() -> None:
    assert isinstance(open_progress(60.0, stream=io.StringIO()), LineProgress)
    assert isinstance(open_progress(mode="silent"), SilentProgress)
