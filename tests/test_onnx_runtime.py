"""The onnxruntime runtime: static int8 in QDQ form, names of nodes, refusals, operator times.

What runs in int8 is lowered for this machine (``HERE``); a record made up is for what is decided
without running: bits of stored weights, notes, refusals.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torch.nn import functional as F

from profiling_agent.deployment.capabilities import int8_support
from profiling_agent.deployment.lowered import Calibration, Lowered, Lowering
from profiling_agent.deployment.onnx_runtime import OnnxRuntime
from profiling_agent.errors import TrialError
from profiling_agent.machine.processor import describe_machine
from profiling_agent.profiling.deployed_onnxruntime import operator_costs
from profiling_agent.records.common import Deployment, Machine
from profiling_agent.records.plan import Quantization

RUNTIME = OnnxRuntime()
INT8 = ("int8-dynamic", "int8-static")


def machine(*features: str, architecture: str = "x86_64", memory_bytes: int = 8 << 30) -> Machine:
    return Machine(
        processor="test",
        architecture=architecture,
        num_cores=1,
        cpu_quota=None,
        features=features,
        memory_bytes=memory_bytes,
        system="Linux",
        versions={},
    )


HERE = describe_machine()
VNNI, NO_VNNI = machine("avx2", "avx512_vnni"), machine("avx2")


def samples(example: dict[str, Tensor], num_samples: int = 32) -> Calibration:
    """Random samples of the example's shapes and types."""
    generator = torch.Generator().manual_seed(1)
    stock: dict[str, np.ndarray] = {}
    for name, value in example.items():
        shape = (num_samples, *value.shape[1:])
        if value.is_floating_point():
            stock[name] = torch.randn(shape, generator=generator).numpy()
        else:
            stock[name] = torch.randint(0, 10, shape, generator=generator).numpy()
    return of_arrays(stock)


def of_arrays(stock: dict[str, np.ndarray]) -> Calibration:
    num_samples = len(next(iter(stock.values())))

    def batches(size: int) -> Iterator[dict[str, np.ndarray]]:
        for start in range(0, num_samples - size + 1, size):
            yield {name: value[start : start + size] for name, value in stock.items()}

    return Calibration(num_samples=num_samples, batches=batches)


def lower(
    model: nn.Module,
    example: dict[str, Tensor],
    folder: Path,
    scheme: str = "int8-static",
    keep_float: tuple[str, ...] = (),
    calibration: Calibration | None = None,
    on: Machine = HERE,
) -> Lowered:
    if on is HERE and scheme in (refused := RUNTIME.refused(HERE)):
        pytest.skip(refused[scheme])
    folder.mkdir(exist_ok=True)
    lowering = Lowering(
        quantization=Quantization(scheme=scheme, keep_float=keep_float),
        machine=on,
        deployment=Deployment(),
        calibration=calibration or samples(example),
    )
    return RUNTIME.lower(model.eval(), example, lowering, folder)


def logits(folder: Path, inputs: dict[str, Tensor]) -> np.ndarray:
    session = onnxruntime.InferenceSession(
        str(folder / "model.onnx"), providers=["CPUExecutionProvider"]
    )
    feed: Any = {name: value.numpy() for name, value in inputs.items()}
    return np.asarray(session.run(None, feed)[0])


def distance(folder: Path, model: nn.Module, inputs: dict[str, Tensor]) -> float:
    """Root mean square error of the artefact's outputs over their standard deviation."""
    with torch.inference_mode():
        expected = model(*inputs.values()).numpy()
    error = logits(folder, inputs) - expected
    return float(np.sqrt((error**2).mean()) / expected.std())


def node_types(folder: Path) -> list[str]:
    return [node.op_type for node in onnx.load(str(folder / "model.onnx")).graph.node]


class Perceptron(nn.Module):
    """Two linear layers; the input of the second has 128 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 128), nn.Linear(128, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.relu(self.first(x)))


class Block(nn.Module):
    """A residual block with a depthwise convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.pointwise = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.pointwise(F.relu6(self.bn(self.depthwise(x)))))


class Convolutional(nn.Module):
    """A stem, pooling, two residual blocks, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.blocks = nn.Sequential(Block(16), Block(16))
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.stem(x)), 2)
        return self.head(self.blocks(x).mean((2, 3)))


class Transformer(nn.Module):
    """Patches, attention of torch's own, a head on the mean token."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 32, 4, stride=4)
        self.norm = nn.LayerNorm(32)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return self.head(x.mean(1))


