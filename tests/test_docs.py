"""What the pages show must be what the code takes: commands, flags, names, plans and files."""

from __future__ import annotations

import ast
import inspect
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main

import profiling_agent
from profiling_agent import api, errors
from profiling_agent.acquisition.demo_models import DemoViT
from profiling_agent.cli import app
from profiling_agent.compression.groups import find_groups
from profiling_agent.machine.torch_state import threads
from profiling_agent.records.patterns import matches
from profiling_agent.records.plan import Plan
from profiling_agent.records.trial import EXIT_CODES

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "examples").glob("*/README.md")),
]

PUBLIC_NAMES = {
    "Plan",
    "Profile",
    "ProfilingAgentError",
    "RunRecord",
    "load",
    "optimize",
    "profile",
}
# Flags and, in capitals, arguments. To change one is to break somebody's script: say so in
# CHANGELOG.md.
REQUEST = (
    "--weights --data --test-data --classes --answers --metric --higher-is-better "
    "--lower-is-better --mean --std --scale --resize --crop --interpolation --mode --max-length "
    "--trust-remote-code --config"
)
COMMANDS = {
    "optimize": f"MODEL {REQUEST} --max-drop --time-budget --out --objective "
    "--batch-size --threads --planner --llm --llm-base-url --llm-tools --no-llm-tools "
    "--llm-prompt --rounds --llm-timeout --max-llm-requests --max-llm-tokens --max-llm-answer "
    "--max-llm-cost --recipe --runtime --evidence --max-trials --seed --restart "
    "--no-restart --json",
    "ablate": f"MODEL {REQUEST} --max-drop --planners --trials --seeds --time-budget --out "
    "--llm --llm-prompts --llm-timeout --max-llm-requests --max-llm-tokens --max-llm-answer "
    "--max-llm-cost --objective --batch-size --threads --runtime --seed --restart --no-restart "
    "--json",
    "profile": f"MODEL {REQUEST} --out --batch-size --threads --time-budget --llm --llm-base-url "
    "--llm-timeout --seed --json",
    "plan": "PROFILE --out --run --planner --max-drop --objective --batch-size --threads --seed "
    "--config",
    "apply": f"MODEL --plan --out {REQUEST} --batch-size --threads --seed --json",
    "evaluate": f"ARTEFACT MODEL {REQUEST} --out --batch-size --threads --seed --json",
    "measure": "ARTEFACT --batch-size --threads --out --json --config",
    "check": f"MODEL {REQUEST} --out --batch-size --threads --llm --llm-base-url "
    "--llm-timeout --seed --json",
    "init": "FOLDER",
    "report": "RUN --json --config",
}


def flags_of(command: str) -> list[str]:
    names: list[str] = []
    for parameter in commands()[command].params:
        if parameter.param_type_name == "argument":
            names.append(str(parameter.name).upper())
        else:
            names += [*parameter.opts, *parameter.secondary_opts]
    return names


def commands() -> dict[str, Any]:
    return dict(vars(typer.main.get_command(app))["commands"])


@cache
def all_flags() -> frozenset[str]:
    return frozenset({flag for name in commands() for flag in flags_of(name)} | {"--help"})


def blocks(page: Path, language: str) -> list[str]:
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)


