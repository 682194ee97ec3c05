"""What was acknowledged survives: the death of the daemon, and a full host file system."""
import errno
import json
import os
import random
import threading
import time
import unittest

from harness import IMGFUSE, MiB, ImageCase, attempt, by_scale, close_quietly, run, sha256, wait_until

BLOCK = 4096


def block_content(number, version):
    """One block that says which one it is; version 0 is what was there at first."""
    if version == 0:
        return bytes(BLOCK)
    return (b'%07d/%07d ' % (number, version) * (BLOCK // 16))[:BLOCK]


class History:
    """Which versions each block may have: the last one known to be durable, and all that were tried after it."""

    def __init__(self):
        self.possible = {}
        self.acknowledged = {}
        self.version = 0

    def write(self, fd, number):
        """Writes the next version of a block."""
        self.version += 1
        version = self.version
        self.possible.setdefault(number, [0]).append(version)
        os.pwrite(fd, block_content(number, version), number * BLOCK)
        self.acknowledged[number] = version

    def sync(self, fd):
        """An fsync makes durable what was acknowledged before it."""
        acknowledged, self.acknowledged = self.acknowledged, {}
        os.fsync(fd)
        for number, version in acknowledged.items():
            versions = self.possible[number]
            del versions[:versions.index(version)]

    def crash(self):
        """What was acknowledged and not synced may be lost."""
        self.acknowledged = {}


class Writer(threading.Thread):
    """Writes its share of the blocks at random and fsyncs now and then, until the disk fails."""

    def __init__(self, disk, rng, history, first, count, stride):
        super().__init__(daemon=True)
        self.disk, self.random, self.history = disk, rng, history
        self.first, self.count, self.stride = first, count, stride
        self.syncs = 0

    def run(self):
        fd = os.open(self.disk, os.O_RDWR)
        try:
            while True:
                for _ in range(self.random.randrange(1, 40)):
                    number = self.first + self.random.randrange(self.count) * self.stride
                    self.history.write(fd, number)
                self.history.sync(fd)
                self.syncs += 1
        except OSError:  # the daemon is dead
            pass
        finally:
            close_quietly(fd)


class FailureCase(ImageCase):
    def verify(self, disk, histories):
        """Every sector of every block is of one version that the block may have."""
        fd = os.open(disk, os.O_RDONLY)
        try:
            for history in histories:
                for number, versions in history.possible.items():
                    data = os.pread(fd, BLOCK, number * BLOCK)
                    for begin in range(0, BLOCK, 512):
                        sector = data[begin:begin + 512]
                        if not any(sector == block_content(number, v)[begin:begin + 512] for v in versions):
                            self.fail('block %d, sector %d: %r is none of the versions %s' % (
                                number, begin // 512, sector[:32], versions))
        finally:
            os.close(fd)


class Kill(FailureCase):
    rounds = by_scale(1, 3, 30)

    def kill_under_load(self, image, *options, blocks=2000, stride=5, consistent=True):
        histories = []
        for _ in range(self.rounds):
            mount = self.mount(image, *options)
            self.verify(mount.disk, histories)
            histories = histories or [History() for _ in range(4)]
            writers = [Writer(mount.disk, random.Random(self.random.random()), history, share * blocks * stride, blocks,
                              stride) for share, history in enumerate(histories)]
            for writer in writers:
                writer.start()
            wait_until(lambda: any(writer.syncs for writer in writers), 60, 'an fsync')
            time.sleep(0.3 + 1.2 * self.random.random())
            mount.kill()
            for writer in writers:
                writer.join(30)
                self.assertFalse(writer.is_alive(), 'a request hangs after the death of the daemon')
            mount.bury()
            for history in histories:
                history.crash()

            if image.suffix != '.img':
                self.assert_no_corruption(image) if consistent else self.assert_repairable(image)
            reading = self.mount(image, '-r', *options)
            self.verify(reading.disk, histories)
            reading.unmount()
        last = self.mount(image, *options)
        self.verify(last.disk, histories)
        last.unmount()
        if image.suffix != '.img':
            self.assert_no_corruption(image)

    def test_a_new_image(self):
        for name in ('disk.qcow2', 'disk.qed'):
            with self.subTest(name):
                self.kill_under_load(self.new(name, '512M'))

    def test_small_clusters(self):
        self.kill_under_load(self.qcow2('disk.qcow2', '512M', '-o', 'cluster_size=4k'))

    def test_an_overlay(self):
        self.raw('base.raw', 512 * MiB)
        for name in ('overlay.qcow2', 'overlay.qed'):
            with self.subTest(name):
                self.kill_under_load(self.new(name, None, '-b', 'base.raw', '-F', 'raw'))

    def test_one_bit_refcounts_and_overwrites(self):
        image = self.qcow2('disk.qcow2', '512M', '-o', 'refcount_bits=1')
        self.kill_under_load(image, blocks=100)

    def test_an_image_with_snapshots(self):
        image = self.qcow2('disk.qcow2', '512M')
        run('qemu-img', 'snapshot', '-c', 'one', image)
        self.kill_under_load(image)

    def test_writeback_cache(self):
        self.kill_under_load(self.qcow2('disk.qcow2', '512M'), '-o', 'writeback_cache')

    def assert_repairable(self, image):
        """Counts that were postponed are rebuilt, by either program, and nothing else is wrong."""
        self.dirty += is_dirty(image)
        for repair in (('qemu-img', 'check', '-q', '-r', 'all'), (IMGFUSE, 'check', '--repair', 'all')):
            copy = self.path('copy.qcow2')
            run('cp', '--sparse=always', image, copy)
            attempt(*repair, copy)
            self.assert_clean(copy)
            self.assertFalse(is_dirty(copy))
            run('qemu-img', 'compare', '-f', 'qcow2', '-F', 'qcow2', image, copy)

    def kill_with_lazy_refcounts(self, image):
        self.dirty = 0
        self.kill_under_load(image, consistent=False)
        self.assertGreater(self.dirty, 0)
        self.assertFalse(is_dirty(image))

    def test_lazy_refcounts(self):
        self.kill_with_lazy_refcounts(self.qcow2('disk.qcow2', '512M', '-o', 'lazy_refcounts=on'))

    def test_lazy_refcounts_of_an_image_made_by_imgfuse(self):
        image = self.path('disk.qcow2')
        run(IMGFUSE, 'create', '--lazy-refcounts', '--cluster-size', '4k', image, '512M')
        self.kill_with_lazy_refcounts(image)

    def test_fvd(self):
        self.kill_under_load(self.fvd('disk.fvd', '512M', 'chunk_size=64k', 'journal_size=64k'))

    def test_fvd_over_a_base_that_is_being_copied(self):
        self.raw('base.raw', 512 * MiB)
        self.kill_under_load(self.fvd('disk.fvd', None, 'block_size=4k', 'copy_on_read=on', 'prefetch_start_delay=1',
                                      base='base.raw'))

    def test_raw(self):
        self.kill_under_load(self.raw('disk.img', 512 * MiB), '--format', 'raw')


def is_dirty(image):
    if image.suffix == '.qed':  # of which qemu-img does not tell
        return bool(image.read_bytes()[16] & 2)
    return '"dirty-flag": true' in run('qemu-img', 'info', '--output=json', image)


class Dirty(FailureCase):
    """QEMU died with the image open, and what it had not written yet is marked: reference counts are not up to date, or
    NEED_CHECK is set."""

    def died_with(self):
        """Images that hold 5 MiB. QEMU's QED driver takes the mark off in a flush of qemu-io's."""
        for name, options, last in (('disk.qcow2', ('-o', 'lazy_refcounts=on'), ('-c', 'flush')), ('disk.qed', (), ())):
            with self.subTest(name):
                image = self.new(name, '64M', *options)
                attempt('qemu-io', '-c', 'write -P 7 3M 5M', *last, '-c', 'abort', image)
                self.assertTrue(is_dirty(image))
                yield image

    def test_opening_for_writing_repairs(self):
        for image in self.died_with():
            mount = self.mount(image)
            with open(mount.disk, 'rb') as disk:
                self.assertEqual(disk.read()[3 * MiB:8 * MiB], b'\7' * (5 * MiB))
            mount.unmount()
            self.assert_clean(image)
            self.assertFalse(is_dirty(image))

    def test_opening_for_reading_leaves_it_alone(self):
        for image in self.died_with():
            before = sha256(image)
            mount = self.mount(image, '-r')
            with open(mount.disk, 'rb') as disk:
                self.assertEqual(disk.read()[3 * MiB:8 * MiB], b'\7' * (5 * MiB))
            mount.unmount()
            self.assertEqual(sha256(image), before)

    def test_clusters_that_were_counted_ahead_come_back(self):
        """QEMU writes to the image in between, and keeps what the header says of it."""
        image = self.qcow2('disk.qcow2', '512M')
        mount = self.mount(image)
        fd = mount.open()
        for number in range(4):
            os.pwrite(fd, b'\7' * MiB, number * MiB)
            os.fsync(fd)
        mount.kill()
        mount.bury()
        close_quietly(fd)

        run('qemu-io', '-f', 'qcow2', '-c', 'read -P 7 0 4M', '-c', 'write -P 8 20M 64k', image)
        self.assertGreater(json.loads(attempt('qemu-img', 'check', '--output=json', image).out)['leaks'], 400)
        self.mount(image).unmount()
        self.assert_clean(image)
        run('qemu-io', '-f', 'qcow2', '-c', 'read -P 7 0 4M', '-c', 'read -P 8 20M 64k', image)

    def test_qemu_goes_on_with_a_qed_image_that_imgfuse_died_with(self):
        image = self.new('disk.qed')
        mount = self.mount(image)
        fd = mount.open()
        os.pwrite(fd, b'\7' * (5 * MiB), 3 * MiB)
        os.fsync(fd)
        mount.kill()
        mount.bury()
        close_quietly(fd)
        self.assertTrue(is_dirty(image))

        run('qemu-io', '-f', 'qed', '-c', 'read -P 7 3M 5M', '-c', 'write -P 8 20M 64k', image)

        self.assertFalse(is_dirty(image))
        self.assert_clean(image)


class FullHost(FailureCase):
    """The image lies on a small file system."""

    def make(self, kind, megabytes, *options, size='1G', format='qcow2'):
        small = self.path('small')
        small.mkdir()
        if kind == 'tmpfs':
            run('mount', '-t', 'tmpfs', '-o', 'size=%dM' % megabytes, 'tmpfs', small)
        else:
            disk = self.raw('host.img', megabytes * MiB)
            run('mkfs.ext4', '-q', '-F', '-m', '0', disk)
            run('mount', '-o', 'loop', disk, small)
        self.ballast = small / 'ballast'
        self.ballast.write_bytes(os.urandom(6 * MiB))
        return self.new('small/disk.' + format, size, *options)

    def fill(self, mount, stride):
        """Writes block after block with an fsync every 16, until the host is full."""
        history, error = History(), None
        fd = mount.open()
        try:
            for n in range(100000):
                history.write(fd, n * stride)
                if n % 16 == 15:
                    history.sync(fd)
        except OSError as failure:
            error = failure
        finally:
            close_quietly(fd)
        self.assertIsNotNone(error, 'the host never filled up')
        self.assertEqual(error.errno, errno.ENOSPC)
        return history

    def full_host(self, kind, *options, stride=1, format='qcow2'):
        image = self.make(kind, 24, *options, size='64G', format=format)
        mount = self.mount(image)
        history = self.fill(mount, stride)
        self.verify(mount.disk, [history])

        self.ballast.unlink()
        self.goes_on(mount, history)  # or it is latched
        status = attempt('umount', mount.point)
        self.assertEqual(status.status, 0, status)
        mount.wait_gone()
        history.crash()
        self.assert_no_corruption(image)

        mount = self.mount(image)
        self.verify(mount.disk, [history])
        self.assertTrue(self.goes_on(mount, history), 'no write after reopening')
        self.verify(mount.disk, [history])
        mount.unmount()
        self.assert_no_corruption(image)

    def goes_on(self, mount, history):
        """Whether writes and fsync work; either all of them, or none is acknowledged."""
        fd = mount.open()
        try:
            for number in range(50, 90):
                history.write(fd, number)
            history.sync(fd)
            return True
        except OSError as error:
            self.assertIn(error.errno, (errno.ENOSPC, errno.EIO))
            return False
        finally:
            close_quietly(fd)

    def test_tmpfs(self):
        self.full_host('tmpfs')

    def test_ext4(self):
        self.full_host('ext4')

    def test_qed_on_tmpfs(self):
        self.full_host('tmpfs', format='qed')

    def test_qed_on_ext4(self):
        self.full_host('ext4', format='qed')

    def test_fvd(self):
        self.full_host('ext4', '-o', 'compact_image=on,chunk_size=64k,journal_size=64k', format='fvd')

    def test_when_every_write_needs_a_new_table(self):
        self.full_host('tmpfs', '-o', 'cluster_size=4k', stride=513)

    def test_a_write_that_finds_no_space_does_not_latch_the_disk(self):
        image = self.make('tmpfs', 24)
        mount = self.mount(image)
        fd = mount.open()
        os.pwrite(fd, b'a' * MiB, 0)
        os.fsync(fd)
        with self.assertRaises(OSError) as full:
            for n in range(1, 100):
                os.pwrite(fd, b'b' * MiB, n * MiB)
        self.assertEqual(full.exception.errno, errno.ENOSPC)
        self.ballast.unlink()
        os.pwrite(fd, b'c' * MiB, 100 * MiB)
        os.fsync(fd)
        self.assertEqual(os.pread(fd, MiB, 100 * MiB), b'c' * MiB)
        os.close(fd)
        mount.unmount()
        self.assert_no_corruption(image)


if __name__ == '__main__':
    unittest.main()
