"""Mirrors of mounted disks: fio and file systems at work beside them, the pivot, limits, and mirrors that cannot be."""
import json
import os
import random
import signal
import subprocess
import threading
import time
import unittest
from pathlib import Path

from harness import (IMGFUSE, KiB, MiB, attempt, imgfuse, is_mounted, raw_sha256, resident_bytes, run, sha256,
                     wait_until)
from live_case import LiveCase, jobs, wait_for_state
from test_bad_input import BadInputCase
from test_failures import close_quietly


class Work(LiveCase):
    def test_fio_verifies_beside_mirrors_that_are_completed(self):
        image = self.filled()
        mount = self.mount(image)
        fio = self.start_fio(mount)
        targets = (('first.qcow2', []), ('second.raw', ['-O', 'raw', '--granularity', '4k']),
                   ('third.qcow2', ['-o', 'cluster_size=1M', '--write-blocking']), ('one.qed', ['-O', 'qed']),
                   ('one.fvd', ['-O', 'fvd', '-o', 'compact_image=on', '--write-blocking']),
                   ('fourth.qcow2', ['-o', 'cluster_size=4k', '--granularity', '1M', '--buffer', '4M']))
        for name, options in targets:
            imgfuse('mirror', mount.point, self.path(name), '--complete', *options)
            self.assertEqual(jobs(mount)[-1]['state'], 'completed')
        self.stop_fio(fio, mount)
        content = sha256(mount.disk)
        mount.unmount()
        self.assert_same_disk(self.path('fourth.qcow2'), 'qcow2', content)
        for name in ('source.qcow2', 'first.qcow2', 'third.qcow2', 'one.qed', 'one.fvd', 'fourth.qcow2'):
            self.assert_clean(self.path(name))

    def test_fio_verifies_beside_mirrors_that_are_finished_or_cancelled(self):
        image = self.filled()
        mount = self.mount(image)
        fio = self.start_fio(mount)
        imgfuse('mirror', mount.point, self.path('copy.qcow2'), '--finish')
        imgfuse('mirror', mount.point, self.path('none.raw'), '-O', 'raw', '--detach', '--rate', '1M')
        imgfuse('mirror', mount.point, '--cancel')
        self.assertEqual([job['state'] for job in jobs(mount)], ['finished', 'cancelled'])
        self.stop_fio(fio, mount)
        content = sha256(mount.disk)
        imgfuse('mirror', mount.point, self.path('copy.raw'), '-O', 'raw', '--finish')
        self.assertEqual(sha256(self.path('copy.raw')), content)
        mount.unmount()
        self.assert_same_disk(image, 'qcow2', content)
        self.assert_clean(self.path('copy.qcow2'))

    def test_a_file_system_that_moves_while_it_is_used(self):
        image = self.qcow2('disk.qcow2', '%dM' % (4 * self.megabytes))
        mount = self.mount(image)
        device = self.losetup(mount.disk)
        run('mke2fs', '-q', '-t', 'ext4', device)
        tree = self.path('tree')
        tree.mkdir()
        run('mount', device, tree)
        contents, written, stop = {}, [], threading.Event()

        def work():
            rng = random.Random(self.seed)
            while not stop.is_set():
                name = 'file%d' % rng.randrange(100)
                contents[name] = rng.randbytes(rng.randrange(1, 300 * KiB))
                (tree / name).write_bytes(contents[name])
                written.append(name)
                if rng.randrange(10) == 0:
                    run('sync', '--file-system', tree)

        def wait_for_work():
            seen = len(written)
            wait_until(lambda: len(written) >= seen + 6, 60, 'the writing of files')

        worker = threading.Thread(target=work)
        worker.start()
        try:
            wait_for_work()
            imgfuse('mirror', mount.point, self.path('moved.qcow2'), '--complete')
            wait_for_work()
            imgfuse('mirror', mount.point, self.path('again.raw'), '-O', 'raw', '--complete', '--granularity', '16k')
            wait_for_work()
        finally:
            stop.set()
            worker.join()
        run('umount', tree)
        self.detach(device)
        mount.unmount()
        device = self.losetup(self.path('again.raw'))
        run('e2fsck', '-f', '-n', device)
        run('mount', '-o', 'ro', device, tree)
        for name, content in contents.items():
            self.assertEqual((tree / name).read_bytes(), content, name)
        run('umount', tree)
        self.assert_clean(self.path('moved.qcow2'))

    def test_the_disk_in_a_directory_and_its_snapshots_follow_the_pivot(self):
        image, point = self.filled(), self.path('point')
        point.mkdir()
        mount = self.mount(image, point=point)
        imgfuse('snapshot', 'create', point, 'monday')
        self.assertEqual(os.listdir(point / 'snapshots'), ['monday.raw'])
        content = sha256(mount.disk)
        with open(point / 'snapshots/monday.raw', 'rb'):
            outcome = attempt(IMGFUSE, 'mirror', point, self.path('target.qcow2'), '--complete')
            self.assertEqual(outcome.status, 1)
            self.assertIn('snapshot is open', outcome.err)
        job = jobs(mount)[-1]
        self.assertEqual(job['state'], 'paused')

        def goes_on():
            """The file system is told of the closing some time after it."""
            imgfuse('job', 'resume', point, job['job'])
            return 'snapshot is open' not in attempt(IMGFUSE, 'job', 'wait', point, job['job']).err

        wait_until(goes_on, what='the closing of the snapshot')
        self.assertEqual(jobs(mount)[-1]['state'], 'completed')
        wait_until(lambda: os.listdir(point / 'snapshots') == [], what='the end of the snapshots')
        self.assertEqual(sha256(mount.disk), content)
        imgfuse('snapshot', 'create', self.path('target.qcow2'), 'tuesday')  # the image that the mount has open now
        self.assertEqual(os.listdir(point / 'snapshots'), ['tuesday.raw'])
        imgfuse('resize', point, '+1M')
        self.assertEqual(mount.disk.stat().st_size, self.megabytes * MiB + MiB)
        mount.unmount()
        self.assertEqual(len(json.loads(imgfuse('snapshot', 'list', '--json', image))), 1)


