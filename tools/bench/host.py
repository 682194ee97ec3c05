"""The machine: programs, mounts, processes, cached pages, and what it is called in a report."""
import mmap
import os
import platform
import re
import shutil
import subprocess
import time
from pathlib import Path

MiB = 1 << 20
KiB = 1 << 10
PATIENCE = 60  # seconds that something may take which takes far less
CLOCK_TICK = os.sysconf('SC_CLK_TCK')
RINGS = Path('/sys/module/fuse/parameters/enable_uring')


class Failure(Exception):
    """A line cannot be measured: something that should work did not."""


def run(*arguments, **options):
    """The program's output; Failure unless it ends with status 0."""
    done = subprocess.run([str(a) for a in arguments], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True, check=False, **options)
    if done.returncode != 0:
        raise Failure('%s: status %d\n%s%s' % (' '.join(map(str, arguments)), done.returncode, done.stdout, done.stderr))
    return done.stdout


def has_program(name):
    return shutil.which(name) is not None


def wait_until(condition, what):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            raise Failure('waited %d s for %s' % (PATIENCE, what))
        time.sleep(0.001)


def mount_points():
    return [line.split()[1] for line in Path('/proc/self/mounts').read_text(encoding='utf-8').splitlines()]


def release(folder):
    """Takes away what a line that failed has left: loop devices and mounts of files in the folder."""
    listed = subprocess.run(['losetup', '--list', '--noheadings', '--output', 'NAME,BACK-FILE'], text=True, check=False,
                            stdout=subprocess.PIPE)
    for line in listed.stdout.splitlines():
        device, _, file = line.partition(' ')
        if file.strip().startswith(str(folder)):
            subprocess.run(['umount', '-l', device], check=False, stderr=subprocess.DEVNULL)
            subprocess.run(['losetup', '--detach', device], check=False)
    for point in reversed(mount_points()):
        if point.startswith(str(folder)):
            subprocess.run(['umount', '-l', point], check=False)


# --- processes --------------------------------------------------------------------------------------------------------

def cpu_seconds(pid):
    """Of all its threads, those that have ended included; in steps of a clock tick (10 ms)."""
    fields = Path('/proc/%d/stat' % pid).read_text(encoding='utf-8').rpartition(')')[2].split()
    return (int(fields[11]) + int(fields[12])) / CLOCK_TICK


def peak_mib(pid):
    return int(re.search(r'VmHWM:\s+(\d+)', Path('/proc/%d/status' % pid).read_text(encoding='utf-8')).group(1)) / 1024


def children(pid):
    done = subprocess.run(['pgrep', '-P', str(pid)], stdout=subprocess.PIPE, text=True, check=False)
    return [int(child) for child in done.stdout.split()]


def open_files(pid):
    return {Path(os.readlink(link)) for link in Path('/proc/%d/fd' % pid).iterdir()}


# --- pages ------------------------------------------------------------------------------------------------------------

def load_pages(path):
    """Makes a file hot, page by page: what a small write costs depends on how large the pieces were in which the kernel
    read the file, and that is by chance. Some machines take pages away that nobody seems to need, however much memory is
    free, but none of what is returned: the pages, mapped. Holes stay as they are."""
    fd, pages = os.open(path, os.O_RDONLY), []
    for begin, end in data_of(fd):
        for offset in range(begin, end, 128 * KiB):  # the kernel may stop behind that
            os.posix_fadvise(fd, offset, 128 * KiB, os.POSIX_FADV_WILLNEED)
        for offset in range(begin, end, MiB):
            os.pread(fd, min(MiB, end - offset), offset)
        pages.append(mmap.mmap(fd, end - begin, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE, prot=mmap.PROT_READ,
                               offset=begin))
    os.close(fd)
    return pages


def data_of(fd):
    """Where a file has data, in order, from the beginning of a page."""
    end, size = 0, os.fstat(fd).st_size
    while end < size:
        try:
            begin = os.lseek(fd, end, os.SEEK_DATA)
        except OSError:  # none behind it
            return
        end = os.lseek(fd, begin, os.SEEK_HOLE)
        yield begin - begin % mmap.ALLOCATIONGRANULARITY, end


def drop_pages(path):
    """Makes a file cold: the next read comes from the device."""
    fd = os.open(path, os.O_RDONLY)
    os.fdatasync(fd)  # pages that are not written yet stay
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def use_pages(folder, mib):
    """In a virtual machine, pages that nobody used before cost ten times as much as others: have used ones free. For
    some seconds: then the machine below may have taken them back."""
    used = folder / 'used'
    with open(used, 'wb', buffering=0) as file:
        for _ in range(mib):
            file.write(bytes(MiB))
    used.unlink()


# --- FUSE over io_uring -----------------------------------------------------------------------------------------------

def why_no_rings():
    """Why the kernel cannot be made to offer it, or None."""
    if not RINGS.exists():
        return 'the kernel has no FUSE over io_uring'
    return None if os.access(RINGS, os.W_OK) else '%s is read-only' % RINGS


class RingsAllowed:
    """Lets the kernel offer it while this is entered, where it can."""

    def __enter__(self):
        self.before = None if why_no_rings() else RINGS.read_text(encoding='ascii')
        if self.before is not None:
            RINGS.write_text('Y', encoding='ascii')

    def __exit__(self, *_):
        if self.before is not None:
            RINGS.write_text(self.before, encoding='ascii')


# --- names ------------------------------------------------------------------------------------------------------------

def version(*command):
    """The first number with a dot in what the program says of itself."""
    if not has_program(command[0]):
        return None
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    found = re.search(r'\d+\.[\w.]+', done.stdout)
    return found.group(0) if found else None


def describe(imgfuse):
    """What a reader has to know of the machine."""
    model = re.search(r'model name\s*:\s*(.+)', Path('/proc/cpuinfo').read_text(encoding='utf-8'))
    memory = re.search(r'MemTotal:\s+(\d+)', Path('/proc/meminfo').read_text(encoding='utf-8'))
    return {
        'date': time.strftime('%Y-%m-%d', time.gmtime()),
        'kernel': platform.release(),
        'cpus': os.cpu_count(),
        'processor': model.group(1) if model else platform.machine(),
        'memory_gib': round(int(memory.group(1)) / KiB / KiB),
        'versions': {
            'imgfuse': version(imgfuse, '--version'),
            'qemu-storage-daemon': version('qemu-storage-daemon', '--version'),
            'nbdfuse': version('nbdfuse', '--version'),
            'fio': version('fio', '--version'),
        },
    }
