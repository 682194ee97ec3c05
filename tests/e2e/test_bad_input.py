"""Bad input gets one clear line on stderr and exit status 1 (2 for usage), and no file is touched."""
import errno
import os
import struct
import unittest

from harness import IMGFUSE, KiB, MiB, ImageCase, attempt, is_mounted, resident_bytes, run, sha256

# Where the fields of a qcow2 header lie: offset and struct format.
FIELDS = {
    'magic': (0, '>I'), 'version': (4, '>I'), 'backing_offset': (8, '>Q'), 'backing_size': (16, '>I'),
    'cluster_bits': (20, '>I'), 'size': (24, '>Q'), 'crypt_method': (32, '>I'), 'l1_size': (36, '>I'),
    'l1_offset': (40, '>Q'), 'refcount_table_offset': (48, '>Q'), 'refcount_table_clusters': (56, '>I'),
    'nb_snapshots': (60, '>I'), 'snapshots_offset': (64, '>Q'), 'incompatible': (72, '>Q'),
    'compatible': (80, '>Q'), 'autoclear': (88, '>Q'), 'refcount_order': (96, '>I'), 'header_length': (100, '>I'),
    'compression_type': (104, '>B'),
}
L1_COPIED = L2_COPIED = 1 << 63
L2_COMPRESSED = 1 << 62


def get(image, field):
    offset, kind = FIELDS[field]
    with open(image, 'rb') as file:
        file.seek(offset)
        return struct.unpack(kind, file.read(struct.calcsize(kind)))[0]


def put(image, offset, kind, value):
    with open(image, 'r+b') as file:
        file.seek(offset)
        file.write(struct.pack(kind, value))


def put_field(image, field, value):
    put(image, *FIELDS[field], value)


class BadInputCase(ImageCase):
    def hashes(self):
        return {path.name: sha256(path) for path in sorted(self.folder.iterdir()) if path.is_file()}

    def refuse(self, *arguments, status=1, says=(), **options):
        """imgfuse ends with the status and one clear line, and every file in the folder is as it was."""
        before = self.hashes()
        outcome = attempt(IMGFUSE, *arguments, timeout=20, **options)
        self.assertEqual(outcome.status, status, outcome)
        lines = outcome.err.splitlines()
        self.assertIn(len(lines), (1, 2), outcome)  # the second one may say what to do
        self.assertTrue(lines[0].startswith('imgfuse: '), outcome)
        self.assertLess(len(lines[0]), 400)
        self.assertEqual(outcome.out, '')
        for word in says:
            self.assertIn(word, outcome.err)
        self.assertEqual(self.hashes(), before)
        return outcome

    def refuse_mount(self, image, *options, says=(), **run_options):
        """Refused read-write, and by `info` or `check` in no worse way than with an error."""
        point = self.path('point')
        point.touch()
        outcome = self.refuse(image, point, *options, says=says, **run_options)
        self.assertFalse(is_mounted(point))
        return outcome


class NotAnImage(BadInputCase):
    def test_a_text_is_not_probed_as_an_image(self):
        file = self.path('letter.txt')
        file.write_text('Dear Sir or Madam,\n' * 100)
        self.refuse_mount(file, '--format', 'qcow2', says=['letter.txt'])
        self.refuse('check', '--format', 'qcow2', file, says=['letter.txt'])

    def test_an_empty_file_is_not_qcow2(self):
        file = self.path('empty')
        file.touch()
        self.refuse_mount(file, '--format', 'qcow2', says=['empty'])

    def test_a_truncated_header(self):
        image = self.qcow2()
        whole = image.read_bytes()
        for length in (4, 8, 71, 72, 100, 103):
            with self.subTest(length):
                image.write_bytes(whole[:length])
                self.refuse_mount(image, '--format', 'qcow2', says=['disk.qcow2'])

    def test_a_directory_a_pipe_and_a_missing_file(self):
        self.refuse_mount(self.folder, says=[str(self.folder)])
        os.mkfifo(self.path('pipe'))
        self.refuse_mount(self.path('pipe'), says=['pipe'])
        self.refuse_mount(self.path('nothing'), says=['nothing', 'o such file'])
        for command in ('info', 'map', 'check'):
            self.refuse(command, self.path('nothing'), says=['nothing'])

    def test_an_unknown_format_name(self):
        self.assertIn(attempt(IMGFUSE, self.qcow2(), self.folder, '--format', 'vmdk').status, (1, 2))


