"""Operator times of deployed graphs, mapped back to the model's modules, for every runtime."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from profiling_agent.acquisition.demo_models import DemoResNet, DemoViT
from profiling_agent.cli import main
from profiling_agent.deployment.artefact import build_artefact, open_artefact
from profiling_agent.deployment.capabilities import int8_support
from profiling_agent.deployment.lowered import Calibration
from profiling_agent.deployment.openvino_graph import PRODUCTS
from profiling_agent.deployment.runtimes import available
from profiling_agent.errors import TrialError
from profiling_agent.machine.processor import describe_machine
from profiling_agent.planning.estimate import controls_to_profile
from profiling_agent.profiling.deployed import profile_artefact, profile_pairs
from profiling_agent.profiling.deployed_openvino import module_of
from profiling_agent.records.common import Deployment
from profiling_agent.records.measurement import Measurement
from profiling_agent.records.plan import Plan, Quantization
from profiling_agent.records.profile import DeployedProfile
from profiling_agent.records.trial import Trial
from record_factory import make_control
from test_deployment import ACHIEVED, record

SERVE_CHECK = Path(__file__).resolve().parents[1] / "benchmarks" / "serve_check.py"
PAIRS = [
    (offer.runtime, scheme) for offer in available(describe_machine()) for scheme in offer.schemes
]


@pytest.fixture
def split(tmp_path: Path) -> Path:
    folder = tmp_path / "split"
    folder.mkdir()
    values = np.random.default_rng(0).normal(size=(3, 1, 28, 28)).astype(np.float32)
    np.save(folder / "x.npy", values)
    np.save(folder / "labels.npy", np.zeros(3))
    return folder


@pytest.mark.parametrize(("runtime", "scheme"), PAIRS)
@pytest.mark.parametrize("kind", [DemoViT, DemoResNet])
def test_times_belong_to_modules(
    tmp_path: Path, split: Path, runtime: str, scheme: str, kind: type
) -> None:
    torch.manual_seed(0)
    model = (
        DemoViT(width=64, depth=2, num_heads=2)
        if kind is DemoViT
        else DemoResNet(widths=(16, 32), depth=1)
    ).eval()
    if kind is DemoResNet and scheme == "int8-dynamic":
        pytest.skip("one linear layer alone")
    example = {"x": torch.randn(2, 1, 28, 28)}
    samples = Calibration(
        num_samples=4,
        batches=lambda size: iter([{"x": np.zeros((size, 1, 28, 28), np.float32) + 0.5}]),
    )
    plan = Plan(runtime=runtime, quantization=Quantization(scheme=scheme))  # pyright: ignore
    deployment = Deployment(batch_size=2)
    built = build_artefact(
        model, record((1, 28, 28)), example, plan, ACHIEVED, tmp_path / "a", deployment, samples
    )
    found = profile_artefact(tmp_path / "a", split, deployment, passes=5)
    assert (found.runtime, found.scheme) == (runtime, scheme)
    assert found.total_ms > 0
    modules = {name for name, _ in model.named_modules()}
    assert set(found.module_ms()) <= modules
    whole = sum(operator.ms for operator in found.operators)
    assert found.unmapped_ms == pytest.approx(whole - sum(found.module_ms().values()))
    assert found.unmapped_ms < 0.25 * whole
    int8 = [operator for operator in found.operators if operator.precision == "i8"]
    if scheme == "int8-weights":  # whose activations only some processors quantize
        assert bool(int8) == (not int8_support(describe_machine()).reduce_range)
    else:
        assert bool(int8) == scheme.startswith("int8")
    if runtime == "openvino":
        products = [operator for operator in int8 if operator.type in PRODUCTS]
        assert len(products) == built.achieved.num_int8_operators


@pytest.mark.parametrize(("runtime", "scheme"), [pair for pair in PAIRS if "bf16" not in pair[1]])
def test_artefacts_serve_with_their_runtime_alone_and_are_measured_without_torch(
    tmp_path: Path, runtime: str, scheme: str
) -> None:
    torch.manual_seed(0)
    model = DemoViT(width=32, depth=1, num_heads=2).eval()
    example = {"x": torch.randn(2, 1, 28, 28)}
    samples = Calibration(num_samples=2, batches=lambda _: iter([{"x": example["x"].numpy()}]))
    plan = Plan(runtime=runtime, quantization=Quantization(scheme=scheme))  # pyright: ignore
    folder, deployment = tmp_path / "a", Deployment(batch_size=2)
    build_artefact(model, record((1, 28, 28)), example, plan, ACHIEVED, folder, deployment, samples)
    np.save(tmp_path / "x.npy", example["x"].numpy())
    subprocess.run(
        [sys.executable, "-I", str(SERVE_CHECK), str(folder), "alone",
         str(tmp_path / "x.npy"), str(tmp_path / "out.npy")],
        check=True, timeout=120,
    )  # fmt: skip
    expected = open_artefact(folder).logits(example["x"].numpy())
    assert np.array_equal(np.load(tmp_path / "out.npy"), expected)

    measured = measure(tmp_path, folder, without_torch=runtime != "torch")
    assert measured.agrees and measured.difference == 0.0
    assert measured.deployment == deployment
    assert (measured.runtime, measured.scheme) == (runtime, scheme)
    assert measured.built_on is not None
    assert measured.machine.same_hardware(measured.built_on)


def measure(tmp_path: Path, folder: Path, *, without_torch: bool, **more: int) -> Measurement:
    """By the command line, in a process (and its children) that may have no torch to import."""
    blocker = tmp_path / "blocked"
    blocker.mkdir(exist_ok=True)
    code = "import sys\nsys.modules['torch'] = None\n" if without_torch else ""
    (blocker / "sitecustomize.py").write_text(code)
    path = os.pathsep.join([str(blocker), *sys.path])
    done = subprocess.run(
        [sys.executable, "-m", "profiling_agent.cli", "measure", str(folder), "--json"],
        capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return Measurement.model_validate_json(done.stdout)


def test_an_artefact_that_answers_otherwise_is_told_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = DemoViT(width=32, depth=1, num_heads=2).eval()
    example = {"x": torch.randn(2, 1, 28, 28)}
    plan = Plan(runtime="onnxruntime")
    folder = tmp_path / "a"
    build_artefact(model, record((1, 28, 28)), example, plan, ACHIEVED, folder, Deployment())
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["check"]["answers"][3] += 5.0
    (folder / "manifest.json").write_text(json.dumps(manifest))
    arguments = ["profiling-agent", "measure", str(folder)]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 12
    assert "NOT as it was built" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*arguments, "--json"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 12
    printed = json.loads(capsys.readouterr().out)
    assert printed["agrees"] is False
    assert Measurement.model_validate(printed).agrees is False
    of_an_older_version = {name: value for name, value in printed.items() if name != "agrees"}
    assert Measurement.model_validate(of_an_older_version) == Measurement.model_validate(printed)
    monkeypatch.setattr(sys, "argv", arguments)
    del manifest["check"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    assert "check inputs" in capsys.readouterr().err


def test_a_fused_operator_belongs_to_its_product() -> None:
    assert module_of("norm::Add_3,fc::MatMul_2,act::Gelu_4") == "fc"
    assert module_of("norm::Add_3") == "norm"
    assert module_of("Constant_12") is None


def test_controls_are_profiled_in_pairs_or_not_at_all() -> None:
    trials = [
        make_control(name, runtime, scheme)
        for name, runtime, scheme in (
            ("c1", "onnxruntime", "fp32"),
            ("c2", "onnxruntime", "int8-dynamic"),
            ("c3", "onnxruntime", "int8-static"),
            ("c4", "torch", "fp32"),
            ("c5", "torch", "int8-dynamic"),
            ("c6", "torch", "bf16"),
        )
    ]
    pairs = controls_to_profile(trials)
    labels = [(one.label, other.label) for one, other in pairs]
    assert set(labels) == {
        ("onnxruntime fp32", "onnxruntime int8-dynamic"),
        ("onnxruntime fp32", "onnxruntime int8-static"),
        ("torch fp32", "torch int8-dynamic"),
    }

    def profiled(*failing: str, num_pairs: int = 9) -> tuple[list[str], list[str]]:
        asked: list[str] = []
        answers = iter([True] * num_pairs + [False] * 9)

        def profile(trial: Trial) -> DeployedProfile | None:
            asked.append(trial.trial_id)
            return None if trial.trial_id in failing else deployed_profile(trial)

        found = profile_pairs(pairs, profile, has_time=lambda: next(answers))
        return asked, sorted(f"{one.runtime} {one.scheme}" for one in found)

    def deployed_profile(trial: Trial) -> DeployedProfile:
        return DeployedProfile(
            runtime=trial.plan.runtime,
            scheme=trial.plan.quantization.scheme,
            deployment=Deployment(),
            total_ms=1.0,
            unmapped_ms=0.0,
            operators=(),
        )

    asked, found = profiled()
    assert sorted(asked) == ["c1", "c2", "c3", "c4", "c5"]
    assert len(found) == 5
    for num_pairs in range(4):  # whenever the time is over, no float control stands alone
        found = profiled(num_pairs=num_pairs)[1]
        assert found == sorted({label for pair in labels[:num_pairs] for label in pair})
    assert "torch fp32" not in profiled("c5")[1]
    assert profiled("c2")[1] == sorted(
        ["onnxruntime fp32", "onnxruntime int8-static", "torch fp32", "torch int8-dynamic"]
    )
    asked, found = profiled("c1")
    assert "c2" not in asked and found == ["torch fp32", "torch int8-dynamic"]


def test_a_folder_that_is_no_artefact(tmp_path: Path, split: Path) -> None:
    with pytest.raises(TrialError, match=r"serve\.py"):
        profile_artefact(tmp_path, split, Deployment())
