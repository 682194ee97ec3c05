"""The benchmark itself, as short as can be: images are made, every kind of side is started, measured and stopped."""
import json
import os
from pathlib import Path
from xml.etree import ElementTree

from harness import IMGFUSE, ImageCase, attempt, daemons_in, mounts

RUN = Path(__file__).resolve().parents[2] / 'tools/bench/run'
MAY_BE_MISSING = {'nbdfuse', 'imgfuse io_uring', 'limit io_uring'}


class Run(ImageCase):
    def bench(self, *arguments):
        return attempt(RUN, *arguments, timeout=280, env={**os.environ, 'IMGFUSE': IMGFUSE})

    def test_a_short_run_measures_every_side_and_leaves_nothing_behind(self):
        files = [self.path('report.' + suffix) for suffix in ('json', 'md', 'svg')]
        outcome = self.bench('--quick', '--rounds', '1', '--seconds', '0.1', '--folder', self.folder,
                             '--only', '4k random write, allocated, depth 1', '--only', '4k subclusters, depth 1',
                             '--only', 'fsync, overwriting',
                             '--json', files[0], '--markdown', files[1], '--svg', files[2])

        self.assertEqual(outcome.status, 0, outcome)
        lines = {line['name']: line for line in json.loads(files[0].read_text())['lines']}
        self.assertEqual(len(lines), 4, outcome)
        for line in lines.values():
            self.assertLessEqual(set(line['left_out']), MAY_BE_MISSING, outcome)
        mounted = lines['4k random write, allocated, depth 1']
        self.assertLessEqual({'imgfuse', 'QSD', 'limit'}, set(mounted['sides']))
        for side in mounted['sides'].values():
            self.assertGreater(side['median'], 0)
            self.assertGreater(side['peak_mib'], 1)
        self.assertEqual(lines['host flushes per guest fsync, overwriting']['sides']['imgfuse']['median'], 1)
        self.assertIn('| 4k random write, allocated, depth 1 |', files[1].read_text())
        ElementTree.parse(files[2])
        self.assertEqual(sorted(self.folder.iterdir()), sorted(files))
        self.assertEqual([point for point in mounts() if str(self.folder) in point], [])
        self.assertEqual(daemons_in(self.folder), [])

    def test_a_word_that_no_line_has_is_an_error(self):
        outcome = self.bench('--only', 'no such line')

        self.assertNotEqual(outcome.status, 0)
        self.assertIn('no line has the word "no such line"', outcome.err)
