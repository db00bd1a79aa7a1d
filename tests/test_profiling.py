"""Counted, followed and measured costs of modules, on tiny models of each kind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from profiling_agent.acquisition.demo_models import DemoResNet, DemoViT
from profiling_agent.acquisition.workload import Workload
from profiling_agent.errors import DataError, ModelError, PlanError
from profiling_agent.machine.processor import describe_machine
from profiling_agent.planning.fits import check_fits
from profiling_agent.profiling.dynamic import measure_modules, split_times
from profiling_agent.profiling.memory import measure_peaks
from profiling_agent.profiling.profile import bottlenecks, profile_costs
from profiling_agent.profiling.static import count
from profiling_agent.records.common import Deployment
from profiling_agent.records.profile import Profile
from small_workload import random_workload

VIT = {"image_size": 8, "width": 16, "num_heads": 2, "depth": 2}


class Lambda(nn.Module):
    """A model that is one function."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def macs(function: Callable[[Tensor], Tensor], *shape: int) -> int:
    costs = count(Lambda(function), {"x": torch.randn(*shape)})
    assert costs.unsupported_operators == ()
    return costs.module("").macs


def make_workload(model: nn.Module, *shape: int, num_samples: int = 4) -> Workload:
    return random_workload(model, shape, num_samples, num_classes=10)


# ---- static -------------------------------------------------------------------------------------


def vit_block_macs(batch: int, tokens: int, width: int) -> dict[str, int]:
    rows = batch * tokens
    return {
        "qkv": rows * width * 3 * width,
        "attention": 2 * batch * tokens * tokens * width,
        "proj": rows * width * width,
        "mlp": 2 * rows * width * 4 * width,
    }


@pytest.mark.parametrize("inference", [False, True])
def test_vit_by_formula(inference: bool) -> None:
    batch, tokens, width = 3, 4, 16
    model = DemoViT(**VIT).eval()
    with torch.inference_mode(inference):
        costs = count(model, {"x": torch.randn(batch, 1, 8, 8)})
    block = vit_block_macs(batch, tokens, width)
    stem, positions = 32, 16  # 8 x 8 pixels, halved twice
    embed = batch * (positions * stem * 9 + tokens * width * stem * 9)
    head = batch * width * 10
    assert costs.module("").macs == embed + 2 * sum(block.values()) + head
    assert costs.module("").self_macs == 0
    assert costs.module("patch_embed").macs == embed
    assert costs.module("blocks.1").macs == sum(block.values())
    assert costs.module("blocks.0.attn").self_macs == block["attention"]
    assert costs.module("blocks.0.attn.qkv").macs == block["qkv"]
    assert costs.module("blocks.0.mlp").macs == block["mlp"]
    assert costs.module("blocks.0.norm1").macs == 0
    assert costs.module("blocks.0.mlp.fc1").output_bytes == 4 * batch * tokens * 4 * width
    assert costs.unsupported_operators == ()


def test_resnet_by_formula() -> None:
    model = DemoResNet(widths=(4, 6), depth=1).eval()
    costs = count(model, {"x": torch.randn(2, 1, 8, 8)})
    full, half = 2 * 64, 2 * 16
    expected = {
        "conv1": full * 4 * 9,
        "layers.0.0.conv1": full * 4 * 4 * 9,
        "layers.0.0.conv2": full * 4 * 4 * 9,
        "layers.1.0.conv1": half * 6 * 4 * 9,
        "layers.1.0.conv2": half * 6 * 6 * 9,
        "layers.1.0.shortcut.0": half * 6 * 4,
        "fc": 2 * 6 * 10,
    }
    assert {name: costs.module(name).macs for name in expected} == expected
    assert costs.module("").macs == sum(expected.values())
    assert costs.module("").num_parameters == sum(p.numel() for p in model.parameters())
    assert costs.module("bn1").num_parameters == 8
    assert costs.module("bn1").weight_bytes == 4 * 4 * 4 + 8  # running statistics and a counter
    assert costs.unsupported_operators == ()


