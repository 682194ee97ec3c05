"""The presented file behaves as an ordinary raw file does."""
import errno
import mmap
import os
import time
import unittest

from harness import (IMGFUSE, KiB, MiB, ImageCase, attempt, fallocate, pattern, punch_hole, run, sha256, wait_until,
                     zero_range)


def used(path):
    """Host bytes in use."""
    return os.stat(path).st_blocks * 512


def wait_for_use(disk, expected):
    """A mount counts it in the background at first."""
    wait_until(lambda: used(disk) == expected, 60, 'the use of %d bytes' % expected)


class Stat(ImageCase):
    def test_block_size_is_the_cluster_size(self):
        for cluster in (4 * KiB, 64 * KiB, 2 * MiB):
            with self.subTest(cluster):
                mount = self.mount(self.qcow2('c%d.qcow2' % cluster, '64M', '-o', 'cluster_size=%d' % cluster))
                self.assertEqual(os.stat(mount.disk).st_blksize, cluster)
                mount.unmount()

    def test_blocks_are_the_allocated_guest_data(self):
        image = self.qcow2()
        mount = self.mount(image)
        self.assertEqual(os.stat(mount.disk).st_blocks, 0)
        with open(mount.disk, 'r+b') as disk:
            disk.write(pattern(10 * MiB, 'blocks'))
        wait_for_use(mount.disk, 10 * MiB)
        mount.unmount()

        mount = self.mount(image)
        wait_for_use(mount.disk, 10 * MiB)
        mount.unmount()

    def test_mtime_changes_with_writes_only(self):
        mount = self.mount(self.qcow2())
        first = os.stat(mount.disk).st_mtime_ns
        time.sleep(0.02)
        with open(mount.disk, 'rb') as disk:
            disk.read(MiB)
        self.assertEqual(os.stat(mount.disk).st_mtime_ns, first)
        with open(mount.disk, 'r+b') as disk:
            disk.write(b'x')
        second = os.stat(mount.disk).st_mtime_ns
        self.assertGreater(second, first)
        time.sleep(0.02)
        self.assertEqual(os.stat(mount.disk).st_mtime_ns, second)
        mount.unmount()

    def test_the_size_may_be_odd(self):
        image = self.qcow2('odd.qcow2', 5 * MiB + 3 * 512)
        mount = self.mount(image)
        self.assertEqual(os.stat(mount.disk).st_size, 5 * MiB + 3 * 512)
        with open(mount.disk, 'rb') as disk:
            self.assertEqual(len(disk.read()), 5 * MiB + 3 * 512)
        mount.unmount()


class Bytes(ImageCase):
    def test_any_offset_and_size(self):
        mount = self.mount(self.qcow2())
        fd = mount.open()
        model = bytearray(8 * MiB)
        for n in range(300):
            length = self.random.choice((1, 511, 513, 4095, 65537, 300001))
            offset = self.random.randrange(len(model) - length)
            data = pattern(length, n)
            self.assertEqual(os.pwrite(fd, data, offset), length)
            model[offset:offset + length] = data
        self.assertEqual(os.pread(fd, len(model), 0), model)
        os.close(fd)
        mount.unmount()

    def test_direct_and_buffered_access_see_each_other(self):
        mount = self.mount(self.qcow2())
        buffered, direct = mount.open(), mount.open(os.O_RDWR | os.O_DIRECT)
        buffer = mmap.mmap(-1, 64 * KiB)
        for n in range(60):
            offset = self.random.randrange(1000) * 4096
            if n % 2:
                buffer[:] = pattern(64 * KiB, n)
                os.pwritev(direct, [buffer], offset)
                self.assertEqual(os.pread(buffered, 64 * KiB, offset), pattern(64 * KiB, n))
            else:
                os.pwrite(buffered, pattern(64 * KiB, n), offset)
                os.preadv(direct, [buffer], offset)
                self.assertEqual(buffer[:], pattern(64 * KiB, n))
        os.close(buffered)
        os.close(direct)
        mount.unmount()

    def test_a_shared_mapping_writes(self):
        image = self.qcow2()
        mount = self.mount(image)
        fd = mount.open()
        with mmap.mmap(fd, 8 * MiB) as memory:
            memory[123456:123456 + MiB] = pattern(MiB, 'mmap')
            memory.flush()
        os.fsync(fd)
        os.close(fd)
        mount.unmount()
        mount = self.mount(image, '-r')
        fd = mount.open(os.O_RDONLY)
        self.assertEqual(os.pread(fd, MiB, 123456), pattern(MiB, 'mmap'))
        os.close(fd)
        mount.unmount()

    def test_fsync_and_fdatasync(self):
        mount = self.mount(self.qcow2())
        fd = mount.open()
        os.fsync(fd)
        os.pwrite(fd, b'x', 0)
        os.fdatasync(fd)
        os.fsync(fd)
        os.close(fd)
        mount.unmount()

    def test_dd_and_cp_copy_the_disk(self):
        image = self.qcow2()
        mount = self.mount(image)
        source = self.path('source')
        source.write_bytes(pattern(20 * MiB, 'dd'))
        run('dd', 'if=%s' % source, 'of=%s' % mount.disk, 'bs=1M', 'seek=3', 'conv=notrunc,fsync', 'status=none')
        run('cp', '--sparse=always', mount.disk, self.path('copy'))
        self.assertEqual(sha256(self.path('copy')), sha256(mount.disk))
        self.assertLess(used(self.path('copy')), 24 * MiB)
        mount.unmount()

    def test_reading_stops_at_the_end(self):
        mount = self.mount(self.qcow2())
        fd = mount.open()
        self.assertEqual(len(os.pread(fd, 8192, 64 * MiB - 4096)), 4096)
        self.assertEqual(os.pread(fd, 4096, 64 * MiB), b'')
        os.close(fd)
        mount.unmount()


