"""What else imgfuse costs: CPU time against the disk's size and the chain's length, memory, the time to mount."""
import os
import time

import images
from host import KiB, MiB, load_pages
from images import create
from results import Sample, Wanted
from rounds import Line
from sides import NBD, OURS, QSD, SIDES
from workloads import Fio, fio


class CpuLine(Line):
    """CPU time of imgfuse per 4k random read, over two images; the first may cost `bound` times the second at most."""

    def __init__(self, name, first, second, bound, options=()):
        (left, _, _), (right, _, _) = first, second
        super().__init__(name, 'us', (left, right), (Wanted(left, right, bound),), [(left, right)], less_is_better=True,
                         cost=1.2)
        self.images = {side: (image, align) for side, image, align in (first, second)}
        self.options, self.mounted = options, {}

    def begin(self, bench, sides):
        for side in sides:
            image = self.images[side][0](bench.store, OURS, 'qcow2')
            place = bench.folder / ('disk-' + side.replace(' ', '-'))
            self.mounted[side] = SIDES[OURS].start(image, place, self.options)
            self.measure(bench, side)  # loads the tables

    def measure(self, bench, side):
        mounted, align = self.mounted[side], self.images[side][1]
        span = mounted.disk.stat().st_size
        mounted.load_images(bench.folder)
        before = mounted.cpu_seconds()
        work = Fio('--rw=randread', '--bs=4k', '--iodepth=1', '--blockalign=%d' % (span // align if align else 4 * KiB)
                   ).measure(mounted.disk, bench.seconds, span)
        return Sample((mounted.cpu_seconds() - before) * 1e6 / work.operations, memory=mounted.peak_mib())

    def end(self, bench):
        for mounted in self.mounted.values():
            mounted.close()
        self.mounted.clear()


class MountLine(Line):
    """From the program's start to the first byte read, in ms."""

    def __init__(self, name, image, bound):
        super().__init__(name, 'ms', (OURS, QSD, NBD), (Wanted(OURS, None, bound),), less_is_better=True, cost=0.4)
        self.image, self.images = image, {}

    def begin(self, bench, sides):
        self.images = {side: self.image(bench.store, side, 'qcow2') for side in sides}

    def measure(self, bench, side):
        return min((self.mount(bench, side) for _ in range(2)), key=lambda sample: sample.value)

    def mount(self, bench, side):
        load_pages(self.images[side])
        begin = time.monotonic()
        mounted = SIDES[side].start(self.images[side], bench.folder / 'mounted')
        fd = os.open(mounted.disk, os.O_RDONLY)
        os.pread(fd, 1, 0)
        taken = time.monotonic() - begin
        os.close(fd)
        sample = Sample(1000 * taken, memory=mounted.peak_mib())
        mounted.close()
        return sample


class MemoryLine(Line):
    """Peak memory in MiB after work on an image of its own. The bound: 32 MiB beside a metadata cache of 32 MiB."""

    def __init__(self, name, size, *options):
        super().__init__(name, 'MiB', (OURS, QSD), (Wanted(OURS, None, 64),), less_is_better=True, rounds=1, cost=3)
        self.size, self.options = size, options

    def measure(self, bench, side):
        image = create(bench.folder / 'sparse.qcow2', self.size)
        mounted = SIDES[side].start(image, bench.folder / 'sparse')
        fio(mounted.disk, '--direct=1', '--ioengine=libaio', '--iodepth=128', '--size=' + self.size, '--norandommap',
            *self.options)
        memory = mounted.peak_mib()
        mounted.close()
        image.unlink()
        return Sample(memory)


def large(store, side, format):
    return create(store.folder / ('large-%s.qcow2' % side), '2T')


LINES = (
    CpuLine('CPU per 4k random read, 1 TiB against 4 GiB', ('1 TiB', images.spread('1T'), images.PLACES),
            ('4 GiB', images.spread('4G'), images.PLACES), bound=1.3, options=('metadata_cache=192M',)),
    CpuLine('CPU per 4k random read, 16 layers against 1', ('16 layers', images.chain(16), None),
            ('1 layer', images.full, None), bound=1.5),
    MountLine('mounting a full image, until the first byte is read', images.full, bound=20),
    MountLine('mounting an empty image of 2 TiB, until the first byte is read', large, bound=20),
    MemoryLine('peak memory, 4k random I/O over 1 TiB, depth 128', '1T', '--rw=randrw', '--rwmixread=70', '--bs=4k',
               '--io_size=40M'),
    MemoryLine('peak memory, 1M random I/O over 4 GiB, depth 128', '4G', '--rw=randrw', '--rwmixread=70', '--bs=1M',
               '--io_size=%d' % (512 * MiB)),
)
