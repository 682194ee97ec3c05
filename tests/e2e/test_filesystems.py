"""File systems in the image, through loop devices, as people use them."""
import os
import platform
import shutil
import stat
import tempfile
import unittest
from pathlib import Path

from harness import GiB, IMGFUSE, MiB, ROOT, SCRATCH, ImageCase, run, sha256

TREE = Path('/usr/include/c++')  # some thousand files of all sizes
MAKE = {'ext4': ('mkfs.ext4', '-q', '-F'), 'xfs': ('mkfs.xfs', '-q', '-f'), 'btrfs': ('mkfs.btrfs', '-q', '-f')}
CHECK = {'ext4': ('e2fsck', '-f', '-n'), 'xfs': ('xfs_repair', '-n'), 'btrfs': ('btrfs', 'check', '--readonly')}


def used(path):
    return os.stat(path).st_blocks * 512


def listing(folder):
    """Path, kind, mode, owner, size, time and content of everything below the folder."""
    entries = {}
    for place, folders, files in os.walk(folder):
        for name in folders + files:
            path = os.path.join(place, name)
            status = os.lstat(path)
            entry = [oct(status.st_mode), status.st_uid, status.st_gid, int(status.st_mtime)]
            if stat.S_ISLNK(status.st_mode):
                entry.append(os.readlink(path))
            elif stat.S_ISREG(status.st_mode):
                entry += [status.st_size, sha256(path)]
            elif stat.S_ISBLK(status.st_mode) or stat.S_ISCHR(status.st_mode):
                entry.append(status.st_rdev)
            entries[os.path.relpath(path, folder)] = entry
    entries.pop('lost+found', None)
    return entries


class LoopCase(ImageCase):
    def mount_device(self, device, *options):
        tree = self.path('tree')
        tree.mkdir(exist_ok=True)
        run('mount', *options, device, tree)
        return tree


class LoopDevices(LoopCase):
    def round_trip(self, kind, direct, format='qcow2', *options):
        image = self.new('%s-%s.%s' % (kind, direct, format), '512M', *options)
        mount = self.mount(image)
        device = self.losetup(mount.disk, '--direct-io=' + direct)
        self.assertEqual(run('losetup', '-n', '-O', 'DIO', device).strip(), '1' if direct == 'on' else '0')
        run(*MAKE[kind], device)
        tree = self.mount_device(device)
        run('cp', '-a', TREE, tree / 'copy')
        run('umount', tree)
        run(*CHECK[kind], device)
        self.detach(device)
        mount.unmount()
        self.assert_clean(image)

        mount = self.mount(image, '-r')
        device = self.losetup(mount.disk, '--read-only')
        run(*CHECK[kind], device)
        tree = self.mount_device(device, '-o', 'ro')
        run('diff', '-r', '--no-dereference', TREE, tree / 'copy')
        run('umount', tree)
        self.detach(device)
        mount.unmount()
        image.unlink()

    def test_ext4_with_direct_io(self):
        self.round_trip('ext4', 'on')

    def test_ext4_without_direct_io(self):
        self.round_trip('ext4', 'off')

    def test_ext4_in_a_qed_image(self):
        self.round_trip('ext4', 'on', 'qed')

    def test_xfs_with_direct_io(self):
        self.round_trip('xfs', 'on')

    def test_xfs_without_direct_io(self):
        self.round_trip('xfs', 'off')

    def test_btrfs_with_direct_io(self):
        self.round_trip('btrfs', 'on')

    def test_btrfs_without_direct_io(self):
        self.round_trip('btrfs', 'off')

    def test_ext4_in_an_fvd_image(self):
        self.round_trip('ext4', 'on', 'fvd')

    def test_xfs_in_an_fvd_image_that_copies_its_base(self):
        self.raw('base.raw', 512 * MiB)
        options = 'compact_image=on,block_size=64k,copy_on_read=on,prefetch_start_delay=1'
        self.round_trip('xfs', 'off', 'fvd', '-o', options, '-b', 'base.raw', '-F', 'raw')

    def test_mount_o_loop_works_on_the_disk(self):
        image = self.qcow2(size='64M')
        mount = self.mount(image)
        run(*MAKE['ext4'], mount.disk)
        tree = self.mount_device(mount.disk, '-o', 'loop')
        run('cp', '-a', ROOT / 'include', tree)
        run('umount', tree)
        run(*CHECK['ext4'], mount.disk)
        mount.unmount()
        self.assert_clean(image)


