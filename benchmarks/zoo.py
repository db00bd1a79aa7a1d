"""Every architecture we could find, pruned at 0.25 and 0.5: runs, is right, is really smaller.

    python benchmarks/zoo.py --json benchmarks/results/zoo.json
    python benchmarks/zoo.py --quick swin_tiny_patch4_window7_224 torchvision:vit_b_16

Random weights: what is shown is structure, not accuracy. For each model: the groups that passed
the proof, the share of parameters inside them, and at each ratio all groups cut at once: parameters
and MACs counted on the result, a forward at batch sizes 1 and 2, and the largest difference to the
whole model with the same units silenced, over the largest output.

Beside it the same by Torch-Pruning 1.6.1 alone, as its documentation has it: magnitude importance,
a local ratio, heads handed over for every attention with fused or separate projections that its
examples know (``num_heads`` by module), the classifier ignored. A model that it leaves the size it
was has not been pruned.

Each model runs in a process of its own. Exit code 1 when one of ours fails.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from profiling_agent.acquisition.hubs.torchvision_repair import make_torchvision_importable
from profiling_agent.acquisition.workload import compute_logits
from profiling_agent.compression.group import Group
from profiling_agent.compression.groups import audible, find_groups
from profiling_agent.compression.importance import removal_order
from profiling_agent.compression.recast import recast
from profiling_agent.compression.surgery import masked, remove_units, restoring
from profiling_agent.machine.processor import describe_machine
from profiling_agent.profiling.static import count
from profiling_agent.records.patterns import units_kept

RATIOS = (0.25, 0.5)
SECONDS = 600
TOLERANCE = 1e-3
LIBRARIES = ("torch", "timm", "transformers", "torchvision", "torch-pruning")
PAPER = (
    "resnet101",
    "vit_base_patch16_224",
    "deit_base_patch16_224",
    "swin_base_patch4_window7_224",
)
TIMM = (
    "beit_base_patch16_224", "cait_xxs24_224", "coat_lite_tiny", "coatnet_nano_rw_224",
    "convit_tiny", "convmixer_768_32", "convnext_atto", "convnextv2_atto", "crossvit_tiny_240",
    "cspresnet50", "davit_tiny", "deit_base_patch16_224", "densenet121", "dla34", "dm_nfnet_f0",
    "dpn48b", "edgenext_xx_small", "efficientformer_l1", "efficientformerv2_s0", "efficientnet_b0",
    "efficientnet_lite0", "efficientvit_b0", "efficientvit_m0", "eva02_tiny_patch14_224",
    "fastvit_t8", "fbnetc_100", "focalnet_tiny_srf", "gcvit_xxtiny", "ghostnet_100", "gmlp_s16_224",
    "hardcorenas_a", "hgnet_tiny", "hiera_tiny_224", "hrnet_w18_small", "inception_next_tiny",
    "inception_v3", "lcnet_050", "levit_128s", "maxvit_tiny_tf_224", "mixer_s32_224", "mixnet_s",
    "mnasnet_small", "mobilenetv2_050", "mobilenetv3_small_050", "mobileone_s0", "mobilevit_xxs",
    "mobilevitv2_050", "mvitv2_tiny", "nest_tiny_jx", "nextvit_small", "nf_regnet_b0",
    "pit_ti_224", "poolformer_s12", "pvt_v2_b0", "regnetx_002", "regnety_002", "repghostnet_050",
    "repvgg_a0", "repvit_m0_9", "res2net50_26w_4s", "resmlp_12_224", "resnest14d", "resnet101",
    "resnet18", "resnetv2_50", "resnext50_32x4d", "rexnet_100", "selecsls42", "seresnet50",
    "skresnet18", "sequencer2d_s", "starnet_s1", "swin_base_patch4_window7_224",
    "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "tinynet_e", "tiny_vit_5m_224",
    "tnt_s_legacy_patch16_224", "twins_svt_small", "vgg11_bn", "visformer_tiny",
    "vit_base_patch16_224", "vit_tiny_patch16_224", "volo_d1_224", "vovnet39a", "xception41",
    "xcit_nano_12_p16_224",
)  # fmt: skip
TRANSFORMERS = ("ViT", "DeiT", "Swin", "ConvNext", "ResNet", "Bert")
TORCHVISION = ("resnet101", "vit_b_16", "swin_b")
QUICK = ("resnet18", "vit_tiny_patch16_224", "mixnet_s", "torchvision:swin_b", "transformers:Bert")


def names() -> list[str]:
    return [
        *TIMM,
        *(f"transformers:{name}" for name in TRANSFORMERS),
        *(f"torchvision:{name}" for name in TORCHVISION),
    ]


def make(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model with random weights and two samples."""
    torch.manual_seed(0)
    library, _, rest = name.rpartition(":")
    make_torchvision_importable()
    if library == "transformers":
        return _transformer(rest)
    if library == "torchvision":
        import torchvision

        return torchvision.models.get_model(rest).eval(), {"x": torch.randn(2, 3, 224, 224)}
    import timm

    model = timm.create_model(rest, pretrained=False).eval()
    return model, {"x": torch.randn(2, *model.default_cfg["input_size"])}


