"""What may be said about a difference of accuracies, and processes that misbehave."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from profiling_agent.errors import TrialError
from profiling_agent.evaluation.statistics import (
    Drop,
    accuracy_interval,
    paired_drop,
    provable_drop,
)
from profiling_agent.machine.child import Child, resident_bytes

# ---- statistics ---------------------------------------------------------------------------------


def outcomes_of(both: int, lost: int, won: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    counts = (both, lost, won, neither)
    original = np.repeat([True, True, False, False], counts)
    artefact = np.repeat([True, False, True, False], counts)
    return original, artefact


def drop_of(original: np.ndarray, artefact: np.ndarray, **options: float) -> Drop:
    """The drop of right and wrong answers, in points."""
    return paired_drop(100.0 * original, 100.0 * artefact, span=100.0, **options)


def simulate(
    rng: np.random.Generator, count: int, lost: float, won: float
) -> tuple[np.ndarray, np.ndarray]:
    cells = rng.multinomial(count, [0.9 - lost, lost, won, 0.1 - won])
    return outcomes_of(*(int(c) for c in cells))


def test_the_estimate_is_the_difference_in_points() -> None:
    drop = drop_of(*outcomes_of(80, 7, 3, 10)).interval
    assert drop.estimate == 4.0
    assert drop.num_samples == 100
    assert drop.low < 4.0 < drop.high
    gain = drop_of(*outcomes_of(80, 3, 7, 10)).interval
    assert gain.estimate == -4.0
    assert (gain.low, gain.high) == pytest.approx((-drop.high, -drop.low))


def test_the_interval_by_hand() -> None:
    """Bonett and Price 2012: one sample is added to each discordant cell."""
    drop = drop_of(*outcomes_of(80, 7, 3, 10)).interval
    lost, won = 8 / 102, 4 / 102
    spread = 1.959964 * ((lost + won - (lost - won) ** 2) / 102) ** 0.5
    assert drop.low == pytest.approx(100 * (lost - won - spread), abs=1e-5)
    assert drop.high == pytest.approx(100 * (lost - won + spread), abs=1e-5)


@pytest.mark.parametrize(
    ("count", "lost", "won"), [(100, 0.02, 0.01), (500, 0.01, 0.005), (1000, 0.03, 0.03)]
)
def test_the_interval_covers_the_truth_as_often_as_it_says(
    count: int, lost: float, won: float
) -> None:
    rng = np.random.default_rng(0)
    truth, covered, bounded = 100 * (lost - won), 0, 0
    for _ in range(1500):
        pair = simulate(rng, count, lost, won)
        drop = drop_of(*pair).interval
        covered += drop.low <= truth <= drop.high
        bounded += truth <= drop_of(*pair).upper_bound
    assert 0.94 <= covered / 1500 <= 0.995
    assert 0.935 <= bounded / 1500 <= 0.995


def test_no_difference_on_a_few_samples_proves_little() -> None:
    few, many = (np.ones(count, dtype=bool) for count in (50, 5000))
    assert drop_of(few, few).interval.estimate == 0.0
    assert drop_of(few, few).interval.high > 3.0
    assert 0.0 < drop_of(many, many).interval.high < 0.1
    assert drop_of(few, few).interval.low == pytest.approx(-drop_of(few, few).interval.high)


def test_the_bound_grows_with_its_level_and_shrinks_with_the_samples() -> None:
    pair = outcomes_of(180, 4, 2, 14)
    bounds = [drop_of(*pair, level=level).upper_bound for level in (0.5, 0.9, 0.95, 0.99)]
    assert bounds == sorted(bounds)
    assert drop_of(*(np.tile(side, 10) for side in pair)).upper_bound < bounds[2]
    two_sided = drop_of(*pair, confidence=0.9).interval
    assert bounds[2] == pytest.approx(two_sided.high)


@pytest.mark.parametrize("level", [0.95, 1 - 0.05 / 3])
@pytest.mark.parametrize("budget", [0.6, 1.0])
def test_that_many_samples_would_prove_it(budget: float, level: float) -> None:
    pair = outcomes_of(880, 12, 8, 100)
    needed = drop_of(*pair, level=level).samples_to_prove(budget)
    assert needed is not None
    factor = needed / 1000
    more, less = (
        outcomes_of(*(round(c * factor * part) for c in (880, 12, 8, 100))) for part in (1.1, 0.8)
    )
    assert drop_of(*more, level=level).upper_bound <= budget
    assert drop_of(*less, level=level).upper_bound > budget


def test_no_number_of_samples_proves_a_drop_over_the_budget() -> None:
    assert drop_of(*outcomes_of(880, 20, 10, 90)).samples_to_prove(1.0) is None
    assert drop_of(*outcomes_of(880, 20, 10, 90)).samples_to_prove(0.5) is None
    assert drop_of(*outcomes_of(880, 0, 0, 120)).samples_to_prove(0.0) is None


def test_what_a_number_of_samples_can_tell_from_zero() -> None:
    drops = [provable_drop(count) for count in (100, 1000, 10_000)]
    assert drops == sorted(drops, reverse=True)
    assert 0.2 < drops[2] < 0.3


def test_wilson_interval_by_hand_and_at_the_ends() -> None:
    interval = accuracy_interval(np.repeat([True, False], [8, 2]))
    assert interval.estimate == 80.0
    assert (interval.low, interval.high) == pytest.approx((49.02, 94.33), abs=0.01)
    perfect = accuracy_interval(np.ones(20, dtype=bool))
    assert perfect.high == pytest.approx(100.0)
    assert perfect.low == pytest.approx(83.89, abs=0.01)
    nothing = accuracy_interval(np.zeros(20, dtype=bool))
    assert nothing.low == pytest.approx(0.0, abs=1e-9)


def test_unpaired_outcomes_are_refused() -> None:
    with pytest.raises(ValueError, match="one shape"):
        drop_of(np.ones(3, dtype=bool), np.ones(4, dtype=bool))
    with pytest.raises(ValueError, match="and a sample"):
        drop_of(np.ones(0, dtype=bool), np.ones(0, dtype=bool))


# ---- children -----------------------------------------------------------------------------------

ECHO = """
import json, os, signal, sys, time
held = []
for line in sys.stdin:
    request = json.loads(line)
    do = request["do"]
    if do == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if do == "exit":
        print("a last word", file=sys.stderr)
        sys.exit(3)
    if do == "hang":
        time.sleep(60)
    if do == "eat":
        held.append(b"x" * 200_000_000)
        time.sleep(60)
    if do == "garbage":
        print("Loading model 100%", flush=True)
        continue
    if do == "list":
        print("[1, 2]", flush=True)
        continue
    if do == "flood":
        while True:
            sys.stdout.write("." * 4096)
            sys.stdout.flush()
            time.sleep(0.01)
    if do == "silent":
        os.close(1)
        time.sleep(60)
    if do == "refuse":
        print(json.dumps({"ok": False, "error": "ValueError: no such scheme"}), flush=True)
        continue
    if do == "slowly":
        text = json.dumps({"ok": True, "long": "y" * 300_000})
        for part in (text[:10], text[10:200_000], text[200_000:]):
            sys.stdout.write(part)
            sys.stdout.flush()
            time.sleep(0.02)
        print(flush=True)
        continue
    print(json.dumps({"ok": True, "pid": os.getpid(), **request}), flush=True)
