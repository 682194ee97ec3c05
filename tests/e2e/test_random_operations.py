"""Random operations on the presented file against a model, in the manner of fsx."""
import mmap
import os
import unittest

from harness import KiB, MiB, ImageCase, by_scale, fallocate, pattern, punch_hole, run, zero_range


class Model:
    """What the disk must read as."""

    def __init__(self, content):
        self.content = bytearray(content)

    def write(self, offset, data):
        self.content[offset:offset + len(data)] = data

    def grow(self, size):
        self.content += bytes(size - len(self.content))


class RandomOperations(ImageCase):
    operations = by_scale(150, 800, 10000)

    def run_against_model(self, image, content, *options, remounts=3):
        self.model = Model(content)
        self.log = []
        for _ in range(remounts):
            mount = self.mount(image, *options)
            self.buffered, self.direct = mount.open(), mount.open(os.O_RDWR | os.O_DIRECT)
            for _ in range(self.operations // remounts):
                self.step()
            self.compare(0, len(self.model.content))
            os.close(self.buffered)
            os.close(self.direct)
            mount.unmount()
            if image.suffix != '.img':
                self.assert_clean(image)
        mount = self.mount(image, '-r', *options)
        self.assertEqual(mount.disk.read_bytes(), self.model.content)
        mount.unmount()

    def step(self):
        step = self.random.choice((self.write, self.write, self.write, self.write_direct, self.write_mapped, self.read,
                                   self.read, self.read_direct, self.read_mapped, self.punch, self.zero,
                                   self.preallocate, self.grow, self.sync))
        size = len(self.model.content)
        length = self.random.randrange(1, self.random.choice((512, 8 * KiB, 100 * KiB, MiB)))
        offset = self.random.randrange(size - length)
        self.log = self.log[-30:] + ['%s %d+%d' % (step.__name__, offset, length)]
        step(offset, length)

    def compare(self, offset, length, data=None):
        data = os.pread(self.buffered, length, offset) if data is None else data
        expected = self.model.content[offset:offset + length]
        if data != expected:
            first = next((i for i in range(min(len(data), length)) if data[i] != expected[i]), len(data))
            self.fail('byte %d differs, after %s' % (offset + first, '; '.join(self.log)))

    def write(self, offset, length):
        data = pattern(length, self.random.random())
        os.pwrite(self.buffered, data, offset)
        self.model.write(offset, data)

    def write_direct(self, offset, length):
        offset, length = offset // 512 * 512, -(-length // 512) * 512
        with mmap.mmap(-1, length) as buffer:
            buffer[:] = pattern(length, self.random.random())
            length = min(length, len(self.model.content) - offset)
            with memoryview(buffer) as view:
                os.pwritev(self.direct, [view[:length]], offset)
            self.model.write(offset, buffer[:length])

    def write_mapped(self, offset, length):
        data = pattern(length, self.random.random())
        with mmap.mmap(self.buffered, len(self.model.content)) as memory:
            memory[offset:offset + length] = data
        self.model.write(offset, data)

    def read(self, offset, length):
        self.compare(offset, length)

    def read_direct(self, offset, length):
        offset, length = offset // 512 * 512, -(-length // 512) * 512
        with mmap.mmap(-1, length) as buffer:
            got = os.preadv(self.direct, [buffer], offset)
            self.compare(offset, got, buffer[:got])

    def read_mapped(self, offset, length):
        with mmap.mmap(self.buffered, len(self.model.content), prot=mmap.PROT_READ) as memory:
            self.compare(offset, length, memory[offset:offset + length])

    def punch(self, offset, length):
        punch_hole(self.buffered, offset, length)
        self.model.write(offset, bytes(length))

    def zero(self, offset, length):
        zero_range(self.buffered, offset, length)
        self.model.write(offset, bytes(length))

    def preallocate(self, offset, length):
        fallocate(self.buffered, 0, offset, length)

    def grow(self, *_):
        size = len(self.model.content)
        if self.random.random() < 0.1 and size < 48 * MiB:
            size += self.random.randrange(1, 2 * MiB // 512) * 512
            os.ftruncate(self.buffered, size)
            self.model.grow(size)

    def sync(self, *_):
        self.random.choice((os.fsync, os.fdatasync))(self.buffered)

    def test_cluster_sizes(self):
        for cluster in (512, 4 * KiB, 64 * KiB, 2 * MiB):
            with self.subTest(cluster):
                size = 8 * MiB
                image = self.qcow2('c%d.qcow2' % cluster, size, '-o', 'cluster_size=%d' % cluster)
                self.run_against_model(image, bytes(size))

    def test_qed_geometries(self):
        for cluster, table in ((4 * KiB, 2), (64 * KiB, 4), (2 * MiB, 8)):
            with self.subTest(cluster):
                size = 8 * MiB
                image = self.new('c%d.qed' % cluster, size, '-o', 'cluster_size=%d,table_size=%d' % (cluster, table))
                self.run_against_model(image, bytes(size))

    def test_an_overlay_on_a_shorter_base_of_another_cluster_size(self):
        content = pattern(5 * MiB, 'base')
        self.raw('base.raw', 0).write_bytes(content)
        run('qemu-img', 'convert', '-O', 'qcow2', '-o', 'cluster_size=4k', self.path('base.raw'),
            self.path('base.qcow2'))
        for name in ('overlay.qcow2', 'overlay.qed'):
            with self.subTest(name):
                image = self.new(name, '9M', '-b', 'base.qcow2', '-F', 'qcow2')
                self.run_against_model(image, content + bytes(4 * MiB))

    def test_a_version_2_overlay(self):
        content = pattern(8 * MiB, 'base')
        self.raw('base.raw', 0).write_bytes(content)
        image = self.path('overlay.qcow2')
        run('qemu-img', 'create', '-q', '-f', 'qcow2', '-o', 'compat=0.10,cluster_size=4k', '-b', 'base.raw', '-F',
            'raw', image)
        self.run_against_model(image, content)

    def test_a_compressed_image(self):
        content = b''.join(pattern(64, n) * 100 for n in range(1300))[:8 * MiB]
        self.raw('source', 0).write_bytes(content)
        for kind in ('zlib', 'zstd'):
            with self.subTest(kind):
                image = self.path(kind + '.qcow2')
                run('qemu-img', 'convert', '-c', '-f', 'raw', '-O', 'qcow2', '-o', 'compression_type=' + kind,
                    self.path('source'), image)
                self.run_against_model(image, content)

    def test_an_image_with_snapshots_and_lazy_refcounts(self):
        image = self.qcow2('disk.qcow2', '8M', '-o', 'lazy_refcounts=on,cluster_size=4k')
        run('qemu-io', '-f', 'qcow2', '-c', 'write -P 7 0 4M', image)
        run('qemu-img', 'snapshot', '-c', 'one', image)
        self.run_against_model(image, b'\7' * (4 * MiB) + bytes(4 * MiB))

    def test_fvd_images_of_every_kind(self):
        content = pattern(5 * MiB, 'base')
        self.raw('base.raw', 0).write_bytes(content)
        for options in (('chunk_size=64k',), ('compact_image=off',), ('chunk_size=64k', 'journal_size=-1')):
            with self.subTest(options=options):
                self.run_against_model(self.fvd('disk.fvd', '8M', *options), bytes(8 * MiB))
        for options in (('block_size=4k', 'chunk_size=64k', 'copy_on_read=on'), ('compact_image=off', 'block_size=7680'),
                        ('journal_size=4k', 'block_size=64k', 'prefetch_start_delay=1')):
            with self.subTest(options=options):
                image = self.fvd('overlay.fvd', '9M', *options, base='base.raw')
                self.run_against_model(image, content + bytes(4 * MiB))

    def test_a_raw_image(self):
        self.run_against_model(self.raw(size=8 * MiB), bytes(8 * MiB), '--format', 'raw')

    def test_with_the_writeback_cache(self):
        self.run_against_model(self.qcow2(size='8M'), bytes(8 * MiB), '-o', 'writeback_cache')

    def test_with_direct_access_to_the_image_file(self):
        self.run_against_model(self.qcow2(size='8M'), bytes(8 * MiB), '--cache=none')


if __name__ == '__main__':
    unittest.main()
