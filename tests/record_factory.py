"""Records made by hand: a small, complete run without torch, for every test that only reads them.

Each function takes overrides by field name, so that a test names only what it is about.
"""

from __future__ import annotations

from typing import Any

from profiling_agent.records.common import (
    Budget,
    Deployment,
    Interval,
    Machine,
    NotMeasured,
    Timing,
)
from profiling_agent.records.evaluation import Accuracy, Achieved, Evaluation, Speedup
from profiling_agent.records.plan import Plan, PruningLine, Quantization
from profiling_agent.records.profile import (
    FrozenGroup,
    GroupCost,
    LayerQuantization,
    ModuleCost,
    Profile,
    RuntimeSchemes,
    SensitivityPoint,
    Spread,
    WidthPoint,
)
from profiling_agent.records.trial import Candidate, RunRecord, RunSettings, Trial, Verdict
from profiling_agent.records.workload import (
    ImageTransform,
    InputSpec,
    Preprocessing,
    Reading,
    SplitInfo,
    SplitName,
    Task,
    WorkloadRecord,
    WorkloadSource,
)


def make_interval(
    estimate: float, width: float = 0.1, *, confidence: float = 0.95, num_samples: int = 30
) -> Interval:
    return Interval(
        estimate=estimate,
        low=estimate - width,
        high=estimate + width,
        confidence=confidence,
        num_samples=num_samples,
    )


def make_machine(**fields: Any) -> Machine:
    values: dict[str, Any] = {
        "processor": "Example CPU",
        "architecture": "x86_64",
        "num_cores": 2,
        "cpu_quota": 2.0,
        "features": ("avx2",),
        "memory_bytes": 8_000_000_000,
        "system": "Linux",
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
    }
    return Machine(**values | fields)


def make_workload(**fields: Any) -> WorkloadRecord:
    values: dict[str, Any] = {
        "name": "demo:vit",
        "source": WorkloadSource(model="demo:vit"),
        "num_parameters": 1_600_000,
        "weight_bytes": 6_400_000,
        "model_sha256": "0" * 64,
        "inputs": (InputSpec(name="x", shape=(1, 28, 28), dtype="float32"),),
        "preprocessing": Preprocessing(layout="hw", scale=1 / 255, mean=(0.286,), std=(0.353,)),
        "task": Task(num_classes=10, class_names=tuple("abcdefghij")),
        "splits": tuple(make_split(name) for name in ("calibration", "search", "test")),
    }
    return WorkloadRecord(**values | fields)


def make_photo_workload(**fields: Any) -> WorkloadRecord:
    """Images of ImageNet read from files, as a pretrained model wants them."""
    image = ImageTransform(
        resize=256, crop=(224, 224), interpolation="bicubic", source="timm's configuration"
    )
    values: dict[str, Any] = {
        "inputs": (InputSpec(name="x", shape=(3, 224, 224), dtype="float32"),),
        "preprocessing": Preprocessing(
            layout="hwc",
            scale=1 / 255,
            mean=(0.485, 0.456, 0.406),
            std=(0.229, 0.224, 0.225),
            source="the model's own",
            image=image,
        ),
        "task": Task(num_classes=1000),
        "reading": Reading(samples_per_s=812.4, num_workers=4),
    }
    return make_workload(**values | fields)


def make_split(name: SplitName, num_samples: int = 1000) -> SplitInfo:
    return SplitInfo(name=name, num_samples=num_samples, labelled=True, sha256="ab" * 32)


def make_timing(median_ms: float = 4.0, **fields: Any) -> Timing:
    values: dict[str, Any] = {
        "median_ms": median_ms,
        "p90_ms": 1.1 * median_ms,
        "interval_ms": make_interval(median_ms, 0.05 * median_ms),
        "num_calls": 300,
        "num_blocks": 12,
    }
    return Timing(**values | fields)


def make_accuracy(
    split: SplitName = "search", value: float = 92.0, drop: float | None = 0.1, **fields: Any
) -> Accuracy:
    values: dict[str, Any] = {
        "split": split,
        "num_samples": 1000,
        "value": value,
        "drop": None if drop is None else make_interval(drop, 0.2, num_samples=1000),
        "upper_bound": None if drop is None else drop + 0.15,
        "agreement": 0.99,
    }
    return Accuracy(**values | fields)


def make_evaluation(artefact: str = "baseline", **fields: Any) -> Evaluation:
    is_baseline = artefact == "baseline"
    speedup = Speedup(over="baseline", ratio=make_interval(2.0, 0.1))
    values: dict[str, Any] = {
        "artefact": artefact,
        "runtime": "torch",
        "scheme": "fp32",
        "deployment": Deployment(),
        "accuracy": (make_accuracy(drop=None if is_baseline else 0.1),),
        "timing": make_timing(4.0 if is_baseline else 2.0),
        "speedup": None if is_baseline else speedup,
        "throughput_per_s": 250.0,
        "size_bytes": 6_400_000 if is_baseline else 1_700_000,
        "weight_bytes": 6_400_000 if is_baseline else 1_600_000,
        "memory_bytes": 40_000_000 if is_baseline else 30_000_000,
    }
    return Evaluation(**values | fields)


