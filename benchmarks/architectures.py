"""What profiling says of the paper's four architectures, held against the literature and torch.

    python benchmarks/architectures.py --json benchmarks/results/architectures.json
    python benchmarks/architectures.py --quick costs

Three parts, all with random weights and without data:

- costs: parameters and MACs of ResNet-101, ViT-B/16, DeiT-B and Swin-B from timm, transformers and
  torchvision, against the literature and against timm's;
- passes: how many forward passes static and per-module costs of ViT-B/16 take, and how long;
- bottlenecks: ResNet-101's slowest modules as we rank them and as torch.profiler does.

Exit code 1 when a cost is off by more than 1 %, more than 30 passes are taken, or the modules we
call slowest are not those on which torch.profiler sees the time spent. Libraries that aren't
installed are skipped by name. Stop everything else on the machine first: the last two parts time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, record_function

from profiling_agent.acquisition.acquire import acquire
from profiling_agent.acquisition.hubs.calls import import_library
from profiling_agent.acquisition.request import Request
from profiling_agent.acquisition.workload import Workload, compute_logits
from profiling_agent.errors import MissingDependency
from profiling_agent.machine.processor import describe_machine
from profiling_agent.machine.threads import default_threads
from profiling_agent.machine.torch_state import threads
from profiling_agent.profiling.calls import Hook, watch
from profiling_agent.profiling.profile import bottlenecks, profile_costs
from profiling_agent.profiling.static import count
from profiling_agent.records.common import Deployment
from profiling_agent.records.profile import Profile

# Millions of parameters and billions of MACs for one image of 224 x 224, attention's own matrix
# products included. These totals also hold a few operations that count zero by our convention
# (normalisation, pooling), so ours lie 0.1 to 0.4 % below.
LITERATURE: dict[str, tuple[float, float]] = {
    "ResNet-101": (44.55, 7.83),
    "ViT-B/16": (86.57, 17.58),
    "DeiT-B": (86.57, 17.58),
    "Swin-B": (87.77, 15.47),
}
TOLERANCE = 1.0
MAX_PASSES = 30
NUM_SLOWEST = 10
MIN_CAPTURED = 0.9
MAX_SHARE_GAP = 0.1
IMAGE = (1, 3, 224, 224)
MODULE, PASS = "module:", "pass:"
WARMUP, TORCH_PASSES = 2, 20
PARTS = ("costs", "passes", "bottlenecks")


# ---- costs


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One library's way to the architecture; ``note`` says where its definition differs."""

    architecture: str
    library: str
    build: Callable[[], nn.Module]
    input_name: str = "x"
    note: str = ""


def _timm(name: str) -> nn.Module:
    return import_library("timm", "timm").create_model(name, pretrained=False)


def _torchvision(name: str) -> nn.Module:
    return import_library("torchvision", "torchvision").models.get_model(name, weights=None)


def _transformers(kind: str, **config: Any) -> nn.Module:
    library = import_library("transformers", "hf")
    settings = getattr(library, f"{kind}Config")(num_labels=1000, **config)
    return getattr(library, f"{kind}ForImageClassification")(settings)


def _hf(architecture: str, kind: str, note: str = "", **config: Any) -> Candidate:
    return Candidate(
        architecture=architecture,
        library="transformers",
        build=lambda: _transformers(kind, **config),
        input_name="pixel_values",
        note=note,
    )


def _named(
    library: str, build: Callable[[str], nn.Module], names: Mapping[str, str]
) -> Iterable[Candidate]:
    for architecture, name in names.items():
        yield Candidate(
            architecture=architecture, library=library, build=lambda name=name: build(name)
        )


TIMM_NAMES = {
    "ResNet-101": "resnet101",
    "ViT-B/16": "vit_base_patch16_224",
    "DeiT-B": "deit_base_patch16_224",  # without distillation token, as in the paper's table
    "Swin-B": "swin_base_patch4_window7_224",
}
CANDIDATES: tuple[Candidate, ...] = (
    *_named("timm", _timm, TIMM_NAMES),
    _hf(
        "ResNet-101",
        "ResNet",
        "stride in the 3x3 convolution (v1.5), as in timm and torchvision",
        depths=[3, 4, 23, 3],
        hidden_sizes=[256, 512, 1024, 2048],
        layer_type="bottleneck",
    ),
    _hf("ViT-B/16", "ViT", "the classifier's model has no pooler"),
    _hf(
        "DeiT-B",
        "DeiT",
        "always carries a distillation token: 198 positions in place of 197; the class with a "
        "second head (WithTeacher) is another model",
    ),
    _hf(
        "Swin-B",
        "Swin",
        embed_dim=128,
        depths=[2, 2, 18, 2],
        num_heads=[4, 8, 16, 32],
    ),
    *_named(
        "torchvision",
        _torchvision,
        {"ResNet-101": "resnet101", "ViT-B/16": "vit_b_16", "Swin-B": "swin_b"},
    ),
)


