"""Mounting and unmounting in every way there is."""
import json
import os
import signal
import subprocess
import unittest
from pathlib import Path

from harness import (IMGFUSE, MiB, ImageCase, attempt, imgfuse, is_mounted, pattern, process_is_gone, run,
                     sha256, wait_until)

NOBODY = ('setpriv', '--reuid=65534', '--regid=65534', '--clear-groups')


class MountPoints(ImageCase):
    def test_a_regular_file_becomes_the_disk(self):
        image = self.qcow2(size='64M')
        mount = self.mount(image)

        self.assertEqual(os.stat(mount.point).st_size, 64 * MiB)
        self.assertTrue(mount.point.is_file())

        mount.unmount()
        self.assertEqual(os.stat(mount.point).st_size, 0)

    def test_a_directory_shows_disk_raw(self):
        image = self.qcow2(size='64M')
        point = self.path('point')
        point.mkdir()

        mount = self.mount(image, point=point)

        self.assertEqual(sorted(os.listdir(point)), ['disk.raw', 'info.json', 'snapshots', 'stats.json'])
        self.assertEqual(os.stat(point / 'disk.raw').st_size, 64 * MiB)
        mount.unmount()
        self.assertEqual(os.listdir(point), [])

    def test_the_image_file_itself_can_be_the_mount_point(self):
        image = self.qcow2(size='64M')
        data = pattern(MiB, 'own')

        mount = self.mount(image, point=image)
        self.assertEqual(os.stat(image).st_size, 64 * MiB)
        with open(image, 'r+b') as disk:
            disk.seek(5 * MiB)
            disk.write(data)
        mount.unmount()

        self.assertEqual(image.read_bytes()[:4], b'QFI\xfb')
        self.assert_clean(image)
        mount = self.mount(image)
        with open(mount.disk, 'rb') as disk:
            disk.seek(5 * MiB)
            self.assertEqual(disk.read(MiB), data)

    def test_relative_paths_work_and_the_daemon_does_not_hold_the_folder(self):
        self.qcow2('disk.qcow2')
        self.path('point').touch()
        run(IMGFUSE, 'disk.qcow2', 'point', cwd=self.folder)
        self.assertTrue(is_mounted(self.path('point')))

        run(IMGFUSE, 'umount', 'point', cwd=self.folder)

        self.assertFalse(is_mounted(self.path('point')))
        self.assert_clean(self.path('disk.qcow2'))

    def test_the_word_mount_may_be_said(self):
        image = self.qcow2()
        self.path('point').touch()
        imgfuse('mount', image, self.path('point'))
        self.assertTrue(is_mounted(self.path('point')))
        imgfuse('umount', self.path('point'))

    def test_names_with_commas_and_spaces_work(self):
        image = self.qcow2('a, b=c.qcow2')
        point = self.path('the point, again')
        point.touch()
        imgfuse(image, point)
        self.assertEqual(os.stat(point).st_size, 64 * MiB)
        imgfuse('umount', point)

    def test_a_raw_image_mounts_and_writes_through(self):
        image = self.raw(size=16 * MiB)
        data = pattern(3 * MiB, 'raw')
        mount = self.mount(image, '--format', 'raw')
        with open(mount.disk, 'r+b') as disk:
            disk.seek(1000)
            disk.write(data)
        mount.unmount()
        self.assertEqual(image.read_bytes()[1000:1000 + len(data)], data)
        self.assertEqual(os.stat(image).st_size, 16 * MiB)


