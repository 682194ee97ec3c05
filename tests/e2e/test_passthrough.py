"""-o passthrough: the kernel reads and writes the host file by itself. Needs Linux 6.9 and root."""
import mmap
import os
import re
import subprocess
import unittest

from harness import IMGFUSE, MiB, ImageCase, attempt, pattern, punch_hole, run
from test_snapshots import Control, socket_of

READING, WRITING = ('pread64', 'preadv', 'preadv2'), ('pwrite64', 'pwritev', 'pwritev2')


def kernel():
    return tuple(int(n) for n in re.match(r'(\d+)\.(\d+)', os.uname().release).groups())


@unittest.skipIf(kernel() < (6, 9), 'the kernel has no passthrough')
class Passthrough(ImageCase):
    def passes_through(self, mount):
        control = Control(socket_of(mount.pid))
        self.addCleanup(control.close)
        return control.ask('info')['return']['passthrough']

    def calls(self, mount, names, work):
        """How many of the system calls the daemon makes during `work`."""
        return len(re.findall(r'^\d+ +(?:%s)\(' % '|'.join(names), self.trace(mount, names, work), re.MULTILINE))

    def test_buffered_reads_and_writes_of_a_raw_image_make_no_requests(self):
        image = self.raw(size=16 * MiB)
        mount = self.mount(image, '--format', 'raw', '-o', 'passthrough')
        self.assertTrue(self.passes_through(mount))
        data = pattern(3 * MiB, 1)

        def work():
            with open(mount.disk, 'r+b') as file:
                file.seek(MiB)
                file.write(data)
                file.seek(0)
                self.assertEqual(file.read(), bytes(MiB) + data + bytes(12 * MiB))

        self.assertEqual(self.calls(mount, READING + WRITING, work), 0)
        self.assertEqual(image.read_bytes()[MiB:4 * MiB], data)
        mount.unmount()

    def test_all_ways_of_access_show_the_same_bytes(self):
        image = self.raw(size=8 * MiB)
        mount = self.mount(image, '--format', 'raw', '-o', 'passthrough')
        buffered = mount.open()
        direct = mount.open(os.O_RDWR | os.O_DIRECT)
        page = mmap.mmap(-1, 65536)
        for number in range(8):
            page[:] = pattern(65536, number)
            os.pwrite(direct, page, number * MiB)
            self.assertEqual(os.pread(buffered, 65536, number * MiB), page[:])
            text = pattern(5000, 100 + number)
            os.pwrite(buffered, text, number * MiB + 100)
            self.assertEqual(os.preadv(direct, [page], number * MiB), 65536)
            self.assertEqual(page[100:5100], text)
        with mmap.mmap(buffered, 8 * MiB) as mapped:
            mapped[123:130] = b'mapped!'
            mapped.flush()
        os.fsync(buffered)
        run('fallocate', '--punch-hole', '--offset', '2M', '--length', '1M', mount.disk)
        self.assertEqual(os.pread(buffered, MiB, 2 * MiB), bytes(MiB))
        shown = mount.disk.read_bytes()
        os.close(buffered)
        os.close(direct)
        mount.unmount()
        self.assertEqual(image.read_bytes(), shown)
        self.assertEqual(shown[123:130], b'mapped!')

    def test_fsync_reaches_the_host_each_time(self):
        mount = self.mount(self.raw(), '--format', 'raw', '-o', 'passthrough')
        fd = mount.open()

        def work():
            for number in range(5):
                os.pwrite(fd, b'new', number * 4096)
                os.fsync(fd)

        self.assertGreaterEqual(self.calls(mount, ('fsync', 'fdatasync'), work), 5)
        os.close(fd)
        mount.unmount()

    def test_jobs_are_refused_since_they_have_to_know_of_each_write(self):
        mount = self.mount(self.raw(size=MiB), '--format', 'raw', '-o', 'passthrough')
        outcome = attempt(IMGFUSE, 'mirror', mount.point, self.path('copy.raw'), '-O', 'raw')
        self.assertEqual(outcome.status, 1, outcome)
        self.assertIn('for jobs, mount it without -o passthrough', outcome.err)
        mount.unmount()

    def with_raw_data(self):
        image = self.path('disk.qcow2')
        run('qemu-img', 'create', '-q', '-f', 'qcow2', '-o', 'data_file=%s,data_file_raw=on' % self.path('disk.data'), image,
            '8M')
        run('qemu-io', '-f', 'qcow2', '-c', 'write -P 7 1M 1M', image)
        return image

    def test_a_raw_data_file_that_is_only_read_passes_through(self):
        image = self.with_raw_data()
        mount = self.mount(image, '-r', '-o', 'passthrough')
        self.assertTrue(self.passes_through(mount))
        self.assertEqual(mount.disk.read_bytes(), bytes(MiB) + b'\7' * MiB + bytes(6 * MiB))
        mount.unmount()

    def test_a_raw_data_file_is_written_by_the_kernel_alone(self):
        image = self.with_raw_data()
        mount = self.mount(image, '-o', 'passthrough')
        self.assertTrue(self.passes_through(mount))
        data = pattern(2 * MiB, 1)
        fd = mount.open()
        self.assertEqual(self.calls(mount, READING + WRITING, lambda: os.pwrite(fd, data, 3 * MiB - 512)), 0)
        self.assertGreaterEqual(self.calls(mount, ('fsync', 'fdatasync'), lambda: os.fsync(fd)), 1)
        punch_hole(fd, MiB, MiB)
        os.pwrite(fd, b'in the hole', MiB + 100)
        os.truncate(mount.disk, 12 * MiB)
        os.pwrite(fd, data, 10 * MiB)
        shown = mount.disk.read_bytes()
        os.close(fd)
        mount.unmount()
        self.assertEqual(shown[:3 * MiB - 512], bytes(MiB + 100) + b'in the hole' + bytes(2 * MiB - 111 - 512))
        self.assertEqual((shown[3 * MiB - 512:][:2 * MiB], shown[10 * MiB:]), (data, data))
        self.assertEqual(self.path('disk.data').read_bytes(), shown)
        run('qemu-img', 'compare', '-f', 'qcow2', '-F', 'raw', image, self.path('disk.data'))
        self.assert_clean(image)

    def test_a_raw_data_file_whose_changes_are_recorded_comes_through_us(self):
        image = self.with_raw_data()
        run('qemu-img', 'bitmap', '--add', image, 'changes')
        mount = self.mount(image, '-o', 'passthrough')
        self.assertFalse(self.passes_through(mount))
        mount.unmount()
        run('qemu-img', 'bitmap', '--remove', image, 'changes')
        mount = self.mount(image, '-o', 'passthrough')
        self.assertTrue(self.passes_through(mount))
        outcome = attempt(IMGFUSE, 'bitmap', 'add', mount.point, 'changes')
        self.assertEqual(outcome.status, 1, outcome)
        self.assertIn('for bitmaps, mount it without -o passthrough', outcome.err)
        mount.unmount()

    def test_a_raw_data_file_with_clusters_of_zeros_comes_through_us(self):
        image = self.with_raw_data()
        run('qemu-io', '-f', 'qcow2', '-c', 'write -z -u 2M 64k', image)
        mount = self.mount(image, '-o', 'passthrough')
        self.assertFalse(self.passes_through(mount))
        mount.unmount()

    def test_the_data_file_of_an_fvd_image_passes_through_if_nothing_else_is_needed(self):
        data, text = self.raw('disk.data', 8 * MiB), pattern(2 * MiB, 1)
        image = self.new('disk.fvd', '8M', '-o', 'data_file=disk.data')
        mount = self.mount(image, '-o', 'passthrough')
        self.assertTrue(self.passes_through(mount))
        with open(mount.disk, 'r+b') as file:
            file.seek(MiB)
            self.assertEqual(self.calls(mount, READING + WRITING, lambda: (file.write(text), file.flush())), 0)
        mount.unmount()
        self.assertEqual(data.read_bytes(), bytes(MiB) + text + bytes(5 * MiB))
        self.assert_clean(image)

    def test_an_fvd_image_that_needs_metadata_comes_through_us(self):
        base = self.raw('base', MiB)
        for name, options in (('table.fvd', ('-o', 'data_file=disk.data,compact_image=on')), ('one.fvd', ()),
                              ('base.fvd', ('-o', 'data_file=disk.data', '-b', base, '-F', 'raw'))):
            self.raw('disk.data', 8 * MiB)
            mount = self.mount(self.new(name, '8M', *options), '-o', 'passthrough')
            self.assertFalse(self.passes_through(mount))
            mount.unmount()

    def test_what_cannot_pass_through_is_served_as_ever(self):
        for image in (self.qcow2(), self.raw(size=MiB)):
            point = self.path('point')
            point.touch()
            outcome = attempt(IMGFUSE, image, point, '-o', 'passthrough')
            self.assertEqual(outcome.status, 0, outcome)
            self.assertIn('no passthrough: the image is no host file of the same bytes', outcome.err)
            self.assertEqual(point.read_bytes()[:4096], bytes(4096))
            run(IMGFUSE, 'umount', point)


if __name__ == '__main__':
    unittest.main()
