"""Positions of axes that can only be removed together: a union-find over *slots*.

Every axis of every tensor in a forward is an array of slots, one for each position. An operator
that needs two positions to stay or go together ties their slots; one that must keep a position
freezes its slot, with the reason. What is tied at the end is one unit of pruning.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

Axis = np.ndarray
"""Slots of one axis, (size,) int64."""
HEADS = "heads"
"""Mark of units that attention handles side by side."""


class Slots:
    """All slots of one trace.

    >>> slots = Slots()
    >>> a, b = slots.fresh(3), slots.fresh(3)
    >>> slots.tie(a, b)
    >>> bool((slots.find(a) == slots.find(b)).all())
    True
    """

    def __init__(self) -> None:
        self._parent = np.arange(1024)
        self._used = 0
        self._reasons: dict[int, str] = {}
        self._marks: dict[int, set[str]] = {}

    def fresh(self, size: int) -> Axis:
        """New slots, each on its own."""
        start, self._used = self._used, self._used + size
        while self._used > len(self._parent):
            self._parent = np.concatenate(
                [self._parent, np.arange(len(self._parent), 2 * len(self._parent))]
            )
        return np.arange(start, self._used)

    def fixed(self, size: int, reason: str) -> Axis:
        """An axis none of whose positions may go: one frozen slot, repeated."""
        slot = self.fresh(1)
        self._reasons[int(slot[0])] = reason
        return np.repeat(slot, size)

    def find(self, axis: Axis) -> np.ndarray:
        """The representative of each slot; equal ones are tied."""
        roots = self._parent[axis]
        while True:
            above = self._parent[roots]
            if np.array_equal(above, roots):
                break
            roots = above
        self._parent[axis] = roots
        return roots

    def tie(self, first: Axis, second: Axis) -> None:
        """Position by position, both stay or both go."""
        ours, theirs = self.find(first), self.find(second)
        apart = ours != theirs
        if not apart.any():
            return
        pairs = np.unique(np.stack([ours[apart], theirs[apart]], 1), axis=0)
        for one, other in pairs.tolist():
            self._join(one, other)

    def freeze(self, axis: Axis, reason: str) -> None:
        for root in np.unique(self.find(axis)).tolist():
            self._reasons.setdefault(root, reason)

    def is_frozen(self, axis: Axis) -> np.ndarray:
        """Which positions may not go, (size,) bool."""
        roots = self.find(axis)
        if len(roots) > 0 and (roots == roots[0]).all():
            return np.full(len(roots), int(roots[0]) in self._reasons)
        return np.fromiter((r in self._reasons for r in roots.tolist()), bool, len(roots))

    def reason(self, axis: Axis) -> str | None:
        """Why the first frozen position of an axis is frozen."""
        return next(
            (self._reasons[r] for r in self.find(axis).tolist() if r in self._reasons), None
        )

    def mark(self, axis: Axis, word: str) -> None:
        """Remember something of these units, whatever they will be tied with."""
        for root in np.unique(self.find(axis)).tolist():
            self._marks.setdefault(root, set()).add(word)

    def has_mark(self, axis: Axis, word: str) -> bool:
        roots = np.unique(self.find(axis)).tolist()
        return any(word in self._marks.get(root, ()) for root in roots)

    def _join(self, one: int, other: int) -> None:
        first, second = self._root(one), self._root(other)
        if first == second:
            return
        low, high = min(first, second), max(first, second)
        self._parent[high] = low
        reason = self._reasons.pop(high, None)
        if reason is not None:
            self._reasons.setdefault(low, reason)
        marks = self._marks.pop(high, None)
        if marks:
            self._marks.setdefault(low, set()).update(marks)

    def _root(self, slot: int) -> int:
        while self._parent[slot] != slot:
            slot = int(self._parent[slot])
        return slot


class Grids:
    """Axes that were merged from others, or split into them, and whose factors are not chosen yet.

    Positions of a merged axis form a grid over its factors: only whole rows of the grid can go, so
    just one factor can carry units; the others must stay. Which one is known only when the whole
    forward was seen: a factor that something else freezes can't be it.
    """

    LEAST = 4
    """Fewer units than this are a poor choice when there is another."""

    def __init__(self, slots: Slots) -> None:
        self._slots = slots
        self._open: list[tuple[Axis, list[Axis]]] = []

    def merge(self, factors: list[Axis]) -> Axis:
        """The axis that lists a grid of these factors, the last one running fastest."""
        sizes = [len(factor) for factor in factors]
        free = self._free(factors)
        if not free:
            reason = next((r for f in factors if (r := self._slots.reason(f))), "positions")
            return self._slots.fixed(int(np.prod(sizes)), reason)
        if len(free) == 1:
            return self._spread(factors, free[0])
        merged = self._slots.fresh(int(np.prod(sizes)))
        self._open.append((merged, factors))
        return merged

    def split(self, merged: Axis, sizes: Iterable[int]) -> list[Axis]:
        """The factors, of these sizes, that an axis is split into.

        Where the positions are already tied along a factor (an axis that was merged before), it
        is known that this one carries nothing.
        """
        sizes = list(sizes)
        if self._slots.is_frozen(merged).all():
            reason = self._slots.reason(merged) or "positions"
            return [self._slots.fixed(size, reason) for size in sizes]
        grid, roots = merged.reshape(sizes), self._slots.find(merged).reshape(sizes)
        varying = [n for n in range(len(sizes)) if (roots != roots.take([0], axis=n)).any()]
        if len(varying) == 1:
            others = [n for n in range(len(sizes)) if n != varying[0]]
            carrier = np.moveaxis(grid, varying[0], 0).reshape(sizes[varying[0]], -1)[:, 0]
            fixed = {n: self._slots.fixed(sizes[n], "positions") for n in others}
            return [fixed.get(n, carrier) for n in range(len(sizes))]
        factors = [
            self._slots.fresh(size) if n in varying else self._slots.fixed(size, "positions")
            for n, size in enumerate(sizes)
        ]
        self._open.append((merged, factors))
        return factors

    def resolve(self) -> None:
        """Choose for every grid the factor that carries its units, and freeze the others."""
        waiting = self._open
        while waiting:
            undecided = [grid for grid in waiting if not self._decide(grid)]
            if len(undecided) == len(waiting):
                merged, factors = undecided.pop(0)
                self._carry(merged, factors, self._preferred(factors))
            waiting = undecided
        self._open = []

    def _free(self, factors: list[Axis]) -> list[int]:
        return [
            number
            for number, factor in enumerate(factors)
            if len(factor) > 1 and not self._slots.is_frozen(factor).all()
        ]

    def _decide(self, grid: tuple[Axis, list[Axis]]) -> bool:
        merged, factors = grid
        if self._slots.is_frozen(merged).all():
            reason = self._slots.reason(merged) or "positions"
            for factor in factors:
                self._slots.freeze(factor, reason)
            return True
        free = self._free(factors)
        if len(free) > 1:
            return False
        if free:
            self._carry(merged, factors, free[0])
        else:
            reason = next((r for f in factors if (r := self._slots.reason(f))), "positions")
            self._slots.freeze(merged, reason)
        return True

    def _preferred(self, factors: list[Axis]) -> int:
        """Attention heads before all, then the outermost factor that isn't tiny."""
        free = self._free(factors)
        for number in free:
            if self._slots.has_mark(factors[number], HEADS):
                return number
        return next((n for n in free if len(factors[n]) >= self.LEAST), free[-1])

    def _carry(self, merged: Axis, factors: list[Axis], carrier: int) -> None:
        self._slots.tie(merged, self._spread(factors, carrier))
        for number, factor in enumerate(factors):
            if number != carrier:
                self._slots.freeze(factor, "a fixed part of each unit")

    def _spread(self, factors: list[Axis], carrier: int) -> Axis:
        sizes = [len(factor) for factor in factors]
        shape = [1] * len(sizes)
        shape[carrier] = -1
        return np.broadcast_to(factors[carrier].reshape(shape), sizes).reshape(-1).copy()