class Holes(ImageCase):
    def test_seek_data_and_hole_follow_the_map(self):
        mount = self.mount(self.qcow2())
        fd = mount.open()
        self.assertEqual(os.lseek(fd, 0, os.SEEK_HOLE), 0)
        with self.assertRaises(OSError) as no_data:
            os.lseek(fd, 0, os.SEEK_DATA)
        self.assertEqual(no_data.exception.errno, errno.ENXIO)

        os.pwrite(fd, pattern(MiB, 'seek'), 4 * MiB)
        os.pwrite(fd, pattern(MiB, 'seek'), 32 * MiB)
        zero_range(fd, 40 * MiB, MiB)

        self.assertEqual(os.lseek(fd, 0, os.SEEK_DATA), 4 * MiB)
        self.assertEqual(os.lseek(fd, 4 * MiB, os.SEEK_HOLE), 5 * MiB)
        self.assertEqual(os.lseek(fd, 5 * MiB, os.SEEK_DATA), 32 * MiB)
        self.assertEqual(os.lseek(fd, 32 * MiB, os.SEEK_HOLE), 33 * MiB)
        with self.assertRaises(OSError):
            os.lseek(fd, 33 * MiB, os.SEEK_DATA)
        os.close(fd)
        mount.unmount()

    def test_seek_looks_through_the_backing_chain(self):
        base = self.raw('base.raw', 16 * MiB)
        with open(base, 'r+b') as file:
            file.seek(8 * MiB)
            file.write(pattern(MiB, 'base'))
        image = self.path('overlay.qcow2')
        run('qemu-img', 'create', '-q', '-f', 'qcow2', '-b', 'base.raw', '-F', 'raw', image)
        mount = self.mount(image)
        fd = mount.open()
        self.assertEqual(os.lseek(fd, 0, os.SEEK_DATA), 8 * MiB)
        self.assertEqual(os.lseek(fd, 8 * MiB, os.SEEK_HOLE), 9 * MiB)
        os.close(fd)
        mount.unmount()

    def test_punched_holes_read_as_zeros_and_free_host_space(self):
        for kind in ('qcow2', 'raw'):
            with self.subTest(kind):
                image = self.qcow2() if kind == 'qcow2' else self.raw()
                mount = self.mount(image, '--format', kind)
                fd = mount.open()
                data = pattern(16 * MiB, 'punch')
                os.pwrite(fd, data, 0)
                os.fsync(fd)
                full = used(image)
                punch_hole(fd, 2 * MiB + 1000, 8 * MiB)
                os.fsync(fd)
                expected = data[:2 * MiB + 1000] + bytes(8 * MiB) + data[10 * MiB + 1000:]
                self.assertEqual(os.pread(fd, 16 * MiB, 0), expected)
                os.close(fd)
                mount.unmount()
                self.assertLess(used(image), full - 7 * MiB)

    def test_zero_range_reads_as_zeros(self):
        mount = self.mount(self.qcow2())
        fd = mount.open()
        data = pattern(4 * MiB, 'zero')
        os.pwrite(fd, data, 0)
        zero_range(fd, 100, MiB)
        self.assertEqual(os.pread(fd, 4 * MiB, 0), data[:100] + bytes(MiB) + data[100 + MiB:])
        os.close(fd)
        mount.unmount()

    def test_zeros_that_are_written_take_space_unless_they_are_looked_for(self):
        for mode, over_nothing, over_data in (('off', 4, 8), ('on', 0, 8), ('unmap', 0, 4)):
            with self.subTest(mode):
                image = self.qcow2(mode + '.qcow2')
                mount = self.mount(image, '-o', 'detect_zeroes=' + mode)
                with open(mount.disk, 'r+b') as disk:
                    disk.write(bytes(4 * MiB))
                wait_for_use(mount.disk, over_nothing * MiB)
                with open(mount.disk, 'r+b') as disk:
                    disk.write(pattern(8 * MiB, 'data'))
                    disk.seek(2 * MiB)
                    disk.write(bytes(4 * MiB))
                wait_for_use(mount.disk, over_data * MiB)
                mount.unmount()
                self.assert_clean(image)
                mount = self.mount(image, '-r')
                data = pattern(8 * MiB, 'data')
                self.assertEqual(mount.disk.read_bytes()[:8 * MiB], data[:2 * MiB] + bytes(4 * MiB) + data[6 * MiB:])
                mount.unmount()
        self.assertEqual(attempt(IMGFUSE, self.qcow2(), self.folder, '-o', 'detect_zeroes=yes').status, 2)

    def test_preallocation_takes_host_space_and_changes_no_byte(self):
        for kind in ('qcow2', 'raw'):
            with self.subTest(kind):
                image = self.qcow2() if kind == 'qcow2' else self.raw()
                mount = self.mount(image, '--format', kind)
                fd = mount.open()
                os.pwrite(fd, b'here', 10 * MiB)
                fallocate(fd, 0, 8 * MiB, 8 * MiB)
                content = os.pread(fd, 8 * MiB, 8 * MiB)
                self.assertEqual(content, bytes(2 * MiB) + b'here' + bytes(6 * MiB - 4))
                os.fsync(fd)
                wait_until(lambda: used(mount.disk) >= 8 * MiB, 60, 'the counting of 8 MiB')
                self.assertGreaterEqual(used(image), 8 * MiB)
                os.close(fd)
                mount.unmount()

    def test_a_hole_in_an_overlay_hides_the_backing_file(self):
        base = self.raw('base.raw', 16 * MiB)
        base.write_bytes(pattern(16 * MiB, 'base'))
        for version in ('0.10', '1.1'):
            with self.subTest(version):
                image = self.path('overlay%s.qcow2' % version)
                run('qemu-img', 'create', '-q', '-f', 'qcow2', '-o', 'compat=' + version, '-b', 'base.raw', '-F', 'raw',
                    image)
                mount = self.mount(image)
                fd = mount.open()
                punch_hole(fd, MiB, 4 * MiB)
                expected = bytearray(pattern(16 * MiB, 'base'))
                expected[MiB:5 * MiB] = bytes(4 * MiB)
                self.assertEqual(os.pread(fd, 16 * MiB, 0), expected)
                os.close(fd)
                mount.unmount()
                self.assert_clean(image)


