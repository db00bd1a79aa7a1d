"""``profiling-agent.toml`` and ``init``: what a file says is what the command line would say."""

from __future__ import annotations

import inspect
import re
import tomllib
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer
from typer.testing import CliRunner

from profiling_agent import cli, loop
from profiling_agent.acquisition.acquire import acquire
from profiling_agent.acquisition.request import Request
from profiling_agent.checkup import check
from profiling_agent.config import CONFIG_FILE, find_config, flags_of, load_config, use_config
from profiling_agent.errors import BudgetError, StorageError
from profiling_agent.records.common import Deployment
from profiling_agent.records.trial import RunSettings
from profiling_agent.run_defaults import MAX_SAMPLES_OF_A_RUN
from profiling_agent.scaffold import TEMPLATES, read_template, write_project

COMMANDS = {
    "optimize": {"model", "data", "weights", "metric", "max_drop", "out", "json", "mean", "resize"},
    "profile": {"model", "data", "weights", "out", "json"},
    "apply": {"model", "plan", "out"},
    "plan": {"profile", "max_drop"},
}


def load(folder: Path, text: str) -> dict[str, dict[str, Any]]:
    path = folder / CONFIG_FILE
    path.write_text(text)
    return load_config(path, COMMANDS)


class TestValues:
    def test_top_level_keys_go_where_the_flag_is(self, tmp_path: Path) -> None:
        found = load(tmp_path, "max-drop = 1\njson = true\n")
        assert found["optimize"] == {"max_drop": "1", "json": True}
        assert found["profile"] == {"json": True}
        assert found["apply"] == {}

    def test_a_table_wins_over_the_top_level(self, tmp_path: Path) -> None:
        found = load(tmp_path, "max_drop = 1\n[optimize]\nmax-drop = 0.25\n")
        assert found["optimize"]["max_drop"] == "0.25"
        assert found["plan"]["max_drop"] == "1"

    def test_a_plan_is_a_flag_and_plan_a_table(self, tmp_path: Path) -> None:
        found = load(tmp_path, "[apply]\nplan = 'p.json'\n[plan]\nprofile = 'x.json'\n")
        assert found["apply"]["plan"] == str(tmp_path / "p.json")
        assert found["plan"] == {"profile": str(tmp_path / "x.json")}

    def test_lists_are_joined_as_on_the_command_line(self, tmp_path: Path) -> None:
        found = load(tmp_path, "mean = [0.5, 0.25, 1]\nresize = [240, 320]\n")
        assert found["optimize"] == {"mean": "0.5,0.25,1", "resize": "240x320"}

    @pytest.mark.parametrize(
        ("line", "key", "expected"),
        [
            ("model = 'model.py:net'", "model", "{}/model.py:net"),
            ("model = 'timm:resnet18'", "model", "timm:resnet18"),
            ("model = 'hf:owner/name'", "model", "hf:owner/name"),
            ("model = 'hf:saved'", "model", "hf:{}/saved"),
            ("model = 'demo:vit'", "model", "demo:vit"),
            ("data = 'photos'", "data", "{}/photos"),
            ("data = '/photos'", "data", "/photos"),
            ("data = 'cifar10:c.tar.gz'", "data", "cifar10:{}/c.tar.gz"),
            ("weights = 'random'", "weights", "random"),
            ("weights = 'w.pt'", "weights", "{}/w.pt"),
            ("metric = 'agreement'", "metric", "agreement"),
            ("metric = 'data.py:map50'", "metric", "{}/data.py:map50"),
            ("out = 'runs/one'", "out", "{}/runs/one"),
        ],
    )
    def test_paths_are_those_of_the_files_folder(
        self, tmp_path: Path, line: str, key: str, expected: str
    ) -> None:
        (tmp_path / "saved").mkdir()
        assert load(tmp_path, line)["optimize"][key] == expected.format(tmp_path)

    def test_in_the_current_folder_paths_stay_short(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        assert find_config(None) is None
        Path(CONFIG_FILE).write_text("out = 'result'\n")
        path = find_config(None)
        assert path is not None and load_config(path, COMMANDS)["optimize"] == {"out": "result"}


class TestRefusals:
    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("max-drip = 1", "'max-drop'"),
            ("[optimize]\nmaxdrop = 1", "'max-drop'"),
            ("[optimise]\nmax-drop = 1", "'optimize'"),
            ("[profile]\nmax-drop = 1", "flag of optimize, plan"),
            ("max-drop = 1\nmax_drop = 2", "twice"),
            ("data = 2024-01-01", "date"),
            ("mean = [[0.5]]", "list"),
            ("data = photos", "line 1"),
            ("\n\nmodel = a", "line 3"),
        ],
    )
    def test_what_can_not_be_meant(self, tmp_path: Path, text: str, words: str) -> None:
        with pytest.raises(BudgetError, match=re.escape(words)) as caught:
            load(tmp_path, text)
        assert CONFIG_FILE in str(caught.value)

    def test_a_file_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(BudgetError, match="--config"):
            find_config(tmp_path / "nothing.toml")

    def test_a_file_that_is_not_text(self, tmp_path: Path) -> None:
        path = tmp_path / CONFIG_FILE
        path.write_bytes(b"\xff\xfe\x00")
        with pytest.raises(BudgetError, match=CONFIG_FILE):
            load_config(path, COMMANDS)


