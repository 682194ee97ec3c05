"""Jobs that cannot be done: one clear line, and nothing is changed or left behind."""
import os
import unittest

from harness import IMGFUSE, KiB, MiB, attempt, run, sha256
from test_bad_input import BadInputCase, put


class Convert(BadInputCase):
    def setUp(self):
        super().setUp()
        self.image = self.qcow2('source.qcow2', '64M')
        run('qemu-io', '-f', 'qcow2', '-c', 'write -P 1 0 8M', self.image)
        self.target = self.path('target')

    def test_a_source_that_cannot_be_opened_leaves_an_existing_target_alone(self):
        self.target.write_bytes(b'precious' * 1000)
        self.refuse('convert', self.path('missing'), self.target, says=['missing', 'no such file'])
        put(self.image, 4, '>I', 9)
        self.refuse('convert', '-f', 'qcow2', self.image, self.target, says=['version 9'])

    def test_options_that_make_no_sense_leave_an_existing_target_alone(self):
        self.target.write_bytes(b'precious' * 1000)
        for options in (['-O', 'qcow2', '-o', 'cluster_size=1000'], ['-O', 'raw', '-B', 'source.qcow2', '-F', 'qcow2'],
                        ['-O', 'raw', '-o', 'preallocation=metadata'], ['-c'], ['-O', 'vmdk'],
                        ['-O', 'qcow2', '-c', '-o', 'preallocation=full']):
            with self.subTest(options):
                self.refuse('convert', *options, self.image, self.target)

    def test_usage(self):
        self.refuse('convert', self.image, status=2)
        self.refuse('convert', '-S', '1000', self.image, self.target, status=2, says=['512'])
        self.refuse('convert', '-m', '0', self.image, self.target, status=2)
        self.refuse('convert', '-o', 'nothing=1', self.image, self.target, status=2, says=['nothing'])

    def test_an_image_is_not_converted_into_itself_or_into_its_backing_file(self):
        run('qemu-img', 'create', '-q', '-f', 'qcow2', '-b', 'source.qcow2', '-F', 'qcow2', self.path('overlay.qcow2'))
        for options in ([], ['-U'], ['-O', 'qcow2'], ['-n', '-O', 'qcow2', '-U']):
            self.refuse('convert', *options, self.image, self.image, says=['source.qcow2'])
            self.refuse('convert', *options, self.path('overlay.qcow2'), self.image, says=['source.qcow2'])
        os.link(self.image, self.path('link'))
        self.refuse('convert', '-U', self.image, self.path('link'))

    def test_a_target_in_use_and_a_target_that_is_no_file(self):
        point = self.path('point')
        point.touch()
        target = self.qcow2('used.qcow2')
        mount = self.mount(target, point=point)
        self.assertEqual(attempt(IMGFUSE, 'convert', '-O', 'qcow2', self.image, target).status, 1)
        mount.unmount()
        self.refuse('convert', self.image, self.folder, says=['not a regular file'])
        self.refuse('convert', self.image, self.path('no/such/folder'), says=['no such file'])
        self.refuse('convert', '-n', self.image, self.path('absent'), says=['absent', 'no such file'])

    def test_a_full_device_removes_the_target(self):
        small = self.path('small')
        small.mkdir()
        run('mount', '-t', 'tmpfs', '-o', 'size=4M', 'none', small)
        for format in ('raw', 'qcow2'):
            outcome = self.refuse('convert', '-O', format, self.image, small / 'target')
            self.assertIn('o space left', outcome.err)
            self.assertEqual(list(small.iterdir()), [])
        run('umount', small)

    def test_a_damaged_source_removes_the_target(self):
        with open(self.image, 'r+b') as file:
            file.truncate(1 * MiB)  # the tables stay; the data behind reads as zeros or as an error
        put(self.image, 0x40000 + 8 * 60, '>Q', 1 << 63 | 0x123)
        outcome = attempt(IMGFUSE, 'convert', self.image, self.target)
        self.assertEqual(outcome.status, 1, outcome)
        self.assertFalse(self.target.exists())

    def test_a_target_that_is_too_short(self):
        self.raw('short.raw', 1 * MiB)
        self.refuse('convert', '-n', '-O', 'raw', self.image, self.path('short.raw'), says=['shorter'])

    def test_names_outside_the_directory_need_allow_path(self):
        run('qemu-img', 'create', '-q', '-f', 'qcow2', '-b', '/etc/passwd', '-F', 'raw', self.path('leaky.qcow2'))
        self.refuse('convert', self.path('leaky.qcow2'), self.target, says=['--allow-path'])


