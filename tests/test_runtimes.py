"""One contract for every runtime and scheme offered here, on a small network with real data."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from profiling_agent.deployment import artefact
from profiling_agent.deployment.artefact import build_artefact
from profiling_agent.deployment.lowered import Calibration
from profiling_agent.deployment.openvino_graph import precision_of, properties
from profiling_agent.deployment.openvino_runtime import quiet_libraries
from profiling_agent.deployment.runtimes import RUNTIMES, available
from profiling_agent.errors import TrialError
from profiling_agent.evaluation.predictor import ProbeProcess
from profiling_agent.machine.processor import describe_machine
from profiling_agent.profiling.deployed import profile_artefact
from profiling_agent.records.common import Deployment, Machine
from profiling_agent.records.evaluation import Achieved, BuiltArtefact
from profiling_agent.records.plan import Plan, Quantization
from profiling_agent.records.workload import (
    InputSpec,
    Preprocessing,
    Task,
    WorkloadRecord,
    WorkloadSource,
)
from small_workload import Net, make_data, train, write_project

HERE = describe_machine()
OFFERED = [(offer.runtime, scheme) for offer in available(HERE) for scheme in offer.schemes]
STATIC = [pair for pair in OFFERED if pair[1].startswith("int8-static")]
ACHIEVED = Achieved(
    num_parameters=1,
    original_parameters=1,
    macs=None,
    original_macs=None,
    kept={},
    widths={},
    num_int8_layers=0,
)


@pytest.fixture(scope="module")
def net() -> Net:
    return train()


def calibration(shape: tuple[int, ...] | None = None, num_samples: int = 64) -> Calibration:
    x, _ = make_data(num_samples, seed=7)
    if shape is not None:
        x = np.zeros((num_samples, *shape), np.float32)

    def batches(size: int) -> Iterator[dict[str, np.ndarray]]:
        for start in range(0, num_samples - size + 1, size):
            yield {"x": x[start : start + size]}

    return Calibration(num_samples=num_samples, batches=batches)


def workload_record() -> WorkloadRecord:
    return WorkloadRecord(
        name="small",
        source=WorkloadSource(model=None),
        num_parameters=1,
        weight_bytes=1,
        model_sha256="",
        inputs=(InputSpec(name="x", shape=(16,), dtype="float32"),),
        preprocessing=Preprocessing(),
        task=Task(num_classes=4),
        splits=(),
    )


def build(
    model: nn.Module,
    pair: tuple[str, str],
    folder: Path,
    *,
    keep_float: tuple[str, ...] = (),
    samples: Calibration | None = None,
    batch_size: int = 1,
) -> BuiltArtefact:
    plan = Plan(
        runtime=pair[0],  # type: ignore[arg-type]
        quantization=Quantization(scheme=pair[1], keep_float=keep_float),
    )
    example = {"x": torch.from_numpy(make_data(batch_size, seed=3)[0])}
    deployment = Deployment(batch_size=batch_size, threads=1)
    return build_artefact(
        model, workload_record(), example, plan, ACHIEVED, folder, deployment, samples
    )


def share_right(folder: Path, runtime: str, x: np.ndarray, y: np.ndarray, batch: int) -> float:
    split = folder.parent / "split"
    split.mkdir(exist_ok=True)
    np.save(split / "x.npy", x)
    probe = ProbeProcess.artefact(folder, runtime, Deployment(batch_size=batch, threads=1))
    try:
        logits = probe.logits(split)
    finally:
        probe.close()
    assert logits.shape == (len(x), 4)
    assert logits.dtype == np.float32
    return float((logits.argmax(1) == y).mean())


@pytest.mark.parametrize("pair", OFFERED, ids="-".join)
def test_keeps_the_accuracy_at_the_measured_batch_and_at_others(
    tmp_path: Path, net: Net, pair: tuple[str, str]
) -> None:
    x, y = make_data(501, seed=5)
    with torch.inference_mode():
        original = float((net(torch.from_numpy(x)).argmax(1).numpy() == y).mean())
    built = build(net, pair, tmp_path / "a", samples=calibration(), batch_size=4)
    assert built.runtime == pair[0] and built.scheme == pair[1]
    for batch in (4, 3):  # the measured one, with one sample left over; and another
        assert share_right(tmp_path / "a", pair[0], x, y, batch) >= original - 0.03


@pytest.mark.parametrize("pair", OFFERED, ids="-".join)
def test_threads_may_share_an_artefact(
    tmp_path: Path, net: Net, pair: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    build(net, pair, tmp_path / "a", samples=calibration())
    served = load_serve(tmp_path / "a")
    # More sizes than a runtime that compiles for each keeps at a time.
    batches = [make_data(size, seed=size)[0] for size in range(1, 8)]
    alone = [served.Model(tmp_path / "a").logits(batch) for batch in batches]
    labels = [served.predict(batch) for batch in batches]
    model, opened = served.Model(tmp_path / "a"), []
    monkeypatch.setattr(served, "_default", [])
    monkeypatch.setattr(served, "Model", lambda: opened.append(model) or model)

    def ask(call: int) -> bool:
        index = call % len(batches)
        logits = model.logits(batches[index])  # where an array lies may change its last digit
        right = logits.shape == alone[index].shape and np.allclose(logits, alone[index], atol=1e-4)
        return right and served.predict(batches[index]) == labels[index]

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(ask, range(200))) == 200
    assert len(opened) == 1


SPY = """
import os, pathlib, sys
pathlib.Path(os.environ["SPIED"]).write_text(" ".join(sys.argv))
raise ImportError("a spy")
"""


def test_openvino_serves_as_it_is_profiled_and_leaves_its_threads_unpinned(
    tmp_path: Path, net: Net
) -> None:
    build(net, ("openvino", "fp32"), tmp_path / "a")
    done = subprocess.run(
        [sys.executable, "-c", "from serve import Model; print(Model(threads=1).properties)"],
        cwd=tmp_path / "a", capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    used = ast.literal_eval(done.stdout)
    assert used == properties("fp32", 1)
    assert used["ENABLE_CPU_PINNING"] is False


@pytest.mark.parametrize("way", ["serve.py", "probe", "operators", "building"])
def test_openvino_reports_its_use_to_nobody(
    tmp_path: Path, net: Net, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way != "building":
        build(net, ("openvino", "fp32"), tmp_path / "a")
    spied = tmp_path / "spied"
    (tmp_path / "spy").mkdir()
    (tmp_path / "spy" / "openvino_telemetry.py").write_text(SPY)
    monkeypatch.setenv("SPIED", str(spied))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "spy"), *sys.path]))
    subprocess.run([sys.executable, "-c", "import openvino"], check=True, timeout=120)
    assert spied.read_text() == "-c"  # as it would be without us
    spied.unlink()
    np.save(tmp_path / "x.npy", make_data(3)[0])
    deployment = Deployment(threads=1)
    if way == "serve.py":
        command = [sys.executable, str(tmp_path / "a" / "serve.py"), str(tmp_path / "x.npy")]
        subprocess.run(command, check=True, timeout=120)
    elif way == "probe":
        share_right(tmp_path / "a", "openvino", *make_data(3), 1)
    elif way == "operators":
        (tmp_path / "split").mkdir()
        (tmp_path / "x.npy").rename(tmp_path / "split" / "x.npy")
        profile_artefact(tmp_path / "a", tmp_path / "split", deployment, passes=1)
    else:
        write_project(tmp_path, num_samples=200)
        (tmp_path / "plan.json").write_text(Plan(runtime="openvino").to_json())
        command = [
            sys.executable, "-m", "profiling_agent.cli", "apply", f"{tmp_path / 'model.py'}:model",
            "--weights", "random", "--data", f"{tmp_path / 'data.py'}:val",
            "--plan", str(tmp_path / "plan.json"), "--out", str(tmp_path / "a"),
        ]  # fmt: skip
        subprocess.run(command, check=True, timeout=120)
    assert not spied.exists()


def load_serve(folder: Path) -> Any:
    spec = importlib.util.spec_from_file_location("served", folder / "serve.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("pair", [p for p in OFFERED if p[1].startswith("int8")], ids="-".join)
def test_int8_is_counted_and_layers_kept_float_are_not(
    tmp_path: Path, net: Net, pair: tuple[str, str]
) -> None:
    whole = build(net, pair, tmp_path / "a", samples=calibration())
    assert whole.achieved.num_int8_layers == 3
    some = build(net, pair, tmp_path / "b", samples=calibration(), keep_float=("fc2",))
    manifest = json.loads((tmp_path / "b" / "manifest.json").read_text())
    assert set(manifest["int8_layers"]) == {"fc1", "head"}
    assert some.achieved.float_layers == ("fc2",)
    assert whole.weight_bytes < some.weight_bytes < 4.2 * whole.weight_bytes
    if pair[1] != "int8-weights" and whole.achieved.num_int8_operators is not None:
        assert whole.achieved.num_int8_operators >= 3
        # A runtime may leave another one in float too: what it runs is what is counted.
        assert 1 <= some.achieved.num_int8_operators < whole.achieved.num_int8_operators


@pytest.mark.parametrize("pair", [p for p in OFFERED if p[1].startswith("int8")], ids="-".join)
def test_a_scheme_that_quantizes_nothing_is_refused(
    tmp_path: Path, net: Net, pair: tuple[str, str]
) -> None:
    with pytest.raises(TrialError, match="quantizes nothing"):
        build(net, pair, tmp_path / "a", samples=calibration(), keep_float=(".*",))
    assert not (tmp_path / "a").exists()
    assert not list(tmp_path.glob(".*"))  # no draft is left either


class Attending(nn.Module):
    """Torch's own attention between two layers, over four rows of four features."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 32)
        self.attn = nn.MultiheadAttention(32, 4, batch_first=True)
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.reshape(-1, 4, 4))
        return self.head((x + self.attn(x, x, x, need_weights=False)[0]).mean(1))


