"""Every refusal: one clear sentence, a next step, the documented exit code, no traceback."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from profiling_agent import cli
from profiling_agent.errors import BudgetError
from profiling_agent.flags import parse_duration
from small_workload import write_project


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_project(tmp_path_factory.mktemp("project"), num_samples=600)


@pytest.fixture
def refuse(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Runs a command that must fail; returns its one sentence."""

    def call(code: int, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["profiling-agent", *arguments])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        error = capsys.readouterr().err
        assert caught.value.code == code, error
        assert "Traceback" not in error
        return error.strip().splitlines()[-1]

    return call


def optimize(project: Path, tmp_path: Path, **changed: str) -> list[str]:
    options: dict[str, str] = {
        "--weights": str(project / "weights.safetensors"),
        "--data": f"{project / 'data.py'}:val",
        "--max-drop": "2",
        "--time-budget": "30s",
        "--threads": "1",
        "--out": str(tmp_path / "out"),
    }
    model = changed.pop("model", f"{project / 'model.py'}:model")
    options |= {f"--{key.replace('_', '-')}": value for key, value in changed.items()}
    flat = [part for pair in options.items() for part in pair]
    return ["optimize", model, *flat]


class TestBudget:
    @pytest.mark.parametrize("drop", ["-1", "nan", "inf", "99"])
    def test_absurd_drops(
        self, refuse: Callable[..., str], project: Path, tmp_path: Path, drop: str
    ) -> None:
        assert "--max-drop" in refuse(2, *optimize(project, tmp_path, max_drop=drop))

    @pytest.mark.parametrize("text", ["soon", "-5m", "0s", "1y", ""])
    def test_durations_that_are_none(self, text: str) -> None:
        with pytest.raises(BudgetError, match="15m"):
            parse_duration(text)

    @pytest.mark.parametrize(
        ("text", "seconds"), [("90s", 90), ("15m", 900), ("2h", 7200), ("30", 30), ("1.5m", 90)]
    )
    def test_durations(self, text: str, seconds: float) -> None:
        assert parse_duration(text) == seconds

    @pytest.mark.parametrize("command", ["optimize", "ablate", "check", "profile"])
    def test_a_time_for_answers_that_is_none(
        self, refuse: Callable[..., str], command: str, tmp_path: Path
    ) -> None:
        given = ["--out", str(tmp_path / "out"), "--llm-timeout", "0s"]
        error = refuse(2, command, "demo:vit", *given)
        assert "--llm-timeout '0s' is not a duration" in error

    def test_test_set_too_small_for_the_budget(
        self, refuse: Callable[..., str], project: Path, tmp_path: Path
    ) -> None:
        error = refuse(2, *optimize(project, tmp_path, max_drop="0.1"))
        assert "weighs" in error and "more test data" in error

    def test_unknown_planner_and_runtime(
        self, refuse: Callable[..., str], project: Path, tmp_path: Path
    ) -> None:
        assert "solver" in refuse(2, *optimize(project, tmp_path, planner="oracle"))
        assert "onnxruntime" in refuse(2, *optimize(project, tmp_path, runtime="tflite"))


class TestModel:
    def test_weights_that_do_not_fit_name_the_keys(
        self, refuse: Callable[..., str], project: Path, tmp_path: Path
    ) -> None:
        state = load_file(project / "weights.safetensors")
        state["fc9.weight"] = state.pop("fc2.weight")
        save_file(state, tmp_path / "other.safetensors")
        weights = str(tmp_path / "other.safetensors")
        error = refuse(2, *optimize(project, tmp_path, weights=weights))
        assert "fc2.weight" in error and "fc9.weight" in error

    def test_a_pickle_that_is_not_plain_tensors(
        self, refuse: Callable[..., str], project: Path, tmp_path: Path
    ) -> None:
        class Evil:
            def __reduce__(self) -> Any:
                return (os.mkdir, (str(tmp_path / "pwned"),))

        path = tmp_path / "evil.pt"
        path.write_bytes(pickle.dumps({"state_dict": Evil()}))
        error = refuse(2, *optimize(project, tmp_path, weights=str(path)))
        assert "safetensors" in error
        assert not (tmp_path / "pwned").exists()

    def test_a_forward_that_fails(
        self, refuse: Callable[..., str], project: Path, tmp_path: Path
    ) -> None:
        broken = f"{project / 'model.py'}:broken"
        assert "no such luck" in refuse(2, *optimize(project, tmp_path, model=broken))

    def test_a_factory_that_is_not_there(
        self, refuse: Callable[..., str], project: Path, tmp_path: Path
    ) -> None:
        wrong = f"{project / 'model.py'}:modell"
        assert "modell" in refuse(2, *optimize(project, tmp_path, model=wrong))


