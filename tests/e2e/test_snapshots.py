"""Snapshots of images, mounted and not, and the control socket."""
import hashlib
import json
import os
import socket
import struct
import subprocess
import threading
import time
import unittest
from pathlib import Path

from harness import (IMGFUSE, KiB, MiB, ImageCase, attempt, by_scale, imgfuse, imgfuse_json, pattern, run, sha256,
                     wait_until)

NOBODY = ('setpriv', '--reuid=65534', '--regid=65534', '--clear-groups')


def socket_of(pid):
    """The path of a daemon's control socket."""
    for line in Path('/proc/net/unix').read_text(encoding='utf-8').splitlines():
        if line.endswith('-%d.sock' % pid):
            return line[line.index(' /') + 1:]
    raise AssertionError('daemon %d has no control socket' % pid)


class Control:
    """A client of a control socket."""

    def __init__(self, path):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(path)
        self.socket.settimeout(60)
        self.lines = self.socket.makefile('r', encoding='utf-8')

    def say(self, data):
        self.socket.sendall(data if isinstance(data, bytes) else data.encode())

    def hear(self):
        line = self.lines.readline()
        return json.loads(line) if line else None

    def ask(self, command, **arguments):
        self.say(json.dumps({'command': command, 'arguments': arguments}) + '\n')
        return self.hear()

    def close(self):
        self.lines.close()
        self.socket.close()


class SnapshotCase(ImageCase):
    def control(self, mount):
        control = Control(socket_of(mount.pid))
        self.addCleanup(control.close)
        return control

    def write(self, mount, offset, data):
        fd = mount.open()
        self.assertEqual(os.pwrite(fd, data, offset), len(data))
        os.close(fd)

    def read(self, path, offset, length):
        with open(path, 'rb') as file:
            file.seek(offset)
            return file.read(length)

    def mount_directory(self, image, *options):
        point = self.path('dir')
        point.mkdir(exist_ok=True)
        return self.mount(image, *options, point=point)

    def snapshot_names(self, image):
        return [snapshot['name'] for snapshot in imgfuse_json('snapshot', 'list', '--json', image)]


