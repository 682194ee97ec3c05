"""Images as QEMU's tools leave them after random work. Equal seeds make equal images."""
import random

from harness import KiB, MiB, attempt, pattern
from matrix import opens_in_qemu

CLUSTERS = {512: 3, KiB: 2, 4 * KiB: 5, 16 * KiB: 4, 64 * KiB: 5, 2 * MiB: 1}
NOISE = 'noise'  # a file in the folder: bytes that cannot be compressed


def make_shared_files(folder, seed):
    """What many images stand on, and nobody changes; returns their names and formats."""
    (folder / NOISE).write_bytes(pattern(64 * KiB, seed))
    layers = []
    for number, (format, size, options, on) in enumerate((
            ('raw', MiB // 2 + 512, '', None), ('qcow2', 2 * MiB, 'cluster_size=4k', 0),
            ('qcow2', 100 * KiB, 'compat=0.10', None), ('qcow2', MiB + 1024, 'extended_l2=on,cluster_size=16k', 1))):
        image = RandomImage(folder, 'shared%d' % number, seed + number, layers)
        image.create_as(format, size, options, None if on is None else layers[on])
        image.write()
        layers.append((image.path.name, format))
    return layers


class RandomImage:
    """One image and the commands that made it."""

    def __init__(self, folder, name, seed, layers):
        self.folder, self.path, self.layers = folder, folder / name, layers
        self.random = random.Random('%d random image' % seed)
        self.commands = []
        self.snapshots, self.bitmaps = [], []
        self.has_state, self.extended = False, False
        self.compression = 'zlib'
        self.version, self.cluster, self.refcount_bits = 2, 4 * KiB, 16

    # -- QEMU's tools

    def qemu(self, *arguments, may_fail=False):
        self.commands.append(' '.join(map(str, arguments)))
        outcome = attempt(*arguments, cwd=self.folder)
        if outcome.status != 0 and not may_fail:
            raise AssertionError(outcome)
        return outcome.status == 0

    def qemu_img(self, command, *arguments, **options):
        return self.qemu('qemu-img', command, *arguments, **options)

    # -- how it begins

    def create(self):
        choose = self.random.choice
        self.version = choice_of(self.random, {3: 6, 2: 1})
        self.cluster = choice_of(self.random, CLUSTERS)
        options = ['compat=' + {2: '0.10', 3: '1.1'}[self.version], 'cluster_size=%d' % self.cluster]
        backing = choose(self.layers) if self.random.random() < 0.5 else None
        if self.version == 3:
            self.extended = self.cluster >= 16 * KiB and self.random.random() < 0.5
            self.refcount_bits = choose((1, 2, 4, 8, 16, 16, 16, 32, 64))
            options.append('refcount_bits=%d' % self.refcount_bits)
            if self.extended:
                options.append('extended_l2=on')
            if self.random.random() < 0.3:
                options.append('lazy_refcounts=on')
            if self.random.random() < 0.4:
                self.compression = 'zstd'
                options.append('compression_type=zstd')
        self.preallocated = self.random.random() < 0.2 and (self.extended or not backing)
        if self.preallocated:
            options.append('preallocation=' + choose(('metadata', 'falloc', 'full')))
        largest = max(MiB, self.cluster * 3)
        size = choice_of(self.random, {0: 1, self.random.randrange(1, 128) * 512: 4,
                                       self.random.randrange(1, largest // 512) * 512: 15})
        self.create_as('qcow2', size, ','.join(options), backing)

    def create_as(self, format, size, options, backing):
        self.format, self.size, self.backing = format, size, backing
        self.qemu_img('create', '-q', '-f', format, *(['-o', options] if options else []),
                      *(['-b', backing[0], '-F', backing[1]] if backing else []), self.path.name, size)

    # -- what happens to it

    def work(self):
        if self.size and not self.preallocated and self.random.random() < 0.5:
            self.write_compressed()
        self.write()
        for _ in range(self.random.randrange(5)):
            step = choice_of(self.random, {
                self.write: 7, self.create_snapshot: 4, self.apply_snapshot: 1,
                self.delete_snapshot: 1, self.resize: 2, self.change_bitmaps: 2, self.commit: 1, self.rebase: 1,
                self.amend: 1})
            step()

    def ranges(self, unit=512):
        """Of a few bytes to a quarter of the disk."""
        for _ in range(self.random.randrange(1, 9)):
            longest = self.random.choice((512, 4 * KiB, self.cluster, 2 * self.cluster, 100 * KiB, self.size // 4))
            offset = self.random.randrange(self.size) // unit * unit
            length = (self.random.randrange(1, max(2, longest)) + unit - 1) // unit * unit
            yield offset, min(length, self.size - offset)

    def write(self):
        if self.size == 0:
            return
        commands = []
        for offset, length in self.ranges():
            kind = choice_of(self.random, {'data': 5, 'noise': 3, 'zero': 2, 'unmap': 2, 'discard': 2})
            if self.version == 2 and kind != 'noise':
                kind = 'data'  # QEMU writes zeros there, which is slow, and does not discard
            commands += ['-c', {'data': 'write -q -P %d' % self.random.randrange(1, 256),
                                'noise': 'write -q -s ' + NOISE, 'zero': 'write -q -z', 'unmap': 'write -q -z -u',
                                'discard': 'discard -q'}[kind] + ' %d %d' % (offset, length)]
        if self.format == 'qcow2' and self.random.random() < 0.1:  # a virtual machine's state, behind the disk
            self.has_state = True
            commands += ['-c', 'write -q -b -P 77 %d 5120' % (self.random.randrange(40) * 512)]
        discards = self.random.choice(('unmap', 'ignore'))
        self.qemu('qemu-io', '-f', self.format, '-t', 'unsafe', '-d', discards, *commands, self.path.name)

    def write_compressed(self):
        """Each cluster once: where one is compressed again, or into one that is allocated, QEMU's tool fails or does
        damage."""
        commands, free = [], 0
        for offset, length in sorted(self.ranges(self.cluster)):
            if offset >= free:
                free = offset + length
                source = self.random.choice(('-P %d' % self.random.randrange(1, 256), '-s ' + NOISE))
                commands += ['-c', 'write -q -c %s %d %d' % (source, offset, length)]
        self.qemu('qemu-io', '-f', 'qcow2', '-t', 'unsafe', *commands, self.path.name)

    def create_snapshot(self):
        name = 'theirs%d' % len(self.commands)
        if self.refcount_bits > 1 and self.qemu_img('snapshot', '-c', name, self.path.name,
                                                    may_fail=self.refcount_bits <= 4):
            self.snapshots.append((name, self.size))

    def apply_snapshot(self):
        if self.snapshots and not self.bitmaps:  # with bitmaps QEMU refuses
            name, size = self.random.choice(self.snapshots)
            if self.qemu_img('snapshot', '-a', name, self.path.name, may_fail=self.refcount_bits <= 4):
                self.size = size

    def delete_snapshot(self):
        if self.snapshots:
            chosen = self.random.choice(self.snapshots)
            self.qemu_img('snapshot', '-d', chosen[0], self.path.name)
            self.snapshots.remove(chosen)

    def resize(self):
        if self.version == 2 and (self.snapshots or self.backing):
            return  # which QEMU refuses
        size = self.random.choice((self.size + self.random.randrange(1, 2000) * 512, self.size // 1024 * 512 or 512))
        shrink = size < self.size
        if shrink and (self.snapshots or self.has_state):
            return  # refused, and leaked
        # QEMU cannot zero what is new in a compressed cluster with subclusters, and changes nothing then.
        if self.qemu_img('resize', '-q', '-f', 'qcow2', *(['--shrink'] if shrink else []), self.path.name, size,
                         may_fail=self.extended):
            self.size = size

    def change_bitmaps(self):
        if self.version == 2 or self.size == 0:
            return  # which QEMU refuses, or forgets when it closes the image
        if len(self.bitmaps) < 2:
            name = 'bitmap%d' % len(self.commands)
            self.qemu_img('bitmap', '-f', 'qcow2', '--add', '-g', 512 << self.random.randrange(9), self.path.name, name)
            self.bitmaps.append(name)
        else:
            what = self.random.choice(('--remove', '--clear', '--disable', '--enable'))
            name = self.random.choice(self.bitmaps)
            self.qemu_img('bitmap', '-f', 'qcow2', what, self.path.name, name)
            if what == '--remove':
                self.bitmaps.remove(name)

    def commit(self):
        """Into a backing file of its own."""
        if not self.backing or self.bitmaps or self.backing[0].startswith(self.path.name):
            return
        base = self.path.name + '.base'
        self.qemu('cp', self.backing[0], base)
        self.backing = (base, self.backing[1])
        self.qemu_img('rebase', '-u', '-f', self.format, '-b', base, '-F', self.backing[1], self.path.name)
        self.qemu_img('commit', '-q', '-f', self.format, *self.random.choice(((), ('-d',))), self.path.name)

    def rebase(self):
        if self.random.random() < 0.3 and self.backing:
            self.qemu_img('rebase', '-f', self.format, '-b', '', self.path.name)
            self.backing = None
        else:
            self.backing = self.random.choice(self.layers)
            self.qemu_img('rebase', '-u', '-f', self.format, '-b', self.backing[0], '-F', self.backing[1], self.path.name)

    def amend(self):
        if self.version == 3:
            self.qemu_img('amend', '-q', '-f', 'qcow2', '-o', 'lazy_refcounts=' + self.random.choice(('on', 'off')),
                          self.path.name)
        else:
            self.qemu_img('amend', '-q', '-f', 'qcow2', '-o', 'compat=1.1', self.path.name)
            self.version = 3


class RandomQedImage(RandomImage):
    """The same for QED, which has less that can happen to it."""

    def create(self):
        self.version = 3
        self.cluster = choice_of(self.random, {4 * KiB: 5, 16 * KiB: 4, 64 * KiB: 5, 2 * MiB: 1})
        table = self.random.choice([n for n in (2, 4, 8, 16) if opens_in_qemu(self.cluster, n)])
        size = choice_of(self.random, {512: 1, self.random.randrange(1, 6 * MiB // 512) * 512: 9})
        self.create_as('qed', size, 'cluster_size=%d,table_size=%d' % (self.cluster, table),
                       self.random.choice(self.layers) if self.random.random() < 0.5 else None)

    def work(self):
        self.write()
        for _ in range(self.random.randrange(5)):
            choice_of(self.random, {self.write: 5, self.resize: 2, self.commit: 1, self.rebase: 1})()

    def resize(self):
        size = self.size + self.random.randrange(1, 2000) * 512
        # QEMU does not grow a disk over a longer backing file.
        if self.qemu_img('resize', '-q', '-f', 'qed', self.path.name, size, may_fail=bool(self.backing)):
            self.size = size


def choice_of(rng, weights):
    return rng.choices(list(weights), list(weights.values()))[0]