class Ending(ImageCase):
    """However it is ended, the daemon is gone afterwards, the lock is dropped and the image is clean."""

    def mount_and_write(self, *options):
        image = self.qcow2('disk.qcow2', '64M', '-o', 'lazy_refcounts=on')
        mount = self.mount(image, *options)
        fd = mount.open()
        os.pwrite(fd, pattern(MiB, 'end'), 3 * MiB)  # not fsynced: a clean end keeps it all the same
        os.close(fd)
        return mount

    def assert_ended_well(self, mount):
        self.assertFalse(is_mounted(mount.point))
        self.assert_clean(mount.image)  # qemu-img takes the lock for this
        self.assertFalse(json.loads(run('qemu-img', 'info', '--output=json', mount.image))['dirty-flag'])
        again = self.mount(mount.image, '-r')
        with open(again.disk, 'rb') as disk:
            disk.seek(3 * MiB)
            self.assertEqual(disk.read(MiB), pattern(MiB, 'end'))
        again.unmount()

    def test_imgfuse_umount_returns_when_the_daemon_is_gone(self):
        mount = self.mount_and_write()
        run(IMGFUSE, 'umount', mount.point)
        self.assertTrue(process_is_gone(mount.pid))
        self.assert_ended_well(mount)

    def test_fusermount3(self):
        mount = self.mount_and_write()
        run('fusermount3', '-u', mount.point)
        mount.wait_gone()
        self.assert_ended_well(mount)

    def test_umount(self):
        mount = self.mount_and_write()
        run('umount', mount.point)
        mount.wait_gone()
        self.assert_ended_well(mount)

    def test_sigterm(self):
        mount = self.mount_and_write()
        mount.kill(signal.SIGTERM)
        mount.wait_gone()
        self.assert_ended_well(mount)

    def test_sigint(self):
        mount = self.mount_and_write()
        mount.kill(signal.SIGINT)
        mount.wait_gone()
        self.assert_ended_well(mount)

    def test_umount_of_a_busy_disk_is_refused_and_nothing_ends(self):
        mount = self.mount_and_write()
        with open(mount.disk, 'rb'):
            outcome = attempt(IMGFUSE, 'umount', mount.point)
            self.assertEqual(outcome.status, 1, outcome)
            self.assertTrue(is_mounted(mount.point))
            self.assertFalse(process_is_gone(mount.pid))
        mount.unmount()

    def test_umount_of_what_is_not_mounted_is_an_error(self):
        self.path('point').touch()
        outcome = attempt(IMGFUSE, 'umount', self.path('point'))
        self.assertEqual(outcome.status, 1)
        self.assertIn('point', outcome.err)


class Foreground(ImageCase):
    def start(self, image, *options):
        self.point = self.path('point')
        self.point.touch()
        daemon = subprocess.Popen([IMGFUSE, str(image), str(self.point), '-f', *options], stderr=subprocess.PIPE,
                                  text=True)
        self.addCleanup(daemon.stderr.close)
        self.addCleanup(daemon.kill)
        wait_until(lambda: is_mounted(self.point), what='the mount')
        return daemon

    def test_status_0_says_that_the_image_was_closed(self):
        image = self.qcow2()
        daemon = self.start(image)
        with open(self.point, 'r+b') as disk:
            disk.write(b'x' * 100000)
        run(IMGFUSE, 'umount', self.point)
        self.assertEqual(daemon.wait(10), 0)
        self.assert_clean(image)

    def test_a_signal_ends_it_with_status_0(self):
        for number in (signal.SIGTERM, signal.SIGINT):
            with self.subTest(number):
                image = self.qcow2('disk%d.qcow2' % number)
                daemon = self.start(image)
                daemon.send_signal(number)
                self.assertEqual(daemon.wait(10), 0)
                self.assertFalse(is_mounted(self.point))
                self.assert_clean(image)

    def test_status_1_says_that_closing_failed(self):
        small = self.path('small')
        small.mkdir()
        run('mount', '-t', 'tmpfs', '-o', 'size=2M', 'tmpfs', small)
        run('qemu-img', 'create', '-q', '-f', 'qcow2', '-o', 'cluster_size=4k', small / 'disk.qcow2', '256M')
        daemon = self.start(small / 'disk.qcow2')
        fd = os.open(self.point, os.O_RDWR)
        # The host fills up while the tables of what was acknowledged are still in memory.
        for n in range(40):
            os.pwrite(fd, b'x' * 4096, n * 6 * MiB)
        with open(small / 'filler', 'wb', buffering=0) as filler:
            try:
                while True:
                    filler.write(bytes(4096))
            except OSError:
                pass
        try:
            os.close(fd)
        except OSError:
            pass
        attempt('umount', self.point)
        status = daemon.wait(20)
        message = daemon.stderr.read()
        if status == 0:  # the tables fitted: then they must all be there
            run('qemu-img', 'check', small / 'disk.qcow2')
        else:
            self.assertEqual(status, 1, message)
            self.assertIn('imgfuse: ', message)
            self.assertIn(attempt('qemu-img', 'check', small / 'disk.qcow2').status, (0, 3))

    def test_debug_stays_in_the_foreground(self):
        image = self.qcow2()
        daemon = self.start(image, '-d')
        self.assertIsNone(daemon.poll())
        run(IMGFUSE, 'umount', self.point)
        daemon.stderr.read()
        self.assertEqual(daemon.wait(10), 0)