class Unmounted(SnapshotCase):
    def test_qemu_sees_what_imgfuse_makes_and_the_other_way_round(self):
        image = self.qcow2()
        run('qemu-io', '-f', 'qcow2', '-c', 'write -P 1 0 1M', image)
        imgfuse('snapshot', 'create', image, 'ours')
        run('qemu-io', '-f', 'qcow2', '-c', 'write -P 2 0 1M', image)
        run('qemu-img', 'snapshot', '-c', 'theirs', image)
        run('qemu-io', '-f', 'qcow2', '-c', 'write -P 3 0 1M', image)

        theirs = run('qemu-img', 'snapshot', '-l', image).splitlines()
        ours = imgfuse('snapshot', 'list', image).splitlines()
        self.assertEqual(self.snapshot_names(image), ['ours', 'theirs'])
        self.assertEqual([line.split()[:7] for line in ours[1:]][1:], [line.split()[:7] for line in theirs[1:]][1:])
        run('qemu-img', 'snapshot', '-a', 'ours', image)
        run('qemu-io', '-f', 'qcow2', '-c', 'read -P 1 0 1M', image)
        imgfuse('snapshot', 'apply', image, 'theirs')
        run('qemu-io', '-f', 'qcow2', '-c', 'read -P 2 0 1M', image)
        imgfuse('snapshot', 'delete', image, 'ours')
        run('qemu-img', 'snapshot', '-d', 'theirs', image)
        self.assertEqual(imgfuse('snapshot', 'list', image), '')
        self.assert_clean(image)

    def test_a_snapshot_is_presented_read_only(self):
        image = self.qcow2(size='8M')
        run('qemu-io', '-f', 'qcow2', '-c', 'write -P 1 0 1M', image)
        run('qemu-img', 'snapshot', '-c', 'then', image)
        run('qemu-io', '-f', 'qcow2', '-c', 'write -P 2 0 1M', image)
        run('qemu-img', 'resize', '-q', image, '16M')
        before = sha256(image)
        for name in ('then', '1'):
            mount = self.mount(image, '-o', 'snapshot=' + name)
            self.assertEqual(os.stat(mount.disk).st_size, 8 * MiB)
            self.assertEqual(self.read(mount.disk, 0, MiB), b'\1' * MiB)
            with self.assertRaises(OSError):
                mount.open()
            mount.unmount()
        self.assertEqual(sha256(image), before)

    def refuse(self, image, *arguments, says, status=1):
        before = sha256(image)
        outcome = attempt(IMGFUSE, *arguments)
        self.assertEqual((outcome.status, outcome.out), (status, ''), outcome)
        self.assertEqual(len([line for line in outcome.err.splitlines() if not line.startswith('hint: ')]), 1, outcome)
        for word in says:
            self.assertIn(word, outcome.err)
        self.assertEqual(sha256(image), before)

    def test_bad_input_is_one_line_and_changes_nothing(self):
        image, raw = self.qcow2(), self.raw()
        run('qemu-img', 'snapshot', '-c', 'a', image)
        run('qemu-img', 'snapshot', '-c', '1', image)
        self.refuse(image, 'snapshot', 'delete', image, '1', says=['"1"', 'another'])
        self.refuse(image, 'snapshot', 'apply', image, 'b', says=['b'])
        self.refuse(image, 'snapshot', 'delete', image, '7', says=['7'])
        self.refuse(image, 'snapshot', 'create', image, '', says=['name'])
        self.refuse(image, 'snapshot', 'create', image, status=2, says=['NAME'])
        self.refuse(image, 'snapshot', 'rename', image, 'a', status=2, says=['--help'])
        self.refuse(image, 'snapshot', status=2, says=['--help'])
        self.refuse(raw, 'snapshot', 'create', '-f', 'raw', raw, 'a', says=['raw'])
        self.refuse(image, 'snapshot', 'list', self.path('nothing'), says=['nothing'])
        self.path('point').touch()
        self.refuse(image, image, self.path('point'), '-o', 'snapshot=b', says=['b'])
        self.refuse(image, image, self.path('point'), '-o', 'snapshot=', status=2, says=['value'])


