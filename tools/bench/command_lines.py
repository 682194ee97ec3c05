"""Lines of imgfuse's other commands: convert, snapshot and mirror, against QEMU's."""
import os
import shutil
import subprocess
import time

import images
from host import Failure, MiB, load_pages, run, use_pages
from qmp import blockdev_mirror
from results import Sample, Wanted
from rounds import Line
from sides import OURS, SIDES, Imgfuse
from workloads import fio

QEMU_IMG, BLOCKDEV_MIRROR = 'qemu-img', 'blockdev-mirror'
WRITING = 'writing its counts'
ROUNDS = 3


def timed(work):
    """Seconds; what was written before does not disturb."""
    os.sync()
    begin = time.monotonic()
    work()
    return time.monotonic() - begin


class ConvertLine(Line):
    """MB/s of the data in the source."""

    def __init__(self, name, source, *options, cost=2.0):
        super().__init__(name, 'MB/s', (OURS, QEMU_IMG), rounds=ROUNDS, cost=cost)
        self.source, self.options = source, options

    def measure(self, bench, side):
        source, target = images.conversion_source(bench.store, self.source), bench.folder / 'converted'
        program = {OURS: (Imgfuse.program, 'convert'), QEMU_IMG: ('qemu-img', 'convert', '-m', '16', '-W')}[side]

        load_pages(source)
        use_pages(bench.folder, bench.store.used)
        seconds = timed(lambda: run(*program, *self.options, source, target))
        target.unlink()
        return Sample(images.mib_of(source) * MiB / 1e6 / seconds)


class SnapshotLine(Line):
    """The whole command, on an image in which every cluster of 100 GiB is allocated: the first snapshot, which clears the
    flags of all clusters, or a later one. Beside it, writing that many counts once, durably."""

    def __init__(self, name, first):
        sides = (OURS, QEMU_IMG, WRITING) if first else (OURS, WRITING)
        super().__init__(name, 'ms', sides, less_is_better=True, rounds=ROUNDS)
        self.first = first

    def measure(self, bench, side):
        image = bench.folder / 'snapshots.qcow2'
        if side == WRITING:
            return Sample(1000 * timed(lambda: self.write_counts(bench.store.anew('counts'))))
        image.unlink(missing_ok=True)
        run('qemu-img', 'create', '-q', '-f', 'qcow2', '-o', 'preallocation=metadata', image, '100G')
        create = (Imgfuse.program, 'snapshot', 'create', image) if side == OURS else ('qemu-img', 'snapshot', image, '-c')
        if not self.first:
            run(*create, 'one')
        return Sample(1000 * timed(lambda: run(*create, 'two')))

    def write_counts(self, path):
        block = os.urandom(64 << 10)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT)
        for number in range(51):
            os.pwrite(fd, block, number * len(block))
        os.fdatasync(fd)
        os.close(fd)


class MirrorLine(Line):
    """Of an idle disk, from the program's start to its end; qemu-img converts the same image, which nobody has open."""

    def __init__(self, name, format):
        super().__init__(name, 'MB/s', (OURS, QEMU_IMG, BLOCKDEV_MIRROR), cost=3.5,
                         wanted=(Wanted(OURS, QEMU_IMG, 1), Wanted(OURS, BLOCKDEV_MIRROR, 1.2)))
        self.format = format

    def begin(self, bench, sides):
        if 2.5 * bench.store.mirrored * MiB > shutil.disk_usage(bench.store.memory).free:
            raise Failure('%s has no room for two images of %d MiB' % (bench.store.memory.parent, bench.store.mirrored))

    def measure(self, bench, side):
        source, target = images.mirror_source(bench.store), bench.store.memory / 'target'
        run('qemu-img', 'create', '-q', '-f', self.format, target, '%dM' % bench.store.mirrored)
        mounted = SIDES[OURS].start(source, bench.folder / 'mirrored') if side == OURS else None
        use_pages(bench.store.memory, bench.store.mirrored)
        seconds = timed({
            OURS: lambda: run(Imgfuse.program, 'mirror', mounted.disk, target, '-n', '-O', self.format, '--finish'),
            QEMU_IMG: lambda: run('qemu-img', 'convert', '-n', '-m', '16', '-W', '-f', 'qcow2', '-O', self.format, source,
                                  target),
            BLOCKDEV_MIRROR: lambda: blockdev_mirror(source, target, self.format)}[side])
        if mounted:
            mounted.close()
        target.unlink()
        return Sample(bench.store.mirrored * MiB / 1e6 / seconds)