class Words(nn.Module):
    """Integer inputs, and a projection used twice on tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(10, 16), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, ids: Tensor, scale: Tensor) -> Tensor:
        x = self.mix(F.gelu(self.mix(self.embed(ids))))
        return self.head(x.mean(1) * scale)


class FixedBatch(nn.Module):
    """Can't be exported with a free batch size."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(12, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.gelu(self.inner(x.reshape(2, 6, 12)))).mean(1)


SEEDED = torch.Generator().manual_seed(0)
IMAGE = {"x": torch.randn(2, 3, 16, 16, generator=SEEDED)}
WORDS = {
    "ids": torch.randint(0, 10, (2, 7), generator=SEEDED),
    "scale": torch.randn(2, 16, generator=SEEDED),
}
CASES: list[tuple[Callable[[], nn.Module], dict[str, Tensor], int, int]] = [
    # model, example, layers in int8, products in int8
    (Perceptron, {"x": torch.randn(2, 16, generator=SEEDED)}, 2, 2),
    (Convolutional, IMAGE, 6, 6),
    (Transformer, IMAGE, 2, 3),
    (Words, WORDS, 2, 3),
    (FixedBatch, {"x": torch.randn(2, 72, generator=SEEDED)}, 2, 2),
]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(("build", "example", "num_layers", "num_products"), CASES)
def test_static_int8_runs_in_int8_and_stays_close(
    tmp_path: Path,
    build: Callable[[], nn.Module],
    example: dict[str, Tensor],
    num_layers: int,
    num_products: int,
) -> None:
    model = build().eval()
    lowered = lower(model, example, tmp_path)
    assert len(lowered.int8_layers) == num_layers
    assert lowered.num_int8_operators == num_products
    assert lowered.num_products is not None
    assert lowered.num_products >= num_products
    assert distance(tmp_path, model, example) < 0.05


def test_counts_of_the_other_schemes(tmp_path: Path) -> None:
    model = Convolutional()
    lowered = lower(model, IMAGE, tmp_path, "fp32")
    assert (lowered.num_int8_operators, lowered.num_products) == (0, 6)
    lowered = lower(model, IMAGE, tmp_path, "int8-dynamic")
    assert (lowered.num_int8_operators, lowered.num_products) == (1, 6)
    assert lowered.int8_layers == ("head",)


def test_weights_shrink_and_patches_stay_float(tmp_path: Path) -> None:
    example = {"x": torch.randn(1, 256)}
    model = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 64))
    full = lower(model, example, tmp_path / "a", "fp32").weight_bytes
    assert lower(model, example, tmp_path / "b").weight_bytes < 0.27 * full
    assert lower(Transformer(), IMAGE, tmp_path / "c").float_layers == ("patches",)


def test_keep_float_names_modules(tmp_path: Path) -> None:
    model = Convolutional().eval()
    kept = lower(model, IMAGE, tmp_path, keep_float=(r"blocks\.0\.depthwise", "stem"))
    assert kept.float_layers == ("stem", "blocks.0.depthwise")
    assert kept.num_int8_operators == 4
    assert distance(tmp_path, model, IMAGE) < 0.05
    # A parent's name keeps what is traced in the parent itself, not its children.
    kept = lower(model, IMAGE, tmp_path, keep_float=(r"blocks\.0",))
    assert kept.float_layers == ()
    with pytest.raises(TrialError, match="quantizes nothing"):
        lower(model, IMAGE, tmp_path, keep_float=(".*",))


def test_attention_is_kept_by_its_own_name(tmp_path: Path) -> None:
    model = Transformer()
    assert lower(model, IMAGE, tmp_path).int8_layers == ("attention.out_proj", "head")
    kept = lower(model, IMAGE, tmp_path, keep_float=("attention",))
    assert (kept.int8_layers, kept.num_int8_operators) == (("head",), 1)
    kept = lower(model, IMAGE, tmp_path, keep_float=(r"attention\.out_proj",))
    assert kept.int8_layers == ("head",)
    assert kept.num_int8_operators == 2, "the projection before it is still in int8"


