"""The lines of work on a presented disk, and what is wanted of each."""
import os

import images
from host import MiB, load_pages, use_pages
from results import Sample, Wanted
from rounds import Line
from sides import FVD, LIMIT, LIMIT_RING, NBD, OURS, PLAIN, QSD, RING, SIDES
from workloads import Fio, Passes, SmallFiles


class DiskLine(Line):
    """Each measurement has a mount of its own, since what is by chance in a mount stays as long as it does; and a new
    image, if it shall be `fresh`."""

    def __init__(self, name, unit, work, image, sides, wanted=(), *, format='qcow2', fresh=False, span=None, options=(),
                 cold=False, read_before=False, **others):
        super().__init__(name, unit, sides, wanted, **others)
        self.work, self.image, self.format, self.fresh, self.span = work, image, format, fresh, span
        self.options, self.cold, self.read_before = options, cold, read_before

    def measure(self, bench, side):
        image = self.image(bench.store, side, SIDES[side].format or self.format)
        mounted = SIDES[side].start(image, bench.folder / ('disk-' + side.replace(' ', '-')), self.options)
        if not self.cold:
            mounted.load_images(bench.folder)
        if self.read_before:
            load_pages(mounted.disk)
        use_pages(bench.folder, bench.store.used)
        sample = self.measure_mounted(bench, mounted, [image] if self.cold else ())
        mounted.close()
        if self.fresh:
            image.unlink()
        os.sync()  # what is still to be written would be in the next one's way
        return sample

    def measure_mounted(self, bench, mounted, cold):
        before = mounted.cpu_seconds()
        work = self.work.measure(mounted.disk, bench.seconds, (self.span or bench.store.hot) * MiB, cold)
        if not mounted.pids:
            return Sample(work.rate(self.unit))
        cpu = (mounted.cpu_seconds() - before) * 1e6 / work.operations
        return Sample(work.rate(self.unit), cpu, mounted.peak_mib())


def wanted(qsd=None, limit=None, plain=None, ring=None):
    """Bounds of imgfuse over QEMU's export, over the limit (by each transport), over a plain file; of io_uring over the
    export."""
    bounds = ((OURS, QSD, qsd), (OURS, LIMIT, limit), (OURS, PLAIN, plain), (RING, QSD, ring),
              (RING, LIMIT_RING, limit if ring else None))
    return tuple(Wanted(of, to, bound) for of, to, bound in bounds if bound is not None)


BASIC = (OURS, RING, QSD, NBD, LIMIT, LIMIT_RING)
WITH_LIMIT = (OURS, QSD, LIMIT)
ALLOCATING = (OURS, FVD, QSD, LIMIT, PLAIN)
FORMATS = (OURS, QSD)

RANDOM_READ = ('--rw=randread', '--bs=4k')
RANDOM_WRITE = ('--rw=randwrite', '--bs=4k')
BUFFERED_WRITE = Fio(*RANDOM_WRITE, '--norandommap', '--end_fsync=1', direct=False, until='done', share=1 / 8)
WRITE_1M = Fio('--rw=write', '--bs=1M', '--size=256M', '--end_fsync=1', until='done')
READ_1M = Fio('--rw=read', '--bs=1M', '--iodepth=1')
SPARSE_4G = ('--size=4G', '--norandommap')  # options of the work win over the line's span
COPY_SHARE = 1 / 64  # of the bytes are written, in a quarter of the clusters


def depth(number):
    return '--iodepth=%d' % number


def copying(number):
    return Fio(*RANDOM_WRITE, '--norandommap', depth(number), until='done', share=COPY_SHARE)


def qed(name, unit, work, fresh=False):
    return DiskLine('QED: ' + name, unit, work, images.empty if fresh else images.full, FORMATS, format='qed', fresh=fresh,
                    rounds=3)


