"""Streams and commits of mounted disks."""
import json
import os
import time
import unittest

from harness import IMGFUSE, KiB, MiB, attempt, imgfuse, run, sha256
from live_case import LiveCase, jobs, wait_for_state


class Chain(LiveCase):
    def chain(self):
        """base <- middle <- top, each with something of its own, the middle one shorter than the others."""
        base = self.filled('base.qcow2')
        for name, below, size in (('middle.qcow2', 'base.qcow2', self.megabytes * MiB - 300 * KiB),
                                  ('top.qcow2', 'middle.qcow2', self.megabytes * MiB)):
            run('qemu-img', 'create', '-q', '-f', 'qcow2', '-b', below, '-F', 'qcow2', self.path(name), size)
        run('qemu-io', '-f', 'qcow2', '-c', 'write -P 201 1M 3M', '-c', 'write -z 9M 1M', self.path('middle.qcow2'))
        run('qemu-io', '-f', 'qcow2', '-c', 'write -P 202 2M 100k', '-c', 'write -z 12M 1M', self.path('top.qcow2'))
        return base, self.path('middle.qcow2'), self.path('top.qcow2')

    def backing_of(self, image):
        return json.loads(run('qemu-img', 'info', '--output=json', image)).get('backing-filename')

    def test_a_stream_beside_fio(self):
        base, middle, top = self.chain()
        mount = self.mount(top)
        fio = self.start_fio(mount)
        imgfuse('stream', mount.point, '--base', base)
        self.assertEqual(jobs(mount)[-1]['state'], 'completed')
        imgfuse('stream', mount.point)
        self.stop_fio(fio, mount)
        content = sha256(mount.disk)
        mount.unmount()
        self.assertIsNone(self.backing_of(top))
        base.unlink()
        middle.unlink()
        self.assert_same_disk(top, 'qcow2', content)
        self.assert_clean(top)

    def test_images_of_every_format_on_a_raw_one(self):
        for format in ('qcow2', 'qed', 'fvd'):
            with self.subTest(format=format):
                base = self.path('base.img')
                with open(base, 'wb') as file:
                    file.truncate(self.megabytes * MiB)
                    file.seek(3 * MiB)
                    file.write(os.urandom(2 * MiB))
                top = self.path('top.' + format)
                imgfuse('create', '-f', format, '-b', base.name, '-F', 'raw', top)
                mount = self.mount(top)
                self.change(mount, 4 * MiB, b'1')
                commit = attempt(IMGFUSE, 'commit', mount.point)
                self.assertEqual(commit.status, 1 if format == 'qed' else 0, commit)
                self.assertEqual('commit it unmounted' in commit.err, format == 'qed', commit)
                content = self.change(mount, 4 * MiB + 50000, b'2')
                mount.unmount()
                mount = self.mount(top)  # a commit has emptied it: it shows what is in the base
                self.assertEqual(sha256(mount.disk), content)
                imgfuse('stream', mount.point)
                content = self.change(mount, 9 * MiB, b'3')
                mount.unmount()
                base.unlink()
                mount = self.mount(top)
                self.assertEqual(sha256(mount.disk), content)
                mount.unmount()
                self.assert_clean(top)

    def test_a_stream_beside_copying_on_read_and_prefetching(self):
        base, middle, top = self.chain()
        mount = self.mount(top, '-o', 'copy_on_read,prefetch')
        fio = self.start_fio(mount)
        imgfuse('stream', mount.point, '--base', base)
        imgfuse('stream', mount.point)
        self.stop_fio(fio, mount)
        content = sha256(mount.disk)
        mount.unmount()
        self.assertIsNone(self.backing_of(top))
        self.assert_same_disk(top, 'qcow2', content)

    def test_a_commit_beside_copying_on_read_and_prefetching(self):
        base, middle, top = self.chain()
        mount = self.mount(top, '-o', 'copy_on_read,prefetch=64M')
        fio = self.start_fio(mount)
        imgfuse('commit', mount.point)
        self.stop_fio(fio, mount)
        content = sha256(mount.disk)
        mount.unmount()
        for image in (middle, top):
            self.assert_same_disk(image, 'qcow2', content)

    def test_a_stream_to_a_base_and_one_that_is_killed(self):
        base, middle, top = self.chain()
        mount = self.mount(top)
        content = sha256(mount.disk)
        imgfuse('stream', mount.point, '--detach', '--rate', '1M')
        mount.kill()
        mount.bury()
        self.assertEqual(self.backing_of(top), 'middle.qcow2')
        mount = self.mount(top)
        self.assertEqual(sha256(mount.disk), content)
        imgfuse('stream', mount.point, '--base', 'base.qcow2')
        self.assertEqual(sha256(mount.disk), content)
        mount.unmount()
        self.assertEqual(self.backing_of(top), 'base.qcow2')
        middle.unlink()
        self.assert_same_disk(top, 'qcow2', content)

    def test_a_commit_beside_fio(self):
        for base in (None, 'base.qcow2'):
            with self.subTest(base=base):
                images = self.chain()
                mount = self.mount(images[2])
                fio = self.start_fio(mount)
                imgfuse('commit', mount.point, *(['--base', base] if base else []))
                time.sleep(0.2)
                self.stop_fio(fio, mount)
                content = sha256(mount.disk)
                mount.unmount()
                target = images[0] if base else images[1]
                grown = json.loads(run('qemu-img', 'info', '--output=json', target))['virtual-size']
                self.assertEqual(grown, self.megabytes * MiB)
                for image in (target, images[2]):
                    self.assert_same_disk(image, 'qcow2', content)
                    self.assert_clean(image)
                self.assertEqual(self.backing_of(images[2]), base or 'middle.qcow2')

    def test_a_commit_that_is_cancelled_or_killed_and_goes_on(self):
        base, middle, top = self.chain()
        mount = self.mount(top)
        content = sha256(mount.disk)
        imgfuse('commit', mount.point, '--detach', '--rate', '1')
        imgfuse('job', 'cancel', mount.point, 1)
        wait_for_state(mount, 'cancelled')
        self.assertEqual(sha256(mount.disk), content)
        imgfuse('commit', mount.point, '--detach', '--rate', '1', '--base', base)
        mount.kill()
        mount.bury()
        mount = self.mount(top)
        self.assertEqual(sha256(mount.disk), content)
        self.assertEqual(imgfuse('commit', mount.point), 'Image committed.\n')
        self.assertEqual(sha256(mount.disk), content)
        mount.unmount()
        self.assert_same_disk(middle, 'qcow2', content)

    def test_an_image_that_is_covered_by_its_own_mount_or_moved(self):
        base, middle, top = self.chain()
        for covered in (True, False):
            mount = self.mount(top, point=top if covered else None)
            content = sha256(mount.disk)
            if not covered:
                top.rename(self.path('elsewhere'))
                top.write_bytes(b'another file')
            for command in ('stream', 'commit'):
                outcome = attempt(IMGFUSE, command, mount.point)
                self.assertEqual((outcome.status, 'another file' in outcome.err), (1, True), outcome)
            self.assertEqual(sha256(mount.disk), content)
            mount.unmount()
            if not covered:
                self.path('elsewhere').rename(top)
        self.assert_clean(top)

    def test_what_they_refuse(self):
        base, middle, top = self.chain()
        mount = self.mount(base)
        for command in ('stream', 'commit'):
            outcome = attempt(IMGFUSE, command, mount.point)
            self.assertEqual((outcome.status, 'has no backing file' in outcome.err), (1, True), outcome)
        mount.unmount()
        mount = self.mount(top)
        content = sha256(mount.disk)
        other = self.mount(middle, '--read-only')
        for arguments, word in ((('commit', mount.point), 'use'), (('commit', mount.point, '-d'), 'mounted'),
                                (('stream', mount.point, '--base', middle), 'nothing lies between'),
                                (('stream', mount.point, '--base', '/etc/passwd'), 'not in the backing chain')):
            outcome = attempt(IMGFUSE, *arguments)
            self.assertEqual((outcome.status, word in outcome.err), (1, True), outcome)
        self.assertEqual(sha256(mount.disk), content)
        other.unmount()
        mount.unmount()

    def test_a_commit_into_a_full_file_system_fails_and_goes_on_when_there_is_space(self):
        small = self.small_host(3)
        run('qemu-img', 'create', '-q', '-f', 'qcow2', small / 'base.qcow2', '%dM' % self.megabytes)
        top = self.path('top.qcow2')
        run('qemu-img', 'create', '-q', '-f', 'qcow2', '-b', small / 'base.qcow2', '-F', 'qcow2', top)
        run('qemu-io', '-f', 'qcow2', '-c', 'write -P 5 1M 12M', top)
        mount = self.mount(top, '--allow-path', small)
        outcome = attempt(IMGFUSE, 'commit', mount.point)
        self.assertEqual((outcome.status, 'o space' in outcome.err), (1, True), outcome)
        content = self.change(mount, 2 * MiB, b'1')
        run('mount', '-o', 'remount,size=%dM' % (2 * self.megabytes), small)
        imgfuse('commit', mount.point)
        self.assertEqual(sha256(mount.disk), content)
        mount.unmount()
        for image in (small / 'base.qcow2', top):
            self.assert_same_disk(image, 'qcow2', content)
            self.assert_clean(image)


if __name__ == '__main__':
    unittest.main()
