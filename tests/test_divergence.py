"""Mean divergences of outputs, against SciPy's and by hand."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.special import rel_entr, softmax

from profiling_agent.compression import divergence
from profiling_agent.compression.divergence import mean_divergence


def by_hand(before: np.ndarray, after: np.ndarray, factor: float) -> float:
    first, second = softmax(before.astype(float), -1), softmax(factor * after.astype(float), -1)
    return float(rel_entr(first, second).sum(-1).mean())


@pytest.mark.parametrize("shape", [(1031, 10), (40, 5, 3)])
def test_of_logits_it_is_the_least_at_any_scale(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(divergence, "CHUNK", 100)
    rng = np.random.default_rng(0)
    before = 3 * rng.normal(size=shape).astype(np.float32)
    after = 0.7 * (before + 0.5 * rng.normal(size=shape)).astype(np.float32)
    best = minimize_scalar(lambda factor: by_hand(before, after, factor), bounds=(0.1, 10))
    assert 1e-3 < best.fun < 0.9 * by_hand(before, after, 1.0)
    assert mean_divergence(before, after, has_classes=True) == pytest.approx(best.fun, rel=1e-5)


@pytest.mark.parametrize("factor", [0.2, 1.0, 7.0])
def test_what_changes_no_answer_is_no_divergence(factor: float) -> None:
    before = np.random.default_rng(2).normal(size=(300, 10)).astype(np.float32)
    after = factor * before + 3.0
    assert mean_divergence(before, after, has_classes=True) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("kind", ["opposite", "constant", "huge"])
def test_ruined_outputs_diverge_by_a_finite_amount(kind: str) -> None:
    before = np.random.default_rng(3).normal(size=(300, 10)).astype(np.float32)
    after = {"opposite": -before, "constant": np.zeros_like(before), "huge": -1e30 * before}[kind]
    assert 0.1 < mean_divergence(before, after, has_classes=True) < np.inf


def test_of_other_outputs_it_is_measured_by_how_they_spread() -> None:
    rng = np.random.default_rng(1)
    before = rng.normal(size=(5000, 2)).astype(np.float32)
    after = before + 0.5
    found = mean_divergence(before, after, has_classes=False)
    assert found == pytest.approx(0.125 / before.var(axis=0).mean(), rel=1e-4)
    scaled = mean_divergence(100 * before, 100 * after, has_classes=False)
    assert scaled == pytest.approx(found, rel=1e-4)