def what_runs(
    model: nn.Module, pair: tuple[str, str], tmp_path: Path, *keep_float: str
) -> tuple[set[str], set[str]]:
    """Modules whose products the runtime itself runs in int8, and the layers said to be float."""
    split, folder = tmp_path / "split", tmp_path / f"a{len(list(tmp_path.iterdir()))}"
    split.mkdir(exist_ok=True)
    np.save(split / "x.npy", make_data(2)[0])
    built = build(model, pair, folder, samples=calibration(), keep_float=keep_float)
    found = profile_artefact(folder, split, Deployment(threads=1), passes=3)
    products = (
        "Conv",
        "FusedConv",
        "FullyConnected",
        "MatMul",
        "QLinear",
        "QGemm",
        "FusedMatMul",
        "Gemm",
    )
    operators = [o for o in found.operators if o.type.startswith(products)]
    running = {str(o.module) for o in operators if o.precision == "i8"}
    floating = {str(o.module) for o in operators} - running
    assert set(built.achieved.float_layers) <= floating
    return running, set(built.achieved.float_layers)


@pytest.mark.parametrize("pair", STATIC, ids="-".join)
def test_the_projection_of_torchs_attention_can_stay_float(
    tmp_path: Path, pair: tuple[str, str]
) -> None:
    torch.manual_seed(0)
    model = Attending().eval()
    whole, _ = what_runs(model, pair, tmp_path)
    assert {"attn", "attn.out_proj"} <= whole
    running, float_layers = what_runs(model, pair, tmp_path, r"attn\.out_proj")
    assert "attn.out_proj" not in running and "attn" in running
    assert "attn.out_proj" in float_layers
    running, float_layers = what_runs(model, pair, tmp_path, r"attn(\.out_proj)?")
    assert not running & {"attn.out_proj", "attn"}
    assert "attn.out_proj" in float_layers