class Options(ImageCase):
    def options_of(self, point):
        for line in Path('/proc/self/mounts').read_text().splitlines():
            source, target, kind, options = line.split()[:4]
            if target == str(point):
                return source, kind, options.split(',')
        raise AssertionError('%s is not mounted' % point)

    def test_every_option_is_accepted(self):
        image = self.qcow2()
        for options in (['-s'], ['-r'], ['--read-only'], ['-o', 'ro'], ['-o', 'rw'], ['-o', 'allow_other'],
                        ['-o', 'default_permissions'], ['-o', 'uid=65534,gid=65534'], ['-o', 'umask=077'],
                        ['-o', 'max_threads=3'], ['-o', 'clone_fd'], ['-o', 'fsname=other'],
                        ['-o', 'subtype=imgfuse'], ['-o', 'auto_unmount'], ['--format', 'qcow2'],
                        ['--backing-format', 'raw'], ['--cache=writeback'], ['--cache=none'],
                        ['--cache=writethrough'], ['--cache=directsync'], ['--cache=unsafe'], ['--cache', 'none'],
                        ['-o', 'direct_io'], ['-o', 'writeback_cache'], ['--metadata-cache', '1M'],
                        ['--allow-path', '/tmp', '--allow-path', '/var'], ['-r', '--force-share'],
                        ['-o', 'rw,allow_other,default_permissions,max_threads=2']):
            with self.subTest(' '.join(options)):
                mount = self.mount(image, *options)
                with open(mount.disk, 'rb') as disk:
                    self.assertEqual(disk.read(4096), bytes(4096))
                mount.unmount()
        self.assert_clean(image)

    def test_every_cache_mode_keeps_what_was_written(self):
        for mode in ('writeback', 'none', 'writethrough', 'directsync', 'unsafe'):
            with self.subTest(mode):
                image = self.qcow2(mode + '.qcow2')
                data = pattern(3 * MiB + 777, mode)
                mount = self.mount(image, '--cache=' + mode)
                fd = mount.open()
                os.pwrite(fd, data, 12345)
                os.fsync(fd)
                os.close(fd)
                mount.unmount()
                self.assert_clean(image)
                mount = self.mount(image, '-r', '--cache=' + mode)
                fd = mount.open(os.O_RDONLY)
                self.assertEqual(os.pread(fd, len(data), 12345), data)
                os.close(fd)
                mount.unmount()

    def test_writeback_cache_and_direct_io_keep_what_was_written(self):
        for option in ('writeback_cache', 'direct_io'):
            for kind in ('file', 'directory'):
                with self.subTest(option=option, kind=kind):
                    image = self.qcow2('%s-%s.qcow2' % (option, kind))
                    point = self.path('%s-%s' % (option, kind))
                    point.mkdir() if kind == 'directory' else point.touch()
                    data = pattern(MiB, option)
                    mount = self.mount(image, '-o', option, point=point)
                    with open(mount.disk, 'r+b') as disk:
                        disk.seek(3333)
                        disk.write(data)
                        disk.seek(0)
                        self.assertEqual(disk.read(3333 + MiB)[3333:], data)
                    mount.unmount()
                    self.assert_clean(image)
                    mount = self.mount(image, '-r')
                    with open(mount.disk, 'rb') as disk:
                        disk.seek(3333)
                        self.assertEqual(disk.read(MiB), data)
                    mount.unmount()

    def test_writethrough_is_durable_without_fsync(self):
        for mode in ('writethrough', 'directsync'):
            with self.subTest(mode):
                image = self.qcow2(mode + '.qcow2')
                mount = self.mount(image, '--cache=' + mode)
                fd = mount.open(os.O_RDWR | os.O_DSYNC)
                for n in range(20):
                    os.pwrite(fd, pattern(70000, n), n * 3 * MiB)
                mount.kill()
                mount.wait_gone()
                try:
                    os.close(fd)
                except OSError:
                    pass
                mount.bury()
                self.assert_no_corruption(image)
                mount = self.mount(image)
                fd = mount.open(os.O_RDONLY)
                for n in range(20):
                    self.assertEqual(os.pread(fd, 70000, n * 3 * MiB), pattern(70000, n))
                os.close(fd)
                mount.unmount()

    def test_fsname_is_the_image_and_the_type_is_fuse_imgfuse(self):
        image = self.qcow2()
        mount = self.mount(image)
        source, kind, _ = self.options_of(mount.point)
        self.assertEqual((source, kind), (str(image), 'fuse.imgfuse'))
        self.assertEqual(run('findmnt', '-n', '-t', 'fuse.imgfuse', '-o', 'SOURCE', mount.point).strip(), str(image))
        mount.unmount()

        mount = self.mount(image, '-o', 'fsname=my-disk,subtype=mine')
        self.assertEqual(self.options_of(mount.point)[:2], ('my-disk', 'fuse.mine'))
        mount.unmount()

    def test_read_only_refuses_writes_and_leaves_the_image_alone(self):
        for options in (['-r'], ['-o', 'ro'], ['--read-only']):
            with self.subTest(options[-1]):
                image = self.qcow2()
                before = sha256(image)
                mount = self.mount(image, *options)
                self.assertIn('ro', self.options_of(mount.point)[2])
                with self.assertRaises(OSError):
                    fd = mount.open()
                    try:
                        os.pwrite(fd, b'x', 0)
                    finally:
                        os.close(fd)
                mount.unmount()
                self.assertEqual(sha256(image), before)

    def test_uid_gid_and_umask_show_in_stat(self):
        image = self.qcow2()
        mount = self.mount(image, '-o', 'uid=1234,gid=4321,umask=027')
        status = os.stat(mount.disk)
        self.assertEqual((status.st_uid, status.st_gid, status.st_mode & 0o777 & 0o027), (1234, 4321, 0))
        mount.unmount()

    def test_auto_unmount_frees_the_mount_point_of_a_killed_daemon(self):
        image = self.qcow2()
        mount = self.mount(image, '-o', 'auto_unmount')
        mount.kill()
        mount.wait_gone()
        wait_until(lambda: not is_mounted(mount.point), what='the unmount')

    def test_a_small_metadata_cache_still_works(self):
        image = self.qcow2('disk.qcow2', '1G', '-o', 'cluster_size=4k')
        mount = self.mount(image, '--metadata-cache', '256k')
        fd = mount.open()
        positions = self.random.sample(range(1024), 200)
        for n in positions:
            os.pwrite(fd, pattern(5000, n), n * MiB)
        for n in positions:
            self.assertEqual(os.pread(fd, 5000, n * MiB), pattern(5000, n))
        os.close(fd)
        mount.unmount()
        self.assert_clean(image)

    def test_help_and_version_go_to_stdout(self):
        for arguments in (['--help'], ['--version'], ['mount', '--help'], ['umount', '--help'], ['create', '--help'],
                          ['info', '--help'], ['map', '--help'], ['check', '--help']):
            with self.subTest(' '.join(arguments)):
                outcome = attempt(IMGFUSE, *arguments)
                self.assertEqual(outcome.status, 0)
                self.assertIn('imgfuse', outcome.out)
                self.assertEqual(outcome.err, '')


