"""The profile that a run's plans start from: an earlier run's, or taken now.

In parts: costs, groups and sensitivity, in the worker; the operators of the int8 controls, by their
own runtimes; widths in the runtimes that are likely to serve. Each part that was timed while the
machine was quiet is kept for later runs.
"""

from __future__ import annotations

from collections.abc import Sequence

from profiling_agent.anchors import merged
from profiling_agent.errors import TrialError
from profiling_agent.evaluation.watch import DOUBTED, DOUBTED_ORIGINAL
from profiling_agent.planning.estimate import controls_to_profile, likely_to_serve
from profiling_agent.planning.fits import check_fits
from profiling_agent.planning.history import controls, measured_pair, pair_of
from profiling_agent.profiling.deployed import profile_artefact, profile_pairs
from profiling_agent.profiling.profile_cache import KeptProfile, ProfileCache
from profiling_agent.profiling.user_cache import user_folder
from profiling_agent.profiling.width_cache import WidthCache
from profiling_agent.records.profile import DeployedProfile, Profile
from profiling_agent.records.store import write_text
from profiling_agent.records.trial import Trial
from profiling_agent.report.live import quiet
from profiling_agent.trial import median_ms, original_ms
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

    One of an earlier run brings the places of the controls with it. ``None`` for want of time or
    because the model can't be profiled: the warnings say why, and the controls are all there is to
    choose from.
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
    )
    found = cache.find(_seconds(bench))
    if found is None and not _has_time(bench):
        bench.warn(
            "Nothing was searched: the controls took the time budget. Allow a larger --time-budget."
        )
        return None
    if found is not None and (is_quiet(bench, found.profile) or not _has_time(bench)):
        taken = found
        when = found.profile.reused_from
        bench.progress.message(f"the profile is an earlier run's, taken on this machine {when}")
        bench.anchor(found.controls)
    else:
        taken = _taken(bench)
    if taken is None:
        return None
    quiet_before = undisturbed(bench, taken.profile.deployed)
    profile = taken.profile.model_copy(update={"deployed": _operators(bench, quiet_before)})
    profile = _with_widths(bench, profile)
    if is_quiet(bench, profile):
        kept = _for_later(bench, taken, profile)
        if kept != found:
            cache.keep(kept)
    write_text(store.profile, profile.to_json())
    state.profile_path = store.profile.name
    store.journal.append("profile", {"path": store.profile.name})
    return profile


def _for_later(bench: Workbench, taken: KeptProfile, profile: Profile) -> KeptProfile:
    """Without operators that were timed while the machine was busy, and without a word on widths
    that there was no time for: later runs try them again."""
    operators = undisturbed(bench, profile.deployed)
    update = {"deployed": operators, "not_measured": taken.profile.not_measured}
    return KeptProfile(
        seconds=taken.seconds,
        profile=profile.model_copy(update=update),
        controls=merged(taken.controls, bench.state.trials),
    )


def is_quiet(bench: Workbench, profile: Profile) -> bool:
    """Whether the original, in the costs of modules, took about as long as in the quietest of the
    races so far."""
    whole = profile.total
    usual = min([1e3 * bench.call_s(), *filter(None, map(original_ms, bench.state.trials))])
    return whole is None or whole.median_ms <= DOUBTED_ORIGINAL * usual


def undisturbed(
    bench: Workbench, operators: Sequence[DeployedProfile]
) -> tuple[DeployedProfile, ...]:
    """Those of artefacts that took about as long as in their races."""
    raced = {pair: median_ms(trial) for pair, trial in controls(bench.state.trials).items()}
    usual = [raced.get(measured_pair(deployed)) for deployed in operators]
    return tuple(
        deployed
        for deployed, ms in zip(operators, usual, strict=True)
        if ms is None or deployed.total_ms <= DOUBTED * ms
    )


def _taken(bench: Workbench) -> KeptProfile | None:
    """Costs, groups and sensitivity, and the seconds for it."""
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
    return KeptProfile(seconds=seconds, profile=profile)


def _has_time(bench: Workbench) -> bool:
    """For a profile."""
    return bench.left - bench.reserve() >= MIN_PROFILE_S + PROFILE_FORWARDS * bench.call_s()


def _seconds(bench: Workbench) -> float:
    """What the worker's part may take."""
    return min(PROFILE_SHARE * bench.budget.time_s, bench.left - bench.reserve())


def _operators(bench: Workbench, known: Sequence[DeployedProfile]) -> tuple[DeployedProfile, ...]:
    """Operator times of the int8 controls and their float counterparts, the fastest first, and
    those that are known."""
    clock = bench.store.journal.clock
    by_pair = {measured_pair(deployed): deployed for deployed in known}
    ends = clock() + min(DEPLOYED_SHARE * bench.budget.time_s, bench.left - bench.reserve())

    def profile(trial: Trial) -> DeployedProfile | None:
        if pair_of(trial) in by_pair:
            return by_pair[pair_of(trial)]
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
    timed = profile_pairs(pairs, profile, has_time=lambda: clock() <= ends)
    by_pair |= {measured_pair(deployed): deployed for deployed in timed}
    return tuple(by_pair.values())


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
