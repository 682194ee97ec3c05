"""Images made by qemu-img and qemu-io, in every combination that matters, through imgfuse and back."""
import hashlib
import json
import os
import random
import unittest

from harness import IMGFUSE, ImageCase, imgfuse_json, punch_hole, raw_sha256, run, seed, sha256, zero_range
from matrix import KiB, matrix

SEED = seed()
SPECS = matrix()


def ranges(rng, size, count, granularity):
    """Random ranges inside the disk, of a few bytes to a quarter of it; small ones are the most frequent."""
    for _ in range(count):
        length = min(rng.choice((512, 4 * KiB, 24 * KiB, 200 * KiB, size // 4)), size)
        length = max(granularity, rng.randrange(1, length + 1) // granularity * granularity)
        offset = rng.randrange(0, size - length + 1) // granularity * granularity
        yield offset, length


def qemu_io(image, format, commands, options=()):
    out = run('qemu-io', '-f', format, '-t', 'unsafe', *options, image, input='\n'.join(commands) + '\nquit\n')
    for complaint in ('failed', 'error', 'Error', 'Invalid'):
        if complaint in out:
            raise AssertionError('qemu-io: ' + out)


def fill_commands(rng, size, version):
    """What is in the images at first: data, zero clusters with and without allocation, discarded ones."""
    commands = []
    for offset, length in ranges(rng, size, 14, 512):
        kind = rng.choice(('data', 'data', 'data', 'zero', 'zero unmap', 'discard')) if version == 3 else 'data'
        commands.append({'data': 'write -P %d %d %d' % (rng.randrange(1, 256), offset, length),
                         'zero': 'write -z %d %d' % (offset, length),
                         'zero unmap': 'write -z -u %d %d' % (offset, length),
                         'discard': 'discard %d %d' % (offset, length)}[kind])
    return commands


class Matrix(ImageCase):
    """One test for each image of the matrix; they are made at the end of this file."""

    def make_image(self, spec):
        rng = self.random
        backing, backing_format = None, None
        for depth, format in reversed(list(enumerate(spec.backing, 1))):
            layer = self.path('layer%d.%s' % (depth, format))
            options = ['-b', backing.name, '-F', backing_format] if backing else []
            if format != 'raw':
                options += ['-o', 'cluster_size=%d' % spec.cluster]
            run('qemu-img', 'create', '-q', '-f', format, *options, layer, spec.size_of_backing(depth))
            qemu_io(layer, format, fill_commands(rng, spec.size_of_backing(depth), 2))
            backing, backing_format = layer, format

        image = self.path('disk.' + spec.format)
        if spec.compression == 'none':
            options = ['-b', backing.name, '-F', backing_format] if backing else []
            made = spec.options + (',data_file=%s' % self.path('data.raw') if spec.data_file != 'none' else '')
            run('qemu-img', 'create', '-q', '-f', spec.format, '-o', made, *options, image, spec.size)
        else:
            options = ['-B', backing.name, '-F', backing_format] if backing else []
            run('qemu-img', 'convert', '-c', '-f', 'raw', '-O', 'qcow2', '-o', spec.options, *options,
                self.compressible_file(spec), image)
        qemu_io(image, spec.format, fill_commands(rng, spec.size, spec.version))
        if spec.snapshots:
            run('qemu-img', 'snapshot', '-c', 'first', image)
            qemu_io(image, 'qcow2', fill_commands(rng, spec.size, spec.version))
            run('qemu-img', 'snapshot', '-c', 'second', image)
        return image

    def compressible_file(self, spec):
        """Text-like stretches, some of them incompressible, with holes between."""
        file = self.raw('compressible', spec.size)
        with open(file, 'r+b') as f:
            for offset, length in ranges(self.random, spec.size, 12, 512):
                words = [self.random.randbytes(8) for _ in range(self.random.choice((4, 30, 100000)))]
                f.seek(offset)
                f.write(b''.join(self.random.choices(words, k=length // 8)))
        return file

    def check_reads(self, image):
        mount = self.mount(image, '--read-only')
        self.assertEqual(sha256(mount.disk), raw_sha256(image), 'content')
        mount.unmount()

    def check_info(self, image):
        ours = imgfuse_json('info', '--json', image)
        theirs = json.loads(run('qemu-img', 'info', '--output=json', image))
        self.assert_shared_keys_equal(ours, theirs)
        for key in ('format', 'virtual-size', 'filename', 'dirty-flag', 'cluster-size'):
            self.assertIn(key, ours)
        self.assertEqual('format-specific' in ours, 'format-specific' in theirs)

    def check_map(self, image):
        ours = imgfuse_json('map', '--json', image)
        theirs = json.loads(run('qemu-img', 'map', '--output=json', image))
        for extent in theirs:
            if extent['data']:
                extent['zero'] = False  # QEMU looks for holes of the host where it guesses a preallocated image
        self.assertEqual(merged(ours, theirs), merged(theirs, ours))

    def assert_shared_keys_equal(self, ours, theirs):
        for key in ours.keys() & theirs.keys():
            if isinstance(ours[key], dict):
                self.assert_shared_keys_equal(ours[key], theirs[key])
            else:
                self.assertEqual(ours[key], theirs[key], key)

    def check_writes(self, image, spec):
        """The same operations through imgfuse, and by qemu-io on a copy: of the disk where QEMU's QED driver would show
        what lies below zero clusters that are written in part."""
        oracle, oracle_format = self.path('oracle'), 'raw' if spec.format == 'qed' else spec.format
        if oracle_format == spec.format:
            run('cp', '--sparse=always', image, oracle)
        else:
            run('qemu-img', 'convert', '-f', spec.format, '-O', oracle_format, image, oracle)
        if spec.data_file != 'none':
            run('cp', '--sparse=always', self.path('data.raw'), self.path('oracle.raw'))
            run('qemu-img', 'amend', '-f', 'qcow2', '-o', 'data_file=%s' % self.path('oracle.raw'), oracle)
        snapshots = self.snapshot_hashes(image)
        commands = self.write_through(self.mount(image), spec)
        if spec.compression != 'none':
            commands += self.write_through(self.mount(image, '-o', 'compress=' + spec.compression), spec)
        qemu_io(oracle, oracle_format, commands)

        self.assert_clean(image, spec.format)
        run('qemu-img', 'compare', '-f', spec.format, '-F', oracle_format, image, oracle)
        self.assertEqual(self.snapshot_hashes(image), snapshots, 'snapshots')
        if spec.data_file == 'raw':
            with open(self.path('data.raw'), 'rb') as data:
                content = hashlib.sha256(data.read(spec.size)).hexdigest()
            self.assertEqual(content, raw_sha256(image), 'the raw data file')

    def write_through(self, mount, spec):
        """Random changes of the mounted disk, which is unmounted then; returns what qemu-io calls them."""
        fd = mount.open()
        commands = []
        for offset, length in ranges(self.random, spec.size, 20, 1):
            kind = self.random.choice(('data', 'data', 'data', 'zero', 'punch', 'flush'))
            if kind == 'data':
                byte = self.random.randrange(1, 256)
                os.pwrite(fd, bytes([byte]) * length, offset)
                commands.append('write -P %d %d %d' % (byte, offset, length))
            elif kind == 'flush':
                os.fsync(fd)
            else:
                {'zero': zero_range, 'punch': punch_hole}[kind](fd, offset, length)
                commands.append('write -z %d %d' % (offset, length))
        os.close(fd)
        mount.unmount()
        return commands

    def snapshot_hashes(self, image):
        listed = json.loads(run('qemu-img', 'info', '--output=json', image)).get('snapshots', [])
        return {s['name']: raw_sha256(image, '-l', 'snapshot.name=' + s['name']) for s in listed}


def merged(extents, others):
    """Extents with the keys that both sides have, neighbours joined where nothing tells them apart."""
    keys = {key for e in extents for key in e} & {key for e in others for key in e} - {'filename'}
    joined = []
    for extent in extents:
        extent = {key: extent[key] for key in extent if key in keys}
        last = joined[-1] if joined else None
        if last and all(last.get(k) == extent.get(k) for k in keys - {'start', 'length', 'offset'}) and (
                last.get('offset') is None and extent.get('offset') is None or
                None not in (last.get('offset'), extent.get('offset')) and
                last['offset'] + last['length'] == extent['offset']):
            last['length'] += extent['length']
        else:
            joined.append(extent)
    return joined


def make_test(spec):
    def test(self):
        self.seed = SEED
        self.random = random.Random('%d %s' % (SEED, spec.name))
        image = self.make_image(spec)
        self.check_reads(image)
        self.check_info(image)
        self.check_map(image)
        self.check_writes(image, spec)
        self.check_reads(image)
        self.check_map(image)
    return test


for _spec in SPECS:
    setattr(Matrix, 'test_' + _spec.name, make_test(_spec))


def setUpModule():
    print('%d images in the matrix, IMG_SEED=%d, %s' % (len(SPECS), SEED, IMGFUSE))


if __name__ == '__main__':
    unittest.main()