class Header(BadInputCase):
    def bad_field(self, field, *values, base=None, says=()):
        for value in values:
            with self.subTest(field=field, value=hex(value)):
                image = base() if base else self.qcow2()
                put_field(image, field, value)
                self.refuse_mount(image, '--format', 'qcow2', says=says)

    def test_magic_and_version(self):
        self.bad_field('magic', 0, 0x514649FA)
        self.bad_field('version', 0, 1, 4, 0xFFFFFFFF, says=['version'])

    def test_cluster_bits(self):
        self.bad_field('cluster_bits', 0, 8, 22, 63, 64, 0xFFFFFFFF, says=['cluster'])

    def test_size(self):
        self.bad_field('size', 1 << 63, (1 << 64) - 1, (1 << 64) - 512, 1 << 61)

    def test_l1_table(self):
        self.bad_field('l1_size', 0, 0xFFFFFFFF, (32 * MiB // 8) + 1)
        self.bad_field('l1_offset', 1, 512, 0x30001, 1 << 40, 1 << 63, (1 << 64) - 65536)

    def test_refcount_table(self):
        self.bad_field('refcount_table_offset', 1, 512, 1 << 40, 1 << 63)
        self.bad_field('refcount_table_clusters', 0xFFFFFFFF, (8 * MiB // (64 * KiB)) + 1)

    def test_refcount_order(self):
        self.bad_field('refcount_order', 7, 64, 0xFFFFFFFF, says=['efcount'])

    def test_header_length(self):
        self.bad_field('header_length', 0, 72, 103, 65544, 0xFFFFFFFF)

    def test_snapshots(self):
        self.bad_field('nb_snapshots', 65537, 0xFFFFFFFF, says=['snapshot'])

        def with_snapshot():
            image = self.qcow2()
            run('qemu-img', 'snapshot', '-c', 'one', image)
            return image
        self.bad_field('snapshots_offset', 1, 512, 1 << 63, base=with_snapshot)

    def test_backing_name(self):
        def with_backing():
            self.raw('base.raw', MiB)
            return self.qcow2('disk.qcow2', None, '-b', 'base.raw', '-F', 'raw')
        self.bad_field('backing_offset', 65536, 65530, 1 << 63, base=with_backing)
        self.bad_field('backing_size', 1024, 65536, 0xFFFFFFFF, base=with_backing)

    def test_encryption_is_refused_by_name(self):
        self.bad_field('crypt_method', 1, 2, says=['encrypt'])
        self.bad_field('crypt_method', 3)

    def test_compression_type(self):
        self.bad_field('compression_type', 2, 255, says=['ompression'])

    def test_unknown_incompatible_bits_are_refused_by_their_name_or_number(self):
        image = self.qcow2()
        put_field(image, 'incompatible', 1 << 33)
        self.refuse_mount(image, says=['33'])
        content = bytearray(image.read_bytes())
        at = content.index(struct.pack('>I', 0x6803F857)) + 8  # QEMU's feature name table: give bit 33 a name
        content[at:at + 48] = struct.pack('>BB46s', 0, 33, b'time travel')
        image.write_bytes(content)
        self.refuse_mount(image, says=['time travel'])

    def test_unknown_compatible_bits_are_ignored(self):
        image = self.qcow2()
        put_field(image, 'compatible', 1 << 40)
        mount = self.mount(image)
        mount.unmount()
        self.assertEqual(get(image, 'compatible'), 1 << 40)

    def test_unknown_autoclear_bits_are_cleared_by_the_first_write_only(self):
        image = self.qcow2()
        put_field(image, 'autoclear', 1 << 40)
        before = sha256(image)
        self.mount(image, '-r').unmount()
        self.assertEqual(sha256(image), before)
        mount = self.mount(image)
        mount.disk.open('r+b').write(b'x')
        mount.unmount()
        self.assertEqual(get(image, 'autoclear'), 0)

    def test_the_corrupt_bit_allows_reading_only_with_a_warning(self):
        image = self.qcow2()
        run('qemu-io', '-f', 'qcow2', '-c', 'write -P 9 0 64k', image)
        put_field(image, 'incompatible', 2)
        before = sha256(image)
        point = self.path('point')
        point.touch()
        for options in ([], ['-r']):
            with self.subTest(options):
                outcome = attempt(IMGFUSE, image, point, *options)
                self.assertEqual(outcome.status, 0, outcome)
                self.assertEqual(outcome.err.count('is marked as corrupt'), 1, outcome)
                with open(point, 'rb') as disk:
                    self.assertEqual(disk.read(65536), b'\x09' * 65536)
                with self.assertRaises(OSError):
                    with open(point, 'r+b') as disk:
                        disk.write(b'x')
                run(IMGFUSE, 'umount', point)
                self.assertEqual(sha256(image), before)

    def test_unknown_extensions_and_header_bytes_are_preserved(self):
        image = self.qcow2()
        content = bytearray(image.read_bytes())
        self.assertEqual(get(image, 'header_length'), 112)
        extension = struct.pack('>II', 0x12345678, 5) + b'hello\0\0\0'
        content[112:112] = extension
        del content[65536:65536 + len(extension)]  # the cluster keeps its size
        image.write_bytes(content)
        put_field(image, 'autoclear', 1 << 40)  # makes the header be written
        mount = self.mount(image)
        mount.disk.open('r+b').write(b'x')
        mount.unmount()
        self.assertIn(extension, image.read_bytes()[:65536])
        self.assert_clean(image)


class Tables(BadInputCase):
    """Hostile tables: the rest of the disk stays readable, the daemon lives, and the image is as it was."""

    def setUp(self):
        super().setUp()
        self.image = self.qcow2()
        run('qemu-io', '-f', 'qcow2', '-c', 'write -P 1 0 1M', '-c', 'write -P 2 32M 1M', self.image)
        self.l1 = get(self.image, 'l1_offset')
        with open(self.image, 'rb') as file:
            file.seek(self.l1)
            self.l2 = struct.unpack('>Q', file.read(8))[0] & 0x00FFFFFFFFFFFE00

    def hostile(self, offset, value, read_fails=True):
        """`read_fails` is False for references that only a writer has to know as wrong."""
        put(self.image, offset, '>Q', value)
        before = sha256(self.image)
        point = self.path('point')
        point.touch()
        outcome = attempt(IMGFUSE, self.image, point, '-r', timeout=20)
        if outcome.status == 0:
            fd = os.open(point, os.O_RDONLY)
            try:
                if read_fails:
                    with self.assertRaises(OSError) as failure:
                        os.pread(fd, 65536, 0)
                    self.assertEqual(failure.exception.errno, errno.EIO)
                if offset != self.l1:
                    self.assertEqual(os.pread(fd, 65536, 32 * MiB), b'\2' * 65536)
            finally:
                os.close(fd)
            run(IMGFUSE, 'umount', point)
        else:
            self.assertEqual(outcome.status, 1, outcome)
            self.assertIn(len(outcome.err.splitlines()), (1, 2), outcome)
        self.assertEqual(sha256(self.image), before)
        outcome = attempt(IMGFUSE, 'check', self.image, timeout=60)
        self.assertEqual(outcome.status, 2, outcome)
        self.assertEqual(sha256(self.image), before)
        self.write_to_it(point)

    def write_to_it(self, point):
        """Read-write: refused, or the write fails; no crash, and no hang."""
        if attempt(IMGFUSE, self.image, point, timeout=20).status != 0:
            return
        fd = os.open(point, os.O_RDWR)
        try:
            with self.assertRaises(OSError):
                os.pwrite(fd, b'x' * 4096, 1000)
                os.fsync(fd)
        finally:
            try:
                os.close(fd)
            except OSError:
                pass
        outcome = attempt(IMGFUSE, 'umount', point, timeout=20)
        self.assertIn(outcome.status, (0, 1), outcome)
        self.assertFalse(is_mounted(point))

    def test_l1_entry_unaligned(self):
        self.hostile(self.l1, L1_COPIED | self.l2 | 512)

    def test_l1_entry_with_reserved_bits(self):
        self.hostile(self.l1, L1_COPIED | self.l2 | 1)
        self.hostile(self.l1, L1_COPIED | self.l2 | 1 << 58)

    def test_l1_entry_past_the_end_of_the_file(self):
        self.hostile(self.l1, L1_COPIED | 1 << 45)

    def test_l1_entry_past_the_address_space(self):
        self.hostile(self.l1, L1_COPIED | 1 << 56)

    def test_l1_entry_at_metadata(self):
        self.hostile(self.l1, L1_COPIED | get(self.image, 'refcount_table_offset'), read_fails=False)

    def test_l1_entry_at_its_own_table(self):
        self.hostile(self.l1, L1_COPIED | self.l1, read_fails=False)

    def test_l2_entry_unaligned(self):
        self.hostile(self.l2, L2_COPIED | 0x50000 | 512)

    def test_l2_entry_with_reserved_bits(self):
        self.hostile(self.l2, L2_COPIED | 0x50000 | 2)

    def test_l2_entry_past_the_address_space(self):
        self.hostile(self.l2, L2_COPIED | 1 << 56)

    def test_l2_entry_at_metadata(self):
        self.hostile(self.l2, L2_COPIED | get(self.image, 'refcount_table_offset'), read_fails=False)

    def test_l2_entry_at_its_own_table(self):
        self.hostile(self.l2, L2_COPIED | self.l2, read_fails=False)

    def test_compressed_data_that_does_not_decompress(self):
        with open(self.image, 'r+b') as file:
            end = os.fstat(file.fileno()).st_size
            file.seek(end)
            file.write(b'\xff' * 65536)
        self.hostile(self.l2, L2_COMPRESSED | end | 100 << 54)

    def test_compressed_data_past_the_end_of_the_file(self):
        self.hostile(self.l2, L2_COMPRESSED | 1 << 45)

    def test_an_image_that_claims_to_be_huge_takes_little_memory(self):
        image = self.path('huge.qcow2')
        run('qemu-img', 'create', '-q', '-f', 'qcow2', '-o', 'cluster_size=2M', image, 1 << 60)
        point = self.path('point')
        point.touch()
        if attempt(IMGFUSE, image, point, timeout=20).status == 0:
            pid = int(run('pgrep', '-f', '%s %s' % (image, point)).split()[0])
            with open(point, 'rb') as disk:
                disk.seek(1 << 59)
                disk.read(4096)
            self.assertLess(resident_bytes(pid, 'VmHWM'), 256 * MiB)
            run(IMGFUSE, 'umount', point)


class Backing(BadInputCase):
    def overlay(self, name, backing, *options):
        run('qemu-img', 'create', '-q', '-u', '-f', 'qcow2', '-b', backing, *(options or ('-F', 'raw')), self.path(name),
            '16M')
        return self.path(name)

    def test_missing(self):
        self.refuse_mount(self.overlay('disk.qcow2', 'gone.raw'), says=['gone.raw', 'o such file'])

    def test_cyclic(self):
        self.overlay('a.qcow2', 'b.qcow2', '-F', 'qcow2')
        self.overlay('b.qcow2', 'a.qcow2', '-F', 'qcow2')
        self.refuse_mount(self.path('a.qcow2'), says=['a.qcow2'])
        self.overlay('self.qcow2', 'self.qcow2', '-F', 'qcow2')
        self.refuse_mount(self.path('self.qcow2'))

    def test_cyclic_through_a_link(self):
        self.overlay('a.qcow2', 'link.qcow2', '-F', 'qcow2')
        os.symlink('a.qcow2', self.path('link.qcow2'))
        self.refuse_mount(self.path('a.qcow2'))

    def test_deeper_than_200(self):
        self.raw('0.qcow2', MiB)
        for n in range(1, 203):
            self.overlay('%d.qcow2' % n, '%d.qcow2' % (n - 1), '-F', 'raw' if n == 1 else 'qcow2')
        self.refuse_mount(self.path('202.qcow2'), says=['200'])
        self.mount(self.path('199.qcow2'), '-r').unmount()

    def test_forbidden_outside_the_folder_until_allowed(self):
        inner = self.path('inner')
        inner.mkdir()
        base = self.raw('base.raw', 16 * MiB)
        for name in (str(base), '../base.raw'):
            with self.subTest(name):
                image = self.overlay('inner/disk.qcow2', name)
                self.refuse_mount(image, says=['--allow-path', str(self.folder)])
                mount = self.mount(image, '--allow-path', self.folder, point=self.path('point'))
                mount.unmount()

    def test_forbidden_through_a_link_out_of_the_folder(self):
        inner = self.path('inner')
        inner.mkdir()
        self.raw('base.raw', 16 * MiB)
        os.symlink('../base.raw', inner / 'base.raw')
        self.refuse_mount(self.overlay('inner/disk.qcow2', 'base.raw'), says=['--allow-path'])

    def test_etc_passwd(self):
        self.refuse_mount(self.overlay('disk.qcow2', '/etc/passwd'), says=['--allow-path'])

    def test_protocol_names(self):
        for name in ('json:{"driver":"raw","file":{"driver":"file","filename":"/etc/passwd"}}', 'nbd:localhost:10809',
                     'file:base.raw', 'ssh://host/disk', 'fat:/etc'):
            with self.subTest(name):
                self.raw('base.raw', 16 * MiB)
                image = self.qcow2('disk.qcow2', '16M')
                content = bytearray(image.read_bytes())
                content[1024:1024 + len(name)] = name.encode()
                image.write_bytes(content)
                put_field(image, 'backing_offset', 1024)
                put_field(image, 'backing_size', len(name))
                self.refuse_mount(image, '--backing-format', 'raw')

    def test_no_recorded_format(self):
        self.raw('base.raw', 16 * MiB)
        image = self.overlay('disk.qcow2', 'base.raw')
        content = bytearray(image.read_bytes())
        at = content.index(struct.pack('>I', 0xE2792ACA))
        content[at:at + 4] = struct.pack('>I', 0x11111111)
        image.write_bytes(content)
        self.refuse_mount(image, says=['--backing-format'])
        self.mount(image, '--backing-format', 'raw').unmount()

    def test_a_pipe_as_backing_file(self):
        os.mkfifo(self.path('pipe'))
        self.refuse_mount(self.overlay('disk.qcow2', 'pipe'), says=['pipe'])

    def test_info_does_not_open_the_chain(self):
        image = self.overlay('disk.qcow2', 'gone.raw')
        self.assertIn('gone.raw', run(IMGFUSE, 'info', image))


class Surroundings(BadInputCase):
    def test_no_permission(self):
        image, point = self.qcow2(), self.path('point')
        point.touch()
        os.chmod(image, 0o600)
        os.chown(point, 65534, 65534)
        outcome = attempt('setpriv', '--reuid=65534', '--regid=65534', '--clear-groups', IMGFUSE, image, point)
        self.assertEqual(outcome.status, 1)
        self.assertIn('ermission denied', outcome.err)

    def test_a_missing_mount_point_says_what_to_do(self):
        image = self.qcow2()
        outcome = self.refuse(image, self.path('nowhere'), says=['nowhere'])
        self.assertTrue('touch' in outcome.err or 'mkdir' in outcome.err or 'create' in outcome.err, outcome)
        self.assertFalse(self.path('nowhere').exists())

    def test_a_busy_mount_point(self):
        mount = self.mount(self.qcow2('first.qcow2'))
        outcome = attempt(IMGFUSE, self.qcow2('second.qcow2'), mount.point)
        self.assertEqual(outcome.status, 1, outcome)
        self.assertIn(str(mount.point), outcome.err)
        mount.unmount()

    def test_a_mount_point_that_hides_files(self):
        image = self.qcow2()
        full = self.path('full')
        full.mkdir()
        (full / 'file').touch()
        outcome = attempt(IMGFUSE, image, full)
        if outcome.status == 0:
            run(IMGFUSE, 'umount', full)
        else:
            self.assertEqual(outcome.status, 1)

    def test_an_image_inside_its_mount_point(self):
        image = self.qcow2()
        outcome = attempt(IMGFUSE, image, self.folder)
        self.assertEqual(outcome.status, 1, outcome)
        self.assertFalse(is_mounted(self.folder))

    def test_a_full_disk(self):
        small = self.path('small')
        small.mkdir()
        run('mount', '-t', 'tmpfs', '-o', 'size=64k', 'tmpfs', small)
        outcome = attempt(IMGFUSE, 'create', '-o', 'preallocation=full', small / 'disk.qcow2', '1M')
        self.assertEqual(outcome.status, 1, outcome)
        self.assertIn('o space', outcome.err)
        self.assertFalse((small / 'disk.qcow2').exists())

    def test_create_does_not_replace_an_image_in_use(self):
        mount = self.mount(self.qcow2())
        before = sha256(mount.image)
        self.assertEqual(attempt(IMGFUSE, 'create', '-f', 'qcow2', mount.image, '1G').status, 1)
        self.assertEqual(sha256(mount.image), before)
        mount.unmount()

    def test_a_dev_fuse_that_is_not_there_is_named(self):
        image, point = self.qcow2(), self.path('point')
        point.touch()
        outcome = attempt('unshare', '--mount', 'sh', '-c',
                          'mount -t tmpfs tmpfs /dev && exec "$@"', 'sh', IMGFUSE, image, point)
        self.assertEqual(outcome.status, 1, outcome)
        self.assertIn('fuse: device not found', outcome.err)


class Usage(BadInputCase):
    def test_unknown_options(self):
        image, point = self.qcow2(), self.path('point')
        point.touch()
        self.refuse(image, point, '--frobnicate', status=2, says=['frobnicate'])
        self.refuse(image, point, '-o', 'frobnicate', status=2, says=['frobnicate'])
        self.refuse(image, point, '--cache=sometimes', status=2, says=['sometimes'])
        self.refuse(image, point, '--metadata-cache', 'much', status=2, says=['much'])
        self.refuse(image, point, '-o', 'max_threads=0', status=2, says=['max_threads'])
        self.refuse(image, point, '-o', 'uid=me', status=2, says=['uid'])
        self.refuse(image, point, '--force-share', status=2, says=['read-only'])

    def test_missing_and_surplus_arguments(self):
        image = self.qcow2()
        self.refuse(image, status=2)
        self.refuse(image, self.folder, 'more', status=2)
        self.refuse('umount', status=2)
        self.refuse('info', status=2)
        self.refuse('create', status=2)
        self.refuse('check', '--repair', 'sometimes', image, status=2)
        self.assertEqual(attempt(IMGFUSE).status, 2)

    def test_create_refuses_what_no_image_can_be(self):
        for options in (['-o', 'cluster_size=3000'], ['-o', 'cluster_size=256'], ['-o', 'refcount_bits=3'],
                        ['-o', 'compat=7'], ['-o', 'compat=0.10,refcount_bits=1'], ['-o', 'preallocation=some'],
                        ['-o', 'frobnicate=1']):
            with self.subTest(' '.join(options)):
                outcome = attempt(IMGFUSE, 'create', '-f', 'qcow2', *options, self.path('new.qcow2'), '1M')
                self.assertIn(outcome.status, (1, 2), outcome)
                self.assertFalse(self.path('new.qcow2').exists())
        self.assertIn(attempt(IMGFUSE, 'create', '-f', 'qcow2', self.path('new.qcow2'), 'big').status, (1, 2))
        self.assertIn(attempt(IMGFUSE, 'create', '-f', 'qcow2', self.path('new.qcow2')).status, (1, 2))
        self.assertFalse(self.path('new.qcow2').exists())


if __name__ == '__main__':
    unittest.main()
