"""Whether a profile's times hold for what is being planned; a plan from the wrong ones misleads."""

from __future__ import annotations

from profiling_agent.errors import PlanError
from profiling_agent.records.common import Deployment, Machine
from profiling_agent.records.profile import Profile


def check_fits(profile: Profile, machine: Machine, deployment: Deployment) -> None:
    """Raise ``PlanError`` naming each difference of batch size, threads, device or machine."""
    differences = _differences(profile, machine, deployment)
    if differences:
        raise PlanError(
            f"This profile was taken {' and '.join(differences)}, so its times don't hold here; "
            "run 'profiling-agent profile' again with the settings you plan for."
        )


def _differences(profile: Profile, machine: Machine, deployment: Deployment) -> list[str]:
    then = profile.deployment
    found: list[str] = []
    if then.batch_size != deployment.batch_size:
        found.append(f"at batch size {then.batch_size} (asked: {deployment.batch_size})")
    if then.threads != deployment.threads:
        found.append(f"with threads={then.threads} (asked: {deployment.threads})")
    if then.device != deployment.device:
        found.append(f"on device {then.device!r} (asked: {deployment.device!r})")
    if not profile.machine.same_hardware(machine):
        found.append(f"on another machine ({_name(profile.machine)}; this is {_name(machine)})")
    return found


def _name(machine: Machine) -> str:
    quota = "" if machine.cpu_quota is None else f", quota {machine.cpu_quota:g}"
    features = " ".join(machine.features) or "no vector features"
    return f"{machine.processor!r}, {machine.num_cores} cores{quota}, {features}"