class Discard(LoopCase):
    def test_blkdiscard_frees_host_clusters(self):
        for direct in ('on', 'off'):
            with self.subTest(direct_io=direct):
                image = self.qcow2(direct + '.qcow2', '256M')
                mount = self.mount(image)
                device = self.losetup(mount.disk, '--direct-io=' + direct)
                run('dd', 'if=/dev/urandom', 'of=' + device, 'bs=1M', 'count=100', 'oflag=direct', 'status=none')
                run('sync', device)
                self.assertGreater(used(image), 99 * MiB)
                run('blkdiscard', '--offset', 10 * MiB, '--length', 80 * MiB, device)
                run('sync', device)
                self.assertLess(used(image), 30 * MiB)
                self.detach(device)
                mount.unmount()
                self.assertLess(used(image), 25 * MiB)
                self.assert_clean(image)

    def test_fstrim_frees_what_deleted_files_took(self):
        image = self.qcow2('disk.qcow2', '512M')
        mount = self.mount(image)
        device = self.losetup(mount.disk, '--direct-io=on')
        run(*MAKE['ext4'], device)
        tree = self.mount_device(device)
        with open(tree / 'big', 'wb') as big:
            for n in range(200):
                big.write(os.urandom(MiB))
        run('sync', '-f', tree)
        full = used(image)
        self.assertGreater(full, 190 * MiB)
        os.unlink(tree / 'big')
        run('sync', '-f', tree)
        run('fstrim', tree)
        run('umount', tree)
        run('sync', device)
        self.assertLess(used(image), full - 180 * MiB)
        run(*CHECK['ext4'], device)
        self.detach(device)
        mount.unmount()
        self.assert_clean(image)


class DebianRoot(LoopCase):
    """A real root file system, made once for all tests of the class."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.cache = Path(tempfile.mkdtemp(prefix='imgfuse-root-', dir=SCRATCH))
        cls.addClassCleanup(shutil.rmtree, cls.cache, ignore_errors=True)
        suite = platform.freedesktop_os_release().get('VERSION_CODENAME', 'bookworm')
        cls.root = cls.cache / 'root'
        run('mmdebstrap', '--variant=minbase', suite, cls.root, timeout=600)
        cls.listing = listing(cls.root)
        cls.disk = cls.cache / 'disk.raw'
        with open(cls.disk, 'wb') as file:
            file.truncate(GiB)
        run('mke2fs', '-q', '-t', 'ext4', '-d', cls.root, cls.disk, timeout=300)

    def compressed(self, kind):
        image = self.path(kind + '.qcow2')
        run('qemu-img', 'convert', '-c', '-f', 'raw', '-O', 'qcow2', '-o', 'compression_type=' + kind, self.disk, image,
            timeout=300)
        return image

    def test_every_file_of_a_compressed_image_is_the_same(self):
        self.assertGreater(len(self.listing), 3000)
        for kind in ('zlib', 'zstd'):
            with self.subTest(kind):
                image = self.compressed(kind)
                before = sha256(image)
                mount = self.mount(image, '-r')
                tree = self.mount_device(self.losetup(mount.disk, '--read-only'), '-o', 'ro')
                self.assertEqual(listing(tree), self.listing)
                run('umount', tree)
                self.detach_all()
                mount.unmount()
                self.assertEqual(sha256(image), before)

    def detach_all(self):
        for line in run('losetup', '--noheadings', '--output', 'NAME,BACK-FILE').splitlines():
            if str(self.folder) in line:
                self.detach(line.split()[0])

    def test_a_compressed_image_can_be_written_to(self):
        image = self.compressed('zstd')
        mount = self.mount(image)
        device = self.losetup(mount.disk, '--direct-io=on')
        tree = self.mount_device(device)
        for folder in ('usr/share', 'var'):
            for place, _, files in os.walk(tree / folder):
                for name in files[:3]:
                    with open(os.path.join(place, name), 'ab') as file:
                        file.write(b'appended')
        changed = listing(tree)
        run('umount', tree)
        run(*CHECK['ext4'], device)
        self.detach(device)
        mount.unmount()
        self.assert_clean(image)

        mount = self.mount(image, '-r')
        tree = self.mount_device(self.losetup(mount.disk, '--read-only'), '-o', 'ro')
        self.assertEqual(listing(tree), changed)
        run('umount', tree)
        self.detach_all()
        mount.unmount()

    def test_a_tree_copied_to_a_compressing_disk_is_the_same_and_smaller(self):
        for kind in ('zlib', 'zstd'):
            with self.subTest(kind):
                image = self.path(kind + '-new.qcow2')
                run(IMGFUSE, 'create', '-o', 'compression_type=' + kind, image, '1G')
                mount = self.mount(image, '-o', 'compress=' + kind)
                device = self.losetup(mount.disk)
                run('mke2fs', '-q', '-t', 'ext4', device)
                tree = self.mount_device(device)
                run('cp', '-a', self.root / 'usr', tree)
                run('umount', tree)
                run(*CHECK['ext4'], device)
                self.detach(device)
                mount.unmount()
                self.assert_clean(image)
                size = int(run('du', '-sk', self.root / 'usr').split()[0]) * 1024
                self.assertLess(image.stat().st_blocks * 512, 0.7 * size)

                mount = self.mount(image, '-r')
                tree = self.mount_device(self.losetup(mount.disk, '--read-only'), '-o', 'ro')
                self.assertEqual(listing(tree / 'usr'), listing(self.root / 'usr'))
                run('umount', tree)
                self.detach_all()
                mount.unmount()


if __name__ == '__main__':
    unittest.main()