class Mounted(SnapshotCase):
    def test_each_way_to_name_it_reaches_the_daemon(self):
        image = self.qcow2()
        mount = self.mount(image)
        link = self.path('link.qcow2')
        os.link(image, link)
        for number, name in enumerate((mount.point, image, link)):
            imgfuse('snapshot', 'create', name, 's%d' % number)
        self.assertEqual(self.snapshot_names(mount.point), ['s0', 's1', 's2'])
        mount.unmount()
        self.assertEqual(self.snapshot_names(image), ['s0', 's1', 's2'])
        mount = self.mount(image, point=image)
        imgfuse('snapshot', 'delete', image, 's0')
        mount.unmount()
        self.assertEqual(self.snapshot_names(image), ['s1', 's2'])
        self.assert_clean(image)

    def test_apply_changes_what_readers_see_at_once(self):
        for options in ((), ('-o', 'writeback_cache'), ('-o', 'direct_io'), ('-s',)):
            with self.subTest(options):
                image = self.qcow2(size='8M')
                mount = self.mount(image, *options)
                then, later = pattern(MiB, 'then'), pattern(MiB, 'later')
                self.write(mount, 100, then)
                imgfuse('snapshot', 'create', mount.point, 'a')
                self.write(mount, 100, later)
                os.truncate(mount.disk, 16 * MiB)
                self.assertEqual(self.read(mount.disk, 100, MiB), later)

                imgfuse('snapshot', 'apply', mount.point, 'a')

                self.assertEqual(os.stat(mount.disk).st_size, 8 * MiB)
                self.assertEqual(self.read(mount.disk, 100, MiB), then)
                self.write(mount, 4 * MiB, later)
                mount.unmount()
                self.assert_clean(image)
                again = self.mount(image, '-r')
                self.assertEqual(self.read(again.disk, 100, MiB), then)
                self.assertEqual(self.read(again.disk, 4 * MiB, MiB), later)
                again.unmount()

    def test_a_loop_device_sees_the_applied_snapshot_after_it_is_attached_again(self):
        image = self.qcow2(size='64M')
        mount = self.mount(image)
        run('mke2fs', '-q', '-F', '-t', 'ext4', mount.disk)
        imgfuse('snapshot', 'create', mount.point, 'empty')
        folder = self.path('fs')
        folder.mkdir()
        for expected in ([], []):
            device = self.losetup(mount.disk)
            run('mount', device, folder)
            self.assertEqual(sorted(os.listdir(folder)), ['lost+found'] + expected)
            (folder / 'file').write_bytes(pattern(MiB, 'file'))
            run('umount', folder)
            self.detach(device)
            imgfuse('snapshot', 'apply', mount.point, 'empty')
            run('e2fsck', '-fn', mount.disk)
        mount.unmount()
        self.assert_clean(image)

    def test_a_snapshot_holds_what_was_acknowledged_before_it_and_nothing_later(self):
        """Writers note what is acknowledged; each block is overwritten with increasing numbers."""
        image = self.qcow2(size='16M')
        mount = self.mount_directory(image)
        block, writers, per_writer = 4 * KiB, 4, 256
        acknowledged, begun = [0] * writers, [0] * writers  # how many writes
        stop = threading.Event()

        def place(writer, number):
            return (writer + writers * (number * 7919 % per_writer)) * 2 * block

        def write(writer):
            fd = mount.open()
            while not stop.is_set():
                number = begun[writer]
                begun[writer] = number + 1
                os.pwrite(fd, struct.pack('<Q', number + 1) * (block // 8), place(writer, number))
                acknowledged[writer] = number + 1
            os.close(fd)

        def check(path, before, after):
            with open(path, 'rb') as file:
                for writer in range(writers):
                    newest = [-1] * per_writer  # the last write to each place that was acknowledged before
                    for number in range(before[writer]):
                        newest[number % per_writer] = number
                    for slot in range(per_writer):
                        file.seek(place(writer, slot))
                        data = file.read(block)
                        self.assertEqual(data, data[:8] * (block // 8), 'a torn block')
                        found = struct.unpack('<Q', data[:8])[0] - 1
                        self.assertGreaterEqual(found, newest[slot], 'an acknowledged write is missing')
                        self.assertLess(found, after[writer], 'a write that began later is there')

        threads = [threading.Thread(target=write, args=(writer,)) for writer in range(writers)]
        for thread in threads:
            thread.start()
        try:
            taken = []
            for number in range(by_scale(3, 8, 40)):
                before = list(acknowledged)
                imgfuse('snapshot', 'create', mount.point, 's%d' % number)
                taken.append(('s%d' % number, before, list(begun)))
                if number % 3 == 2:
                    imgfuse('snapshot', 'delete', mount.point, taken.pop(0)[0])
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        for name, before, after in taken:
            check(mount.point / 'snapshots' / (name + '.raw'), before, after)
        mount.unmount()
        self.assert_clean(image)

    def test_after_applying_under_load_the_kernel_shows_what_the_image_holds(self):
        for options in ((), ('-o', 'writeback_cache')):
            with self.subTest(options):
                image = self.qcow2(size='8M')
                mount = self.mount(image, *options)
                imgfuse('snapshot', 'create', mount.point, 'a')
                stop = threading.Event()

                def work(number):
                    fd, step = mount.open(), 0
                    while not stop.is_set():
                        offset = (step * 7919 + number) % 2048 * 4 * KiB
                        os.pwrite(fd, struct.pack('<QQ', number, step) * 256, offset)
                        os.pread(fd, 4 * KiB, (offset * 3) % (8 * MiB))
                        step += 1
                    os.close(fd)

                threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
                for thread in threads:
                    thread.start()
                try:
                    for _ in range(by_scale(2, 4, 50)):
                        imgfuse('snapshot', 'apply', mount.point, 'a')
                finally:
                    stop.set()
                    for thread in threads:
                        thread.join()
                shown = self.read(mount.disk, 0, 8 * MiB)
                mount.unmount()
                self.assert_clean(image)
                run('qemu-img', 'convert', '-O', 'raw', image, self.path('raw'))
                self.assertEqual(sha256(self.path('raw')), hashlib.sha256(shown).hexdigest())

    def test_a_daemon_that_is_killed_keeps_the_snapshots_it_has_acknowledged(self):
        for round in range(by_scale(2, 4, 30)):
            image = self.qcow2(size='16M')
            mount = self.mount(image)
            acknowledged, running = {}, threading.Event()

            def work():
                number = 0
                while True:
                    data = pattern(64 * KiB, number)
                    try:
                        self.write(mount, number % 64 * 64 * KiB, data)
                    except OSError:
                        return
                    if attempt(IMGFUSE, 'snapshot', 'create', mount.point, 's%d' % number).status != 0:
                        return
                    acknowledged['s%d' % number] = (number % 64 * 64 * KiB, data)
                    number += 1
                    if number > 3:
                        running.set()
                        doomed = 's%d' % (number - 3)
                        del acknowledged[doomed]  # from here on it may be gone
                        if attempt(IMGFUSE, 'snapshot', 'delete', mount.point, doomed).status != 0:
                            return

            worker = threading.Thread(target=work)
            worker.start()
            running.wait(60)
            time.sleep(self.random.random() / 5)
            mount.kill()
            worker.join()
            mount.bury()

            self.assert_no_corruption(image)
            mount = self.mount_directory(image)
            for name, (offset, data) in acknowledged.items():
                self.assertEqual(self.read(mount.point / 'snapshots' / (name + '.raw'), offset, 64 * KiB), data)
            mount.unmount()

    def test_fio_verifies_while_snapshots_come_and_go(self):
        image = self.qcow2(size='64M')
        mount = self.mount(image)
        fio = subprocess.Popen(
            ['fio', '--name=v', '--filename=%s' % mount.disk, '--rw=randwrite', '--bs=4k-64k', '--size=48M',
             '--verify=crc32c', '--do_verify=1', '--verify_fatal=1', '--fsync=64', '--ioengine=psync', '--numjobs=1',
             '--fallocate=none', '--verify_state_save=0', '--loops=%d' % by_scale(1, 3, 20), '--output=/dev/null'],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        self.addCleanup(fio.stderr.close)
        count = 0
        while fio.poll() is None:
            imgfuse('snapshot', 'create', mount.point, 's%d' % count)
            if count > 1:
                imgfuse('snapshot', 'delete', mount.point, 's%d' % (count - 2))
            count += 1
        self.assertEqual(fio.wait(), 0, fio.stderr.read())
        self.assertGreater(count, 1)
        mount.unmount()
        self.assert_clean(image)

    def test_a_read_only_mount_lists_and_changes_nothing(self):
        image = self.qcow2()
        run('qemu-img', 'snapshot', '-c', 'a', image)
        mount = self.mount(image, '-r')
        self.assertEqual(self.snapshot_names(mount.point), ['a'])
        for arguments in (('create', mount.point, 'b'), ('apply', mount.point, 'a'), ('delete', mount.point, 'a')):
            outcome = attempt(IMGFUSE, 'snapshot', *arguments)
            self.assertEqual(outcome.status, 1, outcome)
            self.assertIn('read-only', outcome.err)

    def test_the_mount_of_a_killed_daemon_is_named_as_such(self):
        mount = self.mount(self.qcow2())
        mount.kill()
        mount.wait_gone()
        outcome = attempt(IMGFUSE, 'snapshot', 'list', mount.point)
        self.assertEqual(outcome.status, 1)
        self.assertIn('daemon', outcome.err)
        mount.bury()


class Directory(SnapshotCase):
    def test_snapshots_are_files_with_their_own_size_and_date(self):
        image = self.qcow2(size='8M')
        run('qemu-io', '-f', 'qcow2', '-c', 'write -P 1 0 8M', image)
        run('qemu-img', 'snapshot', '-c', 'small', image)
        run('qemu-img', 'resize', '-q', image, '16M')
        run('qemu-io', '-f', 'qcow2', '-c', 'write -P 2 0 16M', image)
        run('qemu-img', 'snapshot', '-c', 'large', image)
        before = sha256(image)

        mount = self.mount_directory(image, '-r')

        folder = mount.point / 'snapshots'
        self.assertEqual(sorted(os.listdir(folder)), ['large.raw', 'small.raw'])
        self.assertEqual((folder / 'small.raw').read_bytes(), b'\1' * (8 * MiB))
        self.assertEqual((folder / 'large.raw').read_bytes(), b'\2' * (16 * MiB))
        dates = {s['name']: s['date-sec'] for s in imgfuse_json('info', '--json', '-U', image)['snapshots']}
        self.assertEqual(int(os.stat(folder / 'small.raw').st_mtime), dates['small'])
        self.assertEqual(os.stat(folder / 'small.raw').st_mode & 0o777, 0o400)
        mount.unmount()
        self.assertEqual(sha256(image), before)

    def test_tar_and_cp_copy_a_snapshot_whole(self):
        image = self.qcow2(size='8M')
        run('qemu-io', '-f', 'qcow2', '-c', 'write -P 1 3M 64k', '-c', 'write -P 2 8323072 64k', image)
        run('qemu-img', 'snapshot', '-c', 'a', image)
        mount = self.mount_directory(image)
        expected = self.read(mount.disk, 0, 8 * MiB)
        run('tar', '-S', '-cf', self.path('tar'), '-C', mount.point, 'snapshots/a.raw')
        run('tar', '-xf', self.path('tar'), '-C', self.folder)
        self.assertEqual((self.path('snapshots') / 'a.raw').read_bytes(), expected)
        run('cp', mount.point / 'snapshots/a.raw', self.path('copy'))
        self.assertEqual(self.path('copy').read_bytes(), expected)
        self.assertLess(os.stat(self.path('copy')).st_blocks * 512, MiB)
        mount.unmount()

    def test_they_come_and_go_and_an_open_one_is_not_deleted(self):
        image = self.qcow2()
        mount = self.mount_directory(image)
        folder = mount.point / 'snapshots'
        self.assertEqual(os.listdir(folder), [])
        self.write(mount, 0, b'then')
        imgfuse('snapshot', 'create', mount.point, 'a')
        self.write(mount, 0, b'later')
        with open(folder / 'a.raw', 'rb') as file:
            self.assertEqual(file.read(5), b'then\0')
            outcome = attempt(IMGFUSE, 'snapshot', 'delete', mount.point, 'a')
            self.assertEqual(outcome.status, 1, outcome)
            self.assertIn('open', outcome.err)
        imgfuse('snapshot', 'delete', mount.point, 'a')  # at once: the kernel may not have told of the close yet
        self.assertEqual(os.listdir(folder), [])
        self.assertFalse((folder / 'a.raw').exists())
        imgfuse('snapshot', 'create', mount.point, 'a')
        self.assertEqual(self.read(folder / 'a.raw', 0, 5), b'later')
        mount.unmount()
        self.assert_clean(image)

    def test_strange_names(self):
        image = self.qcow2(size='1M')
        names = ['a/b', 'a_b', '..', '.', 'x\ny', '\u00e9' * 120, 'dup', 'dup', 'a b', '-rf', '*', '\x1b[31m', '1']
        for name in names:
            run('qemu-img', 'snapshot', '-c', name, image)
        mount = self.mount_directory(image)
        found = os.listdir(mount.point / 'snapshots')
        self.assertEqual(len(set(found)), len(names))
        for name in found:
            self.assertRegex(name, r'^[^/\x00-\x1f\x7f]+\.raw$')
            self.assertEqual(self.read(mount.point / 'snapshots' / name, 0, MiB), bytes(MiB))
        self.assertIn('dup~8.raw', found)
        self.assertNotIn('\x1b', imgfuse('snapshot', 'list', mount.point))
        mount.unmount()

    def test_a_loop_device_on_a_snapshot(self):
        image = self.qcow2(size='64M')
        mount = self.mount_directory(image)
        run('mke2fs', '-q', '-F', '-t', 'ext4', mount.disk)
        imgfuse('snapshot', 'create', mount.point, 'fs')
        device = self.losetup(mount.point / 'snapshots/fs.raw', '--read-only')
        folder = self.path('fs')
        folder.mkdir()
        run('mount', '-o', 'ro', device, folder)
        self.assertEqual(os.listdir(folder), ['lost+found'])
        run('umount', folder)
        self.detach(device)
        mount.unmount()


class ControlSocket(SnapshotCase):
    def test_hello_info_and_the_last_line(self):
        image = self.qcow2()
        mount = self.mount(image)
        control = self.control(mount)
        hello = control.ask('hello')['return']
        self.assertEqual((hello['protocol'], hello['pid']), (1, mount.pid))
        info = control.ask('info')['return']
        self.assertEqual((info['image'], info['mountpoint']), (str(image), str(mount.point)))
        self.assertEqual((info['format'], info['virtual-size'], info['snapshots']), ('qcow2', 64 * MiB, True))
        mount.unmount()
        self.assertEqual(control.hear(), {'event': 'closed'})
        self.assertIsNone(control.hear())

    def test_garbage_does_no_harm(self):
        mount = self.mount(self.qcow2())
        random = self.random
        for _ in range(by_scale(20, 60, 1000)):
            control = Control(socket_of(mount.pid))
            kind = random.randrange(5)
            try:
                if kind == 0:
                    control.say(random.randbytes(random.randrange(5000)) + b'\n')
                elif kind == 1:
                    control.say(b'{"command": "snapshot-create", "arguments": {"name": ')
                elif kind == 2:
                    control.say(b'[' * 70000)
                elif kind == 3:
                    control.say(b'{"command":"snapshot-list"}\n' * 500)
                else:
                    control.say(json.dumps({'command': random.choice(['resize', 'snapshot-apply', 'bitmap-add', '']),
                                            'arguments': {'size': random.choice([-1, 1e300, '1', None, [], 2**64])}})
                                + '\n')
            except (BrokenPipeError, ConnectionResetError):
                pass
            control.close()
        self.assertIn('return', self.control(mount).ask('hello'))
        self.assertEqual(os.stat(mount.disk).st_size, 64 * MiB)
        self.write(mount, 0, b'alive')
        mount.unmount()
        self.assert_clean(mount.image)

    def test_a_silent_crowd_does_not_keep_umount_from_its_answer(self):
        mount = self.mount(self.qcow2())
        crowd = [Control(socket_of(mount.pid)) for _ in range(100)]
        mount.unmount()
        for control in crowd:
            self.assertEqual(control.hear(), {'event': 'closed'})
            control.close()

    def test_another_user_is_refused(self):
        mount = self.mount(self.qcow2())
        path = socket_of(mount.pid)
        script = 'import socket, sys\ns = socket.socket(socket.AF_UNIX)\ns.connect(sys.argv[1])\nprint(s.recv(999))\n'
        outcome = attempt(*NOBODY, 'python3', '-c', script, path)
        self.assertNotEqual(outcome.status, 0)
        self.assertIn('Permission', outcome.err)
        # Even with access to the socket: the daemon looks at who it is.
        folder = os.path.dirname(path)
        os.chmod(folder, 0o755)
        self.addCleanup(os.chmod, folder, 0o700)
        os.chmod(path, 0o666)
        outcome = attempt(*NOBODY, 'python3', '-c', script, path)
        self.assertEqual(outcome.status, 0, outcome)
        self.assertIn('"denied"', outcome.out)

    def test_the_socket_lies_in_the_runtime_directory_of_a_user(self):
        runtime = self.path('runtime')
        runtime.mkdir(mode=0o700)
        mount = self.mount(self.qcow2(), env=dict(os.environ, XDG_RUNTIME_DIR=str(runtime)))
        path = socket_of(mount.pid)
        self.assertTrue(path.startswith('%s/imgfuse/' % runtime), path)
        self.assertEqual(os.stat(path).st_mode & 0o777, 0o600)
        imgfuse('snapshot', 'create', mount.point, 'a')  # without the variable
        mount.unmount()
        self.assertFalse(os.path.exists(path))


class Bitmaps(SnapshotCase):
    def changed(self, control, name):
        """What the daemon says, asked part by part."""
        ranges, start = [], 0
        while True:
            answer = control.ask('changed-since', name=name, start=start)['return']
            ranges += [(r['start'], r['length']) for r in answer['ranges']]
            if answer['end'] == answer['virtual-size']:
                return ranges
            self.assertGreater(answer['end'], start)
            start = answer['end']

    def test_a_mounted_disk_records_what_changes(self):
        for options in ((), ('-o', 'writeback_cache')):
            with self.subTest(options):
                image = self.qcow2(size='64M')
                mount = self.mount(image, *options)
                control = self.control(mount)
                self.write(mount, 0, b'before')
                self.assertEqual(control.ask('bitmap-add', name='b', granularity=4096), {'return': {}})
                self.assertEqual(self.changed(control, 'b'), [])
                self.write(mount, MiB + 1, b'x' * 4096)
                self.write(mount, 64 * MiB - 1, b'y')
                self.assertEqual(self.changed(control, 'b'), [(MiB, 8192), (64 * MiB - 4096, 4096)])
                self.assertEqual(control.ask('bitmap-clear', name='b'), {'return': {}})
                self.assertEqual(self.changed(control, 'b'), [])
                self.write(mount, 2 * MiB, b'z')
                self.assertEqual(control.ask('bitmap-list')['return'],
                                 [{'name': 'b', 'granularity': 4096, 'in-use': False, 'auto': True}])
                self.assertEqual(control.ask('bitmap-add', name='b')['error']['code'], 'invalid')
                self.assertEqual(control.ask('bitmap-remove', name='c')['error']['code'], 'not-found')
                mount.unmount()
                self.assert_clean(image)
                mount = self.mount(image)
                self.assertEqual(self.changed(self.control(mount), 'b'), [(2 * MiB, 4096)])
                mount.unmount()

    def test_the_subcommands_reach_a_mounted_disk(self):
        image = self.qcow2(size='1G')
        mount = self.mount(image)
        imgfuse('bitmap', 'add', '-g', '512', mount.point, 'b')
        step = 512 * 32768  # what one answer covers: a range that goes on in the next one is one range
        self.write(mount, step - 4096, b'x' * 8192)
        for name in (mount.point, image):
            self.assertEqual(imgfuse_json('map', '--json', '--changed-since', 'b', name),
                             [{'start': step - 4096, 'length': 8192}])
        imgfuse('bitmap', 'clear', image, 'b')
        self.assertEqual(imgfuse_json('map', '--json', '--changed-since', 'b', mount.point), [])
        self.assertEqual([b['name'] for b in imgfuse_json('bitmap', 'list', '--json', mount.point)], ['b'])
        self.assertEqual(attempt(IMGFUSE, 'bitmap', 'remove', mount.point, 'c').status, 1)
        imgfuse('bitmap', 'remove', mount.point, 'b')
        mount.unmount()
        self.assert_clean(image)

    def test_recording_beside_writers_misses_nothing(self):
        image = self.qcow2(size='64M')
        mount = self.mount(image)
        control = self.control(mount)
        fd = mount.open()
        begun, stop = [], threading.Event()  # the block of each write, before it is one

        def work():
            while not stop.is_set():
                begun.append(len(begun) * 7919 % 16384)
                os.pwrite(fd, b'w' * 4096, begun[-1] * 4096)

        worker = threading.Thread(target=work)
        worker.start()
        try:
            for number in range(10):
                control.ask('bitmap-add', name='b%d' % number, granularity=4096)
                before = len(begun)  # a write that had begun may have been done before there was the bitmap
                if number % 2:
                    control.ask('bitmap-remove', name='b%d' % (number - 1))
            wait_until(lambda: len(begun) >= before + 50)
        finally:
            stop.set()
            worker.join()
        os.close(fd)
        changed = {start // 4096 + n for start, length in self.changed(control, 'b9') for n in range(length // 4096)}
        self.assertLessEqual(set(begun[before:]), changed)
        mount.unmount()
        self.assert_clean(image)


class Resize(SnapshotCase):
    def test_a_mounted_disk_grows_for_everybody_who_has_it_open(self):
        image = self.qcow2(size='8M')
        for options in ((), ('-o', 'writeback_cache'), ('-s',)):
            with self.subTest(options):
                mount = self.mount(image, *options)
                size = os.stat(mount.disk).st_size
                device, fd = self.losetup(mount.disk), mount.open()
                imgfuse('resize', '-q', mount.point, '+%d' % size)
                self.assertEqual(os.lseek(fd, 0, os.SEEK_END), 2 * size)
                self.assertEqual(os.stat(mount.disk).st_size, 2 * size)
                run('losetup', '--set-capacity', device)
                self.assertEqual(int(run('blockdev', '--getsize64', device)), 2 * size)
                self.detach(device)
                os.pwrite(fd, b'end', 2 * size - 3)
                os.close(fd)
                self.assertEqual(self.read(mount.disk, 2 * size - 3, 10), b'end')
                outcome = attempt(IMGFUSE, 'resize', image, str(size))
                self.assertEqual(outcome.status, 1, outcome)
                self.assertIn('shrink', outcome.err)
                self.assertEqual(os.stat(mount.disk).st_size, 2 * size)
                mount.unmount()
                self.assert_clean(image)

    def test_a_mounted_disk_shrinks(self):
        image = self.raw(size=8 * MiB)
        mount = self.mount(image, '--format', 'raw')
        self.write(mount, 0, pattern(8 * MiB, 'all'))
        imgfuse('resize', '--shrink', mount.point, '-3M')
        self.assertEqual(os.stat(mount.disk).st_size, 5 * MiB)
        self.assertEqual(self.read(mount.disk, 0, 8 * MiB), pattern(8 * MiB, 'all')[:5 * MiB])
        fd = mount.open()
        with self.assertRaises(OSError):
            os.pwrite(fd, b'x', 5 * MiB)
        os.close(fd)
        mount.unmount()
        self.assertEqual(os.stat(image).st_size, 5 * MiB)

    def test_a_mounted_disk_with_a_snapshot_shrinks_only_when_asked_to(self):
        for compat, may_shrink in (('1.1', True), ('0.10', False)):
            with self.subTest(compat):
                image = self.qcow2('%s.qcow2' % compat, '8M', '-o', 'compat=' + compat)
                content = pattern(8 * MiB, compat)
                mount = self.mount(image)
                self.write(mount, 0, content)
                imgfuse('snapshot', 'create', mount.point, 'whole')
                self.write(mount, MiB, bytes(MiB))
                refused = attempt(IMGFUSE, 'resize', mount.point, '5M')
                self.assertEqual((refused.status, len(refused.err.splitlines())), (1, 1), refused)
                self.assertIn('has to be asked for', refused.err)
                outcome = attempt(IMGFUSE, 'resize', '-q', '--shrink', mount.point, '5M')
                self.assertEqual(outcome.status, 0 if may_shrink else 1, outcome)
                size = 5 * MiB if may_shrink else 8 * MiB
                self.assertEqual(os.stat(mount.disk).st_size, size)
                changed = content[:MiB] + bytes(MiB) + content[2 * MiB:size]
                self.assertEqual(self.read(mount.disk, 0, 8 * MiB), changed)
                imgfuse('snapshot', 'apply', mount.point, 'whole')
                self.assertEqual(self.read(mount.disk, 0, 8 * MiB), content)
                mount.unmount()
                self.assert_clean(image)


if __name__ == '__main__':
    unittest.main()