def measure_costs(candidate: Candidate) -> dict[str, Any]:
    """Parameters, MACs and their deviations in percent, on the meta device: nothing is computed."""
    with torch.device("meta"):
        model, image = candidate.build().eval(), torch.zeros(IMAGE)
    costs = count(model, {candidate.input_name: image})
    whole = costs.module("")
    known_m, known_gmacs = LITERATURE[candidate.architecture]
    return {
        "architecture": candidate.architecture,
        "library": candidate.library,
        "parameters_m": whole.num_parameters / 1e6,
        "gmacs": whole.macs / 1e9,
        "parameters_off_percent": 100.0 * (whole.num_parameters / 1e6 / known_m - 1.0),
        "macs_off_percent": 100.0 * (whole.macs / 1e9 / known_gmacs - 1.0),
        "unsupported_operators": list(costs.unsupported_operators),
        "note": candidate.note,
    }


def compare_costs() -> tuple[list[dict[str, Any]], list[str]]:
    rows: list[dict[str, Any]] = []
    for candidate in CANDIDATES:
        try:
            rows.append(measure_costs(candidate))
        except MissingDependency as error:
            print(f"{candidate.architecture} of {candidate.library}: skipped, {error}")
    of_timm = {row["architecture"]: row for row in rows if row["library"] == "timm"}
    for row in rows:
        peer = of_timm.get(row["architecture"])
        for key in ("parameters_m", "gmacs"):
            off = None if peer is None else 100.0 * (row[key] / peer[key] - 1.0)
            row[f"{key}_off_timm_percent"] = off
    show_costs(rows)
    return rows, [fault for row in rows for fault in _faults_of(row)]


def _faults_of(row: dict[str, Any]) -> list[str]:
    where = f"{row['architecture']} of {row['library']}"
    off = [key for key in row if key.endswith("_percent") and abs(row[key] or 0.0) > TOLERANCE]
    faults = [f"{where}: {key} is {row[key]:+.2f} %" for key in off]
    if row["unsupported_operators"]:
        faults.append(f"{where}: not counted: {', '.join(row['unsupported_operators'])}")
    return faults


def show_costs(rows: list[dict[str, Any]]) -> None:
    print(f"{'':12}{'':14}{'M params':>9}{'off':>9}{'GMACs':>8}{'off':>9}{'off timm':>10}")
    for row in rows:
        peer = row["gmacs_off_timm_percent"]
        print(
            f"{row['architecture']:12}{row['library']:14}"
            f"{row['parameters_m']:9.2f}{row['parameters_off_percent']:+8.2f}%"
            f"{row['gmacs']:8.2f}{row['macs_off_percent']:+8.2f}%"
            f"{'' if peer is None else f'{peer:+9.2f}%'}  {row['note']}"
        )


# ---- passes


def random_workload(name: str, folder: Path) -> Workload:
    """timm's model of that name with random weights, and random inputs."""
    return acquire(Request(model=f"timm:{name}", weights="random"), folder=folder)


def profile_counted(workload: Workload, deployment: Deployment) -> tuple[Profile, int]:
    """The cost half of a profile, and how many forwards of the whole model it took."""
    calls: list[None] = []
    handle = workload.model.register_forward_pre_hook(lambda *_: calls.append(None))
    try:
        profile = profile_costs(workload, describe_machine(), deployment)
    finally:
        handle.remove()
    return profile, len(calls)


def steady_share(first: Profile, second: Profile) -> float:
    """Share of modules whose median of the second profile lies in the first one's quartiles.

    A half is what independent passes of a machine that doesn't drift give at least.
    """
    later = {module.name: module.self_time for module in second.modules}
    inside = [
        time.low_ms <= other.median_ms <= time.high_ms
        for module in first.modules
        if (time := module.self_time) is not None and (other := later[module.name]) is not None
    ]
    return sum(inside) / len(inside)