class Objective(StrEnum):
    latency = "latency"
    size = "size"


def config_callback(context: typer.Context, given: Path | None) -> Path | None:
    return use_config(context, given)


Config = Annotated[
    Path | None, typer.Option("--config", is_eager=True, callback=config_callback, help="settings")
]


def small_app() -> typer.Typer:
    """The shape of the real command line: a positional argument, flags, and an eager --config."""
    app = typer.Typer(pretty_exceptions_enable=False, rich_markup_mode=None)

    @app.command()
    def optimize(
        model: Annotated[str, typer.Argument()],
        data: str | None = None,
        max_drop: float = 0.5,
        max_trials: Annotated[int, typer.Option(min=0)] = 12,
        objective: Objective = Objective.latency,
        higher: Annotated[bool, typer.Option("--higher/--lower")] = True,
        json: Annotated[bool, typer.Option("--json")] = False,
        out: Path = Path("result"),
        config: Config = None,
    ) -> None:
        typer.echo(f"{model} {data} {max_drop} {max_trials} {objective} {higher} {json} {out}")

    @app.command()
    def init(folder: Path = Path()) -> None:
        typer.echo(folder)

    return app


class TestCommandLine:
    @pytest.fixture(autouse=True)
    def _inside(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)

    def call(self, *arguments: str) -> str:
        done = CliRunner().invoke(small_app(), list(arguments), catch_exceptions=False)
        self.said = done.stderr.strip()
        return done.stdout.strip() or self.said

    def test_code_from_outside_is_not_granted_by_a_file_that_is_found(self) -> None:
        Path(CONFIG_FILE).write_text("model = 'hf:a'\n[check]\ntrust-remote-code = true\n")
        known = {"check": {"model", "trust_remote_code"}}
        assert load_config(Path(CONFIG_FILE), known)["check"]["trust_remote_code"] is True
        with pytest.raises(BudgetError, match="name the file with --config"):
            cli.app(["check"], standalone_mode=False)

    def test_without_a_file_nothing_changes(self) -> None:
        assert self.call("optimize", "m") == "m None 0.5 12 latency True False result"
        assert "Missing argument" in self.call("optimize")

    def test_everything_may_come_from_the_file(self) -> None:
        Path(CONFIG_FILE).write_text(
            "model = 'm.py:f'\ndata = 'photos'\nhigher = false\nmax-trials = 3\n"
            "[optimize]\nmax-drop = 2\nobjective = 'size'\njson = true\nout = 'runs'\n"
        )
        assert self.call("optimize") == "m.py:f photos 2.0 3 size False True runs"
        assert self.said == f"settings from {CONFIG_FILE}"

    def test_the_command_line_wins(self) -> None:
        Path(CONFIG_FILE).write_text("model = 'm.py:f'\nmax-drop = 2\nhigher = false\n")
        said = self.call("optimize", "other", "--max-drop", "0.25", "--higher")
        assert said == "other None 0.25 12 latency True False result"

    def test_another_file(self, tmp_path: Path) -> None:
        (tmp_path / "sub").mkdir()
        (tmp_path / "sub" / "x.toml").write_text("model = 'm.py:f'\n")
        assert self.call("optimize", "--config", "sub/x.toml").startswith("sub/m.py:f ")

    def test_values_are_checked_as_on_the_command_line(self) -> None:
        Path(CONFIG_FILE).write_text("model = 'm'\nmax-trials = 1.5\n")
        assert "--max-trials" in self.call("optimize")
        Path(CONFIG_FILE).write_text("model = 'm'\nmax-trials = -1\n")
        assert "--max-trials" in self.call("optimize")

    def test_faults_of_the_file_are_errors_of_ours(self) -> None:
        Path(CONFIG_FILE).write_text("max-drip = 2\n")
        with pytest.raises(BudgetError, match="max-drop"):
            self.call("optimize", "m")
        assert self.call("init") == "."  # a command without --config does not read it


