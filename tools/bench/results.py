"""What was measured: numbers of each side, the ratios between sides, and what is wanted of them."""
import statistics
from dataclasses import dataclass, field

from sides import FVD, LIMIT, LIMIT_RING, OURS, RING

OWN = (OURS, RING, FVD)  # what is compared; the other sides are what it is compared with


@dataclass(frozen=True)
class Sample:
    """One measurement of a side. CPU time of its processes in microseconds per operation, and their peak memory in MiB."""
    value: float
    cpu: float = None
    memory: float = None


@dataclass(frozen=True)
class Wanted:
    """A bound for the ratio of one side's number to another's, or for the number itself where `to` is None: at least that
    much, or at most where less is better."""
    of: str
    to: str
    bound: float


@dataclass(frozen=True)
class Ratio:
    """Of the medians; smallest and largest of one round."""
    median: float
    smallest: float
    largest: float


@dataclass
class Result:
    """Of a line. `samples` has, for each side, one for each round, in the order of the rounds."""
    name: str
    unit: str
    samples: dict
    wanted: tuple = ()
    less_is_better: bool = False
    pairs: list = field(default_factory=list)  # (side, what it is compared with)
    left_out: dict = field(default_factory=dict)  # side: why
    took: float = 0.0  # seconds, for all rounds with what prepares them

    def median(self, side):
        return statistics.median(sample.value for sample in self.samples[side])

    def cpu(self, side):
        return median_of(sample.cpu for sample in self.samples[side])

    def memory(self, side):
        return max((sample.memory for sample in self.samples[side] if sample.memory is not None), default=None)

    def ratio(self, of, to):
        rounds = [a.value / b.value for a, b in zip(self.samples[of], self.samples[to])]
        return Ratio(self.median(of) / self.median(to), min(rounds), max(rounds))

    def compared(self):
        return [pair for pair in self.pairs if all(side in self.samples for side in pair)]

    def bound(self, of, to):
        return next((w.bound for w in self.wanted if (w.of, w.to) == (of, to)), None)

    def is_met(self, of, to):
        """None where nothing is wanted."""
        bound = self.bound(of, to)
        if bound is None:
            return None
        number = self.median(of) if to is None else self.ratio(of, to).median
        return number <= bound if self.less_is_better else number >= bound


def median_of(numbers):
    known = [number for number in numbers if number is not None]
    return statistics.median(known) if known else None


def natural_pairs(sides):
    """Each of our sides with each other side, the limit that has its transport."""
    foreign_limit = {OURS: LIMIT_RING, FVD: LIMIT_RING, RING: LIMIT}
    return [(of, to) for of in sides if of in OWN for to in sides if to not in OWN and to != foreign_limit[of]]


def summary(result):
    """For JSON, and what the tables and the chart are made of."""
    return {
        'name': result.name,
        'unit': result.unit,
        'less_is_better': result.less_is_better,
        'sides': {side: {'median': result.median(side), 'values': [sample.value for sample in samples],
                         'cpu_us_per_operation': result.cpu(side), 'peak_mib': result.memory(side),
                         'bound': result.bound(side, None), 'met': result.is_met(side, None)}
                  for side, samples in result.samples.items()},
        'ratios': [{'of': of, 'to': to, 'bound': result.bound(of, to), 'met': result.is_met(of, to),
                    **vars(result.ratio(of, to))} for of, to in result.compared()],
        'left_out': result.left_out,
        'took_s': round(result.took, 1),
    }
