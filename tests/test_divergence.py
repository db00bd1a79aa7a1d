"""Mean divergences of outputs, against SciPy's and by hand."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import rel_entr, softmax

from profiling_agent.compression.divergence import CHUNK, mean_divergence


@pytest.mark.parametrize("shape", [(2 * CHUNK + 7, 10), (40, 5, 3)])
def test_of_logits_it_is_that_of_their_distributions(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    before = rng.normal(size=shape).astype(np.float32)
    after = (before + 0.1 * rng.normal(size=shape)).astype(np.float32)
    first, second = (softmax(each.astype(np.float64), axis=-1) for each in (before, after))
    expected = rel_entr(first, second).sum(-1).mean()
    assert expected > 1e-4
    assert mean_divergence(before, after, has_classes=True) == pytest.approx(expected, rel=1e-6)
    shifted = before + 3.0  # the same distribution
    assert mean_divergence(before, shifted, has_classes=True) == pytest.approx(0.0, abs=1e-6)


def test_of_other_outputs_it_is_measured_by_how_they_spread() -> None:
    rng = np.random.default_rng(1)
    before = rng.normal(size=(5000, 2)).astype(np.float32)
    after = before + 0.5
    found = mean_divergence(before, after, has_classes=False)
    assert found == pytest.approx(0.125 / before.var(axis=0).mean(), rel=1e-4)
    scaled = mean_divergence(100 * before, 100 * after, has_classes=False)
    assert scaled == pytest.approx(found, rel=1e-4)
