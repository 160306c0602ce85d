"""Deals tests out to shards that take about equally long, by their recorded times.

Longest first, each file to the shard with the least to do; a file that would make it longer than
its share is split by test, if the times of its tests are recorded. The same tree gives the same
shards wherever this runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tools.stats.test_times import TestTimes
from tools.testing.run_process import Work

SMALL = 0.1
"""Works of this part of a share are never split, and may make a shard longer by that."""


def plan(
    works: Sequence[Work],
    times: TestTimes,
    count: int,
    list_tests: Callable[[Work], Sequence[str]],
) -> list[list[Work]]:
    """`count` shards, each a list of works, that together are `works`.

    Args:
        works: files, or parts of files.
        times: what the works are weighed by.
        list_tests: the ids of a work's tests; only asked for works that are split.
    """
    if count == 1:
        return [[weighed(work, times) for work in works]]
    weights = sorted((weighed(w, times) for w in works), key=lambda w: (-w.seconds, w.file))
    share = sum(w.seconds for w in weights) / count
    loads = [0.0] * count
    shards: list[list[Work]] = [[] for _ in range(count)]
    for work in weights:
        k = loads.index(min(loads))
        fits = loads[k] + work.seconds <= share or work.seconds <= SMALL * share
        if not fits and times.of(work.file).tests:
            tests = list_tests(work) if work.tests is None else work.tests
            parts = _split(work, times, loads, share, tests)
        else:
            parts = {k: work}
        for k, part in parts.items():
            loads[k] += part.seconds
            shards[k].append(part)
    return shards


def weighed(work: Work, times: TestTimes) -> Work:
    """The work with the seconds that it should take; a part of a file has them already."""
    if work.tests is not None:
        return work
    file = times.of(work.file)
    return Work(work.file, None, file.startup + file.total)


def _split(
    work: Work, times: TestTimes, loads: list[float], share: float, tests: Sequence[str]
) -> dict[int, Work]:
    """The parts of a file by shard: as few of them as fill the shards evenly."""
    file = times.of(work.file)
    seconds = {t: file.of(t) for t in tests}
    chosen: dict[int, list[str]] = {}
    ahead = list(loads)
    for test in sorted(tests, key=lambda t: (-seconds[t], t)):
        k = next((k for k in chosen if ahead[k] + seconds[test] <= share), None)
        if k is None:
            k = ahead.index(min(ahead))
            if k not in chosen:
                chosen[k] = []
                ahead[k] += file.startup
        chosen[k].append(test)
        ahead[k] += seconds[test]
    if len(chosen) < 2:  # None, where the file is broken: running it shows that.
        return {min(chosen, default=loads.index(min(loads))): work}
    return {
        k: Work(work.file, tuple(sorted(c)), file.startup + sum(seconds[t] for t in c))
        for k, c in chosen.items()
    }