def _transformer(kind: str) -> tuple[nn.Module, dict[str, Tensor]]:
    import transformers

    config = getattr(transformers, f"{kind}Config")()
    if kind == "Bert":
        model = transformers.BertForSequenceClassification(config).eval()
        tokens = torch.randint(1000, 20000, (2, 32))
        return model, {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    model = getattr(transformers, f"{kind}ForImageClassification")(config).eval()
    size = getattr(config, "image_size", 224)
    return model, {"pixel_values": torch.randn(2, 3, size, size)}


# ---- ours


def ours(name: str) -> dict[str, Any]:
    model, example = make(name)
    whole = count(model, _one(example)).module("")
    start = time.perf_counter()
    model = recast(model, example)
    found = find_groups(model, example)
    row: dict[str, Any] = {
        "num_parameters": whole.num_parameters,
        "macs": whole.macs,
        "groups": len(found.groups),
        "frozen": {entry.id: entry.reason for entry in found.frozen},
        "covered": covered_share(model, found.groups),
        "seconds": time.perf_counter() - start,
        "ratios": {},
    }
    model = audible(model)
    with torch.no_grad():
        for ratio in RATIOS:
            row["ratios"][str(ratio)] = _cut(model, found.groups, ratio, example)
    return row


def _cut(
    model: nn.Module, groups: tuple[Group, ...], ratio: float, example: dict[str, Tensor]
) -> dict[str, Any]:
    kept = {}
    for group in groups:
        order = removal_order(model, group, "magnitude", {})
        stay = units_kept(group.width, ratio)
        if stay < group.width:
            kept[group.id] = np.sort(order[len(order) - stay :])
    with masked(model, groups, kept):
        reference = compute_logits(model, example)
        reference_of_one = compute_logits(model, _one(example))
    with restoring(model, groups):
        remove_units(model, groups, kept)
        result = compute_logits(model, example)
        alone = compute_logits(model, _one(example))
        counted = count(model, _one(example)).module("")
    largest = float(reference.abs().max())
    return {
        "num_parameters": counted.num_parameters,
        "macs": counted.macs,
        "difference": float((result - reference).abs().max()) / largest,
        "difference_of_one": float((alone - reference_of_one).abs().max()) / largest,
    }


def _one(example: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor[:1] for name, tensor in example.items()}


def covered_share(model: nn.Module, groups: tuple[Group, ...]) -> float:
    """Parameters that belong to a unit of some group, as a share of all."""
    known = {id(p): name for name, p in model.named_parameters()}
    taken: dict[str, Tensor] = {}

    def take(tensor: Tensor, dim: int, units: np.ndarray) -> None:
        name = known.get(id(tensor))
        if name is not None:
            mask = taken.setdefault(name, torch.zeros(tensor.shape, dtype=torch.bool))
            mask.index_fill_(dim, torch.from_numpy(np.unique(units)), True)

    for group in groups:
        for member in group.members:
            layer = model.get_submodule(member.module)
            if member.tensor is not None:
                take(getattr(layer, member.tensor), member.dim, member.units)
            elif member.axis == "in":
                take(layer.weight, 1, member.units)  # pyright: ignore[reportArgumentType]
            else:
                for tensor in layer.parameters(recurse=False):
                    take(tensor, 0, member.units)
    total = sum(p.numel() for p in model.parameters())
    return sum(int(mask.sum()) for mask in taken.values()) / total


# ---- Torch-Pruning alone


def theirs(name: str) -> dict[str, Any]:
    return {"ratios": {str(ratio): _attempt(lambda r=ratio: _pruned(name, r)) for ratio in RATIOS}}


def _attempt(run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return run()
    except Exception as error:  # whatever it raises is the result
        return {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}


def _pruned(name: str, ratio: float) -> dict[str, Any]:
    import torch_pruning as tp

    model, example = make(name)
    inputs: Any = example if len(example) > 1 else next(iter(example.values()))
    before = sum(p.numel() for p in model.parameters())
    last = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)][-1]
    heads: dict[nn.Module, int] = {}
    for module in model.modules():
        known = getattr(module, "num_heads", getattr(module, "num_attention_heads", None))
        for part in ("qkv", "query", "key", "value", "q_proj", "k_proj", "v_proj"):
            layer = getattr(module, part, None)
            if isinstance(layer, nn.Linear) and isinstance(known, int):
                heads[layer] = known
    pruner = tp.pruner.BasePruner(
        model,
        inputs,
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=ratio,
        num_heads=heads,
        prune_num_heads=bool(heads),
        head_pruning_ratio=ratio,
        ignored_layers=[last],
        output_transform=lambda out: out.logits if hasattr(out, "logits") else out,
    )
    pruner.step()
    for module in model.modules():
        layer = getattr(module, "qkv", getattr(module, "query", None))
        if layer in pruner.num_heads:  # as its ViT example does after a step
            attribute = "num_heads" if hasattr(module, "num_heads") else "num_attention_heads"
            setattr(module, attribute, pruner.num_heads[layer])
            if hasattr(module, "head_dim"):
                module.head_dim = layer.out_features // (3 * pruner.num_heads[layer])
            if hasattr(module, "all_head_size"):
                module.all_head_size = layer.out_features
    model.eval()
    with torch.no_grad():
        compute_logits(model, example)
        after = sum(p.numel() for p in model.parameters())
        macs = count(model, _one(example)).module("").macs
    if after == before:
        raise ValueError("nothing was pruned")
    return {"num_parameters": after, "macs": macs}