class Compare(BadInputCase):
    def test_statuses(self):
        image = self.qcow2()
        self.refuse('compare', image, self.path('missing'), status=2, says=['missing'])
        self.refuse('compare', self.path('missing'), image, status=2, says=['missing'])
        self.refuse('compare', image, status=2)
        self.refuse('compare', '-F', 'vmdk', image, image, status=2)

    def test_a_map_that_cannot_be_read(self):
        image, other = self.qcow2(), self.raw('other.raw')
        run('qemu-io', '-f', 'qcow2', '-c', 'write -P 1 0 64k', image)
        put(image, 0x40000, '>Q', 1 << 63 | 0x123)
        self.refuse('compare', '-f', 'qcow2', '-F', 'raw', image, other, status=3)
        self.refuse('compare', '-f', 'raw', '-F', 'qcow2', other, image, status=3)


class Resize(BadInputCase):
    def test_what_cannot_be_done_changes_nothing(self):
        image, raw = self.qcow2(), self.raw()
        for target in (image, raw):
            for size in ('1M', '-1M', '-1T', 'nonsense', '', '8E', '+8E'):
                with self.subTest(target=target.name, size=size):
                    outcome = attempt(IMGFUSE, 'resize', target, size)
                    self.refuse('resize', target, size, status=outcome.status)
                    self.assertIn(outcome.status, (1, 2))
        self.refuse('resize', image, '1M', says=['shrink'])
        self.refuse('resize', image, '100000', says=['shrink'])
        self.refuse('resize', '--preallocation=some', image, '1G', status=2, says=['some'])
        self.refuse('resize', '--preallocation=metadata', raw, '1G', says=['metadata'])
        self.refuse('resize', self.path('missing'), '1G', says=['missing'])
        self.refuse('resize', image, status=2)


class Measure(BadInputCase):
    def test_usage_and_failures(self):
        image = self.qcow2()
        self.refuse('measure', status=2)
        self.refuse('measure', '--size', '1G', image, status=2)
        self.refuse('measure', '--size', 'x', status=2)
        self.refuse('measure', '-O', 'vmdk', image, says=['vmdk'])
        self.refuse('measure', '-O', 'qcow2', '-o', 'cluster_size=0', '--size', '1G', says=['cluster size 0'])
        self.refuse('measure', self.path('missing'), says=['missing'])


class Bench(BadInputCase):
    def test_it_changes_nothing_that_it_should_not(self):
        image = self.qcow2('disk.qcow2', '4M')
        before = sha256(image)
        self.refuse('bench', '-w', '-U', image, says=['force-share'])
        self.refuse('bench', '-w', '-l', '1', image, says=['snapshot'])
        self.refuse('bench', self.path('missing'), says=['missing', 'no such file'])
        for arguments in (('-s', '0'), ('-s', '5M'), ('-o', '4M'), ('-s', '2M', '-d', '1000'),
                          ('--flush-interval', '3')):
            with self.subTest(arguments):
                self.refuse('bench', *arguments, image)
        for option, value, says in (('-c', '0', 'count: "0" is not a number from 1 to'), ('-c', '-5', '"-5"'),
                                    ('-c', '99999999999999999999', '"99999999999999999999"'), ('-c', '3x', '"3x"'),
                                    ('-d', '0', 'from 1 to 1024'), ('-d', '2000', 'from 1 to 1024'),
                                    ('--pattern', '256', 'from 0 to 255'), ('-s', 'x', 'buffer-size: "x"'),
                                    ('--pattern', '0x100', 'from 0 to 255'),
                                    ('--pattern', '0x', 'from 0 to 255'), ('--pattern', '', 'from 0 to 255'),
                                    ('--flush-interval', '-1', 'flush-interval: "-1" is not a whole number'),
                                    ('-t', 'fast', 'writethrough'), ('--output', 'xml', 'neither human nor json'),
                                    ('-i', 'native', '')):
            with self.subTest(option=option, value=value):
                self.refuse('bench', option, value, image, status=2, says=[says])
        self.assertEqual(sha256(image), before)

    def test_an_image_that_can_only_be_read(self):
        image = self.qcow2('disk.qcow2', '4M')
        put(image, 72, '>Q', 2)  # marked as corrupt
        before = sha256(image)
        outcome = attempt(IMGFUSE, 'bench', '-w', '-c', '1', image)
        self.assertEqual(outcome.status, 1)
        self.assertIn('can only be read', outcome.err)
        self.assertEqual(sha256(image), before)


