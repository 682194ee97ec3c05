"""convert, compare, measure, commit, rebase and resize beside qemu-img: what they leave, say, and exit with."""
import itertools
import json
import random
import unittest

from harness import IMGFUSE, ImageCase, attempt, by_scale, run, seed, sha256
from matrix import KiB, MiB
from test_matrix import fill_commands, qemu_io

SEED = seed()
SIZE = 6 * MiB + 3 * 512


class JobCase(ImageCase):
    def setUp(self):
        super().setUp()
        self.random = random.Random('%d %s' % (SEED, self.id()))
        self.seed = SEED

    def image(self, name, format='qcow2', size=SIZE, options='', backing=None, version=3, fill=True):
        """An image by qemu-img with random data, zeros and holes; `backing` is (name, format)."""
        path = self.path(name)
        arguments = ['-o', options] if options else []
        arguments += ['-b', backing[0], '-F', backing[1]] if backing else []
        run('qemu-img', 'create', '-q', '-f', format, *arguments, path, size)
        if fill:
            qemu_io(path, format, fill_commands(self.random, size, version if format == 'qcow2' else 2))
        return path

    def assert_same_disk(self, a, a_format, b, b_format):
        run('qemu-img', 'compare', '-f', a_format, '-F', b_format, a, b)

    def both(self, command, *arguments):
        """The same command line for either program."""
        return attempt(IMGFUSE, command, *arguments), attempt('qemu-img', command, *arguments)

    def assert_alike(self, command, *arguments):
        ours, theirs = self.both(command, *arguments)
        self.assertEqual((ours.status, ours.out), (theirs.status, theirs.out), '%s\n%s' % (ours, theirs))
        return ours


class Convert(JobCase):
    TARGETS = (('raw', ''), ('qcow2', ''), ('qcow2', 'cluster_size=512'), ('qcow2', 'cluster_size=2M'),
               ('qcow2', 'compat=0.10'), ('qcow2', 'refcount_bits=1'), ('qcow2', 'preallocation=metadata'),
               ('qcow2', 'preallocation=falloc'), ('qcow2', 'preallocation=full'), ('raw', 'preallocation=falloc'))

    def sources(self):
        yield self.image('plain.raw', 'raw'), 'raw'
        yield self.image('plain.qcow2'), 'qcow2'
        self.image('base.raw', 'raw', SIZE - MiB)
        self.image('middle.qcow2', 'qcow2', SIZE + MiB, 'cluster_size=4k', ('base.raw', 'raw'))
        yield self.image('chain.qcow2', 'qcow2', SIZE, 'cluster_size=32k', ('middle.qcow2', 'qcow2')), 'qcow2'
        packed = self.path('packed.qcow2')
        run('qemu-img', 'convert', '-c', '-f', 'qcow2', '-O', 'qcow2', self.path('plain.qcow2'), packed)
        yield packed, 'qcow2'

    def test_every_source_to_every_target(self):
        for (source, source_format), (format, options) in itertools.product(list(self.sources()), self.TARGETS):
            with self.subTest(source=source.name, target=format + ' ' + options):
                target = self.path('target')
                run(IMGFUSE, 'convert', '-f', source_format, '-O', format, *(['-o', options] if options else []),
                    source, target)
                self.assert_same_disk(source, source_format, target, format)
                if format == 'qcow2':
                    self.assert_clean(target)
                target.unlink()

    def test_sparse_images_take_no_more_space_than_qemu_gives_them(self):
        source = self.image('source.raw', 'raw', 64 * MiB)
        for options in (('-O', 'raw'), ('-O', 'qcow2'), ('-O', 'qcow2', '-o', 'cluster_size=4k'), ('-S', '64k')):
            ours, theirs = self.path('ours'), self.path('theirs')
            run(IMGFUSE, 'convert', '-f', 'raw', *options, source, ours)
            run('qemu-img', 'convert', '-f', 'raw', *options, source, theirs)
            self.assertLessEqual(ours.stat().st_blocks, theirs.stat().st_blocks * 1.05 + 256, options)

    def test_onto_the_same_backing_file(self):
        self.image('base.qcow2')
        source = self.image('overlay.qcow2', backing=('base.qcow2', 'qcow2'))
        target = self.path('target.qcow2')
        for options in (('-B', 'base.qcow2', '-F', 'qcow2'), ('-o', 'backing_file=base.qcow2,backing_fmt=qcow2')):
            run(IMGFUSE, 'convert', '-O', 'qcow2', *options, source, target)
            self.assert_same_disk(source, 'qcow2', target, 'qcow2')
            self.assert_clean(target)
            theirs = self.path('theirs.qcow2')
            run('qemu-img', 'convert', '-f', 'qcow2', '-O', 'qcow2', *options, source, theirs)
            self.assertLessEqual(target.stat().st_blocks, theirs.stat().st_blocks * 1.1 + 256)

    def test_into_a_target_that_is_there(self):
        source = self.image('source.qcow2')
        for format, size in (('raw', SIZE), ('qcow2', SIZE), ('qcow2', SIZE + 3 * MiB)):
            with self.subTest(format, size=size):
                target = self.image('target', format, size)
                run(IMGFUSE, 'convert', '-n', '-O', format, source, target)
                raw = self.path('ours.raw')
                run('qemu-img', 'convert', '-f', format, '-O', 'raw', target, raw)
                with open(raw, 'r+b') as file:
                    file.truncate(SIZE)
                self.assert_same_disk(source, 'qcow2', raw, 'raw')
                if format == 'qcow2':
                    self.assert_clean(target)
        short = self.image('short', 'raw', MiB)
        before = sha256(short)
        for outcome in self.both('convert', '-n', '-O', 'raw', source, short):
            self.assertEqual(outcome.status, 1, outcome)
        self.assertEqual(sha256(short), before)

    def test_several_images_one_behind_the_other(self):
        parts = [self.image('a.qcow2', size=MiB + 512), self.image('b.qcow2', size=2 * MiB), self.image('c.qcow2')]
        ours, theirs = self.path('ours.raw'), self.path('theirs.raw')
        run(IMGFUSE, 'convert', '-O', 'raw', *parts, ours)
        run('qemu-img', 'convert', '-O', 'raw', *parts, theirs)
        self.assertEqual(sha256(ours), sha256(theirs))

    def test_sizes_that_are_no_multiple_of_a_sector(self):
        source = self.path('odd.raw')
        source.write_bytes(random.Random(SEED).randbytes(100001))
        for format in ('raw', 'qcow2'):
            ours, theirs = self.path('ours'), self.path('theirs')
            run(IMGFUSE, 'convert', '-f', 'raw', '-O', format, source, ours)
            run('qemu-img', 'convert', '-f', 'raw', '-O', format, source, theirs)
            self.assertEqual(json.loads(run('qemu-img', 'info', '-f', format, '--output=json', ours))['virtual-size'],
                             json.loads(run('qemu-img', 'info', '-f', format, '--output=json', theirs))['virtual-size'])
            self.assert_same_disk(ours, format, theirs, format)

    def test_options_that_qemu_refuses_are_refused(self):
        source, target = self.image('source.qcow2'), self.path('target')
        for options in (('-O', 'vmdk3'), ('-O', 'raw', '-c'), ('-S', '100'), ('-m', '0'), ('-m', '17'),
                        ('-O', 'qcow2', '-o', 'cluster_size=3000'), ('-O', 'qcow2', '-o', 'nonsense=1'),
                        ('-O', 'qcow2', '-B', 'missing', '-F', 'qcow2'), ('-t', 'nonsense')):
            with self.subTest(options):
                ours, theirs = self.both('convert', *options, source, target)
                self.assertNotEqual(theirs.status, 0, theirs)
                self.assertIn(ours.status, (1, 2), ours)
                target.unlink(missing_ok=True)