def test_a_channel_far_beyond_the_others_does_not_spoil_them(tmp_path: Path) -> None:
    model = Perceptron().eval()
    with torch.no_grad():
        model.first.weight[7] *= 300
        model.second.weight[:, 7] /= 300
    example = {"x": torch.randn(64, 16)}
    lowered = lower(model, example, tmp_path, calibration=of_arrays({"x": example["x"].numpy()}))
    assert lowered.notes[-1].endswith("second (1).")
    assert distance(tmp_path, model, example) < 0.03


def test_two_layers_share_the_outliers_of_what_they_read(tmp_path: Path) -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(16, 128)
            self.left, self.right = nn.Linear(128, 8), nn.Linear(128, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = F.gelu(self.first(x))
            return self.left(x) - self.right(x)

    model = Branches().eval()
    with torch.no_grad():
        model.first.weight[5] *= 300
    example = {"x": torch.randn(32, 16)}
    lowered = lower(model, example, tmp_path, calibration=of_arrays({"x": example["x"].numpy()}))
    assert lowered.notes[-1].endswith("left (1), right (1).")
    assert node_types(tmp_path).count("Gather") == 1
    assert distance(tmp_path, model, example) < 0.03


@pytest.mark.parametrize("scheme", ["fp32", *INT8])
@pytest.mark.parametrize("build", [Convolutional, Transformer])
def test_nodes_are_named_after_modules(
    tmp_path: Path, scheme: str, build: Callable[[], nn.Module]
) -> None:
    model = build()
    lower(model, IMAGE, tmp_path, scheme)
    nodes = onnx.load(str(tmp_path / "model.onnx")).graph.node
    names = [node.name for node in nodes]
    assert len(set(names)) == len(names)
    modules = {name for name, _ in model.named_modules()}
    for node in nodes:
        module, _, rest = node.name.partition("::")
        assert module in modules
        assert rest.rpartition("_")[0] == node.op_type
    products = {name.partition("::")[0] for name in names if "::Conv" in name or "::Gemm" in name}
    expected = {name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    assert expected <= products, "a batch norm folded into a convolution doesn't rename it"


@pytest.mark.parametrize(
    ("on", "offered"),
    [
        (machine("avx2", "avx512_vnni"), True),
        (machine("avx2"), True),
        (machine("asimddp", architecture="aarch64"), True),
        (machine("sse4_1"), False),
        (machine(architecture="aarch64"), False),
    ],
)
def test_schemes_depend_on_the_processor(tmp_path: Path, on: Machine, offered: bool) -> None:
    assert RUNTIME.schemes(on) == (("fp32", *INT8) if offered else ("fp32",))
    refused = RUNTIME.refused(on)
    assert set(refused) == (set() if offered else set(INT8))
    assert all("slower" in reason for reason in refused.values())
    if not offered:
        with pytest.raises(TrialError, match=r"does not offer 'int8-static' here: .* slower"):
            lower(Perceptron(), {"x": torch.randn(2, 16)}, tmp_path, on=on)


@pytest.mark.parametrize("scheme", INT8)
def test_weights_have_seven_bits_where_sums_saturate(tmp_path: Path, scheme: str) -> None:
    model, example = Perceptron().eval(), {"x": torch.randn(2, 16)}
    largest = {}
    for name, on in (("full", VNNI), ("reduced", NO_VNNI)):
        lowered = lower(model, example, tmp_path, scheme, on=on)
        largest[name] = max(largest_weights(tmp_path).values())
        assert any("seven bits" in note for note in lowered.notes) == (name == "reduced")
    assert 120 <= largest["full"] <= 128
    assert 60 <= largest["reduced"] <= 64
    assert distance(tmp_path, model, example) < 0.1, "seven bits saturate nowhere"
    lower(model, example, tmp_path, scheme)
    assert distance(tmp_path, model, example) < 0.1


def largest_weights(folder: Path) -> dict[str, int]:
    """The largest magnitude of each int8 weight that an artefact stores."""
    values = onnx.load(str(folder / "model.onnx")).graph.initializer
    arrays = {value.name: numpy_helper.to_array(value) for value in values}
    return {
        name: int(np.abs(array.astype(int)).max())
        for name, array in arrays.items()
        if array.dtype == np.int8 and array.ndim >= 2
    }


def test_depthwise_weights_have_eight_bits_everywhere(tmp_path: Path) -> None:
    for on, others in ((VNNI, 127), (NO_VNNI, 64)):
        lowered = lower(Convolutional(), IMAGE, tmp_path, on=on)
        for name, largest in largest_weights(tmp_path).items():
            assert largest == (127 if "depthwise" in name else others)
        assert any("those of depthwise convolutions eight" in note for note in lowered.notes) == (
            on is NO_VNNI
        )
    only = nn.Sequential(nn.Conv2d(3, 3, 3, groups=3), nn.ReLU(), nn.MaxPool2d(2))
    assert lower(Pooled(only), IMAGE, tmp_path, on=NO_VNNI).notes == ()
    multiplied = nn.Sequential(nn.Conv2d(3, 6, 3, groups=3), nn.ReLU(), nn.MaxPool2d(2))
    assert "seven bits:" in lower(Pooled(multiplied), IMAGE, tmp_path, on=NO_VNNI).notes[0]


class Pooled(nn.Module):
    """The mean over height and width."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).mean((2, 3))


class Loud(nn.Module):
    """One product, all weights of an output alike and as large as any: the largest sums there are.

    An integer stands for each of them exactly, with eight bits or seven.
    """

    def __init__(self, layer: nn.Linear | nn.Conv1d | nn.Conv2d) -> None:
        super().__init__()
        self.layer = layer
        with torch.no_grad():
            layer.weight.fill_(0.5)
            layer.weight[1::2] = -0.5

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return y.flatten(2).mean(2) if y.dim() > 2 else y


LOUD: dict[str, tuple[Callable[[], nn.Linear | nn.Conv1d | nn.Conv2d], tuple[int, ...], str]] = {
    "linear": (lambda: nn.Linear(64, 6), (64,), "int8-static"),
    "linear-odd": (lambda: nn.Linear(63, 33, bias=False), (63,), "int8-static"),
    "linear-dynamic": (lambda: nn.Linear(64, 6), (64,), "int8-dynamic"),
    "linear-dynamic-odd": (lambda: nn.Linear(63, 33, bias=False), (63,), "int8-dynamic"),
    "pointwise": (lambda: nn.Conv2d(16, 6, 1), (16, 5, 5), "int8-static"),
    "conv": (lambda: nn.Conv2d(16, 32, 3, padding=1), (16, 5, 5), "int8-static"),
    "one-channel": (lambda: nn.Conv2d(1, 16, 3), (1, 5, 5), "int8-static"),
    "grouped": (lambda: nn.Conv2d(16, 8, 3, groups=2), (16, 5, 5), "int8-static"),
    "depthwise": (lambda: nn.Conv2d(16, 16, 3, groups=16), (16, 5, 5), "int8-static"),
    "depthwise-1d": (lambda: nn.Conv1d(12, 12, 5, groups=12), (12, 9), "int8-static"),
    "multiplied": (lambda: nn.Conv2d(16, 32, 3, groups=16), (16, 5, 5), "int8-static"),
}


@pytest.mark.parametrize("name", LOUD)
def test_sums_of_int8_products_do_not_saturate(tmp_path: Path, name: str) -> None:
    layer, shape, scheme = LOUD[name]
    model = Loud(layer()).eval()
    inputs = 1 - 0.1 * torch.rand(32, *shape)
    calibration = of_arrays({"x": inputs.numpy()})
    lowered = lower(model, {"x": inputs[:2]}, tmp_path, scheme, calibration=calibration)
    assert lowered.num_int8_operators == 1
    with torch.inference_mode():
        expected = model(inputs).numpy()
    for batch in (1, 5):
        # Saturated sums are off by half; a step of an activation is 0.4 % of its range.
        error = np.abs(logits(tmp_path, {"x": inputs[:batch]}) - expected[:batch]).max()
        assert error < 0.01 * np.abs(expected).max()


@pytest.mark.skipif(not int8_support(HERE).usable, reason="int8 is not offered here")
def test_sums_saturate_on_this_processor_as_its_record_says() -> None:
    x, weight = np.full((1, 8), 255, np.uint8), np.full((8, 16), 127, np.int8)
    values = [
        helper.make_tensor_value_info("x", TensorProto.UINT8, [1, 8]),
        helper.make_tensor_value_info("y", TensorProto.INT32, [1, 16]),
    ]
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["x", "weight"], ["y"])],
        "product",
        [values[0]],
        [values[1]],
        [numpy_helper.from_array(weight, "weight")],
    )
    opsets = [helper.make_opsetid("", 21)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    found = np.asarray(session.run(None, {"x": x})[0])
    saturates = bool((found != 8 * 255 * 127).any())
    assert saturates == int8_support(HERE).reduce_range


def test_calibration_keeps_nothing_of_the_samples(tmp_path: Path) -> None:
    alive: list[weakref.ref[Any]] = []
    most = 0

    class Inputs(dict[str, np.ndarray]):
        """A dict that can be referred to weakly."""

    def batches(size: int) -> Iterator[dict[str, np.ndarray]]:
        nonlocal most
        for _ in range(8):
            gc.collect()
            most = max(most, sum(reference() is not None for reference in alive))
            inputs = Inputs(x=np.random.default_rng(0).normal(size=(size, 16)).astype(np.float32))
            alive.append(weakref.ref(inputs))
            yield inputs
            del inputs

    calibration = Calibration(num_samples=8, batches=batches)
    lower(Perceptron(), {"x": torch.randn(2, 16)}, tmp_path, calibration=calibration)
    assert len(alive) == 8
    assert most <= 1


def test_a_rare_sample_does_not_set_the_range(tmp_path: Path) -> None:
    model, example = Perceptron().eval(), {"x": torch.randn(2, 16)}
    usual = np.random.default_rng(0).normal(size=(200, 16)).astype(np.float32)
    usual[100] *= 100
    lower(model, example, tmp_path, calibration=of_arrays({"x": usual}))
    assert distance(tmp_path, model, {"x": torch.from_numpy(usual[:100])}) < 0.2


class TestBadInput:
    EXAMPLE: dict[str, Tensor] = {"x": torch.zeros(2, 16)}  # noqa: RUF012

    def check(self, folder: Path, match: str, on: Machine = VNNI, **arguments: Any) -> None:
        with pytest.raises(TrialError, match=match):
            lower(Perceptron(), self.EXAMPLE, folder, on=on, **arguments)
        assert list(folder.iterdir()) == []

    def test_no_calibration(self, tmp_path: Path) -> None:
        lowering = Lowering(
            quantization=Quantization(scheme="int8-static"),
            machine=VNNI,
            deployment=Deployment(),
        )
        with pytest.raises(TrialError, match="'int8-static' needs calibration samples"):
            RUNTIME.lower(Perceptron().eval(), self.EXAMPLE, lowering, tmp_path)

    @pytest.mark.parametrize(
        ("array", "match"),
        [
            (np.zeros((4, 3, 16), np.float32), r"'x' has shape \[1, 3, 16\] .* takes .*, 16\]"),
            (np.zeros((4, 12), np.float32), r"'x' has shape \[1, 12\] and type float32"),
            (np.zeros((4, 16), np.float64), r"type float64, but the graph takes .* float32"),
            (np.full((4, 16), np.nan, np.float32), r"Input 'x' is not finite"),
            (np.zeros((0, 16), np.float32), "no calibration samples"),
        ],
    )
    def test_calibration_that_does_not_fit(
        self, tmp_path: Path, array: np.ndarray, match: str
    ) -> None:
        self.check(tmp_path, match, calibration=of_arrays({"x": array}))

    def test_a_missing_input_is_named(self, tmp_path: Path) -> None:
        calibration = of_arrays({"image": np.zeros((4, 16), np.float32)})
        self.check(tmp_path, r"no input 'x', but \['image'\]", calibration=calibration)

    def test_an_activation_that_overflows_names_its_module(self, tmp_path: Path) -> None:
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        with torch.no_grad():
            model[0].weight.fill_(3e38)
        example = {"x": torch.ones(2, 4)}
        calibration = of_arrays({"x": np.ones((4, 4), np.float32)})
        with pytest.raises(TrialError, match="module '0' is not finite"):
            lower(model, example, tmp_path, calibration=calibration)

    def test_memory_is_estimated_first(self, tmp_path: Path) -> None:
        def batches(size: int) -> Iterator[dict[str, np.ndarray]]:
            raise AssertionError("calibration has begun")

        calibration = Calibration(num_samples=1, batches=batches)
        little = machine("avx512_vnni", memory_bytes=10_000)
        self.check(tmp_path, "would need about", calibration=calibration, on=little)

    def test_unknown_scheme(self, tmp_path: Path) -> None:
        self.check(tmp_path, "no scheme 'int4'", scheme="int4")

    def test_a_scheme_without_effect_is_refused(self, tmp_path: Path) -> None:
        class Clipped(nn.Module):
            """onnxruntime can't take this clipping for a range that includes zero."""

            def __init__(self) -> None:
                super().__init__()
                self.conv = nn.Conv2d(3, 4, 3)

            def forward(self, x: Tensor) -> Tensor:
                return self.conv(x).clamp(1.0, 2.0).mean((2, 3))

        with pytest.raises(TrialError, match="has no effect: onnxruntime runs none of the 1"):
            lower(Clipped(), IMAGE, tmp_path)

    def test_an_operator_without_translation_is_named_with_its_module(self, tmp_path: Path) -> None:
        class Bessel(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return torch.special.bessel_j0(x)

        class Nested(nn.Module):
            def __init__(self, inner: nn.Module) -> None:
                super().__init__()
                self.stage = nn.Sequential(nn.Linear(16, 4), inner)

            def forward(self, x: Tensor) -> Tensor:
                return self.stage(x)

        class Direct(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return torch.special.bessel_j0(x)

        with pytest.raises(TrialError, match=r"bessel_j0.*, used in 'stage\.1'"):
            lower(Nested(Bessel()), self.EXAMPLE, tmp_path, "fp32")
        with pytest.raises(TrialError, match=r"bessel_j0.*, used in the model's own forward"):
            lower(Direct(), self.EXAMPLE, tmp_path, "fp32")


class TestOperatorCosts:
    @pytest.mark.parametrize("scheme", ["fp32", *INT8])
    @pytest.mark.parametrize("build", [Convolutional, Transformer])
    def test_times_are_mapped_to_modules(
        self, tmp_path: Path, scheme: str, build: Callable[[], nn.Module]
    ) -> None:
        model = build()
        lowered = lower(model, IMAGE, tmp_path, scheme)
        costs = operator_costs(tmp_path, {}, [IMAGE["x"].numpy()], threads=1, passes=5)
        modules = {name for name, _ in model.named_modules()}
        assert {cost.module for cost in costs if cost.module is not None} <= modules
        total = sum(cost.ms for cost in costs)
        mapped = sum(cost.ms for cost in costs if cost.module is not None)
        assert total > 0
        assert mapped >= 0.9 * total
        assert sum(cost.precision == "i8" for cost in costs) == lowered.num_int8_operators
        layers = {cost.module for cost in costs if "Conv" in cost.type}
        assert layers == {n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}

    def test_neither_torch_nor_pydantic_models_of_torch_are_needed(self) -> None:
        code = (
            "import sys; import profiling_agent.profiling.deployed_onnxruntime; "
            "assert not {'torch', 'onnx', 'onnxruntime'} & set(sys.modules)"
        )
        subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_static_int8_keeps_the_predictions_of_real_models(tmp_path: Path) -> None:
    assets = os.environ.get("PROFILING_AGENT_ASSETS", "")
    for name in ("vit_tiny_imagenet/vit_tiny_patch16_224.safetensors", "imagenet_val_650"):
        if not Path(assets, name).exists():
            pytest.skip(f"{name} is not there (PROFILING_AGENT_ASSETS)")
    folder = Path(__file__).resolve().parents[1] / "benchmarks"
    sys.path.insert(0, str(folder))
    try:
        import workloads  # pyright: ignore[reportMissingImports]
    finally:
        sys.path.remove(str(folder))
    data = workloads.imagenet()

    def prepared(split: Any, num: int) -> np.ndarray:
        images = np.stack([split[index][0] for index in range(num)]).astype(np.float32) / 255
        return ((images - 0.5) / 0.5).transpose(0, 3, 1, 2).copy()

    model = workloads.vit_tiny().eval()
    calibration = of_arrays({"x": prepared(data["calibration"], 128)})
    images = torch.from_numpy(prepared(data["test"], 325))
    lowered = lower(model, {"x": images[:1]}, tmp_path, calibration=calibration)
    assert lowered.float_layers == ("patch_embed.proj",)
    with torch.inference_mode():
        expected = torch.cat([model(block) for block in images.split(25)]).argmax(1).numpy()
    found = np.concatenate([logits(tmp_path, {"x": block}) for block in images.split(25)])
    assert (found.argmax(1) == expected).mean() >= 0.96