LINES = (
    DiskLine('4k random read, depth 1', 'IOPS', Fio(*RANDOM_READ, depth(1)), images.full, BASIC,
             wanted(qsd=1.2, limit=0.9, ring=2.8)),
    DiskLine('4k random read, depth 32', 'IOPS', Fio(*RANDOM_READ, depth(32)), images.full, BASIC,
             wanted(qsd=1.7, limit=0.9, ring=1.7)),
    DiskLine('4k random read, 4 jobs, depth 32', 'IOPS', Fio(*RANDOM_READ, depth(32), '--numjobs=4'), images.full, BASIC,
             wanted(qsd=5, limit=0.9, ring=5)),
    DiskLine('1M sequential read', 'MB/s', READ_1M, images.full, BASIC, wanted(qsd=3, limit=0.9, ring=3)),
    DiskLine('1M sequential read, buffered', 'MB/s', Passes(), images.full, BASIC, wanted(qsd=4, limit=0.9, ring=4)),
    DiskLine('4k random re-read, buffered', 'IOPS', Fio(*RANDOM_READ, '--invalidate=0', direct=False), images.full,
             (OURS, QSD, LIMIT, PLAIN), wanted(qsd=20, plain=0.9), read_before=True),
    DiskLine('4k random write, buffered, fsync at the end', 'IOPS',
             BUFFERED_WRITE, images.full, (OURS, QSD, LIMIT, PLAIN), wanted(qsd=8, limit=0.9),
             options=('writeback_cache',)),
    DiskLine('raw data file, 4k random write, buffered, fsync at the end', 'IOPS',
             BUFFERED_WRITE, images.raw_data, (OURS, QSD, PLAIN), wanted(plain=0.9), options=('passthrough',)),
    DiskLine('4k random write, allocated, depth 1', 'IOPS', Fio(*RANDOM_WRITE, depth(1)), images.full, BASIC,
             wanted(qsd=0.8, limit=0.85, ring=2)),
    DiskLine('4k random write, allocated, depth 32', 'IOPS', Fio(*RANDOM_WRITE, depth(32)), images.full, BASIC,
             wanted(qsd=1.6, limit=0.85, ring=1.6)),
    DiskLine('1M sequential write, allocating, fsync at the end', 'MB/s', WRITE_1M, images.empty,
             (OURS, QSD, LIMIT, PLAIN), wanted(qsd=1.7, limit=0.85), fresh=True, cost=2),
    DiskLine('4k random write, allocating, fsync every 32', 'IOPS',
             Fio(*RANDOM_WRITE, *SPARSE_4G, '--io_size=12M', '--fsync=32', '--end_fsync=1', until='done'), images.empty,
             ALLOCATING, wanted(qsd=1.5, limit=0.8), fresh=True, cost=2),
    DiskLine('copy-on-write, 4k random, depth 1', 'IOPS', copying(1),
             images.copy_on_write, FORMATS, wanted(qsd=2), fresh=True, cost=1.5),
    DiskLine('copy-on-write, 4k random, depth 32', 'IOPS', copying(32),
             images.copy_on_write, FORMATS, wanted(qsd=2.5), fresh=True, cost=1.5),
    DiskLine('copy-on-write, 4k subclusters, depth 1', 'IOPS', copying(1),
             images.subclusters, WITH_LIMIT, wanted(qsd=4, limit=0.6), fresh=True, cost=1.5),
    DiskLine('copy-on-write, 4k subclusters, depth 32', 'IOPS', copying(32),
             images.subclusters, WITH_LIMIT, wanted(qsd=4, limit=0.6), fresh=True, cost=1.5),
    DiskLine('overlay, 4k random read, depth 32', 'IOPS', Fio(*RANDOM_READ, depth(32)), images.overlay, WITH_LIMIT,
             wanted(qsd=2.2, limit=0.9)),
    DiskLine('overlay, 1M sequential read', 'MB/s', READ_1M, images.overlay, WITH_LIMIT, wanted(qsd=4.5, limit=0.9)),
    DiskLine('compressed, 1M sequential read, zlib', 'MB/s', READ_1M, images.packed('zlib'), FORMATS,
             wanted(qsd=2.5), span=48),
    DiskLine('compressed, 1M sequential read, zstd', 'MB/s', READ_1M, images.packed('zstd'), FORMATS,
             wanted(qsd=2), span=48),
    DiskLine('compressed, 4k random read in 8 MiB, zlib', 'IOPS', Fio(*RANDOM_READ, depth(1)), images.packed('zlib'),
             FORMATS, span=8, rounds=3),
    DiskLine('small files in ext4 on a loop device', 'tx/s', SmallFiles(), images.empty, ALLOCATING,
             wanted(qsd=1.35, limit=0.95), fresh=True, cost=2.5),
    DiskLine('cold image, 4k random read, depth 32', 'IOPS', Fio(*RANDOM_READ, depth(32), until='either'), images.full,
             (OURS, QSD, LIMIT, PLAIN), wanted(qsd=2, plain=0.85), cold=True),
    DiskLine('cold image, 1M sequential read', 'MB/s', Passes(direct=True), images.full, (OURS, QSD, LIMIT, PLAIN),
             wanted(qsd=1.5, plain=0.85), cold=True),
    qed('4k random read, depth 1', 'IOPS', Fio(*RANDOM_READ, depth(1))),
    qed('4k random read, depth 32', 'IOPS', Fio(*RANDOM_READ, depth(32))),
    qed('1M sequential read', 'MB/s', READ_1M),
    qed('1M sequential write, allocated', 'MB/s', Fio('--rw=write', '--bs=1M')),
    qed('1M sequential write, allocating, fsync at the end', 'MB/s', WRITE_1M, fresh=True),
    qed('4k random write, allocating, depth 32', 'IOPS',
        Fio(*RANDOM_WRITE, *SPARSE_4G, '--io_size=8M', depth(32), '--end_fsync=1', until='done'), fresh=True),
)