class Compare(JobCase):
    def test_words_and_statuses(self):
        a = self.image('a.qcow2')
        copy = self.path('copy.raw')
        run('qemu-img', 'convert', '-O', 'raw', a, copy)
        longer = self.path('longer.raw')
        run('cp', '--sparse=always', copy, longer)
        run('truncate', '-s', SIZE + 2 * MiB, longer)
        self.assert_alike('compare', a, copy, '-F', 'raw')
        for options in ((), ('-s',), ('-q',), ('-q', '-s')):
            self.assert_alike('compare', '-f', 'qcow2', '-F', 'raw', *options, a, longer)
            self.assert_alike('compare', '-f', 'raw', '-F', 'qcow2', *options, longer, a)
        qemu_io(longer, 'raw', ['write -P 1 %d 512' % (SIZE + MiB)])
        self.assert_alike('compare', '-f', 'qcow2', '-F', 'raw', a, longer)
        for missing in ((a, self.path('none')), (self.path('none'), a)):
            self.assertEqual([outcome.status for outcome in self.both('compare', *missing)], [2, 2])

    def test_the_first_difference(self):
        a, b = self.image('a.qcow2'), self.path('b.qcow2')
        run('qemu-img', 'convert', '-O', 'qcow2', '-o', 'cluster_size=4k', a, b)
        for _ in range(by_scale(5, 15, 100)):
            offset = self.random.randrange(SIZE)
            qemu_io(self.random.choice((a, b)), 'qcow2', ['write -P %d %d 1' % (self.random.randrange(256), offset)])
            self.assert_alike('compare', a, b)
            self.assert_alike('compare', b, a)

    def test_strictly(self):
        a = self.image('a.qcow2', fill=False)
        b = self.path('b.qcow2')
        for commands in (['write -P 1 0 128k'], ['write -P 1 1M 64k', 'write -z 1M 64k'], ['write -z -u 2M 64k']):
            qemu_io(a, 'qcow2', commands + ['write -P 1 5M 64k'])
            run('cp', a, b)
            self.assert_alike('compare', '-s', a, b)
            qemu_io(b, 'qcow2', ['write -z -u 4M 64k'])
            self.assert_alike('compare', '-s', a, b)
            self.assert_alike('compare', a, b)

    def test_json_tells_the_same(self):
        a, b = self.image('a.qcow2'), self.image('b.qcow2')
        outcome = attempt(IMGFUSE, 'compare', '--json', a, b)
        text = attempt('qemu-img', 'compare', a, b).out
        said = json.loads(outcome.out)
        self.assertEqual((outcome.status, said['identical'], said['difference']), (1, False, 'content'))
        self.assertIn(' %d!' % said['offset'], text)


def setUpModule():
    print('IMG_SEED=%d' % SEED)


if __name__ == '__main__':
    unittest.main()
