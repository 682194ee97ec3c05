"""What a mount says of itself: imgfuse list, imgfuse status, info.json and stats.json."""
import json
import os
import socket
import subprocess
import unittest

from harness import IMGFUSE, MiB, ImageCase, attempt, imgfuse, run, sha256


class Status(ImageCase):
    def test_all_mounts_are_listed_those_whose_daemon_is_gone_too(self):
        first, second = self.qcow2('first.qcow2', '8M'), self.raw('second.raw')
        mounts = [self.mount(first), self.mount(second)]
        listed = {entry['mountpoint']: entry for entry in json.loads(imgfuse('list', '--json'))}
        for mount, image, format in zip(mounts, (first, second), ('qcow2', 'raw')):
            entry = listed[str(mount.point)]
            self.assertEqual((entry['image'], entry['format'], entry['pid'], entry['jobs']),
                             (str(image), format, mount.pid, []))
        text = imgfuse('list')
        for mount in mounts:
            self.assertRegex(text, r'(?m)^ *%d .*%s' % (mount.pid, mount.point))
        mounts[1].kill()
        mounts[1].wait_gone()
        self.assertRegex(imgfuse('list'), r'(?m)^ *gone .*%s' % mounts[1].point)
        mounts[1].bury()
        imgfuse('mirror', mounts[0].point, self.path('copy'), '--sync', 'none')
        self.assertIn('mirror 1 (ready)', imgfuse('list'))
        imgfuse('mirror', mounts[0].point, '--cancel')
        mounts[0].unmount()
        self.assertNotIn(str(self.folder), imgfuse('list'))

    def test_every_format_counts_what_it_has(self):
        for name, has_tables in (('disk.qed', True), ('disk.fvd', False), ('disk.qcow2', True)):
            mount = self.mount(self.new(name))
            fd = mount.open()
            os.pwrite(fd, b'changed', MiB)
            os.fsync(fd)
            os.close(fd)
            statistics = json.loads(imgfuse('status', '--json', mount.point))['statistics']
            self.assertGreaterEqual(statistics['flush-cycles'], 1, name)
            self.assertEqual(statistics['table-hits'] + statistics['table-loads'] > 0, has_tables, name)
            mount.unmount()

    def test_requests_latencies_caches_and_cycles_are_counted(self):
        point = self.path('point')
        point.mkdir()
        mount = self.mount(self.qcow2(), point=point)
        fd = mount.open(os.O_RDWR | os.O_DIRECT)
        run('dd', 'if=/dev/zero', 'of=%s' % mount.disk, 'bs=64k', 'count=32', 'oflag=direct', 'conv=notrunc')
        run('dd', 'if=%s' % mount.disk, 'of=/dev/null', 'bs=64k', 'count=16', 'iflag=direct')
        for _ in range(3):
            os.fsync(fd)
        os.close(fd)
        status = json.loads(imgfuse('status', '--json', point))
        statistics = status['statistics']
        self.assertEqual((statistics['writes']['requests'], statistics['writes']['bytes']), (32, 2 * MiB))
        self.assertEqual((statistics['reads']['requests'], statistics['reads']['bytes']), (16, MiB))
        self.assertEqual(statistics['flushes']['requests'], 3)
        for kind in ('reads', 'writes', 'flushes'):
            self.assertEqual(sum(bucket['requests'] for bucket in statistics[kind]['latencies']),
                             statistics[kind]['requests'])
            self.assertEqual(statistics[kind]['failed'], 0)
        self.assertGreater(statistics['table-hits'], 40)
        self.assertGreaterEqual(statistics['flush-cycles'], 1)
        self.assertEqual(status['info']['virtual-size'], 64 * MiB)
        text = imgfuse('status', point)
        self.assertRegex(text, r'(?m)^writes +32 +0 +2 MiB')
        self.assertIn('flush cycles: ', text)
        mount.unmount()

    def test_a_directory_shows_the_same_in_files(self):
        point = self.path('point')
        point.mkdir()
        mount = self.mount(self.qcow2(), point=point)
        info = json.loads((point / 'info.json').read_text(encoding='utf-8'))
        self.assertEqual(info, json.loads(imgfuse('status', '--json', point))['info'])
        first = json.loads(run('cat', point / 'stats.json'))
        self.assertEqual((first['statistics']['writes']['requests'], first['jobs']), (0, []))
        with open(mount.disk, 'r+b', buffering=0) as disk:
            disk.write(b'x' * 4096)
        second = json.loads(run('cat', point / 'stats.json'))
        self.assertEqual(second['statistics']['writes']['requests'], 1)
        for name in ('info.json', 'stats.json'):
            self.assertEqual((point / name).stat().st_mode & 0o7777, 0o400)
            for action in (lambda path: path.write_text('x'), os.unlink, lambda path: os.truncate(path, 0)):
                with self.assertRaises(OSError):
                    action(point / name)
        run('cp', point / 'info.json', self.path('copy.json'))
        self.assertEqual(json.loads(self.path('copy.json').read_text(encoding='utf-8')), info)
        mount.unmount()

    def test_a_service_manager_is_told(self):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
            manager.bind(str(self.path('notify')))
            manager.settimeout(60)
            image, point = self.qcow2(), self.path('point')
            point.touch()
            daemon = subprocess.Popen([IMGFUSE, image, point, '-f'],
                                      env=dict(os.environ, NOTIFY_SOCKET=str(self.path('notify'))))
            self.assertEqual(manager.recv(1000).decode(), 'READY=1\nSTATUS=%s at %s' % (image, point))
            imgfuse('umount', point)
            self.assertEqual(manager.recv(1000).decode(), 'STOPPING=1\nSTATUS=closing %s' % image)
            self.assertEqual(daemon.wait(60), 0)

    def test_what_is_not_mounted_has_no_status(self):
        outcome = attempt(IMGFUSE, 'status', self.qcow2())
        self.assertEqual((outcome.status, outcome.out), (1, ''))
        self.assertIn('not mounted', outcome.err)


