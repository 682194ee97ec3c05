"""FUSE over io_uring: the same requests by another way. Needs Linux 6.14, whose module has to be told to allow it."""
import mmap
import os
import re
import resource
import signal
import subprocess
import unittest
from pathlib import Path

from harness import IMGFUSE, ImageCase, by_scale, imgfuse_json, is_mounted, pattern, run, wait_until
from test_fio import Verify

PARAMETER = Path('/sys/module/fuse/parameters/enable_uring')


class RingCase(ImageCase):
    def setUp(self):
        super().setUp()
        if not PARAMETER.exists():
            self.skipTest('the kernel has no FUSE over io_uring')
        before = PARAMETER.read_text()
        PARAMETER.write_text('Y')
        self.addCleanup(PARAMETER.write_text, before)

    def threads(self, mount):
        return len(list(Path('/proc/%d/task' % mount.pid).iterdir()))


class RingVerify(Verify, RingCase):
    """All that test_fio.py does, over rings."""
    megabytes = by_scale(16, 32, 256)

    def mount(self, image, *options, **others):
        return super().mount(image, '-o', 'io_uring=on', *options, **others)


class Rings(RingCase):
    def test_rings_are_used_where_the_kernel_has_them(self):
        image = self.qcow2()
        with_rings = self.mount(image)
        wait_until(lambda: self.threads(with_rings) >= 16)
        with_rings.unmount()
        without = self.mount(image, '-o', 'io_uring=off')
        self.assertLess(self.threads(without), 16)
        without.unmount()

    def test_a_kernel_that_does_not_allow_it_is_no_obstacle(self):
        PARAMETER.write_text('N')
        image = self.qcow2()
        mount = self.mount(image, '-o', 'io_uring=on')
        mount.disk.read_bytes()
        self.assertLess(self.threads(mount), 16)
        mount.unmount()

    def test_too_few_file_descriptors_are_no_obstacle(self):
        image = self.qcow2()
        mount = self.mount(image, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (14, 14)))
        self.assertEqual(mount.disk.read_bytes(), bytes(64 << 20))
        mount.unmount()

    def test_everything_a_file_can_do(self):
        image = self.qcow2()
        mount = self.mount(image)
        data = pattern(3 << 20, 1)
        with open(mount.disk, 'r+b') as file:
            file.seek(12345)
            file.write(data)
        run('fallocate', '--punch-hole', '--offset', '1M', '--length', '1M', mount.disk)
        run('truncate', '--size', '128M', mount.disk)
        content = mount.disk.read_bytes()
        self.assertEqual(len(content), 128 << 20)
        wanted = bytearray(128 << 20)
        wanted[12345:12345 + len(data)] = data
        wanted[1 << 20:2 << 20] = bytes(1 << 20)
        self.assertEqual(content, bytes(wanted))
        mount.unmount()
        self.assert_clean(image)

    def cold_reads(self, *options):
        """Mounts an image of which nothing is in memory; what strace sees of 2000 reads of 4 KiB, 16 at once."""
        image, source, data = self.path('disk.qcow2'), self.path('source.img'), pattern(64 << 20, 3)
        source.write_bytes(data)
        run('qemu-img', 'convert', '-O', 'qcow2', source, image)
        mount = self.mount(image, *options)
        self.forget_pages(image)
        calls = self.trace(mount, ['pread64', 'preadv2'], lambda: run(
            'fio', '--name=cold', '--filename=%s' % mount.disk, '--direct=1', '--ioengine=libaio', '--rw=randread',
            '--bs=4k', '--iodepth=16', '--number_ios=2000', '--size=64M'))
        self.forget_pages(image)
        fd = os.open(mount.disk, os.O_RDONLY | os.O_DIRECT)
        room = mmap.mmap(-1, 64 << 20)
        length = os.preadv(fd, [room], 0)
        os.close(fd)
        self.assertEqual(room[:length], data)
        return mount, calls

    def forget_pages(self, image):
        fd = os.open(image, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)

    def test_a_ring_does_not_wait_for_a_disk(self):
        mount, calls = self.cold_reads()
        misses = re.findall(r'preadv2.*RWF_NOWAIT\) += -1 EAGAIN', calls)
        self.assertGreater(len(misses), 200)  # the others lay beside one that was read before
        waiting = re.findall(r'pread64\(', calls)
        self.assertLess(len(waiting), 200)
        requests = imgfuse_json('status', '--json', mount.point)['statistics']['reads']['requests']
        self.assertGreaterEqual(requests, 2000)
        mount.unmount()

    def test_a_ring_has_others_wait_for_a_disk_without_a_page_cache(self):
        mount, calls = self.cold_reads('--cache=none')
        readers = re.findall(r'^(\d+) +pread64\(', calls, re.MULTILINE)
        self.assertGreaterEqual(len(readers), 2000)
        names = {reader: Path('/proc/%d/task/%s/comm' % (mount.pid, reader)).read_text().strip() for reader in readers}
        self.assertEqual(set(names.values()), {'ring helper'})
        mount.unmount()

    def test_a_daemon_that_is_to_be_unmounted_when_it_dies_has_none(self):
        for options in ('auto_unmount', 'auto_unmount,io_uring=on'):
            with self.subTest(options):
                mount = self.mount(self.qcow2(), '-o', options)
                info = imgfuse_json('status', '--json', mount.point)['info']
                self.assertEqual(info['transport'], '/dev/fuse')
                mount.kill()
                mount.wait_gone()
                wait_until(lambda: not is_mounted(mount.point), what='the unmount')

    def test_a_killed_daemon_leaves_no_request_waiting(self):
        image = self.qcow2('disk.qcow2', '4G')
        mount = self.mount(image)
        with subprocess.Popen(['dd', 'if=/dev/zero', 'of=%s' % mount.disk, 'bs=1M', 'oflag=direct', 'conv=notrunc'],
                              stderr=subprocess.DEVNULL) as writer:
            wait_until(lambda: image.stat().st_blocks * 512 > 8 << 20, 60, 'the first writes')
            self.assertIsNone(writer.poll())
            mount.kill(signal.SIGKILL)
            self.assertNotEqual(writer.wait(60), 0)
        mount.bury()


if __name__ == '__main__':
    unittest.main()