class Truncate(ImageCase):
    def test_growing(self):
        for kind in ('qcow2', 'raw'):
            with self.subTest(kind):
                image = self.qcow2() if kind == 'qcow2' else self.raw()
                mount = self.mount(image, '--format', kind)
                with open(mount.disk, 'r+b') as disk:
                    disk.write(b'front')
                os.truncate(mount.disk, 200 * MiB)
                self.assertEqual(os.stat(mount.disk).st_size, 200 * MiB)
                with open(mount.disk, 'r+b') as disk:
                    disk.seek(150 * MiB)
                    self.assertEqual(disk.read(4096), bytes(4096))
                    disk.seek(199 * MiB)
                    disk.write(b'back')
                mount.unmount()
                self.assertIn('"virtual-size": %d' % (200 * MiB),
                              run('qemu-img', 'info', '--output=json', '-f', kind, image))
                mount = self.mount(image, '-r', '--format', kind)
                with open(mount.disk, 'rb') as disk:
                    self.assertEqual(disk.read(5), b'front')
                    disk.seek(199 * MiB)
                    self.assertEqual(disk.read(4), b'back')
                mount.unmount()
                if kind == 'qcow2':
                    self.assert_clean(image)

    def test_growing_past_a_longer_backing_file_shows_zeros(self):
        self.raw('base.raw', 16 * MiB).write_bytes(pattern(16 * MiB, 'base'))
        image = self.path('overlay.qcow2')
        run('qemu-img', 'create', '-q', '-f', 'qcow2', '-b', 'base.raw', '-F', 'raw', image, '4M')
        mount = self.mount(image)
        os.truncate(mount.disk, 20 * MiB)
        with open(mount.disk, 'rb') as disk:
            content = disk.read()
        self.assertEqual(content, pattern(16 * MiB, 'base')[:4 * MiB] + bytes(16 * MiB))
        mount.unmount()
        self.assert_clean(image)

    def test_shrinking_works_or_is_refused_and_loses_nothing(self):
        image = self.qcow2()
        mount = self.mount(image)
        fd = mount.open()
        os.pwrite(fd, b'back', 60 * MiB)
        os.close(fd)
        if attempt('truncate', '-s', '32M', mount.disk).status != 0:
            self.assertEqual(os.stat(mount.disk).st_size, 64 * MiB)
            with open(mount.disk, 'rb') as disk:
                disk.seek(60 * MiB)
                self.assertEqual(disk.read(4), b'back')
        mount.unmount()
        self.assert_clean(image)

    def test_opening_with_o_trunc_does_not_empty_the_disk(self):
        image = self.qcow2()
        mount = self.mount(image)
        with open(mount.disk, 'r+b') as disk:
            disk.write(b'precious')
        try:
            os.close(os.open(mount.disk, os.O_WRONLY | os.O_TRUNC))
        except OSError:
            pass
        with open(mount.disk, 'rb') as disk:
            self.assertEqual(disk.read(8), b'precious')
        mount.unmount()


if __name__ == '__main__':
    unittest.main()