def make_plan(**fields: Any) -> Plan:
    values: dict[str, Any] = {
        "runtime": "onnxruntime",
        "pruning": (PruningLine(match=r"mlp:blocks\..*", ratio=0.4, why="half of the time"),),
        "quantization": Quantization(scheme="int8-dynamic", keep_float=("head",)),
    }
    return Plan(**values | fields)


def make_achieved(**fields: Any) -> Achieved:
    values: dict[str, Any] = {
        "num_parameters": 1_200_000,
        "original_parameters": 1_600_000,
        "macs": 60_000_000,
        "original_macs": 80_000_000,
        "kept": {"mlp:blocks.0.mlp.fc1": (0, 2, 3)},
        "widths": {"mlp:blocks.0.mlp.fc1": (5, 3)},
        "num_int8_layers": 9,
        "float_layers": ("head",),
    }
    return Achieved(**values | fields)


def make_trial(trial_id: str = "t1", **fields: Any) -> Trial:
    """A finished trial; one with another ``status`` has neither evaluation nor counts."""
    done = fields.get("status", "done") == "done"
    plan = fields.pop("plan", None) or make_plan()
    scheme = plan.quantization.scheme
    evaluation = make_evaluation(trial_id, runtime=plan.runtime, scheme=scheme)
    values: dict[str, Any] = {
        "trial_id": trial_id,
        "plan": plan,
        "author": "solver",
        "status": "done",
        "achieved": make_achieved() if done else None,
        "evaluation": evaluation if done else None,
        "predicted_ms": 2.1,
        "seconds": 12.3,
    }
    return Trial(**values | fields)


def make_control(trial_id: str, runtime: str, scheme: str, **fields: Any) -> Trial:
    plan = make_plan(runtime=runtime, pruning=(), quantization=Quantization(scheme=scheme))
    values: dict[str, Any] = {
        "plan": plan,
        "author": "control",
        "is_control": True,
        "predicted_ms": None,
    }
    return make_trial(trial_id, **values | fields)


def make_verdict(**fields: Any) -> Verdict:
    values: dict[str, Any] = {
        "kind": "ACCEPT",
        "evidence": "measured",
        "reason": "t1 is within the budget and faster than every control.",
        "next_step": "Serve it with artefact/serve.py.",
        "trial_id": "t1",
        "best_control_id": "c2",
        "drop": make_interval(0.12, 0.2),
        "drop_upper_bound": 0.3,
        "samples_to_prove": 9000,
        "speedup": make_interval(2.31, 0.06),
        "speedup_over_control": make_interval(1.22, 0.03),
        "size_ratio": 0.27,
        "memory_ratio": 0.8,
        "candidates_tested": 1,
    }
    return Verdict(**values | fields)


def make_own_metric_run(
    *, higher_is_better: bool = True, unit: str = "", **fields: Any
) -> RunRecord:
    """One trial, accepted, judged by a function of the user's: 0.873 before, 0.00831 lost."""
    task = Task(
        metric="map50" if higher_is_better else "error",
        unit=unit,
        higher_is_better=higher_is_better,
        num_classes=None,
    )
    drop = Interval(estimate=0.00831, low=-0.0012, high=0.0178, num_samples=1000)
    after = 0.8647 if higher_is_better else 0.8813
    mine = make_accuracy("test", after, agreement=None)
    mine = mine.model_copy(update={"drop": drop, "upper_bound": 0.0164})
    searched = mine.model_copy(update={"split": "search"})
    before = make_accuracy("test", 0.873, None, agreement=None)
    values: dict[str, Any] = {
        "settings": RunSettings(budget=Budget(max_drop=0.01, unit=unit), deployment=Deployment()),
        "workload": make_workload(
            task=task,
            source=WorkloadSource(
                model="demo:vit",
                metric=f"score.py:{task.metric}",
                higher_is_better=higher_is_better,
            ),
        ),
        "baseline": make_evaluation(accuracy=(make_accuracy("search", 0.873, None),)),
        "trials": (make_trial("t1", evaluation=make_evaluation("t1", accuracy=(searched,))),),
        "pareto": ("t1",),
        "final": (
            make_evaluation(accuracy=(before,)),
            make_evaluation("t1", accuracy=(mine,), runtime="onnxruntime"),
        ),
        "verdict": make_verdict(best_control_id=None, drop=drop, drop_upper_bound=0.0164),
    }
    return make_run(**values | fields)


