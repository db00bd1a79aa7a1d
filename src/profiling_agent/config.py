"""``profiling-agent.toml``: the flags of every command in one file, so that nobody retypes them.

Top-level keys go to every command that has the flag, tables such as ``[optimize]`` to theirs. The
command line wins over a table, a table over the top level.
"""

from __future__ import annotations

import difflib
import sys
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from profiling_agent.errors import BudgetError

CONFIG_FILE: Final = "profiling-agent.toml"
PATH_FLAGS: Final = frozenset(
    ("model", "data", "test_data", "weights", "classes", "metric", "out", "plan")
)
PATH_ARGUMENTS: Final = frozenset(("profile", "artefact", "run"))
_SIZES: Final = ("resize", "crop")
_WORDS: Final = {"weights": {"random"}, "metric": {"accuracy", "agreement"}, "data": {"demo"}}
_SCHEMES: Final = {"model": {"timm", "torchvision", "demo"}}
_SCHEMES_WITH_PATH: Final = {"data": {"cifar10", "cifar100"}}


def find_config(given: Path | None) -> Path | None:
    """The file given with ``--config``, else the one in the current folder, else None.

    ``BudgetError`` when a file was given and isn't there.
    """
    if given is None:
        found = Path(CONFIG_FILE)
        return found if found.is_file() else None
    if not given.is_file():
        raise BudgetError(
            f"The configuration {str(given)!r} does not exist; check the path after --config, or "
            "write one with 'profiling-agent init'."
        )
    return given


def load_config(path: Path, commands: Mapping[str, set[str]]) -> dict[str, dict[str, Any]]:
    """Defaults for each command: command to flag (with underscores) to value.

    ``commands`` are the flags and arguments of each. Numbers come back as texts and lists joined,
    as they would stand on the command line, so that the same checks apply; relative paths are those
    of the file's folder. Raises ``BudgetError`` for a file that is no TOML (with the line), and for
    keys that no command knows.

    >>> load_config(Path("profiling-agent.toml"), {"optimize": {"model", "max_drop"}})
    {'optimize': {'model': 'model.py:model', 'max_drop': '0.5'}}
    """
    entries = _read(path)
    flags = {key: value for key, value in entries.items() if not isinstance(value, dict)}
    tables = {key: value for key, value in entries.items() if isinstance(value, dict)}
    _refuse_unknown_tables(path, tables, commands)
    known = {name: commands[_command(name, commands)] for name in tables}
    shared = _settings(path, flags, set().union(*commands.values()), commands, "")
    own = {
        _command(name, commands): _settings(path, table, known[name], commands, name)
        for name, table in tables.items()
    }
    return {
        command: {key: value for key, value in shared.items() if key in names}
        | own.get(command, {})
        for command, names in commands.items()
    }


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except tomllib.TOMLDecodeError as error:
        raise BudgetError(
            f"{str(path)!r} is not valid TOML: {error}. Texts need quotes, as in data = 'photos'."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise BudgetError(f"The configuration {str(path)!r} can't be read: {error}.") from None


def _settings(
    path: Path,
    entries: Mapping[str, Any],
    known: set[str],
    commands: Mapping[str, set[str]],
    table: str,
) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for key, value in entries.items():
        name = key.replace("-", "_")
        if name not in known:
            raise BudgetError(_unknown(path, key, known, commands, table))
        if name in settings:
            raise BudgetError(f"{str(path)!r} gives {key!r} twice, with dash and underscore.")
        settings[name] = _as_typed(path, key, name, value)
    return settings


def _as_typed(path: Path, key: str, name: str, value: Any) -> Any:
    """The value as it would be typed after the flag; flags without a value stay true or false."""
    if isinstance(value, bool):
        return value
    if isinstance(value, list) and all(isinstance(each, str | int | float) for each in value):
        return ("x" if name in _SIZES else ",").join(str(each) for each in value)
    if not isinstance(value, str | int | float):
        raise BudgetError(
            f"The value of {key!r} in {str(path)!r} is a {type(value).__name__!r}; write a text, a "
            "number, true or false, or a list of numbers."
        )
    if isinstance(value, str) and name in (*PATH_FLAGS, *PATH_ARGUMENTS):
        return _rooted(name, value, path.parent)
    return str(value)


def _rooted(name: str, value: str, folder: Path) -> str:
    """A reference whose relative path, if it holds one, starts at ``folder``."""
    if not value or value in _WORDS.get(name, ()):
        return value
    scheme, colon, rest = value.partition(":")
    if colon and scheme in _SCHEMES.get(name, ()):
        return value
    if colon and scheme == "hf" and name == "model":
        return f"hf:{_join(folder, rest)}" if _join(folder, rest).is_dir() else value
    if colon and scheme in _SCHEMES_WITH_PATH.get(name, ()):
        return f"{scheme}:{_join(folder, rest)}"
    return str(_join(folder, value))


def _join(folder: Path, path: str) -> Path:
    return folder / Path(path).expanduser()


def _command(name: str, commands: Mapping[str, set[str]]) -> str:
    return name if name in commands else name.replace("_", "-")


def _refuse_unknown_tables(
    path: Path, tables: Mapping[str, Any], commands: Mapping[str, set[str]]
) -> None:
    for name in tables:
        if _command(name, commands) not in commands:
            raise BudgetError(
                f"{str(path)!r} has the table [{name}], which is no command"
                f"{_meant(name, list(commands))}; there are {', '.join(commands)}."
            )


def _unknown(
    path: Path, key: str, known: set[str], commands: Mapping[str, set[str]], table: str
) -> str:
    name = key.replace("-", "_")
    where = f"the table [{table}] of {str(path)!r}" if table else repr(str(path))
    owners = [command for command, names in commands.items() if name in names]
    if owners:
        return f"{where} has {key!r}, which is a flag of {', '.join(owners)}; move it there."
    meant = _meant(name, sorted(known))
    hint = meant or ". 'profiling-agent COMMAND --help' lists the flags"
    return f"{where} has {key!r}, which is no flag{hint}."


def _meant(name: str, choices: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, choices, n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(repr(n.replace('_', '-')) for n in near)}" if near else ""


def flags_of(group: Any) -> dict[str, set[str]]:
    """What ``load_config`` takes as ``commands``, from a click group whose commands are complete.

    ``--config`` and ``--help`` themselves are no settings.
    """
    return {
        command: {str(parameter.name) for parameter in each.params} - {"config", "help"}
        for command, each in group.commands.items()
    }


def use_config(context: Any, given: Path | None) -> Path | None:
    """Callback of an eager ``--config``: the file's values become the command's defaults.

    Raises ``BudgetError`` as ``find_config`` and ``load_config`` do; nothing without a file.
    """
    path = find_config(given)
    if path is not None and not context.resilient_parsing:
        known = flags_of(context.find_root().command)
        values = load_config(path, known)[context.info_name]
        if given is None and values.pop("trust_remote_code", None):
            raise BudgetError(
                f"{str(path)!r} asks for trust-remote-code, which a file that is merely found "
                "can't grant; pass --trust-remote-code, or name the file with --config."
            )
        if values:
            print(f"settings from {path}", file=sys.stderr)
        context.default_map = values
    return path