class TestInit:
    def test_three_files_and_nothing_is_written_over(self, tmp_path: Path) -> None:
        paths = write_project(tmp_path / "new")
        assert [path.name for path in paths] == list(TEMPLATES)
        paths[0].unlink()
        before = paths[1].read_text()
        with pytest.raises(StorageError, match=re.escape(str(paths[1]))):
            write_project(tmp_path / "new")
        assert not paths[0].exists() and paths[1].read_text() == before

    def test_a_folder_that_is_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(StorageError):
            write_project(tmp_path / "file")

    def test_what_is_written_works_as_it_is(self, tmp_path: Path) -> None:
        write_project(tmp_path)
        known = empty_commands() | {"optimize": {"model", "data"}}
        settings = load_config(tmp_path / CONFIG_FILE, known)["optimize"]
        record = check(
            Request(model=settings["model"], data=settings["data"]),
            deployment=Deployment(batch_size=1, threads=1),
            out=tmp_path / "check",
            seconds=20.0,
        )
        assert not record.has_problems, record.findings
        assert record.value is not None and record.value.estimate > 80
        assert {sample.true for sample in record.samples} <= {"red", "green", "blue"}
        assert record.picture is not None

    def test_the_settings_name_every_flag_and_no_other(self) -> None:
        known = flags_of(typer.main.get_command(cli.app))
        known.pop("init", None)  # it writes the settings and reads none
        shared, tables = commented(read_template(CONFIG_FILE))
        offered = {command: names | shared for command, names in tables.items()}
        for command, flags in known.items():
            assert flags <= offered.get(command, shared), command
        everything = set().union(*known.values())
        for command, names in tables.items():
            assert command not in known or names <= known[command], command
        assert shared <= everything


@pytest.mark.parametrize(("given", "seconds"), [("2m", 120.0), (90, 90.0), (None, 60.0)])
def test_the_time_for_an_answer_reaches_the_settings(
    given: str | int | None, seconds: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the file as from the command line; a record without it is one with the default."""
    seen: list[RunSettings] = []

    def stop(request: object, settings: RunSettings, **_: object) -> None:
        seen.append(settings)
        raise BudgetError("Far enough.")

    monkeypatch.setattr(loop, "optimize_workload", stop)
    answers = tmp_path / "answers.jsonl"
    answers.write_text('{"answer": "{}"}\n')
    config = tmp_path / CONFIG_FILE
    config.write_text("" if given is None else f"[optimize]\nllm-timeout = {given!r}\n")
    flags = ["--llm", f"replay:{answers}", "--out", str(tmp_path / "run")]
    typed = [] if given is None else ["--llm-timeout", str(given)]
    for more in (["--config", str(config)], typed):
        CliRunner().invoke(cli.app, ["optimize", "demo:vit", *flags, *more])
    assert len(seen) == 2 and seen[0] == seen[1]
    assert seen[0].llm is not None and seen[0].llm.limits.request_timeout_s == seconds
    old = seen[0].model_dump(mode="json")
    del old["llm"]["limits"]["request_timeout_s"]
    assert (RunSettings.model_validate(old) == seen[0]) == (seconds == 60.0)


def test_check_tells_the_defaults_that_the_commands_have() -> None:
    most = inspect.signature(acquire).parameters["max_samples"].default
    assert most == MAX_SAMPLES_OF_A_RUN


def empty_commands() -> dict[str, set[str]]:
    """Every command there is, as if it had no flags."""
    return {name: set() for name in flags_of(typer.main.get_command(cli.app))}


def commented(text: str) -> tuple[set[str], dict[str, set[str]]]:
    """The keys of a settings file with its defaults no longer commented out."""
    lines = [re.sub(r"^# (?=[a-z-]+ = )", "", line) for line in text.splitlines()]
    entries = tomllib.loads("\n".join(lines))
    names = {key.replace("-", "_") for key, value in entries.items() if not isinstance(value, dict)}
    tables = {
        key: {name.replace("-", "_") for name in value}
        for key, value in entries.items()
        if isinstance(value, dict)
    }
    return names, tables
