"""What is refused of the data: too much that can't be read, samples unlike each other, shared ones.

A sample here and there is left out or noted; beyond the limits nothing that is measured on these
data would be worth having, so that is said before time is spent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from profiling_agent.acquisition.data import Source, UnreadableSample
from profiling_agent.acquisition.reading import Reader, read_one
from profiling_agent.acquisition.splits import LabelReader, Share, Written, count_duplicates
from profiling_agent.acquisition.workload import Split
from profiling_agent.errors import DataError
from profiling_agent.records.workload import SplitName

MAX_SHARED = 0.01
"""Share of the test samples, given by themselves, that may also be search samples."""


def check_unreadable(share: Share, written: Written, limit: float) -> None:
    """``DataError`` when more than the limit, a share of one, of a split could not be read."""
    count, total = len(written.unreadable), len(share.indices)
    if count > limit * total:
        raise DataError(
            f"{count} of {total} {share.split} samples can't be read (the first: "
            f"{written.unreadable[0]}) Repair or remove them."
        )


def check_stream(part: Source, limit: float) -> None:
    """The same for a stream, which was read when its samples were staged."""
    total = (part.length or 0) + part.num_unreadable
    if part.num_unreadable > limit * total:
        raise DataError(
            f"{part.num_unreadable} of {total} samples of a stream can't be read "
            f"({part.notes[-1]}); repair or remove them."
        )


def check_alike(
    shares: Sequence[Share], firsts: Sequence[Sequence[Mapping[str, np.ndarray]]]
) -> None:
    """One preprocessing and one input shape hold for all splits, so their samples must be alike."""
    first = firsts[0][0]
    for share, samples in zip(shares, firsts, strict=True):
        for name, array in samples[0].items():
            if array.dtype.kind == "f" and np.isnan(array).any():
                raise DataError(
                    f"The first {share.split} sample has NaN values; remove or repair it."
                )
            known = first.get(name)
            if known is None or (known.shape, known.dtype) != (array.shape, array.dtype):
                was = "no such input" if known is None else f"{known.dtype} {known.shape}"
                raise DataError(
                    f"The {share.split} samples have {name or 'inputs'} as {array.dtype} "
                    f"{array.shape}, the {shares[0].split} samples {was}; prepare both alike."
                )


def first_samples(
    share: Share, reader: Reader, label_of: LabelReader
) -> list[Mapping[str, np.ndarray]]:
    """Inputs of up to two samples of a share that can be read, their labels looked at."""
    samples: list[Mapping[str, np.ndarray]] = []
    reason = "there are none"
    for index in share.indices:
        try:
            sample = read_one(share.source, int(index), reader)
        except UnreadableSample as error:
            reason = str(error)
            continue
        label_of(sample.label)
        samples.append(sample.inputs)
        if len(samples) == 2:
            break
    if not samples:
        raise DataError(
            f"None of the {len(share.indices)} {share.split} samples can be read: {reason}"
        )
    return samples


def check_shared(shares: Sequence[Share], splits: Mapping[SplitName, Split]) -> list[str]:
    """Refuses a test set that was given and is in truth the search samples; notes a few of them."""
    if "search" not in splits or "test" not in splits:
        return []
    duplicates = count_duplicates(splits["search"], splits["test"])
    total = splits["test"].info.num_samples
    sources = {share.split: share.source for share in shares}
    if duplicates > MAX_SHARED * total and sources["search"] is not sources["test"]:
        raise DataError(
            f"{duplicates} of {total} test samples are search samples too; what was looked at in "
            "the search proves nothing. Give other test data."
        )
    if not duplicates:
        return []
    return [f"{duplicates} test samples are exact duplicates of search samples"]
