"""The plan format's page is the specification, so what it shows must be what the code takes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import regex

from profiling_agent.records.plan import (
    MAX_PATTERN_LENGTH,
    Importance,
    Plan,
    PruningLine,
    Quantization,
    Repair,
)

PAGE = (Path(__file__).parents[1] / "docs" / "plan-format.md").read_text(encoding="utf-8")


def example() -> Plan:
    blocks = re.findall(r"```json\n(.*?)```", PAGE, flags=re.DOTALL)
    assert len(blocks) == 1
    return Plan.from_json(blocks[0])


def test_the_example_is_a_plan_that_does_what_the_page_says() -> None:
    plan = example()
    first = {
        group: next(line for line in plan.pruning if regex.fullmatch(line.match, group)).ratio
        for group in ("mlp:blocks.0.mlp.fc1", "mlp:blocks.1.mlp.fc1", "heads:blocks.1.attn.qkv")
    }
    assert first == {
        "mlp:blocks.0.mlp.fc1": 0.25,
        "mlp:blocks.1.mlp.fc1": 0.5,
        "heads:blocks.1.attn.qkv": 0.25,
    }
    assert plan.quantization.keep_float == ("head",)


def test_every_field_and_value_is_on_the_page() -> None:
    names = [*Plan.model_fields, *PruningLine.model_fields, *Quantization.model_fields]
    values = [*get_args(Importance), *get_args(Repair), str(MAX_PATTERN_LENGTH)]
    missing = [word for word in [*names, *values] if word not in PAGE]
    assert missing == []


def test_the_defaults_are_those_of_the_page() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \|.*\| (?:`([^`]*)`.*|required) \|$", PAGE, re.MULTILINE))
    plan = Plan(runtime="torch")
    assert rows["runtime"] == ""
    assert rows["seed"] == str(plan.seed)
    assert rows["repair"].strip('"') == plan.repair
    assert rows["quantization"] == plan.quantization.scheme
    assert rows["importance"].strip('"') == PruningLine(match="a", ratio=0.1).importance
