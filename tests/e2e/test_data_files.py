"""Mounted disks whose data lies in an external data file."""
import os
import unittest

from harness import IMGFUSE, KiB, MiB, attempt, fallocate, imgfuse, pattern, punch_hole, run, zero_range
from test_bad_input import BadInputCase
from test_failures import close_quietly

SIZE = 16 * MiB


class DataFileCase(BadInputCase):
    def setUp(self):
        super().setUp()
        self.data = self.path('data.raw')

    def image(self, *options):
        image = self.path('disk.qcow2')
        imgfuse('create', '--data-file', 'data.raw', *options, image, SIZE)
        return image

    def assert_clean(self, image, format='qcow2'):
        """QEMU looks for the data file where it runs, imgfuse beside the image."""
        run('qemu-img', 'check', '-q', '-f', format, image, cwd=self.folder)
        imgfuse('check', image)

    def used(self):
        return os.stat(self.data).st_blocks * 512


class Mounted(DataFileCase):
    def test_the_data_file_is_found_beside_the_image_or_by_its_whole_name(self):
        for name in ('data.raw', self.data):
            with self.subTest(name):
                image = self.path('disk.qcow2')
                run('qemu-img', 'create', '-q', '-f', 'qcow2', '-o', 'data_file=%s' % name, image, SIZE, cwd=self.folder)
                mount = self.mount(image)
                mount.disk.open('r+b').write(b'bytes')
                mount.unmount()
                self.assertEqual(self.data.open('rb').read(5), b'bytes')
                self.assert_clean(image)

    def test_holes_and_preallocation_reach_the_data_file(self):
        for options in ((), ('--data-file-raw',), ('--extended-l2',)):
            with self.subTest(options):
                image = self.image(*options)
                mount = self.mount(image)
                fd = mount.open()
                content = bytearray(pattern(SIZE, 'all'))
                os.pwrite(fd, content, 0)
                os.fsync(fd)
                self.assertGreaterEqual(self.used(), SIZE)
                punch_hole(fd, 4 * MiB, 8 * MiB)
                content[4 * MiB:12 * MiB] = bytes(8 * MiB)
                self.assertLess(self.used(), 9 * MiB)
                zero_range(fd, 100, 300 * KiB)
                content[100:100 + 300 * KiB] = bytes(300 * KiB)
                fallocate(fd, 0, 4 * MiB, 8 * MiB)
                self.assertGreaterEqual(self.used(), SIZE - MiB)
                self.assertEqual(os.pread(fd, SIZE, 0), content)
                os.close(fd)
                mount.unmount()
                self.assert_clean(image)
                mount = self.mount(image, '-r')
                self.assertEqual(mount.disk.read_bytes(), content)
                mount.unmount()
                if '--data-file-raw' in options:
                    self.assertEqual(self.data.read_bytes(), content)

    def test_it_grows_and_shrinks_with_the_mounted_disk(self):
        for options in ((), ('--data-file-raw',)):
            with self.subTest(options):
                image = self.image(*options)
                mount = self.mount(image)
                mount.disk.write_bytes(pattern(SIZE, 'all'))
                for size, option in ((20 * MiB, '-q'), (5 * MiB + 512, '--shrink'), (SIZE, '-q')):
                    imgfuse('resize', option, mount.point, size)
                    self.assertEqual((os.stat(mount.disk).st_size, os.stat(self.data).st_size), (size, size))
                expected = pattern(SIZE, 'all')[:5 * MiB + 512] + bytes(SIZE - 5 * MiB - 512)
                self.assertEqual(mount.disk.read_bytes(), expected)
                mount.unmount()
                self.assert_clean(image)
                if options:
                    self.assertEqual(self.data.read_bytes(), expected)

    def test_what_was_synced_survives_the_death_of_the_daemon(self):
        for options in ((), ('--data-file-raw',)):
            with self.subTest(options):
                image = self.image(*options)
                mount = self.mount(image)
                fd = mount.open()
                os.pwrite(fd, pattern(3 * MiB, 'synced'), MiB)
                punch_hole(fd, 2 * MiB, MiB)
                os.fsync(fd)
                os.pwrite(fd, pattern(MiB, 'perhaps'), 8 * MiB)
                mount.kill()
                close_quietly(fd)
                mount.bury()
                self.assertIn(attempt('qemu-img', 'check', '-f', 'qcow2', image, cwd=self.folder).status, (0, 3))
                mount = self.mount(image)
                content = mount.disk.read_bytes()
                expected = bytearray(pattern(3 * MiB, 'synced'))
                expected[MiB:2 * MiB] = bytes(MiB)
                self.assertEqual(content[MiB:4 * MiB], expected)
                mount.unmount()
                if options:
                    self.assertEqual(self.data.read_bytes(), content)

    def test_a_full_host_of_the_data_file_is_an_error_of_the_writer_only(self):
        small = self.path('small')
        small.mkdir()
        run('mount', '-t', 'tmpfs', '-o', 'size=4M', 'none', small)
        image = self.path('disk.qcow2')
        imgfuse('create', '--data-file', small / 'data.raw', image, SIZE)
        mount = self.mount(image)
        fd = mount.open()
        os.pwrite(fd, pattern(MiB, 'first'), 0)
        os.fsync(fd)
        with self.assertRaisesRegex(OSError, 'No space'):
            for n in range(1, 16):
                os.pwrite(fd, pattern(MiB, n), n * MiB)
        punch_hole(fd, MiB, 15 * MiB)
        os.pwrite(fd, pattern(MiB, 'last'), 8 * MiB)
        os.fsync(fd)
        os.close(fd)
        mount.unmount()
        mount = self.mount(image)
        self.assertEqual(mount.disk.read_bytes(), pattern(MiB, 'first') + bytes(7 * MiB) + pattern(MiB, 'last') +
                         bytes(7 * MiB))
        mount.unmount()
        self.assert_clean(image)
        run('umount', small)