def test_products_and_convolutions() -> None:
    b = torch.randn(2, 5, 7)
    assert macs(lambda x: x @ b, 2, 3, 5) == 2 * 3 * 5 * 7
    assert macs(lambda x: x @ b[0, :, 0], 2, 3, 5) == 2 * 3 * 5
    assert macs(lambda x: torch.einsum("bij,bjk->bik", x, b), 2, 3, 5) == 2 * 3 * 5 * 7
    assert macs(lambda x: torch.baddbmm(torch.zeros(2, 3, 7), x, b), 2, 3, 5) == 2 * 3 * 5 * 7
    assert macs(lambda x: torch.addmm(torch.zeros(7), x, b[0]), 3, 5) == 3 * 5 * 7
    assert macs(lambda x: F.linear(x, torch.randn(7, 5), torch.zeros(7)), 2, 3, 5) == 2 * 3 * 5 * 7
    grouped = torch.randn(6, 2, 3, 3)
    assert macs(lambda x: F.conv2d(x, grouped, groups=2), 1, 4, 8, 8) == 36 * 6 * 2 * 9
    transposed = torch.randn(4, 3, 3, 3)
    assert macs(lambda x: F.conv_transpose2d(x, transposed, groups=2), 1, 4, 8, 8) == 64 * 4 * 3 * 9
    depthwise = torch.randn(4, 1, 3)
    assert macs(lambda x: F.conv1d(x, depthwise, groups=4), 2, 4, 10) == 2 * 8 * 4 * 3


def attend(**options: object) -> Callable[[Tensor], Tensor]:
    return lambda x: F.scaled_dot_product_attention(x, x, x, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options", [{}, {"is_causal": True}, {"attn_mask": torch.zeros(9, 9)}, {"scale": 0.5}]
)
@pytest.mark.parametrize("backend", [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH])
def test_attention_of_every_variant(backend: SDPBackend, options: dict[str, object]) -> None:
    with sdpa_kernel(backend):
        assert macs(attend(**options), 2, 4, 9, 16) == 2 * (2 * 4 * 9 * 9 * 16)


def test_cross_attention_with_fewer_key_heads() -> None:
    kv = torch.randn(2, 2, 5, 16)
    cross = macs(lambda x: F.scaled_dot_product_attention(x, kv, kv, enable_gqa=True), 2, 4, 9, 16)
    assert cross == 2 * (2 * 4 * 9 * 5 * 16)


class Attention(nn.Module):
    def __init__(self, need_weights: bool) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(16, 4, batch_first=True)
        self.need_weights = need_weights

    def forward(self, x: Tensor) -> Tensor:
        return self.mha(x, x, x, need_weights=self.need_weights)[0]


@pytest.mark.parametrize("need_weights", [False, True])
def test_torch_attention_and_its_fast_path(need_weights: bool) -> None:
    model = Attention(need_weights).eval()
    with torch.inference_mode():
        costs = count(model, {"x": torch.randn(2, 9, 16)})
    expected = 2 * 9 * 16 * 48 + 2 * (2 * 9 * 9 * 16) + 2 * 9 * 16 * 16
    assert costs.module("mha").self_macs == costs.module("").macs == expected
    assert costs.module("mha.out_proj").num_calls == 0
    assert costs.unsupported_operators == ()
    assert torch.backends.mha.get_fastpath_enabled()


def test_transformer_encoder_layer() -> None:
    layer = nn.TransformerEncoderLayer(16, 4, dim_feedforward=32, batch_first=True).eval()
    costs = count(layer, {"src": torch.randn(2, 9, 16)})
    attention = 2 * 9 * 16 * 48 + 2 * (2 * 9 * 9 * 16) + 2 * 9 * 16 * 16
    assert costs.module("").macs == attention + 2 * (2 * 9 * 16 * 32)


