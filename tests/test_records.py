"""Records, the journal and the store: what is written is read back, and what is broken is said."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from profiling_agent.errors import PlanError, StorageError
from profiling_agent.records.base import Record
from profiling_agent.records.common import Budget
from profiling_agent.records.evaluation import BuiltArtefact
from profiling_agent.records.journal import Journal
from profiling_agent.records.plan import Plan, PruningLine, Quantization
from profiling_agent.records.store import RunStore, read_array, write_array, write_text
from profiling_agent.records.trial import EXIT_CODES, Rejection
from record_factory import (
    make_achieved,
    make_evaluation,
    make_machine,
    make_plan,
    make_profile,
    make_run,
    make_trial,
    make_verdict,
    make_workload,
)

# ---- records ------------------------------------------------------------------------------------

RECORDS: list[Record] = [
    make_machine(),
    make_workload(),
    make_plan(),
    make_profile(),
    make_evaluation("t1"),
    make_achieved(),
    make_trial("t2", status="failed", reason="crashed"),
    make_verdict(kind="INFEASIBLE", trial_id=None, evidence=None, drop=None),
    make_run(rejections=(Rejection(plan=None, author="llm", reason="not a plan"),)),
    Budget(max_drop=0.5, objective="memory", evidence="proven"),
    BuiltArtefact(
        runtime="torch",
        scheme="fp32",
        model_files=("model.safetensors",),
        size_bytes=10,
        weight_bytes=9,
        achieved=make_achieved(),
        parity=None,
        seconds=0.5,
    ),
]


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)
def test_every_record_survives_a_round_trip(record: Record, tmp_path: Path) -> None:
    kind = type(record)
    assert kind.from_json(record.to_json()) == record
    assert kind.from_json(record.to_json(indent=None)).to_json() == record.to_json()
    write_text(tmp_path / "record.json", record.to_json())
    assert kind.read(tmp_path / "record.json") == record


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"runtime": "torch", "prunning": []}', "unknown field 'prunning'"),
        ("{}", "field 'runtime' is missing"),
        ('{"runtime": "tensorrt"}', "field 'runtime': .*got 'tensorrt'"),
        (
            '{"runtime": "torch", "pruning": [{"match": "a", "ratio": 1.5}]}',
            r"field 'pruning\.0\.ratio': .*less than 1 .*got 1\.5",
        ),
        ('{"runtime": "torch", "pruning": [{"ratio": 0.5}]}', r"'pruning\.0\.match' is missing"),
        ('{"runtime": "torch", "pruning": [{"match": "a", "ratio": "x"}]}', "got 'x'"),
        ('{"runtime": "torch", "seed": NaN}', "seed"),
        ('{"runtime": "torch", "schema_version": 2}', "schema_version"),
        ("not json", "invalid JSON"),
        ("", "invalid JSON"),
        ("[]", "object"),
    ],
)
def test_a_broken_plan_is_described(text: str, words: str) -> None:
    with pytest.raises(PlanError, match=words) as caught:
        Plan.from_json(text, source="'plan.json'")
    sentence = str(caught.value)
    assert sentence.startswith("'plan.json' is not a valid plan: ")
    assert sentence.endswith(".")
    assert "\n" not in sentence


def test_many_faults_are_counted_and_long_values_cut() -> None:
    lines = [{"match": "a" * 300, "ratio": ratio} for ratio in (2, 3, 4)]
    with pytest.raises(PlanError, match="and 2 more") as caught:
        Plan.from_json(json.dumps({"runtime": "torch", "pruning": lines}))
    assert "a" * 100 not in str(caught.value)


def test_reading_what_is_not_there_or_not_text(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"plan\.json"):
        Plan.read(tmp_path / "plan.json")
    (tmp_path / "plan.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PlanError, match="Can't read"):
        Plan.read(tmp_path / "plan.json")
    with pytest.raises(PlanError, match="Can't read"):
        Plan.read(tmp_path)


def test_records_are_frozen_and_equal_by_value() -> None:
    plan = make_plan()
    with pytest.raises(ValueError, match="frozen"):
        plan.seed = 3  # pyright: ignore[reportAttributeAccessIssue]
    assert plan == make_plan()
    assert hash(plan) == hash(make_plan())
    assert plan != make_plan(seed=1)


def test_the_plan_id_is_that_of_what_is_done() -> None:
    line = PruningLine(match="mlp:a", ratio=0.5)
    plan = Plan(runtime="torch", pruning=(line,))
    explained = Plan(
        runtime="torch",
        pruning=(line.model_copy(update={"why": "insensitive"}),),
        quantization=Quantization(why="float is asked for"),
        why="a try",
    )
    assert explained.plan_id == plan.plan_id
    assert Plan.from_json(explained.to_json()).plan_id == plan.plan_id
    others = [
        plan.model_copy(update={"seed": 1}),
        plan.model_copy(update={"repair": "none"}),
        plan.model_copy(update={"runtime": "onnxruntime"}),
        plan.model_copy(update={"quantization": Quantization(scheme="int8-dynamic")}),
        plan.model_copy(update={"pruning": (line.model_copy(update={"ratio": 0.51}),)}),
        plan.model_copy(update={"pruning": (line.model_copy(update={"importance": "variance"}),)}),
        plan.model_copy(update={"pruning": ()}),
    ]
    assert len({plan.plan_id, *(other.plan_id for other in others)}) == len(others) + 1


def test_the_plan_id_does_not_change_between_versions() -> None:
    """It is in every journal: a changed id would make old runs measure again."""
    plan = Plan(runtime="torch", quantization=Quantization(scheme="int8-dynamic"))
    assert plan.plan_id == "19a94f4f72f6b330"


def test_exit_codes_of_verdicts() -> None:
    assert EXIT_CODES == {"ACCEPT": 0, "NO_GAIN": 10, "INFEASIBLE": 11}


# ---- journal ------------------------------------------------------------------------------------


def test_what_is_appended_is_read_in_order(tmp_path: Path) -> None:
    times = iter((1.5, 4.0))
    journal = Journal(tmp_path / "journal.jsonl", lambda: next(times))
    assert list(journal.events()) == []
    assert journal.spent() == 0.0
    trial = make_trial("t1")
    journal.append("start", {"seed": 0})
    journal.append("trial", trial)
    again = Journal(journal.path)
    assert list(again.events()) == [
        ("start", {"seed": 0}),
        ("trial", trial.model_dump(mode="json")),
    ]
    assert again.spent() == 4.0


NASTY = ["line\u2028separator", "next\x85line", "tab\x0b\x0c\x1c", "new\nline", "ü€😀", "a\udc80b"]


@pytest.mark.parametrize("text", NASTY, ids=ascii)
def test_any_text_stays_on_one_line(tmp_path: Path, text: str) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    journal.append("failed", {"reason": text})
    journal.append("end", {})
    assert list(journal.events()) == [("failed", {"reason": text}), ("end", {})]


@pytest.mark.parametrize("rest", ['{"kind": "tri', "{", '{"kind": "x"', "\xc3", "12", ""])
def test_a_broken_last_line_is_skipped_and_then_replaced(tmp_path: Path, rest: str) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    journal.append("start", {"n": 1})
    with journal.path.open("ab") as file:
        file.write(rest.encode("latin-1"))
    assert list(journal.events()) == [("start", {"n": 1})]
    journal.append("trial", {"n": 2})
    assert list(journal.events()) == [("start", {"n": 1}), ("trial", {"n": 2})]
    assert journal.path.read_bytes().endswith(b"\n")


def test_a_whole_last_line_without_its_end_is_kept_by_the_writer_too(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    journal.append("start", {})
    journal.append("trial", {"n": 1})
    journal.path.write_bytes(journal.path.read_bytes().rstrip(b"\n"))
    seen = list(journal.events())
    journal.append("end", {})
    assert list(journal.events()) == [*seen, ("end", {})]


@pytest.mark.parametrize("line", ["{broken", "[]", '{"data": 1}', "null"])
def test_a_broken_line_in_the_middle_is_named(tmp_path: Path, line: str) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    journal.append("start", {})
    with journal.path.open("a") as file:
        file.write(line + "\n")
    journal.append("end", {})
    with pytest.raises(PlanError, match=r"Line 2 of .*journal\.jsonl.*another --out"):
        list(journal.events())


def test_a_journal_that_can_not_be_written_says_so(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "missing" / "journal.jsonl")
    with pytest.raises(StorageError, match="Can't write the journal"):
        journal.append("start", {})


# ---- store --------------------------------------------------------------------------------------


def test_writing_replaces_whole_files_or_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "deep" / "run.json"
    write_text(path, "first")
    write_text(path, "second ü")
    assert path.read_text(encoding="utf-8") == "second ü"

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("profiling_agent.records.store.os.replace", refuse)
    with pytest.raises(StorageError, match=r"No space left on device.*--out"):
        write_text(path, "third")
    assert path.read_text(encoding="utf-8") == "second ü"
    assert [entry.name for entry in path.parent.iterdir()] == ["run.json"]


def test_a_folder_that_can_not_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"Can't write to .*Pass another folder"):
        RunStore(tmp_path / "file" / "run").create()
    with pytest.raises(StorageError, match="Can't write"):
        write_text(tmp_path / "file" / "record.json", "{}")


def test_a_run_keeps_its_things_below_its_folder(tmp_path: Path) -> None:
    store = RunStore(tmp_path / "run")
    store.create()
    store.create()
    assert [path.name for path in store.folder.iterdir()] == ["journal.jsonl"]
    assert store.trial("t1") == tmp_path / "run" / "trials" / "t1"
    assert {p.parent for p in (store.profile, store.run_record, store.report, store.artefact)} == {
        store.folder
    }


class TestRunFolder:
    def test_a_folder_of_another_is_refused_and_left_as_it_was(self, tmp_path: Path) -> None:
        mine = tmp_path / "thesis.txt"
        mine.write_text("years of work")
        with pytest.raises(StorageError, match="other things"):
            RunStore(tmp_path).create()
        RunStore(tmp_path).clear()
        assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]

    def test_clearing_a_run_leaves_everything_else(self, tmp_path: Path) -> None:
        store = RunStore(tmp_path / "run")
        store.create()
        store.journal.append("begin", {})
        (store.folder / "notes.txt").write_text("keep me")
        (store.data / "search").mkdir(parents=True)
        store.clear()
        assert [path.name for path in store.folder.iterdir()] == ["notes.txt"]

    def test_a_second_process_is_kept_out(self, tmp_path: Path) -> None:
        store = RunStore(tmp_path / "run")
        store.create()
        with (
            store.locked(),
            pytest.raises(StorageError, match="Another process"),
            RunStore(tmp_path / "run").locked(),
        ):
            pass

    def test_a_cut_off_array_counts_as_missing(self, tmp_path: Path) -> None:
        path = tmp_path / "a.npy"
        write_array(path, np.arange(10))
        assert np.array_equal(read_array(path), np.arange(10))
        path.write_bytes(path.read_bytes()[:-9])
        assert read_array(path) is None
        assert read_array(tmp_path / "none.npy") is None