class Refused(DataFileCase):
    def test_one_that_is_missing(self):
        """Nobody who needs the data goes on; looking at the metadata needs none."""
        image, target = self.image(), self.path('target')
        self.data.unlink()
        says = ['data file %s: no such file' % self.data]
        self.refuse_mount(image, says=says)
        self.refuse_mount(image, '-r', says=says)
        for arguments in (('map', image), ('convert', image, target), ('measure', '-O', 'raw', image),
                          ('resize', image, '32M'), ('bitmap', 'add', image, 'b'), ('rebase', '-b', '', image)):
            with self.subTest(arguments):
                self.refuse(*arguments, says=says)
        self.assertIn('data file: data.raw', imgfuse('info', image))
        imgfuse('check', image)

    def test_what_is_no_data_file_or_lies_elsewhere(self):
        image = self.image()
        for target, says in (('disk.qcow2', 'the image itself'), ('/etc/passwd', '--allow-path /etc'),
                             ('/dev/null', '--allow-path /dev'), ('.', 'directory'), ('data.raw', 'symbolic links')):
            with self.subTest(target):
                self.data.unlink()
                self.data.symlink_to(target)
                self.refuse_mount(image, says=['data.raw', says])

    def test_one_elsewhere_needs_to_be_allowed(self):
        inner, outer = self.path('inner'), self.path('outer')
        inner.mkdir()
        outer.mkdir()
        image, data = self.image().rename(inner / 'disk.qcow2'), self.data.rename(outer / 'data.raw')
        (inner / 'data.raw').symlink_to(data)
        self.refuse_mount(image, says=['--allow-path', str(outer)])
        self.mount(image, '--allow-path', outer).unmount()
        self.mount(image, '--data-file', data).unmount()

    def test_one_that_somebody_else_writes_to(self):
        image = self.image()
        imgfuse('create', '--data-file', 'other.raw', self.path('other.qcow2'), SIZE)
        self.path('other.raw').unlink()
        self.path('other.raw').symlink_to(self.data)
        mount = self.mount(image)
        outcome = attempt(IMGFUSE, 'map', self.path('other.qcow2'))
        self.assertEqual(outcome.status, 1, outcome)
        self.assertIn('is in use by', outcome.err)
        mount.unmount()

    def test_snapshots(self):
        image = self.image()
        for action in ('create', 'apply', 'delete'):
            self.refuse('snapshot', action, image, 's', says=['data file cannot have snapshots'])
        self.assertEqual(imgfuse('snapshot', 'list', image), '')
        self.refuse_mount(image, '-o', 'snapshot=s', says=['data file cannot have snapshots'])
        self.refuse_mount(image, '-o', 'compress=zlib', says=['data file has no compressed clusters'])


if __name__ == '__main__':
    unittest.main()