def command_lines() -> Iterator[tuple[Path, list[str]]]:
    """Every command of ours shown in a block, fenced or indented, as words."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        for line in text.splitlines():
            if re.match(r"\s*(profiling-agent|scripts/demo)\b", line):
                words = shlex.split(line, comments=True)
                yield page, words


def test_the_public_names_are_frozen() -> None:
    assert set(profiling_agent.__all__) == PUBLIC_NAMES
    assert all(getattr(profiling_agent, name) is not None for name in PUBLIC_NAMES)


FLAG = r"(?<![\w-])--[a-z][a-z-]*"
OTHER_PROGRAMS = re.compile(r"^\s*(?:docker|pip|uvicorn)\b.*$", flags=re.MULTILINE)
"""Command lines whose flags are not ours."""


def test_the_commands_and_their_flags_are_frozen() -> None:
    assert {name: flags_of(name) for name in commands()} == {
        name: flags.split() for name, flags in COMMANDS.items()
    }


def test_every_command_shown_is_one_the_command_line_takes() -> None:
    seen = 0
    for page, words in command_lines():
        name, rest = (words[1], words[2:]) if words[0] == "profiling-agent" else ("", words[1:])
        if words[0] == "scripts/demo":
            name, rest = "optimize", ["demo:vit", *rest]
        assert name in commands(), f"{page.name}: {words}"
        try:
            commands()[name].make_context(name, list(rest))
        except Exception as error:  # click's usage errors
            pytest.fail(f"{page.name}: {' '.join(words)}: {error}")
        seen += 1
    assert seen >= 8


@pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{page.parent.name}-{page.name}")
def test_every_flag_mentioned_on_a_page_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    flags = set(re.findall(FLAG, OTHER_PROGRAMS.sub("", text)))
    scripts = [path.read_text(encoding="utf-8") for path in page.parent.glob("*.py")]
    its_own = {flag for text in scripts for flag in re.findall(f'"({FLAG})"', text)}
    assert flags <= all_flags() | its_own


def test_every_flag_mentioned_in_a_message_exists() -> None:
    unknown: dict[str, set[str]] = {}
    for path in sorted((ROOT / "src").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", node.value)) - all_flags()
                if found:
                    unknown.setdefault(path.name, set()).update(found)
    assert unknown == {}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{page.parent.name}-{page.name}")
def test_python_blocks_are_python_and_use_what_there_is(page: Path) -> None:
    signatures = {name: inspect.signature(getattr(api, name)) for name in ("optimize", "load")}
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module == "profiling_agent":
                assert {alias.name for alias in node.names} <= PUBLIC_NAMES
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                signature = signatures.get(node.func.id)
                keywords = {keyword.arg: None for keyword in node.keywords if keyword.arg}
                if signature is not None:
                    signature.bind(*(None for _ in node.args), **keywords)


def test_json_blocks_are_plans() -> None:
    found = [block for page in PAGES for block in blocks(page, "json")]
    assert found
    for block in found:
        assert Plan.from_json(block).plan_id


def test_the_factories_shown_are_those_of_the_example() -> None:
    shown = blocks(ROOT / "README.md", "python")
    for name in ("model.py", "data.py"):
        text = (ROOT / "examples" / "own_model" / name).read_text(encoding="utf-8")
        assert text in shown


def test_the_readme_lists_every_exit_code() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = {int(code) for code in re.findall(r"^\| (\d+) \|", text, flags=re.MULTILINE)}
    classes = [value for value in vars(errors).values() if inspect.isclass(value)]
    ours = {c.exit_code for c in classes if issubclass(c, errors.ProfilingAgentError)}
    assert rows == {*ours, *EXIT_CODES.values(), 1, 130}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{page.parent.name}-{page.name}")
def test_files_that_a_page_names_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", text)
    assert [link for link in links if not (page.parent / link).exists()] == []
    generated = {"serve.py", "graph.py", "model.py", "data.py"}
    sources = [
        path
        for part in ("src", "tests", "examples", "benchmarks")
        for path in (ROOT / part).rglob("*.py")
    ]
    known = [str(path.relative_to(ROOT)) for path in sources]
    named = set(re.findall(r"`([\w/]+\.py)`", text)) - generated
    missing = {name for name in named if not any(f"/{path}".endswith(f"/{name}") for path in known)}
    assert missing == set()


def test_the_groups_of_the_plan_page_are_those_of_the_demo() -> None:
    page = (ROOT / "docs" / "plan-format.md").read_text(encoding="utf-8")
    ids = re.findall(r"^\| `\w+:` \|.*\| `([^`]+)` \|$", page, flags=re.MULTILINE)
    model = DemoViT().eval()
    with threads(1):
        discovery = find_groups(model, {"x": torch.randn(2, 1, 28, 28)})
    found = [group.id for group in discovery.groups]
    assert len(ids) == 3
    assert set(ids) <= set(found)
    plan = Plan.from_json(blocks(ROOT / "docs" / "plan-format.md", "json")[0])
    assert all(matches(line.match, found) for line in plan.pruning)
    layers = [name for name, _ in model.named_modules()]
    assert all(matches(pattern, layers) for pattern in plan.quantization.keep_float)