def measure_passes(deployment: Deployment, quick: bool) -> tuple[dict[str, Any], list[str]]:
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        workload = random_workload(TIMM_NAMES["ViT-B/16"], Path(folder) / "data")
        profile, num_passes = profile_counted(workload, deployment)
        again = None if quick else profile_counted(workload, deployment)[0]
    assert profile.total is not None and profile.sum_of_parts_ms is not None
    forward_s = profile.total.median_ms / 1e3
    row = {
        "num_passes": num_passes,
        "seconds": profile.seconds_spent,
        "worth_forwards": profile.seconds_spent / forward_s,
        "forward_ms": profile.total.model_dump(),
        "sum_of_parts_ms": profile.sum_of_parts_ms,
        "steady_share": None if again is None else steady_share(profile, again),
    }
    total = profile.total
    print(
        f"\nViT-B/16: {num_passes} passes in {profile.seconds_spent:.1f} s, the time of "
        f"{row['worth_forwards']:.1f} forwards of {total.median_ms:.1f} ms "
        f"[{total.low_ms:.1f}, {total.high_ms:.1f}]; sum of parts {profile.sum_of_parts_ms:.1f} ms"
    )
    if row["steady_share"] is not None:
        print(f"{row['steady_share']:.0%} of a second profile's medians lie in its quartiles")
    too_many = num_passes > MAX_PASSES
    return row, [f"ViT-B/16: {num_passes} passes, over {MAX_PASSES}"] if too_many else []


# ---- bottlenecks


@dataclass(frozen=True, kw_only=True)
class TorchProfile:
    """Median milliseconds a pass: of each module without its children, and of each operator."""

    modules: dict[str, float]
    operators: dict[str, float]


def profile_with_torch(
    model: nn.Module, inputs: Mapping[str, Tensor], passes: int, num_threads: int
) -> TorchProfile:
    """torch.profiler's own times; an operator's falls to the innermost module that is running."""
    ranges: list[Any] = []

    def on_enter(name: str) -> Hook:
        def enter(*_: Any) -> None:
            ranges.append(record_function(MODULE + name))
            ranges[-1].__enter__()

        return enter

    def on_leave(_name: str) -> Hook:
        return lambda *_: ranges.pop().__exit__(None, None, None)

    profiler = torch.profiler.profile(activities=[ProfilerActivity.CPU], acc_events=True)
    with (
        torch.inference_mode(),
        threads(num_threads),
        watch(model, on_enter, on_leave),
        profiler,
    ):
        for number in range(WARMUP + passes):
            with record_function(f"{PASS}{number}"):
                compute_logits(model, inputs)
    return attribute(profiler.events() or (), passes)


def attribute(events: Iterable[Any], passes: int) -> TorchProfile:
    """Self times of a profiler's events to modules and operators, the first passes dropped."""
    modules: dict[str, list[float]] = defaultdict(lambda: [0.0] * passes)
    operators: dict[str, list[float]] = defaultdict(lambda: [0.0] * passes)
    for event in events:
        number, module = _place(event)
        if number < WARMUP or module is None:
            continue
        value = event.self_cpu_time_total / 1e3
        modules[module][number - WARMUP] += value
        if not event.name.startswith(MODULE):
            operators[event.name][number - WARMUP] += value
    return TorchProfile(
        modules={name: statistics.median(values) for name, values in modules.items()},
        operators={name: statistics.median(values) for name, values in operators.items()},
    )


def _place(event: Any) -> tuple[int, str | None]:
    """The pass in which an event lies, or -1, and the innermost module around it."""
    module: str | None = None
    while event is not None:
        if event.name.startswith(PASS):
            return int(event.name.removeprefix(PASS)), module
        if module is None and event.name.startswith(MODULE):
            module = event.name.removeprefix(MODULE)
        event = event.cpu_parent
    return -1, module


def by_type(times: Mapping[str, float], types: Mapping[str, str]) -> dict[str, float]:
    """Shares of the sum of all times by the module's class, largest first."""
    shares: dict[str, float] = defaultdict(float)
    for name, value in times.items():
        shares[types[name]] += value / sum(times.values())
    return dict(sorted(shares.items(), key=lambda item: -item[1]))


