"""Measures lines: every side once in each round, which each begin with another side."""
import sys
import time
from dataclasses import dataclass

from host import Failure, release
from images import Store
from results import Result, Sample, natural_pairs
from sides import SIDES, stop_all


@dataclass
class Bench:
    """What all lines share."""
    store: Store
    rounds: int
    seconds: float

    @property
    def folder(self):
        return self.store.folder


class Line:
    """A row of the report. `rounds` where it is not measured as often as the others; `cost` is about how many seconds a
    measurement takes, for the progress line alone."""

    def __init__(self, name, unit, sides, wanted=(), pairs=None, less_is_better=False, rounds=None, cost=1.3):
        self.name, self.unit, self.sides, self.wanted = name, unit, sides, wanted
        self.pairs = natural_pairs(sides) if pairs is None else pairs
        self.less_is_better, self.rounds, self.cost = less_is_better, rounds, cost

    def missing(self, side):
        """Why this side is left out, or None."""
        return SIDES[side].missing() if side in SIDES else None

    def begin(self, bench, sides):
        """Before the first measurement, with the sides that are not left out."""

    def measure(self, bench, side) -> Sample:
        raise NotImplementedError

    def end(self, bench):
        """After the last one."""

    def rounds_of(self, bench):
        return min(self.rounds, bench.rounds) if self.rounds else bench.rounds


def measure(line, bench, progress):
    """The line's Result."""
    left_out = {side: why for side in line.sides if (why := line.missing(side))}
    sides = [side for side in line.sides if side not in left_out]
    samples = {side: [] for side in sides}
    began = time.monotonic()
    line.begin(bench, sides)
    for number in range(line.rounds_of(bench) if sides else 0):
        progress.show(line.name, number, line.rounds_of(bench))
        first = number % len(sides)
        for side in sides[first:] + sides[:first]:  # none twice in a row, which would find its pages in the CPU's cache
            samples[side].append(line.measure(bench, side))
    line.end(bench)
    return Result(line.name, line.unit, samples, line.wanted, line.less_is_better, line.pairs, left_out,
                  time.monotonic() - began)


def measure_all(lines, bench, progress, show):
    """The results, each given to `show` when it is there, and the names of the lines that could not be measured."""
    results, failed = [], []
    for line in lines:
        try:
            result = measure(line, bench, progress)
        except Failure as failure:
            progress.clear()
            print('%s: FAILED: %s' % (line.name, failure), flush=True)
            failed.append(line.name)
            stop_all()
            release(bench.folder)
        else:
            progress.clear()
            results.append(result)
            show(result)
        progress.finished(line)
    progress.clear()
    return results, failed


class Progress:
    """One line on a terminal that says how long it takes still: the lines' costs, at the speed that they had up to now."""

    def __init__(self, lines, bench, out=sys.stderr):
        self.out, self.is_shown = out, out.isatty()
        self.costs = {line.name: line.cost * len(line.sides) * line.rounds_of(bench) for line in lines}
        self.left, self.done, self.began = dict(self.costs), 0.0, time.monotonic()

    def show(self, name, number, rounds):
        if self.is_shown:
            self.out.write('\r\033[K[%d of %d] %s, round %d of %d, %s left' % (
                len(self.costs) - len(self.left) + 1, len(self.costs), name, number + 1, rounds, self.remaining()))
            self.out.flush()

    def remaining(self):
        speed = (time.monotonic() - self.began) / self.done if self.done else 1
        return in_words(speed * sum(self.left.values()))

    def finished(self, line):
        self.done += self.left.pop(line.name)

    def clear(self):
        if self.is_shown:
            self.out.write('\r\033[K')
            self.out.flush()


def in_words(seconds):
    return '%d min' % round(seconds / 60) if seconds >= 90 else '%d s' % seconds