class Recurrent(nn.Module):
    def __init__(self, kind: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.rnn = kind(8, 6, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


@pytest.mark.parametrize(("kind", "gates"), [(nn.LSTM, 4), (nn.GRU, 3)])
def test_recurrent_layers(kind: Callable[..., nn.Module], gates: int) -> None:
    costs = count(Recurrent(kind).eval(), {"x": torch.randn(2, 5, 8)})
    assert costs.module("rnn").macs == 2 * 5 * gates * 6 * (8 + 6)
    assert costs.unsupported_operators == ()


class Odd(nn.Module):
    """Work of kinds that are not counted, and integer work that needs no counting."""

    def __init__(self) -> None:
        super().__init__()
        self.spectrum = Lambda(lambda x: torch.fft.rfft(x).abs())
        self.running = Lambda(lambda x: x.cumsum(-1))

    def forward(self, x: Tensor) -> Tensor:
        positions = torch.ones(3, dtype=torch.long).cumsum(0)
        return self.running(self.spectrum(x)) + torch.linalg.svdvals(x).sum() + positions.sum()


def test_unknown_operators_are_listed_with_their_place() -> None:
    listed = count(Odd(), {"x": torch.randn(4, 8)}).unsupported_operators
    assert listed == (
        "aten._fft_r2c in module 'spectrum'",
        "aten._linalg_svd in the model itself",
        "aten.cumsum in module 'running'",
    )


def test_what_counts_zero_by_convention() -> None:
    def cheap(x: Tensor) -> Tensor:
        x = F.interpolate(F.max_pool2d(F.relu(x), 2), scale_factor=2, mode="bilinear")
        x = F.group_norm(F.pad(x, (1, 1, 1, 1)), 2)
        x = torch.cat([x, x.flip(1)], 1).softmax(1).clone()
        x = F.adaptive_avg_pool2d(F.hardswish(x), 2).flatten(1)
        return x[:, torch.tensor([2, 0])] + x.std() + F.one_hot(x.argmax(1), 99)[:, :2]

    assert macs(cheap, 2, 4, 8, 8) == 0


class Shared(nn.Module):
    """A layer called twice, tied weights, and layers in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Linear(4, 4)
        self.tied = nn.Linear(4, 4, bias=False)
        self.tied.weight = self.twice.weight
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(F.relu(self.twice(x))) + self.tied(x)
        for layer in self.layers:
            x = layer(x)
        return x


def test_shared_weights_repeated_calls_and_lists() -> None:
    costs = count(Shared(), {"x": torch.randn(3, 4)})
    assert costs.module("twice").num_calls == 2
    assert costs.module("twice").macs == 2 * 3 * 16
    assert costs.module("twice").output_bytes == 2 * 3 * 4 * 4
    assert costs.module("").num_parameters == 3 * 20
    assert costs.module("").weight_bytes == 4 * 3 * 20
    assert costs.module("layers").num_calls == 0
    assert costs.module("layers").macs == 2 * 3 * 16


# ---- memory -------------------------------------------------------------------------------------


def test_peak_of_a_chain_by_hand() -> None:
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
    peaks = measure_peaks(model, {"x": torch.randn(2, 8)})
    unit = 2 * 4  # bytes of one feature for both samples
    assert peaks.modules["0"] == (8 + 32) * unit
    assert peaks.modules["1"] == (8 + 32 + 32) * unit  # the caller still holds the input
    assert peaks.modules["2"] == (8 + 32 + 4) * unit
    assert peaks.total_bytes == peaks.modules[""] == (8 + 32 + 32) * unit


def test_peak_sees_views_in_place_and_release() -> None:
    def function(x: Tensor) -> Tensor:
        big = x.repeat(1, 16)
        small = big.relu_().view(-1)[:1].clone()
        del big
        return small + x.sum()

    peaks = measure_peaks(Lambda(function), {"x": torch.randn(4, 8)})
    assert peaks.total_bytes == (32 + 512 + 1) * 4


def test_peak_is_the_same_each_time_and_grows_with_the_batch() -> None:
    model = DemoViT(**VIT).eval()
    first, again = (measure_peaks(model, {"x": torch.randn(2, 1, 8, 8)}) for _ in range(2))
    double = measure_peaks(model, {"x": torch.randn(4, 1, 8, 8)})
    assert first == again
    assert double.total_bytes == 2 * first.total_bytes
    assert all(0 < peak <= first.total_bytes for peak in first.modules.values())


# ---- dynamic ------------------------------------------------------------------------------------


def test_times_of_a_resnet_add_up() -> None:
    model = DemoResNet(widths=(4, 6), depth=1).eval()
    costs = measure_modules(model, {"x": torch.randn(1, 1, 8, 8)}, passes=5, warmup=1)
    assert costs.not_measured == ()
    assert set(costs.modules) == {name for name, _ in model.named_modules()}
    assert costs.total.median_ms > 0
    assert costs.total.num_passes == 5
    for time in costs.modules.values():
        assert time.total.low_ms <= time.total.median_ms <= time.total.high_ms
        assert 0 <= time.self_time.median_ms <= time.total.high_ms
    assert costs.sum_of_parts_ms == pytest.approx(costs.hooked_total.median_ms)
    assert costs.modules["fc"].total == costs.modules["fc"].self_time


def test_uncalled_modules_have_a_reason_instead_of_a_time() -> None:
    costs = measure_modules(Shared(), {"x": torch.randn(3, 4)}, passes=2, warmup=0)
    assert "layers" not in costs.modules
    assert "layers.1" in costs.modules
    assert [(n.what, n.reason) for n in costs.not_measured] == [
        (
            "time and peak memory of module 'layers'",
            "a ModuleList has no forward of its own; see the modules inside it",
        )
    ]
    attention = measure_modules(
        Attention(True).eval(), {"x": torch.randn(2, 9, 16)}, passes=2, warmup=0
    )
    assert [n.what for n in attention.not_measured] == [
        "time and peak memory of module 'mha.out_proj'"
    ]


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_torchscript_inside_is_passed_over_and_whole_is_refused() -> None:
    scripted = torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    model, inputs = nn.Sequential(nn.Linear(4, 4), scripted), {"x": torch.randn(2, 4)}
    costs = measure_modules(model, inputs, passes=2, warmup=0)
    assert set(costs.modules) == {"", "0"}
    assert "TorchScript" in costs.not_measured[0].reason
    assert count(model, inputs).module("").macs == 2 * (2 * 4 * 4)
    with pytest.raises(ModelError, match="TorchScript"):
        count(scripted, inputs)


def test_splitting_events() -> None:
    events = [
        ("", True, 0),
        ("a", True, 1_000_000),
        ("a", True, 2_000_000),  # calls itself
        ("a", False, 4_000_000),
        ("a", False, 6_000_000),
        ("b", True, 6_000_000),
        ("c", True, 7_000_000),  # raises, and b catches
        ("b", False, 9_000_000),
        ("", False, 10_000_000),
    ]
    times = split_times(events)
    assert times == {"": (10, 2), "a": (5, 5), "b": (3, 1), "c": (2, 2)}
    assert sum(own for _, own in times.values()) == times[""][0]


class Broken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError(f"broken at {tuple(self.inner(x).shape)}")


def num_hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("measure", [count, measure_peaks, measure_modules])
def test_a_failing_forward_leaves_nothing_behind(measure: Callable[..., object]) -> None:
    model, threads = Broken(), torch.get_num_threads()
    with pytest.raises(RuntimeError, match="broken"):
        measure(model, {"x": torch.randn(2, 4)})
    assert num_hooks(model) == 0
    assert torch.get_num_threads() == threads
    assert not torch.is_inference_mode_enabled()
    assert torch.backends.mha.get_fastpath_enabled()


# ---- the profile --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def profile() -> Profile:
    workload = make_workload(DemoViT(**VIT), 1, 8, 8)
    return profile_costs(workload, describe_machine(), Deployment(batch_size=2), passes=3)


def test_profile_of_a_vit(profile: Profile, tmp_path: Path) -> None:
    assert profile.total is not None
    assert profile.sum_of_parts_ms is not None
    assert profile.total_macs == profile.modules[0].macs > 0
    assert profile.modules[0].name == ""
    assert profile.peak_activation_bytes == profile.modules[0].peak_activation_bytes
    shares = [module.share for module in profile.modules if module.share is not None]
    assert len(shares) == len(profile.modules)
    path = tmp_path / "profile.json"
    path.write_text(profile.to_json())
    assert Profile.read(path) == profile


def test_bottlenecks_are_sorted_by_self_time(profile: Profile) -> None:
    worst = bottlenecks(profile, n=3)
    times = [module.self_time.median_ms for module in worst if module.self_time]
    assert len(times) == 3
    assert times == sorted(times, reverse=True)


class Stateful(nn.Module):
    """Counts its forwards, normalises by batch statistics in training, and draws numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout()
        self.forwards = 0

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += 1
        return self.drop(self.norm(x)) + torch.rand(1)


def test_a_profile_leaves_the_model_as_it_was() -> None:
    workload = make_workload(Stateful(), 4)
    model = workload.model
    assert isinstance(model, Stateful)
    model.train()
    model.norm.eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    random_state, threads = torch.get_rng_state(), torch.get_num_threads()
    deployment = Deployment(batch_size=8, threads=2)  # more than there are samples
    profile = profile_costs(workload, describe_machine(), deployment)
    assert model.forwards <= 30
    assert model.training
    assert model.drop.training
    assert not model.norm.training
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert num_hooks(model) == 0
    assert torch.equal(random_state, torch.get_rng_state())
    assert torch.get_num_threads() == threads
    assert profile.deployment == deployment
    assert profile.modules[1].output_bytes == 8 * 4 * 4


def test_no_calibration_data() -> None:
    workload = make_workload(Stateful(), 4)
    bare = Workload(model=workload.model, record=workload.record, splits={})
    with pytest.raises(DataError, match="calibration"):
        profile_costs(bare, describe_machine(), Deployment())


def test_a_profile_from_elsewhere_is_refused(profile: Profile) -> None:
    machine, deployment = describe_machine(), profile.deployment
    check_fits(profile, machine, deployment)
    newer = machine.model_copy(update={"versions": {}})
    check_fits(profile, newer, deployment)
    with pytest.raises(PlanError, match=r"at batch size 2 \(asked: 7\).* again"):
        check_fits(profile, machine, Deployment(batch_size=7))
    with pytest.raises(PlanError, match=r"threads=1 \(asked: 3\)"):
        check_fits(profile, machine, Deployment(batch_size=2, threads=3))
    with pytest.raises(PlanError, match=r"another machine .*'Other CPU'"):
        check_fits(profile, machine.model_copy(update={"processor": "Other CPU"}), deployment)