class Options(LiveCase):
    def test_the_copy_of_an_overlays_own_layer(self):
        base = self.filled('base.qcow2')
        overlay = self.path('overlay.qcow2')
        run('qemu-img', 'create', '-q', '-f', 'qcow2', '-b', 'base.qcow2', '-F', 'qcow2', overlay)
        run('qemu-io', '-f', 'qcow2', '-c', 'write -P 9 100k 300k', '-c', 'write -z 5M 1M', overlay)
        elsewhere = self.path('elsewhere')
        elsewhere.mkdir()
        target = elsewhere / 'copy.qcow2'
        mount = self.mount(overlay)
        imgfuse('mirror', mount.point, target, '--sync', 'top', '--complete', '-o', 'cluster_size=1M')
        fd = mount.open()
        os.pwrite(fd, b'after' * 1000, 12345678)
        os.close(fd)
        content = sha256(mount.disk)
        mount.unmount()
        run('qemu-img', 'rebase', '-u', '-F', 'qcow2', '-b', '../base.qcow2', target)
        self.assert_same_disk(target, 'qcow2', content)
        self.assertLess(target.stat().st_blocks * 512, 5 * MiB)

    def test_the_own_layer_of_an_image_that_is_covered_and_of_one_without_a_name(self):
        base = self.filled('base.qcow2')
        overlay = self.path('overlay.qcow2')
        run('qemu-img', 'create', '-q', '-f', 'qcow2', '-b', 'base.qcow2', '-F', 'qcow2', overlay)
        mount = self.mount(overlay, point=overlay)
        content = self.change(mount, 5 * MiB, b'1')
        outcome = attempt(IMGFUSE, 'mirror', mount.point, self.path('top.qcow2'), '--sync', 'top', '--finish')
        self.assertEqual((outcome.status, 'covers it' in outcome.err), (1, True), outcome)
        imgfuse('mirror', mount.point, self.path('top.qcow2'), '--sync', 'top', '--finish', '-o',
                'backing_file=base.qcow2,backing_fmt=qcow2')
        mount.unmount()
        self.assert_same_disk(self.path('top.qcow2'), 'qcow2', content)
        self.assertLess(self.path('top.qcow2').stat().st_blocks * 512, MiB)
        mount = self.mount(overlay, '-o', 'ephemeral')
        content = self.change(mount, 7 * MiB, b'2')
        imgfuse('mirror', mount.point, self.path('kept.qcow2'), '--sync', 'top', '--finish')
        mount.unmount()
        info = json.loads(run('qemu-img', 'info', '--output=json', self.path('kept.qcow2')))
        self.assertEqual(info['full-backing-filename'], str(overlay))
        self.assert_same_disk(self.path('kept.qcow2'), 'qcow2', content)
        self.assertNotEqual(raw_sha256(overlay), content)

    def test_an_existing_target_whatever_it_holds(self):
        mount = self.mount(self.filled())
        target = self.path('target.raw')
        target.write_bytes(os.urandom((self.megabytes + 1) * MiB))
        imgfuse('mirror', mount.point, target, '-n', '-O', 'raw', '--finish')
        self.assertEqual(run('cmp', '-n', self.megabytes * MiB, target, mount.disk), '')
        imgfuse('mirror', mount.point, target, '--force', '--finish')
        self.assert_same_disk(target, 'qcow2', sha256(mount.disk))
        mount.unmount()

    def test_only_what_changes(self):
        mount = self.mount(self.filled())
        target = self.path('target.raw')
        with open(mount.disk, 'rb') as disk:
            target.write_bytes(disk.read())
        imgfuse('mirror', mount.point, target, '-n', '-O', 'raw', '--sync', 'none')
        with open(mount.disk, 'r+b') as disk:
            disk.seek(5 * MiB)
            disk.write(b'changed' * 10000)
        imgfuse('mirror', mount.point, '--finish')
        job = jobs(mount)[-1]
        self.assertLess(job['copied'], MiB)
        self.assertEqual(sha256(target), sha256(mount.disk))
        mount.unmount()

    def test_no_faster_than_the_limit_and_pauses(self):
        mount = self.mount(self.filled())
        begin = time.monotonic()
        imgfuse('mirror', mount.point, self.path('target'), '--detach', '--rate', '8M', '--buffer', '1M',
                '--in-flight', '1')
        wait_until(lambda: jobs(mount)[-1]['copied'] > 8 * MiB, 60)
        copied, seconds = jobs(mount)[-1]['copied'], time.monotonic() - begin
        self.assertLess(copied, 8 * MiB * seconds * 1.1 + MiB)
        imgfuse('job', 'pause', mount.point, 1)
        wait_for_state(mount, 'paused')
        paused = jobs(mount)[-1]
        imgfuse('job', 'set-rate', mount.point, 1, '0')
        imgfuse('job', 'complete', mount.point, 1)
        self.assertLessEqual(jobs(mount)[-1]['copied'] - paused['copied'], MiB)  # what was in flight
        imgfuse('job', 'resume', mount.point, 1)
        imgfuse('job', 'wait', mount.point, 1)
        self.assertEqual(jobs(mount)[-1]['state'], 'completed')
        mount.unmount()

    def test_its_memory_is_the_buffer_the_bitmaps_and_4_mib(self):
        mount = self.mount(self.filled(size=256 * MiB))
        for format, buffer in (('qcow2', 4), ('raw', 16)):
            Path('/proc/%d/clear_refs' % mount.pid).write_text('5')  # the peak begins here
            before = resident_bytes(mount.pid, 'VmRSS')
            imgfuse('mirror', mount.point, self.path('target.' + format), '-O', format, '--buffer', '%dM' % buffer,
                    '--granularity', '4k', '--finish')
            peak = resident_bytes(mount.pid, 'VmHWM')
            print('mirror to %s: %.1f MiB at most, with a buffer of %d' % (format, (peak - before) / MiB, buffer))
            self.assertLess(peak - before, (buffer + 4) * MiB + 3 * 256 * MiB // 4096 // 8)
        mount.unmount()

    def test_who_watches_a_mirror_and_is_interrupted_cancels_it(self):
        mount = self.mount(self.filled())
        watcher = subprocess.Popen([IMGFUSE, 'mirror', mount.point, self.path('target'), '--rate', '1M', '-p'],
                                   stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        err = b''
        while b'%' not in err and (more := os.read(watcher.stderr.fileno(), 4096)):
            err += more
        watcher.terminate()
        err += watcher.communicate(timeout=30)[1]
        self.assertEqual(watcher.returncode, 1)
        self.assertIn(b'cancelled', err)
        self.assertIn(b'%', err)
        self.assertEqual(jobs(mount)[-1]['state'], 'cancelled')
        mount.unmount()

    def test_unmounting_is_refused_or_cancels(self):
        image = self.filled()
        mount = self.mount(image)
        imgfuse('mirror', mount.point, self.path('target.qcow2'), '--detach', '--rate', '1M')
        outcome = attempt(IMGFUSE, 'umount', mount.point)
        self.assertEqual(outcome.status, 1)
        self.assertIn('job 1', outcome.err)
        self.assertIn('--force', outcome.err)
        self.assertEqual(jobs(mount)[-1]['state'], 'running')
        imgfuse('umount', '--force', mount.point)
        mount.wait_gone()
        again = self.mount(image)
        imgfuse('mirror', again.point, self.path('other.qcow2'), '--detach', '--rate', '1M')
        again.kill(signal.SIGTERM)
        again.wait_gone()
        self.assertFalse(is_mounted(again.point))
        self.assert_clean(image)
        self.assert_clean(self.path('target.qcow2'))


class Errors(LiveCase):
    def test_a_full_target_pauses_or_fails_and_costs_the_guest_nothing(self):
        image = self.filled()
        mount = self.mount(image)
        content = sha256(mount.disk)
        small = self.small_host(4)
        outcome = attempt(IMGFUSE, 'mirror', mount.point, small / 'a.raw', '-O', 'raw', '--finish')
        self.assertEqual(outcome.status, 1)
        self.assertIn('o space', outcome.err)
        self.assertEqual(jobs(mount)[-1]['state'], 'failed')
        (small / 'a.raw').unlink()
        outcome = attempt(IMGFUSE, 'mirror', mount.point, small / 'b.raw', '-O', 'raw', '--complete', '--on-error',
                          'enospc')
        self.assertEqual(outcome.status, 1)
        self.assertEqual(jobs(mount)[-1]['state'], 'paused')
        run('mount', '-o', 'remount,size=%dM' % (2 * self.megabytes), small)
        imgfuse('job', 'resume', mount.point, 2)
        imgfuse('job', 'wait', mount.point, 2)
        self.assertEqual(jobs(mount)[-1]['state'], 'completed')
        self.assertEqual(sha256(mount.disk), content)
        self.assertEqual(sha256(small / 'b.raw'), content)
        mount.unmount()

    def test_full_file_systems_below_a_backup_and_a_mirror_that_tries_again(self):
        mount = self.mount(self.filled())
        content = sha256(mount.disk)
        small = self.small_host(4)
        imgfuse('mirror', mount.point, small / 'a.raw', '-O', 'raw', '--complete', '--on-error', 'ignore', '--detach')
        wait_until(lambda: 'error' in jobs(mount)[-1], 60, 'the error')
        self.assertNotEqual(jobs(mount)[-1]['state'], 'failed')
        content = self.change(mount, MiB, b'1')
        run('mount', '-o', 'remount,size=%dM' % (2 * self.megabytes), small)
        imgfuse('job', 'wait', mount.point, 1)
        self.assertEqual((jobs(mount)[-1]['state'], sha256(small / 'a.raw')), ('completed', content))
        mount.unmount()

        mount = self.mount(small / 'a.raw')
        smaller = self.small_host(2, 'smaller')
        imgfuse('backup', mount.point, smaller / 'b.raw', '-O', 'raw', '--on-error', 'enospc', '--detach')
        wait_for_state(mount, 'paused')
        run('mount', '-o', 'remount,size=%dM' % (2 * self.megabytes), smaller)
        self.change(mount, 15 * MiB, b'2')  # is copied before
        imgfuse('job', 'resume', mount.point, 1)
        imgfuse('job', 'wait', mount.point, 1)
        self.assertEqual(sha256(smaller / 'b.raw'), content)
        (smaller / 'b.raw').unlink()
        run('mount', '-o', 'remount,size=2M', smaller)
        imgfuse('backup', mount.point, smaller / 'c.raw', '-O', 'raw', '--on-error', 'stop', '--detach')
        wait_for_state(mount, 'paused')
        content = self.change(mount, 24 * MiB, b'3')  # cannot be copied before: the guest comes first
        wait_for_state(mount, 'failed')
        mount.unmount()
        self.assertEqual(sha256(small / 'a.raw'), content)

    def test_a_daemon_that_is_killed_leaves_a_source_with_all_that_was_synced(self):
        image = self.filled()
        mount = self.mount(image)
        imgfuse('mirror', mount.point, self.path('target.qcow2'), '--detach', '--rate', '4M')
        fd = mount.open()
        os.pwrite(fd, b'synced' * 1000, 7 * MiB)
        os.fsync(fd)
        mount.kill()
        close_quietly(fd)
        mount.bury()
        self.assert_no_corruption(image)
        self.assert_no_corruption(self.path('target.qcow2'))
        again = self.mount(image)
        with open(again.disk, 'rb') as disk:
            disk.seek(7 * MiB)
            self.assertEqual(disk.read(6000), b'synced' * 1000)
        again.unmount()


class Refused(BadInputCase):
    def setUp(self):
        super().setUp()
        self.image = self.qcow2('disk.qcow2', '64M')
        self.point = self.path('point')
        self.point.mkdir()
        self.mounted = self.mount(self.image, point=self.point)
        self.target = self.path('target')
        self.addCleanup(self.still_serves)

    def still_serves(self):
        fd = self.mounted.open()
        os.pwrite(fd, b'alive', 4096)
        os.fsync(fd)
        self.assertEqual(os.pread(fd, 5, 4096), b'alive')
        os.close(fd)
        self.mounted.unmount()
        self.assert_clean(self.image)

    def refuse_mirror(self, *arguments, **options):
        self.refuse('mirror', self.point, *arguments, **options)
        self.assertEqual([job for job in jobs(self.mounted) if job['state'] not in ('failed', 'cancelled')], [])

    def test_a_target_that_exists(self):
        self.target.write_bytes(b'precious')
        self.refuse_mirror(self.target, says=['exists', '--force'])
        self.refuse_mirror(self.target, '-n', '-O', 'raw', says=['too small', '67108864'])

    def test_the_source_its_backing_file_and_targets_in_use(self):
        self.refuse_mirror(self.image, '--force', says=['disk.qcow2'])
        self.refuse_mirror(self.image, '-n', says=['disk.qcow2'])
        other = self.qcow2('other.qcow2', '64M')
        point = self.path('other')
        point.touch()
        elsewhere = self.mount(other, point=point)
        self.assertEqual(attempt(IMGFUSE, 'mirror', self.point, other, '--force').status, 1)
        self.assertEqual(attempt(IMGFUSE, 'mirror', self.point, other, '-n').status, 1)
        elsewhere.unmount()

    def test_targets_in_the_mount_and_on_a_loop_device_on_it(self):
        for options in (('--force',), ('-n', '-O', 'raw')):
            self.refuse_mirror(self.mounted.disk, *options, says=['lies in the mount'])
        self.refuse_mirror(self.point / 'new.qcow2', says=['lies in the mount'])
        device = self.losetup(self.mounted.disk)
        run('mke2fs', '-q', device)
        tree = self.path('tree')
        tree.mkdir()
        run('mount', device, tree)
        outcome = attempt(IMGFUSE, 'mirror', self.point, tree / 'target.qcow2')
        self.assertEqual(outcome.status, 1)
        self.assertIn('lies in the mount', outcome.err)
        self.assertFalse((tree / 'target.qcow2').exists())
        run('umount', tree)
        self.detach(device)

    def test_targets_that_cannot_be_made(self):
        self.refuse_mirror(self.folder, '--force', says=['not a regular file'])
        self.refuse_mirror(self.path('no/such/folder'), says=['no such file'])
        self.refuse_mirror(self.path('absent'), '-n', says=['absent', 'no such file'])
        self.refuse_mirror(self.target, '-O', 'vmdk', says=['vmdk'])
        self.refuse_mirror(self.target, '--sync', 'top', says=['no backing file'])
        self.refuse_mirror(self.target, '--granularity', '1000', says=['granularity 1000'])
        self.refuse_mirror(self.target, '--buffer', '4G', says=['4294967296'])

    def test_usage(self):
        for arguments in ([], ['--in-flight', '0', self.target], ['--sync', 'some', self.target],
                          ['--on-error', 'panic', self.target], ['--complete', '--finish', self.target],
                          ['--cancel', self.target], ['-n', '--force', self.target], ['-o', 'nothing=1', self.target]):
            self.refuse('mirror', self.point, *arguments, status=2)

    def test_unknown_jobs_and_two_at_a_time(self):
        self.refuse('job', 'pause', self.point, '7', says=['no job 7'])
        self.refuse('mirror', self.point, '--complete', says=['no mirror'])
        run('qemu-io', '-f', 'raw', '-c', 'write -P 3 0 8M', self.mounted.disk)
        imgfuse('mirror', self.point, self.target, '--detach', '--rate', '1k')
        outcome = attempt(IMGFUSE, 'mirror', self.point, self.path('second'))
        self.assertEqual(outcome.status, 1)
        self.assertIn('one at a time', outcome.err)
        self.assertFalse(self.path('second').exists())
        self.path('precious').write_bytes(b'precious')
        self.assertEqual(attempt(IMGFUSE, 'mirror', self.point, self.path('precious'), '--force').status, 1)
        self.assertEqual(self.path('precious').read_bytes(), b'precious')
        self.assertEqual(attempt(IMGFUSE, 'resize', self.point, '+1M').status, 1)
        imgfuse('mirror', self.point, '--cancel')
        self.assertEqual(attempt(IMGFUSE, 'job', 'cancel', self.point, 1).status, 1)

    def test_what_is_not_mounted_and_a_daemon_that_is_dead(self):
        other = self.qcow2('other.qcow2', '1M')
        self.refuse('mirror', other, self.target, says=['not mounted'])
        self.refuse('jobs', other, says=['not mounted'])
        point = self.path('dead')
        point.touch()
        dead = self.mount(other, point=point)
        dead.kill()
        dead.wait_gone()
        outcome = attempt(IMGFUSE, 'jobs', point, timeout=20)
        self.assertEqual(outcome.status, 1)
        self.assertIn('gone', outcome.err)
        dead.bury()
        self.assertFalse(is_mounted(point))


if __name__ == '__main__':
    unittest.main()
