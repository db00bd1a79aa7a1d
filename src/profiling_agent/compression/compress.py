"""From a plan to a smaller model: choose the units, remove them, repair what read them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from profiling_agent.acquisition.workload import Workload, compute_logits
from profiling_agent.compression.group import Kept
from profiling_agent.compression.groups import Discovery, find_groups
from profiling_agent.compression.importance import removal_order
from profiling_agent.compression.recast import recast
from profiling_agent.compression.repair import (
    recalibrate_batch_norms,
    repair_consumers,
    with_chosen_ridge,
)
from profiling_agent.compression.sequential import is_held, lost_outputs, refine
from profiling_agent.compression.statistics import Moments, consumers_of, gather_moments
from profiling_agent.compression.surgery import NewWeights, remove_units
from profiling_agent.compression.taylor import gather_changes
from profiling_agent.errors import TrialError
from profiling_agent.machine.memory import release_free_memory
from profiling_agent.records.evaluation import Achieved
from profiling_agent.records.patterns import assign, units_kept
from profiling_agent.records.plan import Importance, Plan, Repair

CALIBRATION_BATCH = 32
MOMENTS_BATCH = 16
GRADIENT_BATCH = 8
CALIBRATION_SAMPLES = 512


@dataclass(frozen=True, kw_only=True)
class Compressed:
    """The smaller module and what was really removed (MACs are counted by the caller)."""

    model: nn.Module
    achieved: Achieved


class Compressor:
    """Compresses one workload's model as often as asked; the original is never changed.

    The groups, the calibration statistics and the removal orders are found once and kept.

        smaller = Compressor(workload).compress(plan).model
    """

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        self._orders: dict[tuple[str, Importance], np.ndarray] = {}

    @cached_property
    def model(self) -> nn.Module:
        """The model that is cut: the workload's own, or an equal one (``recast.py``)."""
        return recast(self.workload.model, self.workload.example(2))

    @cached_property
    def discovery(self) -> Discovery:
        discovery = find_groups(self.model, self.workload.example(2))
        release_free_memory()
        return discovery

    @cached_property
    def moments(self) -> dict[str, Moments]:
        names = consumers_of(self.model, self.discovery.groups)
        batches = self.calibration_batches(batch_size=MOMENTS_BATCH)
        moments = gather_moments(self.model, names, batches)
        for name in moments:
            moments[name] = with_chosen_ridge(self.model.get_submodule(name), moments[name])
            release_free_memory()
        return moments

    @cached_property
    def changes(self) -> dict[str, Tensor]:
        """What ``gather_changes`` finds, in small batches, since gradients need all activations."""
        return gather_changes(
            self.model,
            self.moments,
            self.calibration_batches(batch_size=GRADIENT_BATCH),
            has_classes=self.workload.record.task.has_classes,
        )

    def calibration_batches(
        self, limit: int = CALIBRATION_SAMPLES, batch_size: int = CALIBRATION_BATCH
    ) -> Iterator[dict[str, Tensor]]:
        """Preprocessed calibration samples, ``batch_size`` at a time."""
        split = self.workload.splits["calibration"]
        for raw, _labels in split.batches(batch_size, limit):
            yield self.workload.tensors(raw)

    def order(self, group_id: str, importance: Importance) -> np.ndarray:
        key = (group_id, importance)
        if key not in self._orders:
            group = next(g for g in self.discovery.groups if g.id == group_id)
            moments = {} if importance == "magnitude" else self.moments
            changes = self.changes if importance == "taylor" else None
            self._orders[key] = removal_order(self.model, group, importance, moments, changes)
            release_free_memory()
        return self._orders[key]

    def keep(self, group_id: str, num_kept: int, importance: Importance) -> np.ndarray:
        """Sorted indices of the ``num_kept`` most important units of a group."""
        order = self.order(group_id, importance)
        return np.sort(order[len(order) - num_kept :])

    def select(self, plan: Plan) -> Kept:
        """The units each selected group keeps; groups that would stay whole are left out."""
        if not plan.pruning:
            return {}  # finding the groups takes a minute on a large model
        groups = {group.id: group for group in self.discovery.groups}
        kept: dict[str, np.ndarray] = {}
        for group_id, line in assign(plan, tuple(groups)).items():
            width = groups[group_id].width
            num_kept = units_kept(width, line.ratio)
            if num_kept < width:
                kept[group_id] = self.keep(group_id, num_kept, line.importance)
        return kept

    def repaired(self, kept: Kept, method: Repair) -> dict[str, NewWeights]:
        if method == "none" or not kept:
            return {}
        return repair_consumers(self.model, self.discovery.groups, kept, self.moments, method)

    def compress(self, plan: Plan) -> Compressed:
        """Carry out the pruning part of a plan on a copy of the model.

        Parameters that stay whole are shared with the original; don't write into them.

        Raises ``TrialError`` when the result does not run, or gives numbers that are not finite.
        """
        kept = self.select(plan)
        if not kept:
            whole = _copied(self.workload.model)
            return Compressed(model=whole, achieved=self._achieved(whole, kept))
        smaller = _copied(self.model)
        remove_units(smaller, self.discovery.groups, kept, self.repaired(kept, plan.repair))
        self._check(smaller)
        if plan.repair != "none":
            self._recalibrate(smaller, kept)
        if plan.repair == "sequential":
            self._refine(smaller, kept)
        return Compressed(model=smaller, achieved=self._achieved(smaller, kept))

    def _recalibrate(self, smaller: nn.Module, kept: Kept) -> None:
        if any(key.startswith("channels:") for key in kept):
            recalibrate_batch_norms(smaller, self.calibration_batches())

    def _refine(self, smaller: nn.Module, kept: Kept) -> None:
        """Fit the consumers in order, some batches held out to judge by."""
        num_samples = self.workload.splits["calibration"].info.num_samples
        num_batches = -(-min(num_samples, CALIBRATION_SAMPLES) // CALIBRATION_BATCH)

        def batches(*, held: bool) -> Iterator[dict[str, Tensor]]:
            for index, batch in enumerate(self.calibration_batches()):
                if is_held(index, num_batches) == held:
                    yield batch

        refine(
            self.model,
            smaller,
            lost_outputs(self.discovery.groups, kept, self.moments),
            self.moments,
            fitted=lambda: batches(held=False),
            held=lambda: batches(held=True),
            recalibrate=lambda: self._recalibrate(smaller, kept),
            has_classes=self.workload.record.task.has_classes,
        )

    @torch.inference_mode()
    def _check(self, smaller: nn.Module) -> None:
        for batch_size in (1, 2):
            inputs = self.workload.example(batch_size)
            try:
                logits = compute_logits(smaller, inputs)
            except Exception as error:  # whatever a user's forward raises
                raise TrialError(f"The pruned model's forward fails: {error}") from error
            if not torch.isfinite(logits).all():
                raise TrialError("The pruned model gives numbers that are not finite.")

    def _achieved(self, smaller: nn.Module, kept: Kept) -> Achieved:
        widths = {group.id: group.width for group in self.discovery.groups} if kept else {}
        return Achieved(
            num_parameters=_count(smaller),
            original_parameters=_count(self.workload.model),
            macs=None,
            original_macs=None,
            kept={key: tuple(int(i) for i in units) for key, units in kept.items()},
            widths={key: (widths[key], len(units)) for key, units in kept.items()},
            num_int8_layers=0,
        )


def _copied(model: nn.Module) -> nn.Module:
    """A copy with the same parameters, which are replaced and never written to."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