class Mount8(ImageCase):
    """mount(8), its helper, and fstab. The helper is put in its place for the test and removed afterwards."""

    def setUp(self):
        super().setUp()
        for link in ('/usr/sbin/mount.imgfuse', '/usr/bin/imgfuse'):
            if not os.path.lexists(link):
                os.symlink(os.path.realpath(IMGFUSE), link)
                self.addCleanup(os.unlink, link)

    def check(self, point, pid_source):
        self.assertEqual(os.stat(point).st_size, 64 * MiB)
        run('umount', point)
        wait_until(lambda: attempt('qemu-img', 'check', pid_source).status == 0, what='the dropping of the lock')

    def test_mount_type_fuse_imgfuse(self):
        image, point = self.qcow2(), self.path('point')
        point.touch()
        run('mount', '-t', 'fuse.imgfuse', image, point)
        self.check(point, image)

    def test_mount_type_imgfuse_with_options(self):
        image, point = self.qcow2(), self.path('point')
        point.touch()
        run('mount', '-t', 'imgfuse', '-o', 'ro,noatime,allow_other', image, point)
        with self.assertRaises(OSError):
            os.close(os.open(point, os.O_RDWR))
        self.check(point, image)

    def test_the_helper_takes_what_mount_8_gives_it(self):
        image, point = self.qcow2(), self.path('point')
        point.touch()
        run('/usr/sbin/mount.imgfuse', image, point, '-sfnv', '-o', 'rw,nofail,noauto,user,_netdev,x-systemd.automount',
            '-t', 'imgfuse')
        if is_mounted(point):  # -f is mount(8)'s "fake": nothing is mounted
            self.fail('-f mounted')
        run('/usr/sbin/mount.imgfuse', image, point, '-n', '-o',
            'rw,nofail,noauto,_netdev,x-systemd.automount,comment=hello', '-t', 'imgfuse')
        self.check(point, image)

    def test_the_helper_says_where_its_options_are_listed(self):
        outcome = attempt('/usr/sbin/mount.imgfuse', self.qcow2(), self.folder, '-o', 'cache=fast')
        self.assertEqual(outcome.status, 2, outcome)
        self.assertIn('cache mode "fast"', outcome.err)
        self.assertIn('imgfuse mount --help', outcome.err)
        self.assertFalse(is_mounted(self.folder))

    def test_fstab_lines(self):
        image, point = self.qcow2(), self.path('point')
        point.touch()
        for kind in ('fuse.imgfuse', 'imgfuse'):
            with self.subTest(kind):
                table = self.path('fstab')
                table.write_text('%s %s %s noauto,ro,allow_other,nofail 0 0\n' % (image, point, kind))
                run('mount', '--fstab', table, point)
                self.check(point, image)