class TestData:
    @pytest.mark.parametrize(
        ("factory", "words"),
        [
            ("empty", "empty"),
            ("one_class", "class"),
            ("outside", "4"),
            ("shuffled", "no better than"),
            ("nothing", "nothing"),
        ],
    )
    def test_unusable_data(
        self,
        refuse: Callable[..., str],
        project: Path,
        tmp_path: Path,
        factory: str,
        words: str,
    ) -> None:
        data = f"{project / 'data.py'}:{factory}"
        assert words in refuse(2, *optimize(project, tmp_path, data=data))

    def test_object_arrays(self, refuse: Callable[..., str], project: Path, tmp_path: Path) -> None:
        path = tmp_path / "bad.npz"
        np.savez(path, x=np.array([{"a": 1}], dtype=object), y=np.array([0]))
        assert "bad.npz" in refuse(2, *optimize(project, tmp_path, data=str(path)))


class TestPlanFiles:
    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"surprise": 1}, "unknown field 'surprise'"),
            ({"runtime": "abacus"}, "runtime"),
            ({"quantization": {"scheme": "int3"}}, "int3"),
            ({"pruning": [{"match": "mlp:nowhere", "ratio": 0.5}]}, "matches no prunable group"),
            ({"pruning": [{"match": "mlp:fc1", "ratio": 1.5}]}, "ratio"),
            ({"pruning": [{"match": "mlp:fc1", "ratio": 0.97}]}, "0.95"),
            ({"pruning": [{"match": "mlp:(", "ratio": 0.5}]}, "regular expression"),
            ({"pruning": [{"match": "(m+)+$" * 40, "ratio": 0.5}]}, "200"),
            ({"quantization": {"scheme": "fp32", "keep_float": ["nope"]}}, "keep_float"),
        ],
    )
    def test_plans_that_can_not_be_used(
        self,
        refuse: Callable[..., str],
        project: Path,
        tmp_path: Path,
        change: dict[str, Any],
        words: str,
    ) -> None:
        plan = tmp_path / "plan.json"
        plan.write_text(json.dumps({"runtime": "torch", **change}))
        error = refuse(2, *apply(project, plan, tmp_path / "artefact"))
        assert words in error
        assert not (tmp_path / "artefact").exists()

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"pruning": [{"match": "mlp:.*", "ratio": 0.5}]}, "Pruning"),
            ({"quantization": {"scheme": "int8-static"}}, "'int8-static'"),
            ({"quantization": {"scheme": "int8-static-bf16"}}, "'int8-static-bf16'"),
        ],
    )
    def test_plans_that_need_data(
        self,
        refuse: Callable[..., str],
        project: Path,
        tmp_path: Path,
        change: dict[str, Any],
        words: str,
    ) -> None:
        plan = tmp_path / "plan.json"
        plan.write_text(json.dumps({"runtime": "openvino", **change}))
        arguments = apply(project, plan, tmp_path / "artefact")
        at = arguments.index("--data")
        error = refuse(2, *arguments[:at], *arguments[at + 2 :])
        assert words in error and "pass --data" in error
        assert not (tmp_path / "artefact").exists()

    def test_not_json_and_not_there(
        self, refuse: Callable[..., str], project: Path, tmp_path: Path
    ) -> None:
        plan = tmp_path / "plan.json"
        assert "plan.json" in refuse(2, *apply(project, plan, tmp_path / "artefact"))
        plan.write_text("prune everything, please")
        assert "plan.json" in refuse(2, *apply(project, plan, tmp_path / "artefact"))


def apply(project: Path, plan: Path, out: Path) -> list[str]:
    return [
        "apply", f"{project / 'model.py'}:model", "--plan", str(plan), "--out", str(out),
        "--weights", str(project / "weights.safetensors"),
        "--data", f"{project / 'data.py'}:val", "--threads", "1",
    ]  # fmt: skip


def test_a_persons_plan_is_applied_and_measured(project: Path, tmp_path: Path) -> None:
    plan, out = tmp_path / "plan.json", tmp_path / "artefact"
    plan.write_text(
        json.dumps(
            {
                "runtime": "torch",
                "pruning": [{"match": "mlp:fc[12]", "ratio": 0.25, "why": "wide"}],
                "quantization": {"scheme": "int8-dynamic", "keep_float": ["head"]},
            }
        )
    )
    built = run(*apply(project, plan, out), "--json")
    assert built["achieved"]["widths"] == {"mlp:fc1": [768, 576], "mlp:fc2": [768, 576]}
    assert built["achieved"]["num_int8_layers"] == 2
    assert built["achieved"]["float_layers"] == ["head"]
    (taken,) = json.loads((out / "manifest.json").read_text())["inputs"]
    assert (taken["dtype"], taken["raw_dtype"]) == ("float32", "float32")
    record = run(
        "evaluate", str(out), f"{project / 'model.py'}:model",
        "--weights", str(project / "weights.safetensors"),
        "--data", f"{project / 'data.py'}:val", "--threads", "1", "--json",
    )  # fmt: skip
    assert record["accuracy"][0]["num_samples"] > 200
    assert record["accuracy"][0]["drop"]["estimate"] < 10.0
    assert record["speedup"]["over"] == "baseline"