class Overlays(ImageCase):
    def setUp(self):
        super().setUp()
        self.image = self.qcow2()
        run('qemu-io', '-f', 'qcow2', '-c', 'write -P 1 0 1M', self.image)
        self.before = sha256(self.image)

    def write(self, mount, offset, data):
        with open(mount.disk, 'r+b', buffering=0) as disk:
            disk.seek(offset)
            disk.write(data)
            os.fsync(disk.fileno())

    def read(self, mount, offset, length):
        with open(mount.disk, 'rb', buffering=0) as disk:
            disk.seek(offset)
            return disk.read(length)

    def test_what_is_written_to_an_ephemeral_mount_is_gone_afterwards(self):
        scratch = self.path('scratch')
        scratch.mkdir()
        mount = self.mount(self.image, '-o', 'ephemeral', env=dict(os.environ, TMPDIR=str(scratch)))
        self.assertEqual(os.listdir(scratch), [])
        self.write(mount, 4096, b'changed' * 100)
        self.assertEqual(self.read(mount, 4090, 13), b'\1' * 6 + b'changed')
        mount.unmount()
        self.assertEqual(sha256(self.image), self.before)
        again = self.mount(self.image)
        self.assertEqual(self.read(again, 4096, 7), b'\1' * 7)
        again.unmount()

    def test_a_named_overlay_keeps_it_until_it_is_committed(self):
        overlay = self.path('overlays/work.qcow2')
        overlay.parent.mkdir()
        for round in range(2):
            mount = self.mount(self.image, '-o', 'overlay=%s' % overlay)
            self.write(mount, round * 8192, b'changed')
            self.assertEqual(self.read(mount, 0, 7), b'changed')
            mount.unmount()
        self.assertEqual(sha256(self.image), self.before)
        self.assert_clean(overlay)
        imgfuse('commit', overlay, '--allow-path', self.folder)
        mount = self.mount(self.image)
        self.assertEqual((self.read(mount, 0, 7), self.read(mount, 8192, 7)), (b'changed', b'changed'))
        mount.unmount()

    def test_what_was_written_to_an_ephemeral_mount_is_kept_when_it_is_committed(self):
        mount = self.mount(self.image, '-o', 'ephemeral')
        self.write(mount, 4096, b'changed' * 100)
        imgfuse('commit', mount.point)
        self.write(mount, 0, b'after')
        [entry] = [entry for entry in json.loads(imgfuse('list', '--json')) if entry['mountpoint'] == str(mount.point)]
        self.assertEqual(entry['image'], str(self.image))
        mount.unmount()
        again = self.mount(self.image)
        self.assertEqual((self.read(again, 4096, 7), self.read(again, 0, 5)), (b'changed', b'after'))
        again.unmount()
        self.assert_clean(self.image)

    def test_overlays_that_cannot_be(self):
        point = self.path('point')
        point.touch()
        other = self.qcow2('other.qcow2')
        for options, status, word in ((('-o', 'overlay=%s' % other), 1, 'no overlay of'),
                                      (('-o', 'overlay=%s' % self.image), 1, 'no overlay of'),
                                      (('-o', 'overlay=/no/such/folder/file'), 1, 'no such file'),
                                      (('-o', 'overlay='), 2, 'needs a value'), (('-o', 'ephemeral,ro'), 2, 'overlay')):
            outcome = attempt(IMGFUSE, self.image, point, *options)
            self.assertEqual(outcome.status, status, outcome)
            self.assertIn(word, outcome.err)
        self.assertEqual(sha256(self.image), self.before)


if __name__ == '__main__':
    unittest.main()