class Unprivileged(ImageCase):
    """As nobody, through fusermount3."""

    def setUp(self):
        super().setUp()
        if os.stat('/dev/fuse').st_mode & 0o006 != 0o006:  # some containers make it for root only
            mode = os.stat('/dev/fuse').st_mode & 0o777
            os.chmod('/dev/fuse', 0o666)
            self.addCleanup(os.chmod, '/dev/fuse', mode)
        self.image, self.point = self.qcow2(), self.path('point')
        self.point.touch()
        for path in (self.image, self.point, self.folder):
            os.chown(path, 65534, 65534)

    def as_nobody(self, *arguments):
        return attempt(*NOBODY, *arguments)

    def test_nobody_can_mount_write_and_unmount(self):
        outcome = self.as_nobody(IMGFUSE, self.image, self.point)
        self.assertEqual(outcome.status, 0, outcome)
        data = self.path('data')
        data.write_bytes(pattern(MiB, 'nobody'))
        outcome = self.as_nobody('dd', 'if=%s' % data, 'of=%s' % self.point, 'bs=64k', 'seek=7', 'conv=notrunc,fsync',
                                 'status=none')
        self.assertEqual(outcome.status, 0, outcome)
        status = self.as_nobody('stat', '-c', '%u %s', self.point)
        self.assertEqual(status.out.split(), ['65534', str(64 * MiB)])
        outcome = self.as_nobody(IMGFUSE, 'umount', self.point)
        self.assertEqual(outcome.status, 0, outcome)
        self.assert_clean(self.image)
        raw = self.path('raw')
        run('qemu-img', 'convert', '-O', 'raw', self.image, raw)
        self.assertEqual(raw.read_bytes()[7 * 65536:7 * 65536 + MiB], pattern(MiB, 'nobody'))

    def test_others_do_not_see_the_disk(self):
        self.assertEqual(self.as_nobody(IMGFUSE, self.image, self.point).status, 0)
        with self.assertRaises(PermissionError):
            os.stat(self.point)
        self.assertEqual(self.as_nobody('fusermount3', '-u', self.point).status, 0)

    def test_a_directory_works_too(self):
        folder = self.path('directory')
        folder.mkdir()
        os.chown(folder, 65534, 65534)
        self.assertEqual(self.as_nobody(IMGFUSE, self.image, folder).status, 0)
        self.assertEqual(self.as_nobody('ls', folder).out.split(), ['disk.raw', 'info.json', 'snapshots', 'stats.json'])
        self.assertEqual(self.as_nobody('fusermount3', '-u', folder).status, 0)
        wait_until(lambda: attempt('qemu-img', 'check', self.image).status == 0, what='the dropping of the lock')

    def test_an_image_that_may_only_be_read_needs_read_only(self):
        os.chmod(self.image, 0o444)
        outcome = self.as_nobody(IMGFUSE, self.image, self.point)
        self.assertEqual(outcome.status, 1, outcome)
        self.assertFalse(is_mounted(self.point))
        outcome = self.as_nobody(IMGFUSE, self.image, self.point, '-r')
        self.assertEqual(outcome.status, 0, outcome)
        self.assertEqual(self.as_nobody(IMGFUSE, 'umount', self.point).status, 0)

    def test_allow_other_without_user_allow_other_says_what_to_do(self):
        configuration = Path('/etc/fuse.conf')
        if configuration.exists() and any(line.strip() == 'user_allow_other'
                                          for line in configuration.read_text().splitlines()):
            self.assertEqual(self.as_nobody(IMGFUSE, self.image, self.point, '-o', 'allow_other').status, 0)
            return
        outcome = self.as_nobody(IMGFUSE, self.image, self.point, '-o', 'allow_other')
        self.assertEqual(outcome.status, 1)
        self.assertIn('user_allow_other', outcome.err)