class MirrorLatencyLine(Line):
    """The median of 4k random writes at 500 a second: beside a mirror that copies what they change, and alone."""
    beside, alone = 'beside a mirror', 'alone'

    def __init__(self, name):
        super().__init__(name, 'us', (self.beside, self.alone), pairs=[(self.beside, self.alone)],
                         less_is_better=True, rounds=ROUNDS)
        self.mounted = None

    def begin(self, bench, sides):
        self.mounted = SIDES[OURS].start(images.busy_source(bench.store), bench.folder / 'mirrored')

    def measure(self, bench, side):
        target = bench.store.anew('target')
        self.mounted.load_images(bench.folder)
        if side == self.beside:
            run(Imgfuse.program, 'mirror', self.mounted.disk, target)
        latency = fio(self.mounted.disk, '--direct=1', '--rw=randwrite', '--bs=4k', '--iodepth=1', '--ioengine=psync',
                      '--rate_iops=500', '--time_based', '--runtime=%dms' % (1000 * bench.seconds),
                      '--size=%dM' % bench.store.busy, '--norandommap').latency
        if side == self.beside:
            run(Imgfuse.program, 'mirror', self.mounted.disk, '--cancel')
        return Sample(latency * 1e6)

    def end(self, bench):
        self.mounted.close()


class MirrorConvergenceLine(Line):
    """From the start to the pivot, beside a guest that makes 2000 random 4k writes a second."""

    def __init__(self, name):
        super().__init__(name, 's', (OURS,), less_is_better=True, rounds=ROUNDS, cost=3)

    def measure(self, bench, side):
        target = bench.store.anew('target')
        mounted = SIDES[OURS].start(images.busy_source(bench.store), bench.folder / 'mirrored')
        mounted.load_images(bench.folder)
        guest = subprocess.Popen(['fio', '--name=bench', '--filename=%s' % mounted.disk, '--direct=1', '--rw=randwrite',
                                  '--bs=4k', '--iodepth=8', '--ioengine=libaio', '--rate_iops=2000', '--time_based',
                                  '--runtime=600', '--size=%dM' % bench.store.busy, '--norandommap'],
                                 stdout=subprocess.DEVNULL, cwd=bench.folder)
        try:
            seconds = timed(lambda: run(Imgfuse.program, 'mirror', mounted.disk, target, '--complete', '--granularity',
                                        '64k'))
        finally:
            guest.terminate()
            guest.wait(30)
        mounted.close()
        return Sample(seconds)


LINES = (
    ConvertLine('convert, full raw to qcow2', 'full.raw', '-O', 'qcow2'),
    ConvertLine('convert, full qcow2 to raw', 'full.qcow2', '-O', 'raw'),
    ConvertLine('convert, sparse raw to qcow2', 'sparse.raw', '-O', 'qcow2', cost=1),
    ConvertLine('convert, sparse qcow2 to raw', 'sparse.qcow2', '-O', 'raw', cost=1),
    ConvertLine('convert, full -c zlib', 'full.raw', '-c', '-O', 'qcow2', '-o', 'compression_type=zlib', cost=4),
    ConvertLine('convert, full -c zstd', 'full.raw', '-c', '-O', 'qcow2', '-o', 'compression_type=zstd'),
    ConvertLine('convert, sparse -c zlib', 'sparse.raw', '-c', '-O', 'qcow2', '-o', 'compression_type=zlib', cost=1),
    ConvertLine('convert, sparse -c zstd', 'sparse.raw', '-c', '-O', 'qcow2', '-o', 'compression_type=zstd', cost=1),
    SnapshotLine('a snapshot of 100 GiB, the first', first=True),
    SnapshotLine('a snapshot of 100 GiB, a later one', first=False),
    MirrorLine('mirror, allocated qcow2 to qcow2', 'qcow2'),
    MirrorLine('mirror, allocated qcow2 to raw', 'raw'),
    MirrorLatencyLine('mirror, guest latency of a 4k write'),
    MirrorConvergenceLine('mirror, convergence beside 2000 writes/s'),
)