class Depthwise(nn.Module):
    """Convolutions with batch norms, one of them depthwise, over one channel of four by four."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False)
        self.depthwise_norm = nn.BatchNorm2d(16)
        self.project, self.head = nn.Conv2d(16, 32, 1), nn.Linear(32, 4)
        for norm in (self.stem_norm, self.depthwise_norm):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem_norm(self.stem(x.reshape(-1, 1, 4, 4))))
        x = F.relu(self.depthwise_norm(self.depthwise(x)))
        return self.head(F.relu(self.project(x)).mean((2, 3)))


@pytest.mark.parametrize("pair", STATIC, ids="-".join)
def test_a_depthwise_convolution_can_stay_float_though_a_norm_is_folded_into_it(
    tmp_path: Path, pair: tuple[str, str]
) -> None:
    torch.manual_seed(0)
    model = Depthwise().eval()
    whole, float_layers = what_runs(model, pair, tmp_path)
    assert {"stem", "depthwise", "project"} <= whole and not float_layers
    running, float_layers = what_runs(model, pair, tmp_path, "depthwise")
    assert {"stem", "project"} <= running and "depthwise" not in running
    assert float_layers == {"depthwise"}


class Ending(nn.Module):
    """A classifier that answers with probabilities, mixed by a matrix of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 4)
        self.mix = nn.Parameter(torch.rand(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(self.fc(x), -1) @ self.mix.T


class ByHand(nn.Module):
    """Attention written out, with dropout between the softmax and what it weighs."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.drop = nn.Linear(4, 12), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x.reshape(-1, 4, 4)).chunk(3, -1)
        weights = self.drop((q @ k.transpose(1, 2)).softmax(-1))
        return (weights @ v).mean(1)


@pytest.mark.parametrize(
    ("kind", "is_transformer"),
    [(Ending, False), (Net, False), (ByHand, True), (Attending, True)],
)
def test_nncfs_preset_for_transformers_is_for_attention_alone(
    tmp_path: Path, kind: type[nn.Module], is_transformer: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with quiet_libraries():
        nncf = pytest.importorskip("nncf")
    asked: list[Any] = []

    def stop(*_: object, **given: Any) -> None:
        asked.append(given["model_type"])
        raise RuntimeError("far enough")

    monkeypatch.setattr(nncf, "quantize", stop)
    with pytest.raises(TrialError, match="far enough"):
        build(kind().eval(), ("openvino", "int8-static"), tmp_path / "a", samples=calibration())
    assert asked == [nncf.ModelType.TRANSFORMER if is_transformer else None]


@pytest.mark.parametrize("pair", STATIC, ids="-".join)
class TestStatic:
    def test_without_calibration(self, tmp_path: Path, net: Net, pair: tuple[str, str]) -> None:
        with pytest.raises(TrialError, match="calibration"):
            build(net, pair, tmp_path / "a")

    def test_calibration_of_another_shape(
        self, tmp_path: Path, net: Net, pair: tuple[str, str]
    ) -> None:
        with pytest.raises(TrialError, match=r"'x'.*17"):
            build(net, pair, tmp_path / "a", samples=calibration((17,)))

    def test_more_memory_than_there_is(
        self, tmp_path: Path, net: Net, pair: tuple[str, str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        weights = 4 * sum(parameter.numel() for parameter in net.parameters())
        small = HERE.model_copy(update={"memory_bytes": 2 * weights})
        monkeypatch.setattr(artefact, "describe_machine", lambda: small)
        with pytest.raises(
            TrialError, match=r"Calibration would need about 0\.\d+ GB .*1 sample\)"
        ):
            build(net, pair, tmp_path / "a", samples=calibration())
        whole = HERE.model_copy(update={"memory_bytes": 6 * weights})
        monkeypatch.setattr(artefact, "describe_machine", lambda: whole)
        build(net, pair, tmp_path / "a", samples=calibration())

    def test_the_model_is_left_as_it_was(
        self, tmp_path: Path, net: Net, pair: tuple[str, str]
    ) -> None:
        before = {name: value.clone() for name, value in net.state_dict().items()}
        build(net, pair, tmp_path / "a", samples=calibration())
        for name, value in net.state_dict().items():
            assert torch.equal(value, before[name])


def machine(*features: str, architecture: str = "x86_64") -> Machine:
    return HERE.model_copy(update={"features": features, "architecture": architecture})


INT8_ON_AVX2 = [p for p in OFFERED if p[1].startswith("int8") and "bf16" not in p[1]]


@pytest.mark.parametrize("pair", INT8_ON_AVX2, ids="-".join)
def test_without_vnni_a_note_names_the_one_factor_of_seven_bits(
    tmp_path: Path, net: Net, pair: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(artefact, "describe_machine", lambda: machine("avx2"))
    build(net, pair, tmp_path / "a", samples=calibration())
    notes = json.loads((tmp_path / "a" / "manifest.json").read_text())["notes"]
    factors = [
        name for note in notes for name in ("activations", "weights") if name in note.lower()
    ]
    assert factors == ([] if pair[1] == "int8-weights" else ["weights"])


@pytest.mark.parametrize("runtime", sorted(RUNTIMES))
class TestProcessors:
    def test_all_has_all(self, runtime: str) -> None:
        full = machine("avx2", "avx512f", "avx512_vnni", "avx512_bf16")
        assert RUNTIMES[runtime].refused(full) == {}
        assert "fp32" in RUNTIMES[runtime].schemes(full)

    def test_without_bf16(self, runtime: str) -> None:
        plain = machine("avx2", "avx512f", "avx512_vnni")
        offered, refused = RUNTIMES[runtime].schemes(plain), RUNTIMES[runtime].refused(plain)
        assert not any("bf16" in scheme for scheme in offered)
        assert all("bfloat16" in reason for reason in refused.values())

    def test_without_int8(self, runtime: str) -> None:
        bare = machine(architecture="aarch64")
        offered, refused = RUNTIMES[runtime].schemes(bare), RUNTIMES[runtime].refused(bare)
        assert [scheme for scheme in offered if scheme != "int8-weights"] == ["fp32"]
        assert any("int8" in reason for reason in refused.values())


def test_refused_schemes_are_reported() -> None:
    offers = {offer.runtime: offer for offer in available(machine("avx2"))}
    refused = {entry.what: entry.reason for entry in offers["openvino"].refused}
    assert set(refused) == {"bf16", "int8-static-bf16"}
    assert "AVX512-BF16" in refused["bf16"]


@pytest.mark.parametrize(
    ("kind", "primitive", "stated", "without_vnni", "with_vnni"),
    [
        ("FullyConnected", "jit_gemm_I8", "u8", "i8", "i8"),
        ("Convolution", "jit_avx2_i8", "i8", "i8", "i8"),
        ("FullyConnected", "brgemm_avx2_f32", "f32", "f32", "f32"),
        # Compressed weights: the precision stated is theirs.
        ("FullyConnected", "brgemm_avx2_f32", "u8", "f32", "i8"),
        ("FullyConnected", "brgemm_avx512_amx_bf16", "u8", "bf16", "bf16"),
    ],
)
def test_an_openvino_operator_is_int8_if_it_multiplies_bytes(
    kind: str, primitive: str, stated: str, without_vnni: str, with_vnni: str
) -> None:
    facts = {"layerType": kind, "primitiveType": primitive, "runtimePrecision": stated}
    assert precision_of(facts, machine("avx2")) == without_vnni
    assert precision_of(facts, machine("avx2", "avx512f", "avx512_vnni")) == with_vnni