# ---- the list


def measure(name: str, which: str, seconds: float, threads: int) -> dict[str, Any]:
    """One side of one model, in a process of its own."""
    command = [sys.executable, __file__, "--one", which, name]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"not done after {seconds:.0f} s"}
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no reason given"]
        return {"failed": lines[-1][:300]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def faults_of(name: str, row: dict[str, Any]) -> Iterator[str]:
    if "failed" in row:
        yield f"{name}: {row['failed']}"
        return
    for ratio, cut in row["ratios"].items():
        if not cut["difference"] <= TOLERANCE or not cut["difference_of_one"] <= TOLERANCE:
            worst = max(cut["difference"], cut["difference_of_one"])
            yield f"{name} at {ratio}: differs from the silenced model by {worst:.1g}"
        if cut["num_parameters"] >= row["num_parameters"] or cut["macs"] >= row["macs"]:
            yield f"{name} at {ratio}: not smaller"


def show(name: str, mine: dict[str, Any], other: dict[str, Any]) -> str:
    if "failed" in mine:
        return f"{name:34}FAILED: {mine['failed']}"
    half, theirs_half = mine["ratios"]["0.5"], other.get("ratios", {}).get("0.5", other)
    beside = theirs_half.get("failed") or (
        f"{theirs_half['num_parameters'] / mine['num_parameters']:.2f} of parameters"
    )
    return (
        f"{name:34}{mine['groups']:4} groups {mine['covered']:7.1%} inside; at 0.5 "
        f"{half['num_parameters'] / mine['num_parameters']:.2f} of parameters, "
        f"{half['macs'] / mine['macs']:.2f} of MACs, differs {half['difference']:.0e}; "
        f"{mine['seconds']:5.1f} s   Torch-Pruning: {beside[:90]}"
    )


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    good = [row for row in rows if "failed" not in row["ours"]]
    passed = [row for row in good if not list(faults_of(row["model"], row["ours"]))]
    survived = [
        row
        for row in rows
        if "ratios" in row["torch_pruning"]
        and all("failed" not in cut for cut in row["torch_pruning"]["ratios"].values())
    ]
    shares = {row["model"]: row["ours"]["covered"] for row in good}
    return {
        "models": len(rows),
        "ours_pass": len(passed),
        "torch_pruning_runs": len(survived),
        "median_covered": statistics.median(shares.values()) if shares else None,
        "least_covered": min(shares.values(), default=None),
        "paper_covered": {name: shares[name] for name in PAPER if name in shares},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("models", nargs="*", help="default: all of them")
    parser.add_argument("--quick", action="store_true", help=f"only {', '.join(QUICK)}")
    parser.add_argument("--ours-only", action="store_true", help="without Torch-Pruning")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for each model and side")
    parser.add_argument(
        "--jobs", type=int, default=1, help="models at a time, on cores of their own"
    )
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--one", choices=("ours", "theirs"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps({"ours": ours, "theirs": theirs}[args.one](args.models[0])))
        return
    machine = describe_machine()
    threads = max(1, machine.num_cores // args.jobs)

    def both(name: str) -> dict[str, Any]:
        mine = measure(name, "ours", args.seconds, threads)
        other = {"failed": "left out"}
        if not args.ours_only:
            other = measure(name, "theirs", args.seconds, threads)
        return {"model": name, "ours": mine, "torch_pruning": other}

    rows: list[dict[str, Any]] = []
    faults: list[str] = []
    chosen = args.models or (QUICK if args.quick else names())
    with ThreadPoolExecutor(args.jobs) as pool:
        for done in as_completed([pool.submit(both, name) for name in chosen]):
            row = done.result()
            rows.append(row)
            faults += faults_of(row["model"], row["ours"])
            print(show(row["model"], row["ours"], row["torch_pruning"]), flush=True)
            if args.json is not None:
                results = {
                    "machine": machine.model_dump(mode="json"),
                    "versions": {name: version(name) for name in LIBRARIES},
                    "summary": summary(rows),
                    "rows": rows,
                }
                args.json.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(summary(rows), indent=1))
    print("\n".join(faults) if faults else "every model was pruned and is right")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