class Locks(ImageCase):
    def test_a_second_writer_is_refused_by_the_name_of_the_first(self):
        image = self.qcow2()
        mount = self.mount(image)
        other = self.path('other')
        other.touch()
        outcome = attempt(IMGFUSE, image, other)
        self.assertEqual(outcome.status, 1)
        self.assertIn(str(mount.pid), outcome.err)
        self.assertIn('imgfuse', outcome.err)
        self.assertFalse(is_mounted(other))
        mount.unmount()

    def test_the_same_image_by_another_path_is_the_same_image(self):
        image = self.qcow2()
        link = self.path('link.qcow2')
        os.link(image, link)
        self.mount(image)
        self.path('other').touch()
        self.assertEqual(attempt(IMGFUSE, link, self.path('other')).status, 1)

    def test_two_readers_share(self):
        image = self.qcow2()
        first = self.mount(image, '-r')
        self.path('other').touch()
        second = self.mount(image, '-r', point=self.path('other'))
        first.unmount()
        second.unmount()

    def test_qemu_is_refused_while_mounted_and_welcome_afterwards(self):
        image = self.qcow2()
        mount = self.mount(image)
        outcome = attempt('qemu-io', '-f', 'qcow2', '-c', 'write 0 4k', image)
        self.assertNotEqual(outcome.status, 0)
        self.assertIn('lock', outcome.err + outcome.out)
        self.assertNotEqual(attempt('qemu-img', 'check', image).status, 0)
        mount.unmount()
        run('qemu-io', '-f', 'qcow2', '-c', 'write 0 4k', image)

    def test_an_image_that_qemu_writes_is_refused_by_the_name_of_the_holder(self):
        image = self.qcow2()
        holder = subprocess.Popen(['qemu-io', '-f', 'qcow2', str(image)], stdin=subprocess.PIPE,
                                  stdout=subprocess.PIPE)
        self.addCleanup(holder.stdout.close)
        self.addCleanup(holder.wait)
        self.addCleanup(holder.kill)
        self.addCleanup(holder.stdin.close)
        # Its answer tells that it has the lock. Trying to open the image until that fails could keep it from it.
        holder.stdin.write(b'length\n')
        holder.stdin.flush()
        self.assertIn(b'64 MiB', holder.stdout.readline())
        self.path('point').touch()

        outcome = attempt(IMGFUSE, image, self.path('point'))

        self.assertEqual(outcome.status, 1)
        self.assertIn(str(holder.pid), outcome.err)
        self.assertIn('qemu-io', outcome.err)
        run(IMGFUSE, image, self.path('point'), '-r', '--force-share')
        imgfuse('umount', self.path('point'))

    def test_a_backing_file_in_use_is_locked_against_writers(self):
        base = self.raw('base.raw', 16 * MiB)
        image = self.path('overlay.qcow2')
        run('qemu-img', 'create', '-q', '-f', 'qcow2', '-b', 'base.raw', '-F', 'raw', image)
        self.mount(image)
        self.assertNotEqual(attempt('qemu-io', '-f', 'raw', '-c', 'write 0 4k', base).status, 0)
        self.assertEqual(attempt('qemu-io', '-r', '-f', 'raw', '-c', 'read 0 4k', base).status, 0)


if __name__ == '__main__':
    unittest.main()
