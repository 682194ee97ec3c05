"""Every subcommand on FVD images, held against an independent reader and QEMU's view of the mounted disk."""
import json
import os
import random
import unittest
from itertools import product

from fvd_reader import Fvd
from harness import IMGFUSE, KiB, MiB, ImageCase, attempt, close_quietly, imgfuse, imgfuse_json, pattern, run, seed, sha256, wait_until

SEED = seed()
SIZE = 5 * MiB + 3 * 512


class FvdCase(ImageCase):
    def setUp(self):
        super().setUp()
        self.random = random.Random('%d %s' % (SEED, self.id()))

    def create(self, name='disk.fvd', *options, size=SIZE, base=None):
        path = self.path(name)
        options = ('journal_size=64k', 'storage_grow_unit=1M') + options
        over = ('-b', base, '-F', 'raw') if base else ()
        imgfuse('create', '-f', 'fvd', '-o', ','.join(options), *over, path, size)
        return path

    def filled(self, name='base.raw', size=SIZE, key='base'):
        path = self.path(name)
        content = bytearray(pattern(size, key))
        content[MiB:2 * MiB] = bytes(MiB)
        path.write_bytes(content)
        return path

    def change(self, image, model, times=40, *options):
        """Random writes and zeros through a mount; `model` is a bytearray of the disk."""
        mount = self.mount(image, *options)
        fd = mount.open()
        try:
            for number in range(times):
                at = self.random.randrange(len(model))
                length = min(self.random.choice((512, 4096, 70000, 300000)), len(model) - at)
                data = bytes(length) if self.random.random() < 0.2 else pattern(length, '%s %d' % (self.id(), number))
                self.assertEqual(os.pwrite(fd, data, at), length)
                model[at:at + length] = data
                if self.random.random() < 0.3:
                    os.fsync(fd)
        finally:
            os.close(fd)
        mount.unmount()

    def assert_reads(self, image, model):
        reader = Fvd(image)
        self.assertEqual(list(reader.problems()), [])
        self.assertTrue(reader.content() == bytes(model), 'the independent reader sees something else (seed %d)' % SEED)
        imgfuse('check', image)