class CommitAndRebase(BadInputCase):
    def setUp(self):
        super().setUp()
        self.base = self.qcow2('base.qcow2', '8M')
        self.overlay = self.path('overlay.qcow2')
        run('qemu-img', 'create', '-q', '-f', 'qcow2', '-b', 'base.qcow2', '-F', 'qcow2', self.overlay)
        run('qemu-io', '-f', 'qcow2', '-c', 'write -P 3 0 1M', self.overlay)

    def test_commit_without_a_backing_file_or_to_a_stranger(self):
        other = self.qcow2('other.qcow2', '8M')
        self.refuse('commit', self.base, says=['no backing file'])
        self.refuse('commit', '-b', other, self.overlay, says=['other.qcow2', 'not in the backing chain'])
        self.refuse('commit', self.path('missing'), says=['missing'])
        self.refuse('commit', status=2)

    def test_commit_while_the_base_is_used(self):
        mount = self.mount(self.base, '--read-only')
        outcome = attempt(IMGFUSE, 'commit', self.overlay)
        self.assertEqual(outcome.status, 1, outcome)
        self.assertIn('base.qcow2', outcome.err)
        mount.unmount()
        self.assertEqual(run(IMGFUSE, 'commit', self.overlay), 'Image committed.\n')

    def test_commit_onto_a_full_device_can_be_repeated(self):
        content = sha256_of_disk(self.overlay)
        small = self.path('small')
        small.mkdir()
        run('mount', '-t', 'tmpfs', '-o', 'size=1M', 'none', small)
        run('mv', self.base, small)
        os.symlink(small / 'base.qcow2', self.base)
        outcome = attempt(IMGFUSE, 'commit', '--allow-path', small, self.overlay)
        self.assertEqual(outcome.status, 1, outcome)
        self.assertIn('o space left', outcome.err)
        self.assertEqual(sha256_of_disk(self.overlay), content)
        run('mount', '-o', 'remount,size=8M', small)
        run(IMGFUSE, 'commit', '--allow-path', small, self.overlay)
        self.assertEqual(sha256_of_disk(self.overlay), content)
        self.assert_clean(small / 'base.qcow2')
        run('umount', small)

    def test_rebase(self):
        raw = self.raw('plain.raw')
        for options, says in ((['-b', 'missing', '-F', 'qcow2'], ['missing']), (['-b', 'base.qcow2'], ['format']),
                              (['-b', 'overlay.qcow2', '-F', 'qcow2'], ['overlay.qcow2']),
                              (['-b', 'plain.raw', '-F', 'vmdk'], ['vmdk']),
                              (['-b', 'plain.raw', '-F', 'qcow2'], ['plain.raw']),
                              (['-b', 'nbd://host/', '-F', 'raw'], ['nbd']), (['-u', '-b', 'x' * 2000, '-F', 'raw'], [])):
            with self.subTest(options):
                self.refuse('rebase', *options, self.overlay, says=says)
        self.refuse('rebase', '-b', 'base.qcow2', '-F', 'qcow2', raw, says=['raw'])
        self.refuse('rebase', self.overlay, status=2)
        run('qemu-img', 'create', '-q', '-f', 'qcow2', '-b', 'overlay.qcow2', '-F', 'qcow2', self.path('top.qcow2'))
        self.refuse('rebase', '-b', 'top.qcow2', '-F', 'qcow2', self.overlay, says=['stands on it'])


def sha256_of_disk(image):
    """As imgfuse reads it, wherever its chain lies."""
    raw = image.parent / 'content.raw'
    run(IMGFUSE, 'convert', '--allow-path', '/', image, raw)
    try:
        return sha256(raw)
    finally:
        raw.unlink()


if __name__ == '__main__':
    unittest.main()
