"""Collectors with subnet sampling: what it costs to draw the index, by who draws it, collector, task and environments."""

import time
from contextlib import ExitStack

import pytest
from collecting import COLLECTORS, Collecting

# Where the index is drawn, and who acts: the dense extract(0), which leaves the primer's own cost, or all subnetworks.
DRAWN = {
    "none": ("none", False),
    "outside": ("outside", False),
    "inside": ("inside", False),
    "outside, indexed": ("outside", True),
    "inside, indexed": ("inside", True),
    "policy, indexed": ("policy", True),
}
STEPS, ROUNDS = 50, 9  # of each environment in a turn; turns of each


@pytest.mark.parametrize("num_envs", [1, 4, 16, 64])
@pytest.mark.parametrize("env", ["Hopper-v4", "Humanoid-v4", "ZeroWork"])
@pytest.mark.parametrize("collector", COLLECTORS)
def test_collectors(benchmark, collector, env, num_envs):
    """All ways to draw the index in one process, which take turns; ``extra_info`` has the seconds of each turn."""
    if num_envs == 64 and (env != "ZeroWork" or collector != "Collector"):
        pytest.skip("so many only where the collector's own work is all there is")
    # Two asynchronous workers end their batches at nearly the same time: every other wait is none. Some batches before the
    # timed ones set them going, and fetch what was left of the last turn.
    before, batches = (4, 4) if collector == "MultiAsync" else (0, 1)
    frames = STEPS * max(4, num_envs)
    options = {"collector": collector, "num_envs": num_envs, "frames_per_batch": frames}
    seconds = {way: [] for way in DRAWN}
    with ExitStack() as ends:
        streams = {}
        for way, (placement, indexed) in DRAWN.items():
            streams[way] = Collecting(env, placement, indexed=indexed, **options)
            ends.callback(streams[way].end)
            turn(streams[way], before, batches)

        def turns():
            done = len(seconds["none"])
            ways = list(DRAWN)[done % len(DRAWN) :] + list(DRAWN)[: done % len(DRAWN)]
            for way in ways:
                seconds[way].append(turn(streams[way], before, batches))

        benchmark.pedantic(turns, rounds=ROUNDS)
    benchmark.extra_info.update(seconds=seconds, frames=batches * frames)


def turn(stream, before, batches):
    """The seconds of so many batches, after some others."""
    stream.wake()
    for _ in range(before):
        next(stream)
    start = time.perf_counter()
    for _ in range(batches):
        next(stream)
    seconds = time.perf_counter() - start
    stream.rest()
    return seconds
