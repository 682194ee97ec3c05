"""What is done with a presented disk. Each has measure(disk, seconds, span, cold) -> Work: the disk's first `span` bytes
have data, and the files in `cold` shall not be in the page cache."""
import json
import mmap
import os
import random
import time
from dataclasses import dataclass

from host import KiB, MiB, Failure, drop_pages, run


@dataclass(frozen=True)
class Work:
    operations: int
    bytes: int
    seconds: float
    latency: float = None  # the median in seconds, of one job

    def rate(self, unit):
        return {'IOPS': self.operations, 'tx/s': self.operations, 'MB/s': self.bytes / 1e6}[unit] / self.seconds


class Fio:
    """Ends with the time ("time"), with the work that the options say ("done"), or with what comes first ("either"). The
    work may be a share of the span, in bytes."""

    def __init__(self, *options, until='time', direct=True, share=None):
        self.options, self.until, self.share = options, until, share
        self.common = ['--direct=%d' % direct, '--ioengine=' + ('libaio' if direct else 'psync')]

    def measure(self, disk, seconds, span, cold=()):
        for path in cold:
            drop_pages(path)
        limits = ['--size=%d' % span]
        if self.share:
            limits.append('--io_size=%d' % (span * self.share))
        if self.until != 'done':
            limits.append('--runtime=%dms' % (1000 * seconds))
        if self.until == 'time':
            limits += ['--time_based', '--norandommap']
        return fio(disk, *self.common, *limits, *self.options)


def fio(disk, *options):
    """The work of all jobs; Failure if one had an error."""
    report = run('fio', '--name=bench', '--filename=%s' % disk, '--thread', '--clocksource=clock_gettime',
                 '--output-format=json', *options, cwd=disk.parent)
    jobs = json.loads(report[report.index('{'):])['jobs']
    done = [job[way] for job in jobs for way in ('read', 'write')]
    operations = sum(way['total_ios'] for way in done)
    if not operations or any(job['error'] for job in jobs):
        raise Failure('fio had errors:\n' + report)
    # A job's runtime has its final fsync in it, and a millisecond is its unit.
    seconds = max(1, *(job['job_runtime'] for job in jobs)) / 1000
    percentiles = max(done, key=lambda way: way['total_ios'])['clat_ns'].get('percentile', {})
    return Work(operations, sum(way['io_bytes'] for way in done), seconds, percentiles.get('50.000000', 0) / 1e9)


class Passes:
    """Reads the whole disk in order, again and again. Before each pass, which alone is timed, the kernel forgets what it
    has of the presented file, and of the image where it shall be cold."""
    block = MiB

    def __init__(self, direct=False):
        self.direct = direct

    def measure(self, disk, seconds, span, cold=()):
        fd = os.open(disk, os.O_RDONLY | (os.O_DIRECT if self.direct else 0))
        buffer = mmap.mmap(-1, self.block)
        taken, passes = 0.0, 0
        while taken < seconds:
            for path in (disk, *cold):
                drop_pages(path)
            begin = time.monotonic()
            for offset in range(0, span, self.block):
                if os.preadv(fd, [buffer], offset) != self.block:
                    raise Failure('%s is too short' % disk)
            taken += time.monotonic() - begin
            passes += 1
        os.close(fd)
        buffer.close()
        return Work(passes * span // self.block, passes * span, taken)


class SmallFiles:
    """As PostMark: files are made in an ext4 on the disk, then read, appended to, removed and made anew."""
    files, transactions = 3000, 3000

    def measure(self, disk, seconds, span, cold=()):
        device = run('losetup', '--find', '--show', disk).strip()
        tree = disk.parent / 'tree'
        tree.mkdir(exist_ok=True)
        try:
            run('mkfs.ext4', '-q', '-F', device)
            run('mount', device, tree)
            begin = time.monotonic()
            self.work(tree)
            run('sync', '--file-system', tree)
            taken = time.monotonic() - begin
            run('umount', tree)
        finally:
            run('losetup', '--detach', device)
        return Work(self.files + self.transactions, 0, taken)

    def work(self, tree):
        chance = random.Random(1)
        data = chance.randbytes(16 * KiB)
        paths = [tree / ('d%d' % (n % 50)) / str(n) for n in range(self.files)]
        for path in paths[:50]:
            path.parent.mkdir()
        for path in paths:
            path.write_bytes(data[:chance.randint(500, 10000)])
        for number in range(self.transactions):
            path = chance.choice(paths)
            if number % 4 == 0:
                path.read_bytes()
            elif number % 4 == 1:
                with open(path, 'ab') as file:
                    file.write(data[:chance.randint(500, 4000)])
            else:
                path.unlink()
                path.write_bytes(data[:chance.randint(500, 10000)])
            if number % 100 == 0:
                fd = os.open(tree, os.O_RDONLY)
                os.fsync(fd)
                os.close(fd)
