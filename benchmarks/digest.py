"""Tokens that a language model reads before its first plan: instructions, schema and digest.

    python benchmarks/digest.py --json benchmarks/results/digest.json
    python benchmarks/digest.py --quick

The paper's four models of timm, and the zoo's with most groups, with random weights: groups and
costs are found as `profiling-agent profile` finds them; divergences, which depend on data, are
drawn, since only their length matters here. Tokens are counted by SmolLM2's own tokenizer (every
digit is one), served by llama.cpp, beside the estimate that the digest goes by. Exit code 1 when a
limit is missed, a group is in no row, or in two.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from paper_quantization import MODELS

from profiling_agent.acquisition.acquire import acquire
from profiling_agent.acquisition.request import Request
from profiling_agent.compression.compress import Compressor
from profiling_agent.machine.processor import describe_machine
from profiling_agent.planning.agents.consult import Question
from profiling_agent.planning.agents.digest import count_tokens
from profiling_agent.profiling.group_costs import levels
from profiling_agent.profiling.whole import profile_workload
from profiling_agent.records.common import Budget, Deployment
from profiling_agent.records.patterns import matches
from profiling_agent.records.profile import Profile, SensitivityPoint

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from local_llm import local_llm

NAMES = {name: MODELS[name][0] for name in ("resnet101", "vit_b", "deit_b", "swin_b")}
LARGEST = "densenet121"
LIMIT, LIMIT_LARGEST = 5000, 8000


def profile_of(timm_name: str) -> Profile:
    with tempfile.TemporaryDirectory(prefix="benchmark-") as temporary:
        request = Request(model=f"timm:{timm_name}", weights="random")
        workload = acquire(request, folder=Path(temporary) / "data")
        profile = profile_workload(
            workload, describe_machine(), Deployment(),
            compressor=Compressor(workload), with_widths=False, with_sensitivity=False,
        )  # fmt: skip
    draw = random.Random(0)
    groups = tuple(
        group.model_copy(
            update={
                "sensitivity": tuple(
                    SensitivityPoint(
                        ratio=ratio, kl=draw.lognormvariate(-4.0, 1.5) * ratio, kl_error=0.001,
                        disagreement=0.05, num_images=128,
                    )
                    for ratio in levels(group)
                )
            }
        )
        for group in profile.groups
    )  # fmt: skip
    return profile.model_copy(update={"groups": groups})


def tokens_by(base_url: str) -> Callable[[str], int]:
    """The tokenizer of a llama.cpp server."""
    url = base_url.removesuffix("/v1") + "/tokenize"

    def count(text: str) -> int:
        body = json.dumps({"content": text}).encode()
        request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return len(json.load(answer)["tokens"])

    return count


def measure(name: str, timm_name: str, count: Callable[[str], int], limit: int) -> dict[str, Any]:
    profile = profile_of(timm_name)
    budget = Budget(max_drop=0.5)
    question = Question(profile=profile, history=(), budget=budget, seed=0).conversation()
    digest = question.turns[0].text
    schema = json.dumps(question.schema)
    ids = [group.id for group in profile.groups]
    rows = digest.split("GROUPS: ")[-1].split("\n\n")[0].splitlines()[1:]
    found = [name for row in rows for name in matches(row.split(" | ")[0], ids)]
    row = {
        "model": name,
        "num_groups": len(ids),
        "num_rows": len(rows),
        "missing": sorted(set(ids) - set(found)),
        "twice": len(found) - len(set(found)),
        "digest_tokens": count(digest),
        "estimated_tokens": count_tokens(digest),
        "instructions_tokens": count(question.instructions),
        "schema_tokens": count(schema),
        "limit": limit,
    }
    row["tokens"] = row["digest_tokens"] + row["instructions_tokens"]
    print(
        f"{name:18}{row['num_groups']:5} groups in {row['num_rows']:4} rows: {row['tokens']:6,} "
        f"tokens (digest {row['digest_tokens']:,}, by estimate {row['estimated_tokens']:,}); "
        f"schema {row['schema_tokens']:,}",
        flush=True,
    )
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--quick", action="store_true", help="the first two models")
    parser.add_argument("--json", type=Path, help="file for the results")
    args = parser.parse_args()
    jobs = [(name, timm_name, LIMIT) for name, timm_name in NAMES.items()]
    jobs = jobs[:2] if args.quick else [*jobs, (LARGEST, LARGEST, LIMIT_LARGEST)]
    with local_llm() as base_url:
        rows = [measure(name, timm, tokens_by(base_url), limit) for name, timm, limit in jobs]
    if args.json is not None:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    bad = [r for r in rows if r["tokens"] > r["limit"] or r["missing"] or r["twice"]]
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
