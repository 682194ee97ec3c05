"""What imgfuse asks of the host, counted by strace: exact numbers, the same in every round."""
import os
import re
import signal
import subprocess
from pathlib import Path

import images
from host import KiB, MiB, run, wait_until
from results import Sample, Wanted
from rounds import Line
from sides import OURS, RING, SIDES

FLUSHES = ('fsync', 'fdatasync', 'sync_file_range')
READS = ('pread64', 'preadv', 'preadv2')
WRITES = ('pwrite64', 'pwritev', 'pwritev2')


class CountLine(Line):
    """`count(bench, side)` is the number; `bound` is what imgfuse may have at most."""

    def __init__(self, name, unit, count, bound=None, sides=(OURS,)):
        super().__init__(name, unit, sides, (Wanted(OURS, None, bound),) if bound else (), less_is_better=True, rounds=1,
                         pairs=[], cost=4)
        self.count = count

    def measure(self, bench, side):
        return Sample(self.count(bench, side))


def trace(bench, daemon, calls, work):
    """The system calls that the daemon makes while `work` runs, as strace prints them, a line each."""
    log = bench.store.anew('strace.log')
    tracer = subprocess.Popen(['strace', '-f', '-qq', '-y', '-s', '0', '-e', 'trace=' + ','.join(calls), '-o', log, '-p',
                               str(daemon.process.pid)], stderr=subprocess.DEVNULL)
    tasks = Path('/proc/%d/task' % daemon.process.pid)
    wait_until(lambda: not any('TracerPid:\t0' in (task / 'status').read_text() for task in tasks.iterdir()),
               'strace to attach')
    work()
    tracer.send_signal(signal.SIGINT)
    tracer.wait(20)
    return log.read_text(encoding='utf-8').splitlines()


def results(lines):
    """What the calls returned; one that another thread's call interrupted in the log ends in a line of its own."""
    return [int(found.group(1)) for line in lines if (found := re.search(r'= (\d+)$', line))]


def flushes(format, which):
    """Host flushes per guest fsync, after a 4k write each into clusters that have none yet, and then again."""
    def count(bench, side):
        daemon = SIDES[side].start(images.empty(bench.store, side, format), bench.folder / 'count')
        fd = os.open(daemon.disk, os.O_RDWR)
        fsyncs = 200

        def write_and_sync():
            for number in range(fsyncs):
                os.pwrite(fd, b'x' * 4096, number * 4 * MiB)
                os.fsync(fd)

        if which == 'overwriting':
            write_and_sync()
        calls = len(results(trace(bench, daemon, FLUSHES, write_and_sync)))
        os.close(fd)
        daemon.close()
        return calls / fsyncs
    return count


def calls_per_read(calls):
    """Of 4k random reads at depth 1, when the tables are in the cache."""
    def count(bench, side):
        reads = 1000
        daemon = SIDES[side].start(images.full(bench.store, side, 'qcow2'), bench.folder / 'count')

        def read():
            run('fio', '--name=read', '--filename=%s' % daemon.disk, '--direct=1', '--rw=randread', '--bs=4k',
                '--size=%dM' % bench.store.hot, '--number_ios=%d' % reads, '--ioengine=psync', cwd=bench.folder)

        daemon.load_images(bench.folder)
        read()
        lines = trace(bench, daemon, calls, read)
        daemon.close()
        return len([line for line in lines if 'resumed>' not in line]) / reads
    return count


def metadata_per_gib(bench, side):
    """Bytes written beside the data while a GiB is written in order, over the size of its L2 entries and counts."""
    data, needed = 1 << 30, (8 + 2) * (1 << 30) // (64 * KiB)
    image = images.empty(bench.store, side, 'qcow2')
    daemon = SIDES[side].start(image, bench.folder / 'count')
    lines = trace(bench, daemon, WRITES, lambda: run(
        'fio', '--name=write', '--filename=%s' % daemon.disk, '--direct=1', '--rw=write', '--bs=1M', '--size=%d' % data,
        '--end_fsync=1', '--ioengine=psync', cwd=bench.folder))
    daemon.close()
    image.unlink()
    return (sum(results(line for line in lines if str(image) in line or 'resumed>' in line)) - data) / needed


def overlay(what):
    """4k random writes into an overlay with subclusters of that size, an fsync after every 256."""
    def count(bench, side):
        below, image, written = bench.folder / 'below.raw', bench.store.anew('above.qcow2'), 16 * MiB
        below.write_bytes(os.urandom(64 * MiB))
        os.truncate(below, 1 << 30)
        run('qemu-img', 'create', '-q', '-f', 'qcow2', '-o', 'cluster_size=128k,extended_l2=on', '-b', below.name, '-F',
            'raw', image)
        daemon = SIDES[side].start(image, bench.folder / 'count')
        lines = trace(bench, daemon, WRITES + READS, lambda: run(
            'fio', '--name=write', '--filename=%s' % daemon.disk, '--direct=1', '--rw=randwrite', '--bs=4k', '--size=1G',
            '--io_size=%d' % written, '--fsync=256', '--norandommap', '--ioengine=psync', cwd=bench.folder))
        daemon.close()
        if what == 'reads':
            return len([line for line in lines if 'pread' in line and str(below) in line])
        return sum(results(line for line in lines if 'pwrite' in line)) / written
    return count


LINES = (
    CountLine('host flushes per guest fsync, overwriting', '', flushes('qcow2', 'overwriting'), bound=1),
    CountLine('host flushes per guest fsync, allocating', '', flushes('qcow2', 'allocating'), bound=1.05),
    CountLine('QED: host flushes per guest fsync, overwriting', '', flushes('qed', 'overwriting'), bound=1),
    CountLine('QED: host flushes per guest fsync, allocating', '', flushes('qed', 'allocating')),
    CountLine('host reads per 4k read', '', calls_per_read(READS), bound=1),
    CountLine('system calls per 4k read', '', calls_per_read(('all',)), sides=(OURS, RING)),
    CountLine('metadata written per GiB in order, over what is needed', '', metadata_per_gib, bound=1.5),
    CountLine('overlay, 4k random write: host bytes per byte', '', overlay('bytes')),
    CountLine('overlay, 4k random write: backing reads', '', overlay('reads')),
)
