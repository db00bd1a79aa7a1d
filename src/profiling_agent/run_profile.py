"""The profile that a run's plans start from: an earlier run's, or taken now.

In parts: the operators of the int8 controls, by their own runtimes; costs, groups and sensitivity,
in the worker; widths in the runtimes that are likely to serve.
"""

from __future__ import annotations

from profiling_agent.errors import TrialError
from profiling_agent.evaluation.watch import DOUBTED, DOUBTED_ORIGINAL
from profiling_agent.planning.estimate import controls_to_profile, likely_to_serve
from profiling_agent.planning.fits import check_fits
from profiling_agent.planning.history import Pair, controls
from profiling_agent.profiling.deployed import profile_artefact, profile_pairs
from profiling_agent.profiling.profile_cache import KeptProfile, ProfileCache
from profiling_agent.profiling.user_cache import user_folder
from profiling_agent.profiling.width_cache import WidthCache
from profiling_agent.records.profile import DeployedProfile, Profile
from profiling_agent.records.store import write_text
from profiling_agent.records.trial import Trial
from profiling_agent.report.live import quiet
from profiling_agent.run_state import package_version
from profiling_agent.trial import median_ms
from profiling_agent.widths import measure_deployed_widths
from profiling_agent.workbench import Workbench

PROFILE_SHARE = 0.2
MIN_PROFILE_S, PROFILE_FORWARDS = 5.0, 80
"""What a profile takes at least: seconds, and forwards of the original on a sample."""
DEPLOYED_SHARE = 0.05
"""Of the time budget, for the operator times of the controls."""
WIDTHS_SHARE, MIN_WIDTHS_S, TRIALS_FIRST = 0.15, 10.0, 6
"""Of the time budget, for widths in the runtimes; there are none with less than so many seconds,
or when so many trials would not have time after them."""


def take_profile(bench: Workbench) -> Profile | None:
    """The profile of the workload on a bench that is set up; journalled, and kept for later runs.

    ``None`` for want of time or because the model can't be profiled: the warnings say why, and the
    controls are all there is to choose from.
    """
    store, state = bench.store, bench.state
    if store.profile.exists() and state.profile_path is not None:
        profile = Profile.read(store.profile)
        check_fits(profile, bench.machine, bench.deployment)
        return profile
    if state.candidates is not None:
        return None
    cache = ProfileCache(
        folder=user_folder("profiles"),
        workload=bench.workload,
        machine=bench.machine,
        deployment=bench.deployment,
        version=package_version(),
    )
    found = cache.find(_seconds(bench, DEPLOYED_SHARE * bench.budget.time_s))
    if found is not None:
        when = found.profile.reused_from
        bench.progress.message(f"the profile is an earlier run's, taken on this machine {when}")
    taken = found or _taken(bench)
    if taken is None:
        return None
    profile = _with_widths(bench, taken.profile)
    if profile != (found and found.profile) and is_undisturbed(bench, profile):
        gaps = taken.profile.not_measured  # widths that there was no time for are tried again
        kept = profile.model_copy(update={"not_measured": gaps})
        cache.keep(KeptProfile(seconds=taken.seconds, profile=kept))
    write_text(store.profile, profile.to_json())
    state.profile_path = store.profile.name
    store.journal.append("profile", {"path": store.profile.name})
    return profile


def is_undisturbed(bench: Workbench, profile: Profile) -> bool:
    """Whether no time in it, beside those that ran before or after it, says that the machine was
    busy."""
    if bench.runner.is_busy:
        return False
    whole = profile.total
    if whole is not None and whole.median_ms > DOUBTED_ORIGINAL * 1e3 * bench.call_s():
        return False
    raced = {pair: median_ms(trial) for pair, trial in controls(bench.state.trials).items()}
    for deployed in profile.deployed:
        usual = raced.get(Pair(runtime=deployed.runtime, scheme=deployed.scheme))
        if usual is not None and deployed.total_ms > DOUBTED * usual:
            return False
    return True


def _taken(bench: Workbench) -> KeptProfile | None:
    """All but the widths in the runtimes, and the seconds for it."""
    if bench.left - bench.reserve() < MIN_PROFILE_S + PROFILE_FORWARDS * bench.call_s():
        bench.warn(
            "Nothing was searched: the controls took the time budget. Allow a larger --time-budget."
        )
        return None
    deployed = _operators(bench)
    bench.progress.stage("profiling", "costs, groups, sensitivity")
    seconds = max(MIN_PROFILE_S, _seconds(bench))
    try:
        with quiet(bench.progress):
            profile = bench.runner.builder.profile(bench.deployment, seconds)
    except TrialError as error:
        bench.warn(
            f"Nothing was searched, since the model can't be profiled: {error} Try "
            "'profiling-agent profile' on it alone."
        )
        return None
    finally:
        bench.runner.builder.pause()
    profile = profile.model_copy(update={"deployed": deployed})
    return KeptProfile(seconds=seconds, profile=profile)


def _seconds(bench: Workbench, after_s: float = 0.0) -> float:
    """What the worker's part may take, if it starts after so many seconds."""
    return min(PROFILE_SHARE * bench.budget.time_s, bench.left - bench.reserve() - after_s)


def _operators(bench: Workbench) -> tuple[DeployedProfile, ...]:
    """Operator times of the int8 controls and their float counterparts, the fastest first."""
    clock = bench.store.journal.clock
    ends = clock() + DEPLOYED_SHARE * bench.budget.time_s

    def profile(trial: Trial) -> DeployedProfile | None:
        bench.progress.stage("profiling", f"the operators of {trial.label}")
        try:
            return profile_artefact(
                bench.store.trial(trial.trial_id),
                bench.store.data / "calibration",
                bench.deployment,
                memory_limit=bench.memory_limit,
            )
        except TrialError as error:
            bench.warn(f"The operators of {trial.label} could not be timed: {error}")
            return None

    pairs = controls_to_profile(bench.state.trials)
    return profile_pairs(pairs, profile, has_time=lambda: clock() <= ends)


def _with_widths(bench: Workbench, profile: Profile) -> Profile:
    """The profile with widths timed in the runtimes that are likely to serve."""
    left = bench.left - bench.reserve() - TRIALS_FIRST * bench.usual_trial_s()
    seconds = min(WIDTHS_SHARE * bench.budget.time_s, left)
    if not profile.groups or seconds < MIN_WIDTHS_S:
        return profile
    bench.progress.stage("profiling", "widths in the runtimes that are likely to serve")
    with quiet(bench.progress):
        tables, missing = measure_deployed_widths(
            bench.runner,
            profile,
            likely_to_serve(bench.state.trials, bench.budget),
            bench.store.trial("width"),
            control_folder=bench.store.trial,
            seconds=seconds,
            call_s=bench.call_s(),
            cache=WidthCache(
                folder=user_folder("widths"),
                machine=profile.machine,
                deployment=bench.deployment,
            ),
        )
    return profile.model_copy(
        update={"deployed_widths": tables, "not_measured": (*profile.not_measured, *missing)}
    )