def compare_bottlenecks(deployment: Deployment) -> tuple[dict[str, Any], list[str]]:
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        workload = random_workload(TIMM_NAMES["ResNet-101"], Path(folder) / "data")
        profile, _ = profile_counted(workload, deployment)
        inputs = workload.example(deployment.batch_size)
        theirs = profile_with_torch(workload.model, inputs, TORCH_PASSES, deployment.threads)
    row = weigh(profile, theirs)
    show_bottlenecks(row)
    return row, _bottleneck_faults(row)


def weigh(profile: Profile, theirs: TorchProfile) -> dict[str, Any]:
    """Both rankings side by side; ``captured`` is how much of torch's top time our top holds."""
    types = {module.name: module.type for module in profile.modules}
    ours = {m.name: m.self_time.median_ms for m in profile.modules if m.self_time is not None}
    top = [module.name for module in bottlenecks(profile, NUM_SLOWEST)]
    their_top = sorted(theirs.modules, key=lambda name: -theirs.modules[name])[:NUM_SLOWEST]
    at_theirs = [theirs.modules.get(name, 0.0) for name in top]
    operators = sorted(theirs.operators.items(), key=lambda item: -item[1])[:6]
    return {
        "share_by_type": by_type(ours, types),
        "share_by_type_torch": by_type(theirs.modules, types),
        "operators_torch": {name: v / sum(theirs.operators.values()) for name, v in operators},
        "slowest": [{"name": n, "ours_ms": ours[n], "torch_ms": theirs.modules[n]} for n in top],
        "slowest_torch": their_top,
        "overlap": len(set(top) & set(their_top)),
        "captured": sum(at_theirs) / sum(theirs.modules[name] for name in their_top),
        "sum_ms": sum(ours.values()),
        "sum_torch_ms": sum(theirs.modules.values()),
    }


def _bottleneck_faults(row: dict[str, Any]) -> list[str]:
    ours, theirs = row["share_by_type"], row["share_by_type_torch"]
    faults = [
        f"ResNet-101: {kind} takes {ours.get(kind, 0.0):.0%}, torch.profiler says {share:.0%}"
        for kind, share in theirs.items()
        if abs(ours.get(kind, 0.0) - share) > MAX_SHARE_GAP
    ]
    if row["captured"] < MIN_CAPTURED:
        faults.append(f"ResNet-101: our slowest hold {row['captured']:.0%} of torch's slowest")
    return faults


def show_bottlenecks(row: dict[str, Any]) -> None:
    print(
        f"\nResNet-101: self times add up to {row['sum_ms']:.1f} ms, torch.profiler's to "
        f"{row['sum_torch_ms']:.1f} ms\n{'type':22}{'ours':>8}{'torch':>8}"
    )
    for kind, share in list(row["share_by_type_torch"].items())[:6]:
        print(f"{kind:22}{row['share_by_type'].get(kind, 0.0):8.1%}{share:8.1%}")
    shares = ", ".join(f"{name} {share:.1%}" for name, share in row["operators_torch"].items())
    print(f"torch.profiler's operators: {shares}\n{'slowest modules':22}{'ours':>8}{'torch':>8} ms")
    for module in row["slowest"]:
        mark = "" if module["name"] in row["slowest_torch"] else "  (not among torch's)"
        print(f"{module['name']:22}{module['ours_ms']:8.2f}{module['torch_ms']:8.2f}{mark}")
    print(
        f"{row['overlap']} of {len(row['slowest'])} are torch.profiler's; by its times they hold "
        f"{row['captured']:.0%} of what its own slowest do"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; default all")
    parser.add_argument("--quick", action="store_true", help="each model profiled once")
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--json", type=Path, help="file for the results")
    args = parser.parse_args()
    deployment = Deployment(threads=args.threads)
    parts: dict[str, Callable[[], tuple[Any, list[str]]]] = {
        "costs": compare_costs,
        "passes": lambda: measure_passes(deployment, args.quick),
        "bottlenecks": lambda: compare_bottlenecks(deployment),
    }
    results: dict[str, Any] = {"machine": describe_machine().model_dump(mode="json")}
    results["deployment"] = deployment.model_dump(mode="json")
    faults: list[str] = []
    for name in args.parts or PARTS:
        try:
            results[name], found = parts[name]()
            faults += found
        except MissingDependency as error:
            print(f"\n{name}: skipped, {error}")
    results["faults"] = faults
    if args.json is not None:
        args.json.write_text(json.dumps(results, indent=1) + "\n")
    print("\n" + ("\n".join(faults) if faults else "all within bounds"))
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