"""


@pytest.fixture
def child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Child]:
    (tmp_path / "misbehaving_child.py").write_text(ECHO)
    paths = (str(tmp_path), os.environ.get("PYTHONPATH", ""))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in paths if path))
    started = Child("misbehaving_child", memory_limit=120_000_000)
    yield started
    started.close()


def test_answers_come_back_as_they_were_sent(child: Child) -> None:
    for text in ("plain", "ü\u2028\n"):
        assert child.ask({"do": "echo", "text": text}, 20)["text"] == text
    assert len(child.ask({"do": "slowly"}, 20)["long"]) == 300_000
    assert child.ask({"do": "echo"}, 20)["do"] == "echo"


def test_a_refusal_is_words_and_the_process_lives_on(child: Child) -> None:
    with pytest.raises(TrialError, match="no such scheme"):
        child.ask({"do": "refuse"}, 20)
    assert child.ask({"do": "echo"}, 20)["do"] == "echo"


def test_a_crash_names_its_signal(child: Child) -> None:
    with pytest.raises(TrialError, match="ended by SIGSEGV"):
        child.ask({"do": "crash"}, 20)
    assert not child.alive
    with pytest.raises(TrialError, match="SIGSEGV"):
        child.ask({"do": "echo"}, 20)


def test_an_exit_has_a_code_and_last_words(child: Child) -> None:
    with pytest.raises(TrialError, match=r"exit code 3\. Its last words: a last word"):
        child.ask({"do": "exit"}, 20)


def test_a_module_that_does_not_exist_is_an_exit(tmp_path: Path) -> None:
    child = Child("no_such_module_anywhere")
    with pytest.raises(TrialError, match=r"exit code 1.*No module named no_such_module_anywhere"):
        child.ask({}, 20)
    child.close()


@pytest.mark.parametrize("do", ["hang", "flood"])
def test_no_answer_in_time_ends_the_process(child: Child, do: str) -> None:
    child.ask({"do": "echo"}, 20)
    start = time.monotonic()
    with pytest.raises(TrialError, match="No answer within 1 s"):
        child.ask({"do": do}, 0.6)
    assert time.monotonic() - start < 8
    assert not child.alive


def test_too_much_memory_ends_the_process(child: Child) -> None:
    child.ask({"do": "echo"}, 20)
    with pytest.raises(TrialError, match=r"GiB of memory, more than the 0\.1 GiB"):
        child.ask({"do": "eat"}, 20)
    assert not child.alive


@pytest.mark.parametrize(("do", "shown"), [("garbage", "Loading model"), ("list", r"\[1, 2\]")])
def test_garbage_instead_of_an_answer_is_a_trial_error(child: Child, do: str, shown: str) -> None:
    with pytest.raises(TrialError, match=f"printed '{shown}.*in place of an answer"):
        child.ask({"do": do}, 20)
    assert not child.alive


def test_a_closed_output_is_not_waited_for(child: Child, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("profiling_agent.machine.child.OBITUARY_S", 0.1)
    with pytest.raises(TrialError, match="closed its output"):
        child.ask({"do": "silent"}, 20)
    assert not child.alive


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def wait_for(pid: int, stopped: bool) -> None:
    for _ in range(200):
        if (state_of(pid) == "T") == stopped:
            return
        time.sleep(0.01)
    raise AssertionError(f"process state {state_of(pid)}")


def test_a_paused_process_stands_still_and_answers_when_asked(child: Child) -> None:
    pid = child.ask({"do": "echo"}, 20)["pid"]
    child.pause()
    child.pause()
    wait_for(pid, stopped=True)
    child.resume()
    wait_for(pid, stopped=False)
    child.pause()
    assert child.ask({"do": "echo"}, 20)["pid"] == pid


def test_closing_ends_a_paused_process_and_may_be_repeated(child: Child) -> None:
    pid = child.ask({"do": "echo"}, 20)["pid"]
    assert (resident_bytes(pid) or 0) > 1_000_000
    child.pause()
    child.close()
    child.close()
    assert not child.alive
    assert resident_bytes(pid) is None
    with pytest.raises(TrialError):
        child.ask({"do": "echo"}, 20)