@pytest.mark.parametrize(
    ("runtime", "scheme"),
    [("openvino", "int8-static"), ("onnxruntime", "int8-static"), ("torch", "int8-dynamic")],
)
def test_libraries_keep_silent(project: Path, tmp_path: Path, runtime: str, scheme: str) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({"runtime": runtime, "quantization": {"scheme": scheme}}))
    done = subprocess.run(
        [sys.executable, "-m", "profiling_agent.cli", *apply(project, plan, tmp_path / "a")],
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


def test_stages_one_by_one(project: Path, tmp_path: Path) -> None:
    profile = tmp_path / "profile.json"
    record = run(
        "profile", f"{project / 'model.py'}:model",
        "--weights", str(project / "weights.safetensors"),
        "--data", f"{project / 'data.py'}:val", "--threads", "1", "--time-budget", "10s",
        "--out", str(profile), "--json",
    )  # fmt: skip
    assert {group["id"] for group in record["groups"]} == {"mlp:fc1", "mlp:fc2"}
    assert record["total_macs"] == 16 * 768 + 768 * 768 + 768 * 4
    other = subprocess.run(
        [sys.executable, "-m", "profiling_agent.cli", "plan", str(profile), "--threads", "1",
         "--batch-size", "8"],
        capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert other.returncode == 2
    assert "batch size" in other.stderr


def run(*arguments: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "profiling_agent.cli", *arguments],
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_no_permission_to_write(project: Path, tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    arguments = optimize(project, tmp_path, out=str(closed / "run"))
    if os.geteuid() == 0:  # root may write anywhere, a stranger may not
        for folder in (project, *project.parents):
            if folder == Path("/tmp"):
                break
            folder.chmod(0o755)
        prefix = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
        probe = subprocess.run([*prefix, sys.executable, "-c", "import torch"], capture_output=True)
        if probe.returncode:
            pytest.skip("no unprivileged user can run this interpreter here")
    else:
        prefix = []
    done = subprocess.run(
        [*prefix, sys.executable, "-m", "profiling_agent.cli", *arguments],
        capture_output=True, text=True, timeout=100, env={**os.environ, "HOME": "/tmp"},
    )  # fmt: skip
    assert done.returncode == 4, done.stderr
    assert "--out" in done.stderr and "Traceback" not in done.stderr


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a disk of a size such as ``64k``; skips where that is not allowed."""
    folder = tmp_path / "disk"

    def make(size: str) -> Path:
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        try:
            done = subprocess.run(command, capture_output=True)
        except OSError:
            pytest.skip("there is no mount here")
        if done.returncode:
            pytest.skip("nothing may be mounted here")
        return folder

    yield make
    if os.path.ismount(folder):
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("size", ["64k", "2380k"])  # for nothing, and for the model alone
@pytest.mark.parametrize("runtime", ["torch", "onnxruntime", "openvino"])
def test_a_full_disk_leaves_nothing_behind(
    refuse: Callable[..., str],
    project: Path,
    tmp_path: Path,
    tiny_disk: Callable[[str], Path],
    runtime: str,
    size: str,
) -> None:
    disk, plan = tiny_disk(size), tmp_path / "plan.json"
    plan.write_text(json.dumps({"runtime": runtime}))
    error = refuse(4, *apply(project, plan, disk / "artefact"))
    assert "Can't write the artefact" in error and "Free space" in error
    assert list(disk.iterdir()) == []


def test_a_missing_extra_names_the_install_line(
    refuse: Callable[..., str], project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from profiling_agent.deployment import onnx_runtime

    monkeypatch.setattr(onnx_runtime.OnnxRuntime, "version", lambda _self: None)
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({"runtime": "onnxruntime"}))
    error = refuse(3, *apply(project, plan, tmp_path / "artefact"))
    assert 'pip install "profiling-agent[cpu]"' in error


def test_help_is_quick_and_light() -> None:
    code = "import sys; from profiling_agent import cli; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_weights_as_pt_with_wrappers(project: Path, tmp_path: Path) -> None:
    state = load_file(project / "weights.safetensors")
    wrapped = {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}}
    torch.save(wrapped, tmp_path / "weights.pt")
    record = run(
        "profile", f"{project / 'model.py'}:model", "--weights", str(tmp_path / "weights.pt"),
        "--data", f"{project / 'data.py'}:val", "--threads", "1", "--time-budget", "5s", "--json",
    )  # fmt: skip
    assert record["num_parameters"] == sum(value.numel() for value in state.values())
