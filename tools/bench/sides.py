"""The programs that are compared: each presents an image as a raw file."""
import os
import signal
import subprocess
from pathlib import Path

from host import (PATIENCE, Failure, children, cpu_seconds, has_program, load_pages, mount_points, open_files, peak_mib,
                  run, wait_until, why_no_rings)

OURS, RING, FVD = 'imgfuse', 'imgfuse io_uring', 'imgfuse FVD'
QSD, NBD = 'QSD', 'nbdfuse'
LIMIT, LIMIT_RING, PLAIN = 'limit', 'limit io_uring', 'plain file'


started = []  # every process


def stop_all():
    """Ends what a line that failed has left."""
    for process in started:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


class Mounted:
    """A disk that can be used at `disk`, and the processes that present it."""

    def __init__(self, disk, process=None, leave=None):
        self.disk, self.process, self.leave = disk, process, leave
        self.pids, self.pages = [], []
        if process:
            wait_until(self.is_ready, '%s to present %s' % (process.args[0], disk))
            self.pids = [process.pid]

    def is_ready(self):
        if self.process.poll() is not None:
            raise Failure('%s: status %d' % (' '.join(map(str, self.process.args)), self.process.returncode))
        return str(self.disk) in mount_points() and self.disk.stat().st_size > 0

    def cpu_seconds(self):
        return sum(map(cpu_seconds, self.pids))

    def peak_mib(self):
        return sum(map(peak_mib, self.pids))

    def load_images(self, folder):
        """Makes hot what it reads there, as long as it is mounted: the image, its data file and the whole backing chain."""
        opened = set().union(*map(open_files, self.pids)) if self.pids else {self.disk}
        self.pages = [load_pages(path) for path in sorted(opened) if path.parent == folder]

    def close(self):
        """Returns when the image is closed."""
        self.pages = []
        if not self.process:
            return
        self.leave(self)
        if self.process.wait(PATIENCE) != 0:
            raise Failure('%s could not close the image: status %d' % (self.process.args[0], self.process.returncode))
        wait_until(lambda: str(self.disk) not in mount_points(), '%s to go away' % self.disk)


def by_signal(mounted):
    mounted.process.send_signal(signal.SIGTERM)


def by_unmount(mounted):
    run('umount', mounted.disk)


class Side:
    """`format` is that of its images where it is not the line's."""
    format = None

    def __init__(self, name):
        self.name = name

    def missing(self):
        """Why it cannot be measured here, or None."""

    def start(self, image, disk, options=()):
        """`options` are those of imgfuse's -o; others do without them. Returns when the disk can be used."""
        raise NotImplementedError

    def spawn(self, command, disk, leave):
        disk.touch()
        started.append(subprocess.Popen([str(word) for word in command], stdin=subprocess.DEVNULL))
        return Mounted(disk, started[-1], leave)


class Imgfuse(Side):
    program = None  # set once, see find_programs()

    def __init__(self, name, rings=False, format=None):
        super().__init__(name)
        self.rings, self.format = rings, format

    def missing(self):
        return why_no_rings() if self.rings else None

    def start(self, image, disk, options=()):
        mounted = self.spawn([self.program, image, disk, '-f', *mount_options(self.rings, options)], disk,
                             lambda mounted: run(self.program, 'umount', mounted.disk))
        return with_rings(mounted) if self.rings else mounted


class NullFuse(Side):
    """The limit. See null_fuse.cc."""
    program = None
    format = 'raw'

    def __init__(self, name, rings=False):
        super().__init__(name)
        self.rings = rings

    def missing(self):
        if not self.program.exists():
            return '%s is not built' % self.program
        return why_no_rings() if self.rings else None

    def start(self, image, disk, options=()):
        mounted = self.spawn([self.program, image, disk, *mount_options(self.rings, options)], disk, by_signal)
        return with_rings(mounted) if self.rings else mounted


class StorageDaemon(Side):
    """QEMU's export, on a writable node with its default cache mode, as its manual shows it."""

    def missing(self):
        return None if has_program('qemu-storage-daemon') else 'qemu-storage-daemon is not installed'

    def start(self, image, disk, options=()):
        # It goes on after an unmount from outside; SIGTERM makes it unmount, flush and close.
        return self.spawn([
            'qemu-storage-daemon', '--blockdev', 'driver=file,node-name=f,discard=unmap,filename=%s' % image,
            '--blockdev', 'driver=%s,node-name=q,discard=unmap,file=f' % image.suffix[1:],
            '--export', 'type=fuse,id=e,node-name=q,mountpoint=%s,writable=on' % disk], disk, by_signal)


class Nbdfuse(Side):
    """qemu-nbd as nbdfuse's child, over a socket that nobody else sees. An unmount ends nbdfuse, and that qemu-nbd."""

    def missing(self):
        absent = [program for program in ('nbdfuse', 'qemu-nbd') if not has_program(program)]
        return ' and '.join(absent) + ' not installed' if absent else None

    def start(self, image, disk, options=()):
        command = ['qemu-nbd', '--format', image.suffix[1:], '--discard=unmap', image]
        mounted = self.spawn(['nbdfuse', disk, '[', *command, ']'], disk, by_unmount)
        mounted.pids += children(mounted.process.pid)
        return mounted


class PlainFile(Side):
    """A file without FUSE and without a format."""
    format = 'raw'

    def start(self, image, disk, options=()):
        return Mounted(image)


SIDES = {side.name: side for side in (
    Imgfuse(OURS), Imgfuse(RING, rings=True), Imgfuse(FVD, format='fvd'), StorageDaemon(QSD), Nbdfuse(NBD),
    NullFuse(LIMIT), NullFuse(LIMIT_RING, rings=True), PlainFile(PLAIN))}


def mount_options(rings, options):
    return ['-o', ','.join(['io_uring=%s' % ('on' if rings else 'off'), *options])]


def with_rings(mounted):
    """Checks that it has not fallen back to /dev/fuse, which it may."""
    if not any('[io_uring]' in path.name for path in open_files(mounted.process.pid)):
        raise Failure('%s does without io_uring' % mounted.process.args[0])
    return mounted


def find_programs():
    """The imgfuse that is measured, $IMGFUSE, and the limit beside it."""
    program = Path(os.environ['IMGFUSE']).absolute()
    if not program.exists():
        raise Failure('%s, which $IMGFUSE names, is not there' % program)
    Imgfuse.program = str(program)
    NullFuse.program = program.parents[1] / 'bench/null_fuse'
