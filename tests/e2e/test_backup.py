"""Backups of mounted disks, whole and by bitmaps."""
import unittest

from harness import IMGFUSE, MiB, attempt, imgfuse, run, sha256
from live_case import LiveCase, jobs


class Backup(LiveCase):
    def test_the_disk_of_the_moment_at_which_it_began_beside_fio(self):
        image = self.filled()
        mount = self.mount(image)
        before = sha256(mount.disk)
        imgfuse('backup', mount.point, self.path('slow.qcow2'), '--detach', '--rate', '64k')
        run('fio', '--name=change', '--filename=%s' % mount.disk, '--direct=1', '--rw=randwrite', '--bs=16k',
            '--ioengine=libaio', '--iodepth=8', '--verify=crc32c', '--do_verify=1', '--size=%dM' % self.megabytes,
            '--io_size=16M', '--randseed=%d' % self.seed, cwd=self.folder)
        imgfuse('job', 'set-rate', mount.point, 1, 0)
        imgfuse('job', 'wait', mount.point, 1)
        self.assertNotEqual(sha256(mount.disk), before)
        self.assert_same_disk(self.path('slow.qcow2'), 'qcow2', before)
        self.assert_clean(self.path('slow.qcow2'))
        now = sha256(mount.disk)
        imgfuse('backup', mount.point, self.path('plain.raw'), '-O', 'raw')
        self.assertEqual(sha256(self.path('plain.raw')), now)
        mount.unmount()
        self.assert_clean(image)

    def test_increments_by_a_bitmap_across_mounts(self):
        image = self.filled()
        mount = self.mount(image)
        imgfuse('bitmap', 'add', mount.point, 'daily')
        imgfuse('backup', mount.point, self.path('full.qcow2'))
        content = self.change(mount, 7 * MiB, b'1')
        incremental = ('--incremental', 'daily')
        imgfuse('backup', mount.point, self.path('one.qcow2'), *incremental, '-o',
                'backing_file=full.qcow2,backing_fmt=qcow2')
        self.assertLess(jobs(mount)[-1]['copied'], MiB)
        self.assert_same_disk(self.path('one.qcow2'), 'qcow2', content)
        self.change(mount, 3 * MiB, b'2')
        mount.unmount()
        mount = self.mount(image)
        content = self.change(mount, 11 * MiB, b'3')
        self.assertEqual(attempt(IMGFUSE, 'backup', mount.point, '/dev/full', '-n', *incremental).status, 1)
        imgfuse('backup', mount.point, self.path('one.qcow2'), '-n', *incremental)
        self.assertLess(jobs(mount)[-1]['copied'], MiB)
        self.assert_same_disk(self.path('one.qcow2'), 'qcow2', content)
        outcome = attempt(IMGFUSE, 'backup', mount.point, self.path('none.qcow2'), '--incremental', 'weekly')
        self.assertIn('no bitmap "weekly"', outcome.err)
        self.assertFalse(self.path('none.qcow2').exists())
        mount.unmount()


if __name__ == '__main__':
    unittest.main()
