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
            qemu_io(path, format, fill_commands(self.random, size, version if format != 'raw' else 2))
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
               ('qcow2', 'preallocation=falloc'), ('qcow2', 'preallocation=full'), ('raw', 'preallocation=falloc'),
               ('qed', ''), ('qed', 'cluster_size=4k,table_size=2'), ('qed', 'cluster_size=2M'))

    def sources(self):
        yield self.image('plain.raw', 'raw'), 'raw'
        yield self.image('plain.qcow2'), 'qcow2'
        yield self.image('plain.qed', 'qed'), 'qed'
        yield self.image('overlay.qed', 'qed', SIZE, 'cluster_size=16k', ('plain.qed', 'qed')), 'qed'
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
                if format != 'raw':
                    self.assert_clean(target, format)
                target.unlink()

    def test_progress_is_for_a_terminal_or_who_asks_for_it(self):
        source = self.image('source.raw', 'raw', 4 * MiB)
        for options, shown in (((), False), (('-p',), True), (('-q', '-p'), False), (('-p', '-q'), False)):
            with self.subTest(options):
                outcome = attempt(IMGFUSE, 'convert', *options, source, self.path('target.raw'))
                self.assertEqual(outcome.status, 0, outcome)
                self.assertEqual('100' in outcome.err, shown, outcome)

    def test_sparse_images_take_no_more_space_than_qemu_gives_them(self):
        source = self.image('source.raw', 'raw', 64 * MiB)
        for options in (('-O', 'raw'), ('-O', 'qcow2'), ('-O', 'qcow2', '-o', 'cluster_size=4k'), ('-S', '64k'),
                        ('-O', 'qed'), ('-O', 'qed', '-o', 'cluster_size=4k')):
            ours, theirs = self.path('ours'), self.path('theirs')
            run(IMGFUSE, 'convert', '-f', 'raw', *options, source, ours)
            run('qemu-img', 'convert', '-f', 'raw', *options, source, theirs)
            self.assertLessEqual(ours.stat().st_blocks, theirs.stat().st_blocks * 1.05 + 256, options)

    def test_compressed(self):
        """Text that compresses, noise that does not, zeros and holes."""
        source = self.path('source.raw')
        rng = random.Random(SEED)
        words = [rng.randbytes(7) for _ in range(100)]
        with open(source, 'wb') as file:
            for offset, length in ((0, 3 * MiB), (4 * MiB + 512, 200 * KiB), (7 * MiB, 512)):
                file.seek(offset)
                file.write(b''.join(rng.choices(words, k=length // 7)))
            file.seek(5 * MiB)
            file.write(rng.randbytes(MiB))
            file.truncate(9 * MiB + 512)
        for options in ('', 'compression_type=zstd', 'cluster_size=4k', 'cluster_size=512', 'cluster_size=2M',
                        'compat=0.10', 'refcount_bits=1', 'refcount_bits=64,compression_type=zstd,cluster_size=16k'):
            with self.subTest(options):
                option = ('-o', options) if options else ()
                ours, theirs = self.path('ours.qcow2'), self.path('theirs.qcow2')
                run(IMGFUSE, 'convert', '-c', '-f', 'raw', '-O', 'qcow2', *option, source, ours)
                run('qemu-img', 'convert', '-c', '-f', 'raw', '-O', 'qcow2', *option, source, theirs)
                self.assert_same_disk(source, 'raw', ours, 'qcow2')
                self.assert_clean(ours)
                self.assertLessEqual(ours.stat().st_size, theirs.stat().st_size * 1.15 + 256 * KiB)
                run(IMGFUSE, 'compare', '-f', 'raw', '-F', 'qcow2', source, ours)
                run(IMGFUSE, 'convert', '-O', 'raw', ours, self.path('back.raw'))
                self.assertEqual(sha256(self.path('back.raw')), sha256(source))

    def test_a_snapshot(self):
        source = self.image('source.qcow2')
        run('qemu-img', 'snapshot', '-c', 'first', source)
        qemu_io(source, 'qcow2', fill_commands(self.random, SIZE, 3))
        theirs = self.path('theirs.raw')
        run('qemu-img', 'convert', '-l', 'snapshot.name=first', '-O', 'raw', source, theirs)
        for name in ('first', '1', 'snapshot.id=1', 'snapshot.name=first', 'snapshot.id=1,snapshot.name=first'):
            ours = self.path('ours.raw')
            run(IMGFUSE, 'convert', '-l', name, '-O', 'raw', source, ours)
            self.assertEqual(sha256(ours), sha256(theirs), name)
            ours.unlink()
        ours = attempt(IMGFUSE, 'convert', '-l', 'nothing', source, self.path('ours.raw'))
        self.assertEqual(ours.status, 1, ours)
        self.assertFalse(self.path('ours.raw').exists())
        self.assert_alike('measure', '-O', 'qcow2', '-l', 'first', source)

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
        for format, size in (('raw', SIZE), ('qcow2', SIZE), ('qcow2', SIZE + 3 * MiB), ('qed', SIZE)):
            with self.subTest(format, size=size):
                target = self.image('target', format, size)
                run(IMGFUSE, 'convert', '-n', '-O', format, source, target)
                raw = self.path('ours.raw')
                run('qemu-img', 'convert', '-f', format, '-O', 'raw', target, raw)
                with open(raw, 'r+b') as file:
                    file.truncate(SIZE)
                self.assert_same_disk(source, 'qcow2', raw, 'raw')
                if format != 'raw':
                    self.assert_clean(target, format)
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
        for format in ('raw', 'qcow2', 'qed'):
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


class Measure(JobCase):
    OPTIONS = ((), ('-O', 'qcow2'), ('-O', 'qcow2', '-o', 'cluster_size=512'), ('-O', 'qcow2', '-o', 'cluster_size=2M'),
               ('-O', 'qcow2', '-o', 'compat=0.10'), ('-O', 'qcow2', '-o', 'refcount_bits=1'),
               ('-O', 'qcow2', '-o', 'refcount_bits=64,cluster_size=4k'), ('-O', 'qcow2', '-o', 'extended_l2=on'),
               ('-O', 'qcow2', '-o', 'preallocation=metadata'), ('-O', 'qcow2', '-o', 'preallocation=falloc'),
               ('-O', 'qcow2', '-o', 'backing_file=base.qcow2,backing_fmt=qcow2'))

    def test_sizes(self):
        for options in self.OPTIONS:
            for size in ('0', '1', '512', '64k', '1M', '1G', '3T', '%d' % SIZE):
                with self.subTest(options, size=size):
                    self.assert_alike('measure', *options, '--size', size)
                    ours, theirs = self.both('measure', '--output=json', *options, '--size', size)
                    if theirs.status == 0:
                        self.assertEqual(json.loads(ours.out), json.loads(theirs.out))

    def test_images(self):
        self.image('base.qcow2', size=4 * MiB, options='cluster_size=16k')
        images = [self.image('plain.raw', 'raw'), self.image('plain.qcow2'),
                  self.image('overlay.qcow2', options='cluster_size=4k', backing=('base.qcow2', 'qcow2'))]
        for image, options in itertools.product(images, self.OPTIONS):
            with self.subTest(options, image=image.name):
                self.assert_alike('measure', *options, image)
                ours, theirs = self.both('measure', '--output=json', *options, image)
                self.assertEqual(json.loads(ours.out), json.loads(theirs.out))

    def test_bitmaps(self):
        for options in ('', 'cluster_size=4k', 'cluster_size=2M'):
            image = self.image('%s.qcow2' % (options or 'default'), options=options, fill=False)
            for name, granularity in (('a', 512), ('a longer name', 4 * KiB), ('coarse', MiB)):
                run('qemu-img', 'bitmap', '--add', '-g', granularity, image, name)
                qemu_io(image, 'qcow2', ['write -P 5 %dM 2M' % self.random.choice((0, 2, 4))])
                for target in ('', 'cluster_size=512', 'cluster_size=2M', 'compat=0.10', 'extended_l2=on'):
                    with self.subTest(image=image.name, bitmaps=name, target=target):
                        option = ('-o', target) if target else ()
                        self.assert_alike('measure', '-O', 'qcow2', *option, image)
                        ours, theirs = self.both('measure', '--output=json', '-O', 'qcow2', *option, image)
                        self.assertEqual(json.loads(ours.out), json.loads(theirs.out))
                self.assert_alike('measure', '-O', 'raw', image)

    def test_bad_requests(self):
        image = self.image('plain.qcow2')
        for arguments in ((), ('--size', '1G', image), ('--size', '-5'), ('-O', 'nonsense', image), (self.path('none'),)):
            for outcome in self.both('measure', *arguments):
                self.assertIn(outcome.status, (1, 2), outcome)


class Bench(JobCase):
    CASES = (('-c', 10), ('-c', 3, '-s', '64k', '-S', '1M'), ('-c', 40, '-s', '5k', '-S', '7k', '-o', '1M'),
             ('-c', 8, '-s', '64k', '--flush-interval=4'), ('-c', 8, '-s', '64k', '--flush-interval=4', '--no-drain'))

    def test_it_writes_what_qemu_img_writes_and_says_so_in_its_words(self):
        for format in ('raw', 'qcow2'):
            image, theirs = self.image('ours.' + format, format), self.path('theirs.' + format)
            run('cp', '--sparse=always', image, theirs)
            for case in self.CASES:
                with self.subTest(case, format=format):
                    arguments = ('-f', format, '-w', '-d', '2', '--pattern=0x41', *case)
                    ours = run(IMGFUSE, 'bench', *arguments, image)
                    expected = run('qemu-img', 'bench', *arguments, theirs)
                    self.assertEqual(ours.split('Run completed')[0], expected.split('Run completed')[0])
                    self.assertRegex(ours, r'\nRun completed in \d+\.\d{3} seconds\.\n')
                    self.assert_same_disk(image, format, theirs, format)
            if format != 'raw':
                self.assert_clean(image, format)

    def test_reading_changes_nothing_and_json_has_the_rates(self):
        image = self.image('disk.qcow2')
        before = sha256(image)
        said = json.loads(run(IMGFUSE, 'bench', '--json', '-c', '100', '-d', '3', '-s', '8k', image))
        self.assertEqual({key: said[key] for key in ('count', 'depth', 'buffer-size', 'step-size', 'offset', 'write')},
                         {'count': 100, 'depth': 3, 'buffer-size': 8 * KiB, 'step-size': 8 * KiB, 'offset': 0,
                          'write': False})
        self.assertAlmostEqual(said['iops'] * said['seconds'], 100, delta=0.01)
        self.assertAlmostEqual(said['bytes-per-second'], said['iops'] * 8 * KiB, delta=said['iops'])
        self.assertEqual(run(IMGFUSE, 'bench', '-q', '-c', '1', image), '')
        self.assertEqual(sha256(image), before)


class Resize(JobCase):
    def resize_both(self, image, format, *arguments):
        """The same on a copy by qemu-img; both are then alike."""
        theirs = self.path('theirs')
        run('cp', '--sparse=always', image, theirs)
        outcome = attempt(IMGFUSE, 'resize', '-f', format, *arguments[:-1], image, arguments[-1])
        expected = attempt('qemu-img', 'resize', '-f', format, *arguments[:-1], theirs, arguments[-1])
        self.assertEqual((outcome.status, outcome.out), (expected.status, expected.out), '%s%s' % (outcome, expected))
        self.assert_same_disk(image, format, theirs, format)
        self.assertEqual(self.virtual_size(image, format), self.virtual_size(theirs, format))
        if format != 'raw':
            self.assert_clean(image, format)

    @staticmethod
    def virtual_size(image, format):
        return json.loads(run('qemu-img', 'info', '-f', format, '--output=json', image))['virtual-size']

    def test_growing(self):
        for format in ('raw', 'qcow2', 'qed'):
            image = self.image('disk.' + format, format)
            for arguments in (('8M',), ('+1M',), ('-q', '+64k'), ('+3G',), ('--preallocation=off', '+1M')):
                with self.subTest(format, arguments=arguments):
                    self.resize_both(image, format, *arguments)

    def test_preallocation_of_raw_images(self):
        image = self.image('disk.raw', 'raw')
        for mode in ('falloc', 'full'):
            self.resize_both(image, 'raw', '--preallocation=' + mode, '+4M')
            self.assertGreaterEqual(image.stat().st_blocks * 512, 4 * MiB)

    def test_shrinking_must_be_asked_for(self):
        for format in ('raw', 'qcow2', 'qed'):
            image = self.image('disk.' + format, format)
            before = sha256(image)
            self.resize_both(image, format, '-1M')
            self.resize_both(image, format, '1M')
            self.assertEqual(sha256(image), before)
        self.resize_both(self.path('disk.qcow2'), 'qcow2', '6M')
        self.resize_both(self.path('disk.qed'), 'qed', '--shrink', '-1M')  # which it cannot
        self.resize_both(self.path('disk.raw'), 'raw', '--shrink', '-1M')
        self.resize_both(self.path('disk.raw'), 'raw', '--shrink', '1M')

    def test_shrinking_qcow2(self):
        """Down, and up again: what was cut off does not come back. QEMU shows it in the cluster that the old end was in:
        it is not asked to."""
        for options in ('', 'cluster_size=512', 'cluster_size=2M', 'compat=0.10', 'refcount_bits=1',
                        'extended_l2=on', 'lazy_refcounts=on', 'preallocation=full'):
            image = self.image('disk.qcow2', options=options, version=2 if 'compat' in options else 3)
            for arguments in (('--shrink', '6M'), ('--shrink', '-2M'), ('+2M',), ('--shrink', '2M'), ('8M',),
                              ('--shrink', str(MiB + 512)), ('--shrink', '-1M')):
                with self.subTest(options, arguments=arguments):
                    self.resize_both(image, 'qcow2', *arguments)
            image.unlink()

    def test_shrinking_an_overlay(self):
        self.image('base.qcow2', size=5 * MiB)
        for options in ('cluster_size=4k', 'extended_l2=on'):
            overlay = self.image('overlay.qcow2', options=options, backing=('base.qcow2', 'qcow2'))
            for arguments in (('--shrink', '2M'), ('+4M',), ('--shrink', '-1M'), ('+1M',)):
                with self.subTest(options, arguments=arguments):
                    self.resize_both(overlay, 'qcow2', *arguments)

    def test_preallocation_of_qcow2_images(self):
        for mode in ('metadata', 'falloc', 'full'):
            for options in ('', 'cluster_size=512', 'cluster_size=2M', 'extended_l2=on', 'refcount_bits=64'):
                with self.subTest(mode, options=options):
                    image = self.image('disk.qcow2', options=options)
                    before = image.stat().st_blocks
                    self.resize_both(image, 'qcow2', '--preallocation=' + mode, '+4M')
                    extents = json.loads(run('qemu-img', 'map', '--output=json', '-f', 'qcow2', image))
                    bare = [e for e in extents if e['start'] + e['length'] > SIZE + 2 * MiB and 'offset' not in e]
                    self.assertEqual(bare, [])
                    if mode != 'metadata':
                        self.assertGreaterEqual((image.stat().st_blocks - before) * 512, 2 * MiB)

    def test_what_a_longer_backing_file_holds_is_not_shown(self):
        self.image('base.raw', 'raw', 9 * MiB)
        qemu_io(self.path('base.raw'), 'raw', ['write -P 7 0 9M'])
        overlay = self.image('overlay.qcow2', size=4 * MiB, backing=('base.raw', 'raw'))
        self.resize_both(overlay, 'qcow2', '+20M')


class Commit(JobCase):
    def chain(self, base_format, base_size, overlay_size, version=3, format='qcow2'):
        """base <- middle <- top, made twice: for us and for qemu-img."""
        made = []
        for folder in ('ours', 'theirs'):
            self.random = random.Random('%d %s' % (SEED, self.id()))
            self.path(folder).mkdir(exist_ok=True)
            options = 'compat=' + {2: '0.10', 3: '1.1'}[version] if format == 'qcow2' else ''
            self.image(folder + '/base', base_format, base_size)
            self.image(folder + '/middle', format, overlay_size, 'cluster_size=4k', ('base', base_format))
            made.append(self.image(folder + '/top', format, overlay_size, options, ('middle', format), version))
        return made

    def commit_both(self, images, *options):
        outcomes = [attempt(IMGFUSE, 'commit', *options, images[0]), attempt('qemu-img', 'commit', *options, images[1])]
        ours, theirs = outcomes
        self.assertEqual((ours.status, ours.out), (theirs.status, theirs.out), '%s\n%s' % (ours, theirs))
        return ours

    def test_into_the_backing_file_and_further_down(self):
        for base_format, base_size, overlay_size, version, format in (
                ('raw', SIZE, SIZE, 3, 'qcow2'), ('qcow2', SIZE, SIZE, 2, 'qcow2'), ('qcow2', 3 * MiB, SIZE, 3, 'qcow2'),
                ('raw', 3 * MiB, SIZE, 3, 'qcow2'), ('qcow2', SIZE, 3 * MiB, 3, 'qcow2'),
                ('raw', SIZE, SIZE, 3, 'qed'), ('qed', 3 * MiB, SIZE, 3, 'qed'), ('qed', SIZE, 3 * MiB, 3, 'qcow2')):
            with self.subTest(base_format, base=base_size, overlay=overlay_size, version=version, format=format):
                ours, theirs = self.chain(base_format, base_size, overlay_size, version, format)
                content = self.path('content.raw')
                run('qemu-img', 'convert', '-O', 'raw', ours, content)
                for name in ('top', 'middle'):
                    image, other = ours.parent / name, theirs.parent / name
                    self.assertEqual(self.commit_both([image, other]).out, 'Image committed.\n')
                    self.assert_same_disk(image, format, content, 'raw')
                    self.assert_clean(image, format)
                    extents = json.loads(run('qemu-img', 'map', '--output=json', image))
                    left = [e for e in extents if e['depth'] == 0 and e['present']]
                    self.assertEqual(bool(left), format == 'qed', 'only QED keeps what it holds')
                self.assert_same_disk(ours.parent / 'base', base_format, theirs.parent / 'base', base_format)
                if base_format != 'raw':
                    self.assert_clean(ours.parent / 'base', base_format)

    def test_the_overlay_can_be_kept(self):
        ours, theirs = self.chain('qcow2', SIZE, SIZE)
        before = sha256(ours)
        self.commit_both([ours, theirs], '-d')
        self.assertEqual(sha256(ours), before)
        self.assert_same_disk(ours.parent / 'middle', 'qcow2', theirs.parent / 'middle', 'qcow2')

    def test_into_an_image_further_down(self):
        for base_size in (SIZE, 9 * MiB):
            ours, theirs = self.chain('qcow2', base_size, SIZE)
            run('qemu-img', 'rebase', '-u', '-f', 'qcow2', '-b', 'middle', '-F', 'qcow2', ours)
            outcomes = [attempt(IMGFUSE, 'commit', '-b', ours.parent / 'base', ours),
                        attempt('qemu-img', 'commit', '-b', theirs.parent / 'base', theirs)]
            self.assertEqual([o.status for o in outcomes], [0, 0], outcomes[0])
            self.assert_same_disk(ours, 'qcow2', theirs, 'qcow2')
            self.assert_same_disk(ours.parent / 'base', 'qcow2', theirs.parent / 'base', 'qcow2')
            self.assert_clean(ours.parent / 'base')

    def test_bad_requests(self):
        ours, theirs = self.chain('raw', SIZE, SIZE)
        before = sha256(ours)
        for image in ('base', 'missing'):
            self.assertEqual(attempt(IMGFUSE, 'commit', ours.parent / image).status, 1)
            self.assertEqual(attempt('qemu-img', 'commit', theirs.parent / image).status, 1)
        self.assertEqual(self.commit_both([ours, theirs], '-b', 'nonsense').status, 1)
        self.assertEqual(sha256(ours), before)


class Rebase(JobCase):
    def make(self, old_size=SIZE, new_size=SIZE, size=SIZE, version=3, format='qcow2'):
        self.image('old', 'qcow2', old_size)
        self.image('new', 'qcow2', new_size, 'cluster_size=4k')
        run('cp', self.path('old'), self.path('like_old'))
        qemu_io(self.path('like_old'), 'qcow2', ['write -P 77 512k 100k'])
        options = 'compat=' + {2: '0.10', 3: '1.1'}[version] if format == 'qcow2' else ''
        return self.image('overlay', format, size, options, ('old', 'qcow2'), version)

    def test_safely(self):
        for old_size, new_size, size, version, format in (
                (SIZE, SIZE, SIZE, 3, 'qcow2'), (SIZE, SIZE, SIZE, 2, 'qcow2'), (3 * MiB, SIZE, SIZE, 3, 'qcow2'),
                (SIZE, 3 * MiB, SIZE, 3, 'qcow2'), (MiB + 512, 9 * MiB, 4 * MiB + 512, 3, 'qcow2'),
                (MiB + 512, 9 * MiB, 4 * MiB + 512, 2, 'qcow2'), (SIZE, SIZE, SIZE, 3, 'qed'),
                (MiB + 512, 9 * MiB, 4 * MiB + 512, 3, 'qed')):
            for options in (('-b', 'new', '-F', 'qcow2'), ('-b', 'like_old', '-F', 'qcow2'), ('-b', '')):
                with self.subTest(options, old=old_size, new=new_size, size=size, version=version, format=format):
                    overlay, content = self.make(old_size, new_size, size, version, format), self.path('content.raw')
                    run('qemu-img', 'convert', '-O', 'raw', overlay, content)
                    theirs = self.path('theirs')
                    run('cp', overlay, theirs)
                    run(IMGFUSE, 'rebase', '-f', format, *options, overlay)
                    run('qemu-img', 'rebase', '-f', format, *options, theirs)
                    self.assert_same_disk(overlay, format, content, 'raw')
                    self.assert_clean(overlay, format)
                    self.assertEqual(self.names(overlay), self.names(theirs))

    @staticmethod
    def names(image):
        info = json.loads(run('qemu-img', 'info', '--output=json', image))
        return info.get('backing-filename'), info.get('backing-filename-format')

    def test_what_is_alike_is_not_copied(self):
        overlay = self.make()
        before = overlay.stat().st_blocks
        run(IMGFUSE, 'rebase', '-b', 'like_old', '-F', 'qcow2', overlay)
        self.assertLess((overlay.stat().st_blocks - before) * 512, 500 * KiB)

    def test_unsafely(self):
        overlay = self.make()
        run('sync', overlay)  # which may take a block for the host's own tables
        before = overlay.stat().st_blocks
        run(IMGFUSE, 'rebase', '-u', '-b', 'new', '-F', 'qcow2', overlay)
        self.assertEqual(self.names(overlay), ('new', 'qcow2'))
        self.assertEqual(overlay.stat().st_blocks, before)
        run(IMGFUSE, 'rebase', '-u', '-b', 'not/there', '-F', 'raw', overlay)
        self.assertEqual(self.names(overlay), ('not/there', 'raw'))

    def test_bad_requests(self):
        overlay = self.make()
        before = sha256(overlay)
        for options in (('-b', 'missing', '-F', 'qcow2'), ('-b', 'new'), ('-b', 'overlay', '-F', 'qcow2'),
                        ('-b', 'new', '-F', 'nonsense'), ()):
            self.assertIn(attempt(IMGFUSE, 'rebase', *options, overlay).status, (1, 2), options)
            self.assertEqual(sha256(overlay), before)
            run('cp', overlay, self.path('theirs'))
            options = ['theirs' if option == 'overlay' else option for option in options]
            self.assertEqual(attempt('qemu-img', 'rebase', *options, self.path('theirs')).status, 1, options)


def setUpModule():
    print('IMG_SEED=%d' % SEED)


if __name__ == '__main__':
    unittest.main()
