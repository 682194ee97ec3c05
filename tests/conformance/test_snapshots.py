"""Internal snapshots, made, applied, removed and read by imgfuse and by qemu-img in turns."""
import json
import random
import unittest

from harness import KiB, MiB, ImageCase, by_scale, imgfuse, imgfuse_json, raw_sha256, run, seed, sha256

SEED = seed()

# cluster size, refcount bits, version, further options of qemu-img create
IMAGES = [
    (512, 16, 3, ()),
    (4 * KiB, 8, 3, ()),
    (64 * KiB, 16, 3, ()),
    (64 * KiB, 32, 3, ('lazy_refcounts=on',)),
    (64 * KiB, 16, 3, ('extended_l2=on',)),
    (64 * KiB, 16, 2, ()),
    (2 * MiB, 64, 3, ()),
]
STEPS = by_scale(10, 30, 200)


class Snapshots(ImageCase):
    def setUp(self):
        super().setUp()
        self.random = random.Random('%s %s' % (SEED, self.id()))
        self.image = self.path('disk.qcow2')
        self.kept = {}  # what each snapshot holds, by id
        self.expected = None  # what the disk holds

    # -- requests, each made by one of the two tools

    def write(self, size):
        commands = []
        for _ in range(4):
            length = self.random.choice((512, 20 * KiB, 300 * KiB))
            offset = self.random.randrange(0, size - length) // 512 * 512
            commands.append('write -P %d %d %d' % (self.random.randrange(1, 256), offset, length))
        run('qemu-io', '-f', 'qcow2', self.image, input='\n'.join(commands) + '\nquit\n')
        self.expected = raw_sha256(self.image)

    def create(self, name):
        if self.random.random() < 0.6:
            imgfuse('snapshot', 'create', self.image, name)
        else:
            run('qemu-img', 'snapshot', '-c', name, self.image)
        newest = self.listed()[-1]
        self.assertEqual(newest['name'], name)
        self.assertNotIn(newest['id'], self.kept)
        self.kept[newest['id']] = self.expected

    def apply(self, which):
        if self.random.random() < 0.6:
            imgfuse('snapshot', 'apply', self.image, which)
        else:
            run('qemu-img', 'snapshot', '-a', which, self.image)
        self.expected = self.kept[which]

    def delete(self, which):
        if self.random.random() < 0.6:
            imgfuse('snapshot', 'delete', self.image, which)
        else:  # by name: QEMU's tool does not look at ids here
            run('qemu-img', 'snapshot', '-d', 'snapshot %s' % which, self.image)
        del self.kept[which]

    # -- what must be true at any time

    def listed(self):
        theirs = json.loads(run('qemu-img', 'info', '--output=json', self.image)).get('snapshots', [])
        ours = imgfuse_json('snapshot', 'list', '--json', self.image)
        keys = ('id', 'name', 'vm-state-size', 'date-sec', 'date-nsec', 'vm-clock-sec', 'vm-clock-nsec')
        self.assertEqual([[entry[key] for key in keys] for entry in ours],
                         [[entry[key] for key in keys] for entry in theirs])
        return ours

    def assert_sound(self):
        run('qemu-img', 'check', '-q', self.image)
        report = imgfuse_json('check', '--json', self.image)
        self.assertEqual((report.get('corruptions', 0), report.get('leaks', 0)), (0, 0), report)

    def assert_content(self, ids):
        """Both tools read the disk and the snapshots as they were."""
        out = self.path('out.raw')
        self.assertEqual(raw_sha256(self.image), self.expected)
        for which in ids:
            run('qemu-img', 'convert', '-l', 'snapshot.id=' + which, '-O', 'raw', self.image, out)
            self.assertEqual(sha256(out), self.kept[which], 'qemu-img reads snapshot ' + which)
            imgfuse('convert', '-l', which, '-O', 'raw', self.image, out)
            self.assertEqual(sha256(out), self.kept[which], 'imgfuse reads snapshot ' + which)
            out.unlink()

    def next_name(self):
        numbers = [int(entry['id']) for entry in self.listed()]
        return 'snapshot %d' % (max(numbers, default=0) + 1)

    def run_steps(self, size):
        for _ in range(STEPS):
            step = self.random.choice(('write', 'create', 'create', 'apply', 'delete'))
            if step == 'write':
                self.write(size)
            elif step == 'create':
                self.create(self.next_name())
            elif self.kept:
                getattr(self, step)(self.random.choice(sorted(self.kept)))
            self.assert_sound()
            self.assert_content(self.random.sample(sorted(self.kept), min(2, len(self.kept))))
        self.assert_content(sorted(self.kept))

    def exchange(self, cluster, bits, version, more):
        size = 8 * MiB if cluster <= 64 * KiB else 24 * MiB
        options = ['cluster_size=%d' % cluster, 'compat=' + {2: '0.10', 3: '1.1'}[version], *more]
        if bits != 16:
            options.append('refcount_bits=%d' % bits)
        run('qemu-img', 'create', '-q', '-f', 'qcow2', '-o', ','.join(options), self.image, size)
        self.write(size)
        self.run_steps(size)

    def test_compressed_clusters_are_counted_in_every_cluster_that_they_touch(self):
        plain = self.raw('plain', 8 * MiB)
        with open(plain, 'r+b') as file:
            for offset in range(0, 6 * MiB, 64 * KiB):
                file.seek(offset)
                file.write(self.random.randbytes(9 * KiB) * 4)
        run('qemu-img', 'convert', '-c', '-f', 'raw', '-O', 'qcow2', plain, self.image)
        self.expected = raw_sha256(self.image)
        self.run_steps(8 * MiB)

    def test_snapshots_over_a_backing_file_show_it(self):
        base = self.path('base.qcow2')
        run('qemu-img', 'create', '-q', '-f', 'qcow2', base, 8 * MiB)
        run('qemu-io', '-f', 'qcow2', '-c', 'write -P 99 1M 3M', base)
        run('qemu-img', 'create', '-q', '-f', 'qcow2', '-b', base.name, '-F', 'qcow2', self.image)
        self.write(8 * MiB)
        self.run_steps(8 * MiB)

    def test_two_hundred_snapshots(self):
        run('qemu-img', 'create', '-q', '-f', 'qcow2', '-o', 'cluster_size=4k', self.image, 8 * MiB)
        for number in range(1, 201):
            if number % 10 == 1:
                self.write(8 * MiB)
            if number % 20 == 0:
                run('qemu-img', 'snapshot', '-c', 'snapshot %d' % number, self.image)
            else:
                imgfuse('snapshot', 'create', self.image, 'snapshot %d' % number)
            self.kept[str(number)] = self.expected
        self.assertEqual([entry['id'] for entry in self.listed()], [str(number) for number in range(1, 201)])
        self.assert_sound()
        self.assert_content(['1', '11', '100', '200'])
        for which in self.random.sample(sorted(self.kept), 20):
            self.delete(which)
        self.apply(self.random.choice(sorted(self.kept)))
        self.assert_sound()
        self.assert_content(self.random.sample(sorted(self.kept), 4))

    def test_the_state_of_a_virtual_machine_and_unknown_extra_data_stay(self):
        run('qemu-img', 'create', '-q', '-f', 'qcow2', self.image, 8 * MiB)
        self.write(8 * MiB)
        run('qemu-io', '-f', 'qcow2', '-c', 'write -P 1 0 4k', self.image)
        self.expected = raw_sha256(self.image)
        self.create('snapshot 1')
        with open(self.image, 'r+b') as file:  # a clock, a state size, as a virtual machine leaves them
            file.seek(64)
            table = int.from_bytes(file.read(8), 'big')
            file.seek(table + 24)
            file.write((5 * 10**9 + 7).to_bytes(8, 'big') + (4096).to_bytes(4, 'big'))
            file.seek(table + 40)
            file.write((4096).to_bytes(8, 'big'))
        self.create('snapshot 2')
        self.delete('2')
        self.create('snapshot 2')
        first = self.listed()[0]
        self.assertEqual((first['vm-state-size'], first['vm-clock-sec'], first['vm-clock-nsec']), (4096, 5, 7))
        self.assert_sound()
        self.assert_content(['1', '2'])


def add_test(image):
    cluster, bits, version, more = image
    name = 'test_exchange_cluster_%d_refcount_%d_v%d%s' % (cluster, bits, version, ''.join('_' + option.split('=')[0] for option in more))
    setattr(Snapshots, name, lambda self: self.exchange(*image))


for image in IMAGES:
    add_test(image)

if __name__ == '__main__':
    unittest.main()