class Writing(FvdCase):
    KINDS = tuple(product((False, True), (False, True), ('64k', '-1')))

    def test_what_a_mount_wrote_an_independent_reader_reads(self):
        base = self.filled(size=3 * MiB + 512)
        for compact, with_base, journal in self.KINDS:
            with self.subTest(compact=compact, base=with_base, journal=journal, seed=SEED):
                options = ['journal_size=' + journal]
                options += ['compact_image=on', 'chunk_size=128k'] if compact else []
                options += ['block_size=32k'] if with_base else []
                image = self.create('disk.fvd', *options, base=base.name if with_base else None)
                model = bytearray(SIZE)
                if with_base:
                    model[:3 * MiB + 512] = base.read_bytes()
                for _ in range(2):
                    self.change(image, model)
                    self.assert_reads(image, model)
                    self.assertTrue(Fvd(image).clean)

    def test_a_killed_daemon_leaves_a_journal_that_holds_what_was_synced(self):
        for compact in (False, True):
            with self.subTest(compact=compact):
                base = self.filled()
                image = self.create('disk.fvd', 'compact_image=%s' % ('on' if compact else 'off'), 'chunk_size=64k',
                                    'block_size=4k', base=base.name)
                model = bytearray(base.read_bytes())
                mount = self.mount(image)
                fd = mount.open()
                for number in range(10):
                    at = self.random.randrange(SIZE // 4096) * 4096
                    data = pattern(min(4096, SIZE - at), number)
                    os.pwrite(fd, data, at)
                    model[at:at + len(data)] = data
                os.fsync(fd)
                mount.kill()
                close_quietly(fd)
                mount.bury()
                reader = Fvd(image)
                self.assertFalse(reader.clean)
                self.assertGreater(reader.records, 0)
                self.assertTrue(reader.content() == bytes(model))
                self.assertEqual(self.mounted_content(image), bytes(model))

    def mounted_content(self, image, *options):
        mount = self.mount(image, '-r', *options)
        content = mount.disk.read_bytes()
        mount.unmount()
        return content

    def test_data_in_a_raw_file_and_in_a_qcow2_image(self):
        for format in ('raw', 'qcow2'):
            with self.subTest(format=format):
                data = self.path('data.' + format)
                data.unlink(missing_ok=True)
                run('qemu-img', 'create', '-q', '-f', format, data, 0 if format == 'raw' else SIZE)
                image = self.create('disk.fvd', 'compact_image=on', 'chunk_size=64k', 'data_file=' + data.name,
                                    'data_file_fmt=' + format)
                model = bytearray(SIZE)
                self.change(image, model)
                if format == 'raw':
                    self.assert_reads(image, model)
                else:
                    run('qemu-img', 'check', '-q', data)
                self.assertEqual(self.mounted_content(image), bytes(model))


class Commands(FvdCase):
    def test_info_tells_what_it_is(self):
        self.filled()
        image = self.create('disk.fvd', 'compact_image=on', 'chunk_size=64k', 'block_size=4k', 'copy_on_read=on',
                            base='base.raw')
        info = imgfuse_json('info', '--json', image)
        self.assertEqual((info['format'], info['virtual-size'], info['backing-filename']), ('fvd', SIZE, 'base.raw'))
        own = info['format-specific']['data']
        self.assertEqual((own['chunk-size'], own['block-size'], own['copy-on-read']), (64 * KiB, 4 * KiB, True))
        self.assertIn('chunk size: 65536', imgfuse('info', image))

    def test_map_tells_what_is_where(self):
        base = self.filled()
        image = self.create('disk.fvd', 'block_size=64k', base=base.name)
        model = bytearray(base.read_bytes())
        mount = self.mount(image)
        with open(mount.disk, 'r+b') as disk:
            disk.seek(MiB)
            disk.write(pattern(64 * KiB, 1))
        mount.unmount()
        extents = [e for e in json.loads(imgfuse('map', '--json', image)) if e['depth'] == 0 and e['data']]
        self.assertEqual([(e['start'], e['length']) for e in extents], [(MiB, 64 * KiB)])
        self.assertEqual(extents[0]['offset'], Fvd(image).metadata_size + MiB)

    def test_convert_and_compare_in_both_directions(self):
        source = self.filled('source.raw')
        for options in ('compact_image=on', 'compact_image=off', 'compact_image=on,chunk_size=64k,journal_size=-1'):
            with self.subTest(options=options):
                image, back = self.path('disk.fvd'), self.path('back.raw')
                imgfuse('convert', '-f', 'raw', '-O', 'fvd', '-o', options, source, image)
                self.assert_reads(image, source.read_bytes())
                imgfuse('compare', source, image)
                imgfuse('convert', '-f', 'fvd', '-O', 'raw', image, back)
                self.assertEqual(sha256(back), sha256(source))
                imgfuse('convert', '-O', 'qcow2', image, self.path('other.qcow2'))
                run('qemu-img', 'compare', '-f', 'raw', source, self.path('other.qcow2'))

    def test_measure_says_what_convert_takes(self):
        source = self.filled('source.raw')
        run('fallocate', '--punch-hole', '-o', MiB, '-l', MiB, source)
        for options in ('compact_image=on,chunk_size=64k', 'compact_image=off', 'compact_image=on,journal_size=-1'):
            with self.subTest(options=options):
                image = self.path('disk.fvd')
                imgfuse('convert', '-f', 'raw', '-O', 'fvd', '-o', options + ',storage_grow_unit=4k', source, image)
                measured = imgfuse_json('measure', '--json', '-O', 'fvd', '-o', options, source)
                reader = Fvd(image)
                used = reader.metadata_size + (sum(e != 0xFFFFFFFF for e in reader.table) * reader.chunk
                                               if reader.compact else SIZE)
                self.assertEqual(measured['required'], used)

    def test_resize_grows_shrinks_and_refuses(self):
        image = self.create('disk.fvd', 'compact_image=on', 'chunk_size=4k')
        model = bytearray(SIZE)
        self.change(image, model)
        imgfuse('resize', image, 9 * MiB)
        model += bytes(9 * MiB - SIZE)
        self.assert_reads(image, model)
        imgfuse('resize', '--shrink', image, 2 * MiB)
        imgfuse('resize', image, 4 * MiB)
        model = model[:2 * MiB] + bytes(2 * MiB)
        self.assert_reads(image, model)
        refused = attempt(IMGFUSE, 'resize', image, '100G')
        self.assertEqual(refused.status, 1)
        self.assertIn('imgfuse convert', refused.err)

    def test_amend_changes_settings_and_refuses_what_would_lose_something(self):
        self.filled()
        image = self.create('disk.fvd', base='base.raw')
        imgfuse('amend', '-o', 'copy_on_read=on,prefetch_start_delay=5,bytes_per_prefetch=64k', image)
        own = imgfuse_json('info', '--json', image)['format-specific']['data']
        self.assertEqual((own['copy-on-read'], own['prefetch-start-delay']), (True, 5))
        for wrong in ('compat=1.1', 'size=5', 'prefetch_perf_calc_alpha=101', 'copy_on_read=perhaps'):
            self.assertNotEqual(attempt(IMGFUSE, 'amend', '-o', wrong, image).status, 0, wrong)

    def test_commit_and_rebase(self):
        base = self.filled()
        other = self.path('other.raw')
        other.write_bytes(base.read_bytes())
        image = self.create('disk.fvd', 'block_size=4k', base=base.name)
        model = bytearray(base.read_bytes())
        self.change(image, model)
        imgfuse('rebase', '-u', '-b', other.name, '-F', 'raw', image)
        self.assert_reads(image, model)
        imgfuse('commit', image)
        self.assertTrue(other.read_bytes() == bytes(model))
        self.assert_reads(image, model)

    def test_commit_of_an_image_that_is_longer_than_its_base(self):
        base = self.path('short.raw')
        base.write_bytes(bytes(range(256)) * 4096)
        for compact in ('on', 'off'):
            with self.subTest(compact=compact):
                image = self.path('long.fvd')
                image.unlink(missing_ok=True)
                imgfuse('create', '-f', 'fvd', '-b', base, '-F', 'raw', '-o', 'compact_image=' + compact, image, '8M')
                mount = self.mount(image)
                with open(mount.disk, 'r+b') as disk:
                    for at in (4096, 1 << 20, (8 << 20) - 5000):
                        disk.seek(at)
                        disk.write(b'guest' * 1000)
                model = mount.disk.read_bytes()
                mount.unmount()
                imgfuse('commit', image)
                self.assertEqual(base.read_bytes(), model)
                self.assert_reads(image, model)
                os.truncate(base, 1 << 20)

    def test_what_the_format_does_not_have_is_refused_in_words(self):
        image = self.create()
        for command in (('snapshot', 'create', image, 'one'), ('bitmap', 'add', image, 'one'),
                        ('convert', '-c', '-O', 'fvd', image, self.path('other.fvd'))):
            refused = attempt(IMGFUSE, *command)
            self.assertEqual(refused.status, 1, str(refused))
            self.assertEqual(refused.err.count('\n'), 1, str(refused))

    def test_a_data_file_that_is_not_what_it_seems_is_not_guessed(self):
        data = self.path('data')
        run('qemu-img', 'create', '-q', '-f', 'qcow2', data, SIZE)
        image = self.create('disk.fvd', 'data_file=data', 'data_file_fmt=qcow2')
        with open(image, 'r+b') as file:
            file.seek(2132)
            file.write(bytes(16))
        refused = self.attempt_mount(image)
        self.assertIn('data_format=', refused.err)
        self.mount(image, '-r', '-o', 'data_format=qcow2').unmount()

    def attempt_mount(self, image):
        point = self.path('point')
        point.touch()
        refused = attempt(IMGFUSE, image, point)
        self.assertEqual(refused.status, 1, str(refused))
        return refused


class Copying(FvdCase):
    def status(self, image):
        return imgfuse_json('info', '--json', image)['format-specific']['data']

    def test_prefetching_ends_with_an_image_that_needs_no_base(self):
        base = self.filled()
        content = base.read_bytes()
        for options, mounting in ((('prefetch_start_delay=1',), ()), ((), ('-o', 'prefetch')), ((), ('-o', 'prefetch=50M'))):
            with self.subTest(options=options, mounting=mounting):
                image = self.create('disk.fvd', 'compact_image=on', 'chunk_size=64k', *options, base=base.name)
                mount = self.mount(image, *mounting)
                wait_until(lambda: Fvd(image).all_data, 60, 'the end of prefetching')
                mount.unmount()
                base.rename(self.path('elsewhere'))
                try:
                    self.assert_reads(image, content)
                    mount = self.mount(image, '-r')
                    self.assertTrue(mount.disk.read_bytes() == content)
                    mount.unmount()
                finally:
                    self.path('elsewhere').rename(base)

    def test_copy_on_read_keeps_what_was_read(self):
        base = self.filled()
        for kind in ('fvd', 'qcow2'):
            with self.subTest(kind=kind):
                image = self.path('disk.' + kind)
                imgfuse('create', '-f', kind, '-b', base.name, '-F', 'raw', image)
                mount = self.mount(image, '-o', 'copy_on_read')
                with open(mount.disk, 'rb') as disk:
                    self.assertEqual(disk.read(MiB), base.read_bytes()[:MiB])
                mount.unmount()
                local = sum(e['length'] for e in json.loads(imgfuse('map', '--json', image)) if e['depth'] == 0)
                self.assertGreater(local, 0)
                imgfuse('check', image)
                mount = self.mount(image, '-r')
                self.assertTrue(mount.disk.read_bytes() == base.read_bytes())
                mount.unmount()


if __name__ == '__main__':
    unittest.main()