def make_run(**fields: Any) -> RunRecord:
    """Two controls, an accepted trial, a screened one and a failed one."""
    no_memory = NotMeasured(what="memory", reason="the process ended before it was read")
    trials = (
        make_control("c1", "onnxruntime", "fp32"),
        make_control(
            "c2",
            "onnxruntime",
            "int8-dynamic",
            evaluation=make_evaluation(
                "c2", runtime="onnxruntime", memory_bytes=None, not_measured=(no_memory,)
            ),
        ),
        make_trial("t1"),
        make_trial("t2", status="screened", reason="accuracy collapsed to 11 % on 200 images"),
        make_trial("t3", status="failed", reason="the worker ran out of memory"),
    )
    tested = (make_accuracy("test", 91.9, 0.12),)
    values: dict[str, Any] = {
        "package_version": "0.1.0",
        "machine": make_machine(),
        "settings": RunSettings(budget=Budget(max_drop=0.5), deployment=Deployment()),
        "workload": make_workload(),
        "baseline": make_evaluation(),
        "baseline_timing": make_timing(4.0),
        "trials": trials,
        "rejections": (),
        "candidates": (Candidate(trial_id="t1", predicted_drop=0.1, objective_value=2.0),),
        "pareto": ("c1", "t1"),
        "final": (
            make_evaluation(accuracy=(make_accuracy("test", 92.0, None),)),
            make_evaluation("c1", accuracy=tested, runtime="onnxruntime"),
            make_evaluation("c2", accuracy=tested, runtime="onnxruntime", memory_bytes=None),
            make_evaluation("t1", accuracy=tested, runtime="onnxruntime", scheme="int8-dynamic"),
        ),
        "verdict": make_verdict(),
        "artefact": "artefact",
        "seconds": 143.0,
    }
    return RunRecord(**values | fields)


def make_spread(median_ms: float, num_passes: int = 20) -> Spread:
    return Spread(
        median_ms=median_ms,
        low_ms=0.95 * median_ms,
        high_ms=1.1 * median_ms,
        num_passes=num_passes,
    )


def make_module(name: str, self_ms: float | None = 0.5, **fields: Any) -> ModuleCost:
    values: dict[str, Any] = {
        "name": name,
        "type": "Linear",
        "num_calls": 1,
        "macs": 10_000_000,
        "self_macs": 10_000_000,
        "num_parameters": 200_000,
        "weight_bytes": 800_000,
        "output_bytes": 50_000,
        "total": None if self_ms is None else make_spread(self_ms),
        "self_time": None if self_ms is None else make_spread(self_ms),
        "share": None if self_ms is None else self_ms / 4.0,
        "peak_activation_bytes": 100_000,
    }
    return ModuleCost(**values | fields)


def make_group(group_id: str, width: int = 512, **fields: Any) -> GroupCost:
    kind, _, root = group_id.partition(":")
    values: dict[str, Any] = {
        "id": group_id,
        "kind": kind,
        "root": root,
        "width": width,
        "members": (root,),
        "macs_per_unit": 25_000,
        "parameters_per_unit": 513,
        "self_ms": 0.6,
        "shape_class": f"{kind}/{width}",
        "widths": (
            WidthPoint(width=width, saved_ms=0.0, low_ms=0.0, high_ms=0.0),
            WidthPoint(width=width // 2, saved_ms=0.3, low_ms=0.28, high_ms=0.32),
        ),
        "sensitivity": tuple(
            SensitivityPoint(
                ratio=ratio,
                kl=0.1 * ratio**2,
                kl_error=0.001,
                disagreement=0.05 * ratio,
                num_images=256,
            )
            for ratio in (0.25, 0.5, 0.75)
        ),
    }
    return GroupCost(**values | fields)


def make_profile(**fields: Any) -> Profile:
    values: dict[str, Any] = {
        "workload": make_workload(),
        "machine": make_machine(),
        "deployment": Deployment(),
        "total": make_spread(4.0),
        "sum_of_parts_ms": 3.6,
        "total_macs": 80_000_000,
        "num_parameters": 1_600_000,
        "peak_activation_bytes": 900_000,
        "modules": (
            make_module("", 0.2, type="DemoViT", total=make_spread(4.0)),
            make_module("blocks.0.attn.qkv", 0.4),
            make_module("blocks.0.mlp.fc1", 0.9),
            make_module("head", None),
        ),
        "groups": (
            make_group("mlp:blocks.0.mlp.fc1"),
            make_group("heads:blocks.1.attn.qkv", 8),
        ),
        "frozen": (FrozenGroup(id="channels:head", reason="it is the model's output"),),
        "layers": (
            LayerQuantization(name="head", kl=0.01, kl_error=0.001, float_ms=0.1, int8_ms=0.05),
        ),
        "runtimes": (
            RuntimeSchemes(runtime="torch", version="2.13.0", schemes=("fp32", "int8-dynamic")),
            RuntimeSchemes(
                runtime="onnxruntime", version="1.31.1", schemes=("fp32", "int8-dynamic")
            ),
        ),
        "unsupported_operators": ("aten::bucketize",),
        "not_measured": (NotMeasured(what="head: self time", reason="below the clock's step"),),
        "seconds_spent": 21.0,
    }
    return Profile(**values | fields)
