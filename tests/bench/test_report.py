"""The benchmark's arithmetic and its reports, from numbers that are given."""
import contextlib
import io
import json
import sys
import tempfile
import unittest
from pathlib import Path
from unittest import mock
from xml.etree import ElementTree

BENCH = Path(__file__).resolve().parents[2] / 'tools/bench'
sys.path.insert(0, str(BENCH))

import chart  # noqa: E402
import command_lines  # noqa: E402
import costs  # noqa: E402
import counts  # noqa: E402
import disk_lines  # noqa: E402
import host  # noqa: E402
import report  # noqa: E402
from host import Failure, RingsAllowed  # noqa: E402
from results import Result, Sample, Wanted, natural_pairs, summary  # noqa: E402
from rounds import Bench, Line, Progress, measure, measure_all  # noqa: E402

MACHINE = {'date': '2026-01-02', 'kernel': '6.18.1', 'cpus': 2, 'processor': 'A & B', 'memory_gib': 24,
           'versions': {'imgfuse': '0.1.0', 'nbdfuse': None}}


def result(wanted=(), less_is_better=False, **sides):
    samples = {name.replace('_', ' '): [Sample(value, cpu=2 * value, memory=value / 2) for value in values]
               for name, values in sides.items()}
    return Result('a line', 'IOPS', samples, wanted, less_is_better, natural_pairs(samples))


READS = result((Wanted('imgfuse', 'QSD', 1.5), Wanted('imgfuse', 'limit', 0.9)),
               imgfuse=[300, 100, 200], QSD=[100, 100, 120], limit=[250, 400, 200])


class Results(unittest.TestCase):
    def test_the_ratio_is_that_of_the_medians_and_its_range_that_of_the_rounds(self):
        ratio = READS.ratio('imgfuse', 'QSD')

        self.assertEqual((ratio.median, ratio.smallest, ratio.largest), (2, 1, 3))

    def test_what_is_wanted_is_met_or_not(self):
        self.assertIs(READS.is_met('imgfuse', 'QSD'), True)  # 2
        self.assertIs(READS.is_met('imgfuse', 'limit'), False)  # 0.8
        self.assertIsNone(READS.is_met('QSD', 'limit'))

    def test_where_less_is_better_a_bound_is_the_most(self):
        times = result((Wanted('imgfuse', None, 20), Wanted('imgfuse', 'QSD', 0.5)), True, imgfuse=[20], QSD=[30])

        self.assertIs(times.is_met('imgfuse', None), True)
        self.assertIs(times.is_met('imgfuse', 'QSD'), False)

    def test_cpu_time_is_a_median_and_memory_a_maximum(self):
        self.assertEqual((READS.cpu('imgfuse'), READS.memory('imgfuse')), (400, 150))
        self.assertEqual(Result('', '', {'plain file': [Sample(1)]}).memory('plain file'), None)

    def test_each_transport_has_its_own_limit(self):
        pairs = natural_pairs(['imgfuse', 'imgfuse io_uring', 'QSD', 'limit', 'limit io_uring'])

        self.assertEqual(pairs, [('imgfuse', 'QSD'), ('imgfuse', 'limit'), ('imgfuse io_uring', 'QSD'),
                                 ('imgfuse io_uring', 'limit io_uring')])

    def test_a_side_that_is_left_out_is_not_compared(self):
        alone = Result('', '', {'imgfuse': [Sample(1)]}, pairs=[('imgfuse', 'QSD')], left_out={'QSD': 'not installed'})

        self.assertEqual(summary(alone)['ratios'], [])
        self.assertIn('QSD               left out: not installed', report.text_of(summary(alone)))


