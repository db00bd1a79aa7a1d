"""Everything this package raises on purpose.

    ProfilingAgentError                     exit code
    ├── UserError                           2   what was given can't be used
    │   ├── ModelError                      2   factory, weights, forward
    │   ├── DataError                       2   data, labels, splits
    │   ├── BudgetError                     2   budget, flags, settings
    │   ├── PlanError                       2   a plan or a record that can't be used
    │   └── ArtefactError                   2   an artefact folder that can't be opened
    ├── MissingDependency                   3   an extra is not installed
    ├── StorageError                        4   no permission, no space, not our folder
    ├── TrialError                          5   a plan can't be carried out
    └── LlmUnavailable                      1   a language model gives no answer; ends no run

Messages say what to do next; inside the loop a ``TrialError`` becomes a FAILED trial.
Verdicts have exit codes too: ACCEPT 0, NO_GAIN 10, INFEASIBLE 11; 12 says that ``check`` found
problems, or ``measure`` other answers than those of the build. An internal fault exits with 1, an
interrupted run with 130. ``UserError`` and its kin are ``ValueError`` as well.
"""

from __future__ import annotations


class ProfilingAgentError(Exception):
    """Root of the tree; ``exit_code`` is what the command line ends with."""

    exit_code: int = 1


class UserError(ProfilingAgentError, ValueError):
    """What the user gave can't be used; the message quotes it and names the next step."""

    exit_code = 2


class ModelError(UserError):
    """The model's factory, weights or forward."""


class DataError(UserError):
    """The data, the labels or the splits."""


class BudgetError(UserError):
    """The budget, a flag or a setting."""


class PlanError(UserError):
    """A plan, or a record file, that can't be used."""


class ArtefactError(UserError):
    """An artefact folder that can't be opened."""


class MissingDependency(ProfilingAgentError, ImportError):
    """An optional dependency is not installed; the message has the install line."""

    exit_code = 3


class StorageError(ProfilingAgentError, OSError):
    """A folder that can't be written, or holds something else."""

    exit_code = 4


class TrialError(ProfilingAgentError, RuntimeError):
    """A plan that could not be carried out; the loop records it as a FAILED trial."""

    exit_code = 5


class LlmUnavailable(ProfilingAgentError, RuntimeError):
    """A language model that gives no answer.

    ``is_final``: asking again is pointless in this run (a limit is reached, the key or the model's
    name is wrong).
    """

    def __init__(self, sentence: str, *, is_final: bool) -> None:
        super().__init__(sentence)
        self.is_final = is_final