class Reports(unittest.TestCase):
    def test_text(self):
        rows = report.text_of(summary(READS)).splitlines()

        self.assertEqual(rows[0], 'a line')
        self.assertEqual(rows[1].split(None, 5)[:5], ['imgfuse', '200', 'IOPS', '400', '150'])
        self.assertIn('2.00 of QSD (1.00..3.00) ≥ 1.5 met', rows[1])
        self.assertIn('0.80 of limit (0.25..1.20) ≥ 0.9 NOT MET', rows[1])
        self.assertEqual(rows[2].split(), ['QSD', '100', 'IOPS', '200', '60'])

    def test_totals(self):
        self.assertEqual(report.totals([summary(READS), summary(READS)]), (2, 4))

    def test_numbers_have_three_or_four_digits(self):
        self.assertEqual([report.number(n) for n in (None, 0, 1.234, 12.34, 123.4, 1234, 12345, 123456)],
                         ['', '0', '1.23', '12.3', '123', '1234', '12.3k', '123k'])

    def test_markdown(self):
        text = report.markdown(MACHINE, [summary(READS)])
        rows = text.splitlines()

        self.assertEqual({row.count('|') for row in rows[:3]}, {8})
        self.assertEqual(rows[2], '| a line | 200 IOPS | **2.00 (≥ 1.5)** | 0.80 (≥ 0.9) |  | 400 / 200 | 150 / 60 |')
        self.assertEqual(rows[-1], 'Measured on 2026-01-02, Linux 6.18.1, 2 CPUs (A & B), 24 GiB; imgfuse 0.1.0.')

    def test_json(self):
        data = json.loads(report.as_json(MACHINE, 3, 0.5, [summary(READS)]))

        self.assertEqual(data['lines'][0]['sides']['QSD']['values'], [100, 100, 120])
        self.assertEqual(data['lines'][0]['ratios'][0], {'of': 'imgfuse', 'to': 'QSD', 'bound': 1.5, 'met': True,
                                                         'median': 2, 'smallest': 1, 'largest': 3})
        self.assertEqual(data['machine']['kernel'], '6.18.1')

    def test_the_chart_is_xml_with_a_bar_for_each_ratio_to_the_peer(self):
        slower = result(imgfuse=[50], QSD=[100])
        alone = result(imgfuse=[1])
        root = ElementTree.fromstring(chart.svg(MACHINE, [summary(READS), summary(slower), summary(alone)]))

        shapes = [shape for shape in root if shape.get('class') == 'ours' and float(shape.get('y')) > 50]
        self.assertEqual([float(shape.get('height')) for shape in shapes], [10, 10])
        one = next(float(line.get('x1')) for line in root if line.get('class') == 'one')
        self.assertEqual(float(shapes[0].get('x')), one)  # faster: to the right
        self.assertAlmostEqual(float(shapes[1].get('x')) + float(shapes[1].get('width')), one, 1)  # slower: to the left
        self.assertEqual(len([line for line in root if line.get('class') == 'limit']), 2)  # legend, first line


class Alternating(Line):
    def __init__(self, sides=('a', 'b'), fails=False):
        super().__init__('a line', 'IOPS', sides, pairs=[])
        self.calls, self.fails = [], fails

    def missing(self, side):
        return 'not there' if side == 'absent' else None

    def measure(self, bench, side):
        if self.fails:
            raise Failure('no')
        self.calls.append(side)
        return Sample(len(self.calls))


class Rounds(unittest.TestCase):
    bench = Bench(store=type('Store', (), {'folder': Path('/nowhere')}), rounds=3, seconds=1)

    def run_quietly(self, *lines):
        with contextlib.redirect_stdout(io.StringIO()):
            return measure_all(lines, self.bench, Progress(lines, self.bench, io.StringIO()), print)

    def test_every_second_round_goes_the_other_way(self):
        line = Alternating(('a', 'absent', 'b'))
        found = measure(line, self.bench, Progress([line], self.bench, io.StringIO()))

        self.assertEqual(line.calls, ['a', 'b', 'b', 'a', 'a', 'b'])
        self.assertEqual([sample.value for sample in found.samples['a']], [1, 4, 5])
        self.assertEqual(found.left_out, {'absent': 'not there'})

    def test_a_line_that_fails_does_not_keep_the_others_from_being_measured(self):
        bad, good = Alternating(fails=True), Alternating()
        bad.name = 'a bad line'
        results, failed = self.run_quietly(bad, good)

        self.assertEqual(([found.name for found in results], failed), (['a line'], ['a bad line']))

    def test_a_line_without_a_side_is_no_error(self):
        results, failed = self.run_quietly(Alternating(('absent',)))

        self.assertEqual((summary(results[0])['sides'], failed), ({}, []))


class Parameter(unittest.TestCase):
    def test_the_parameter_of_the_module_gets_its_value_back(self):
        with tempfile.NamedTemporaryFile() as file, mock.patch.object(host, 'RINGS', Path(file.name)):
            host.RINGS.write_text('N\n', encoding='ascii')
            with self.assertRaises(Failure), RingsAllowed():
                allowed = host.RINGS.read_text(encoding='ascii')
                raise Failure('stopped')

            self.assertEqual((allowed, host.RINGS.read_text(encoding='ascii')), ('Y', 'N\n'))

    def test_a_kernel_without_the_parameter_is_left_alone(self):
        with mock.patch.object(host, 'RINGS', Path('/nowhere/enable_uring')), RingsAllowed():
            self.assertEqual(host.why_no_rings(), 'the kernel has no FUSE over io_uring')


class Lines(unittest.TestCase):
    lines = disk_lines.LINES + command_lines.LINES + counts.LINES + costs.LINES

    def test_names_are_unique(self):
        names = [line.name for line in self.lines]
        self.assertEqual(len(names), len(set(names)))

    def test_every_bound_is_of_a_ratio_that_is_shown_or_of_a_side(self):
        stray = [(line.name, bound) for line in self.lines for bound in line.wanted
                 if bound.of not in line.sides or (bound.to and (bound.of, bound.to) not in line.pairs)]
        self.assertEqual(stray, [])


if __name__ == '__main__':
    unittest.main()
