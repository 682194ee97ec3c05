"""What the tests on real files share: running programs, mounting images, loop devices, and taking all of it down."""
import ctypes
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import tempfile
import threading
import time
import unittest
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
IMGFUSE = os.environ.get('IMGFUSE', str(ROOT / 'build-gcc/tools/imgfuse/imgfuse'))
SCALE = os.environ.get('IMG_TEST_SCALE', 'normal')  # quick, normal or long
SCRATCH = os.environ.get('IMG_TEST_DIR', '/var/tmp')  # a file system with O_DIRECT, holes and some GiB of room

KiB, MiB, GiB, TiB = 1 << 10, 1 << 20, 1 << 30, 1 << 40


def by_scale(quick, normal, long):
    return {'quick': quick, 'normal': normal, 'long': long}[SCALE]


def seed():
    """The seed of this run's random tests: IMG_SEED, which may be "new". Tests put it into their failure messages."""
    wanted = os.environ.get('IMG_SEED', '20240607')
    return random.SystemRandom().randrange(1 << 32) if wanted == 'new' else int(wanted)


# --- programs ---------------------------------------------------------------------------------------------------------

class Outcome:
    def __init__(self, arguments, status, out, err):
        self.arguments, self.status, self.out, self.err = arguments, status, out, err

    def __str__(self):
        return '%s\nstatus %d\n%s%s' % (' '.join(map(str, self.arguments)), self.status, self.out, self.err)


def attempt(*arguments, timeout=120, **options):
    """Runs a program to its end, whatever the end."""
    arguments = [str(a) for a in arguments]
    options.setdefault('stdin', None if 'input' in options else subprocess.DEVNULL)
    if options['stdin'] is None:
        del options['stdin']
    done = subprocess.run(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors='replace',
                          timeout=timeout, **options)
    return Outcome(arguments, done.returncode, done.stdout, done.stderr)


def run(*arguments, **options):
    """Runs a program that must succeed; returns what it wrote to stdout."""
    outcome = attempt(*arguments, **options)
    if outcome.status != 0:
        raise AssertionError(str(outcome))
    return outcome.out


def imgfuse(*arguments, **options):
    return run(IMGFUSE, *arguments, **options)


def imgfuse_json(*arguments):
    return json.loads(imgfuse(*arguments))


def wait_until(condition, seconds=10, what='the condition'):
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError('%s did not come true within %d s' % (what, seconds))
        time.sleep(0.005)


# --- files ------------------------------------------------------------------------------------------------------------

def sha256(path):
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        while block := file.read(MiB):
            digest.update(block)
    return digest.hexdigest()


def raw_sha256(image, *options):
    """The hash of what QEMU reads from the image."""
    with tempfile.TemporaryDirectory(dir=SCRATCH) as folder:
        raw = Path(folder) / 'raw'
        run('qemu-img', 'convert', '-O', 'raw', *options, image, raw)
        return sha256(raw)


def pattern(length, key):
    """Bytes that differ from key to key and do not repeat."""
    return random.Random(key).randbytes(length)


FALLOC_KEEP_SIZE, FALLOC_PUNCH_HOLE, FALLOC_ZERO_RANGE = 1, 2, 16
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


def fallocate(fd, mode, offset, length):
    while _libc.fallocate(fd, mode, offset, length) != 0:
        error = ctypes.get_errno()
        if error != 4:  # EINTR
            raise OSError(error, 'fallocate: ' + os.strerror(error))


def punch_hole(fd, offset, length):
    fallocate(fd, FALLOC_PUNCH_HOLE | FALLOC_KEEP_SIZE, offset, length)


def zero_range(fd, offset, length):
    fallocate(fd, FALLOC_ZERO_RANGE | FALLOC_KEEP_SIZE, offset, length)


def mounts():
    """Mount points, in the order of mounting."""
    with open('/proc/self/mounts', encoding='utf-8') as table:
        return [line.split()[1].replace('\\040', ' ').replace('\\054', ',') for line in table]


def format_of(image):
    """As its name says: qcow2 where it does not."""
    suffix = Path(image).suffix[1:]
    return suffix if suffix in ('qed', 'fvd') else 'qcow2'


def is_mounted(path):
    return str(path) in mounts()


# --- daemons ----------------------------------------------------------------------------------------------------------

def daemons_in(folder):
    """The imgfuse processes whose command line names something in the folder."""
    found = []
    for entry in os.listdir('/proc'):
        if entry.isdigit() and 'imgfuse' in executable(entry) and str(folder) + '/' in command_line(entry):
            found.append(int(entry))
    return found


def executable(pid):
    try:
        return os.path.basename(os.readlink('/proc/%s/exe' % pid))
    except OSError:
        return ''


def command_line(pid):
    try:
        return Path('/proc/%s/cmdline' % pid).read_bytes().replace(b'\0', b' ').decode(errors='replace')
    except OSError:
        return ''


def process_is_gone(pid):
    """Nothing of it runs: neither its first thread nor others that live on without that one."""
    try:
        with open('/proc/%d/stat' % pid, encoding='utf-8', errors='replace') as status:
            fields = status.read().rsplit(')', 1)[1].split()
            return fields[0] == 'Z' and int(fields[17]) <= 1
    except OSError:
        return True


def resident_bytes(pid, field='VmRSS'):
    with open('/proc/%d/status' % pid, encoding='utf-8') as status:
        for line in status:
            if line.startswith(field + ':'):
                return int(line.split()[1]) * KiB
    raise AssertionError('no %s for process %d' % (field, pid))


def close_quietly(fd):
    try:
        os.close(fd)
    except OSError:
        pass


class Mount:
    """An image presented as a raw file. `disk` is that file, `pid` the daemon."""

    def __init__(self, image, point, pid):
        self.image, self.point, self.pid = Path(image), Path(point), pid

    @property
    def disk(self):
        return self.point / 'disk.raw' if self.point.is_dir() else self.point

    def open(self, flags=os.O_RDWR):
        return os.open(self.disk, flags)

    def unmount(self):
        run(IMGFUSE, 'umount', self.point)
        if not process_is_gone(self.pid):
            raise AssertionError('the daemon %d outlived imgfuse umount' % self.pid)

    def kill(self, number=signal.SIGKILL):
        os.kill(self.pid, number)

    def wait_gone(self, seconds=20):
        wait_until(lambda: process_is_gone(self.pid), seconds, 'the end of daemon %d' % self.pid)

    def bury(self):
        """Removes what a killed daemon left in the mount table."""
        self.wait_gone()
        if is_mounted(self.point):
            run('umount', '-l', self.point)


class ImageCase(unittest.TestCase):
    """A test with a folder of its own. All it mounted, attached or started is taken down at its end, and its daemons
    are killed when it takes longer than `seconds`, so that a hanging request cannot hang the run."""

    seconds = 300
    maxDiff = 4000

    def setUp(self):
        self.folder = Path(tempfile.mkdtemp(prefix='imgfuse-test-', dir=SCRATCH))
        os.chmod(self.folder, 0o755)
        self.addCleanup(shutil.rmtree, self.folder, ignore_errors=True)
        self.addCleanup(self._take_down)
        self.seed = seed()
        self.random = random.Random(self.seed)
        self._watchdog = threading.Timer(self.seconds, self._kill_daemons)
        self._watchdog.daemon = True
        self._watchdog.start()
        self.addCleanup(self._watchdog.cancel)

    def _formatMessage(self, message, standard):
        return super()._formatMessage(message, standard) + '\n(IMG_SEED=%d)' % self.seed

    def _kill_daemons(self):
        for pid in daemons_in(self.folder):
            try:
                os.kill(pid, signal.SIGKILL)
            except OSError:
                pass

    def _take_down(self):
        """Unmounts in reverse order what lies in the folder, then kills what still runs there."""
        for _ in range(3):
            mine = [point for point in mounts() if point.startswith(str(self.folder) + '/')]
            if not mine:
                break
            for point in reversed(mine):
                if attempt('umount', point).status != 0:
                    attempt('umount', '-l', point)
        for line in attempt('losetup', '--noheadings', '--output', 'NAME,BACK-FILE').out.splitlines():
            if str(self.folder) in line:
                attempt('losetup', '--detach', line.split()[0])
        deadline = time.monotonic() + 5
        while daemons_in(self.folder) and time.monotonic() < deadline:
            time.sleep(0.02)
        self._kill_daemons()

    # Making images

    def path(self, name):
        return self.folder / name

    def new(self, name, size='64M', *options):
        """A new image of the format that ends its name; `options` are those of qemu-img, which makes it if it knows the
        format, such as '-o', 'cluster_size=4k'."""
        program = (IMGFUSE, 'create') if format_of(name) == 'fvd' else ('qemu-img', 'create', '-q')
        run(*program, '-f', format_of(name), *options, self.path(name), *([size] if size else []))
        return self.path(name)

    def qcow2(self, name='disk.qcow2', size='64M', *options):
        return self.new(name, size, *options)

    def raw(self, name='disk.img', size=64 * MiB):
        with open(self.path(name), 'wb') as file:
            file.truncate(size)
        return self.path(name)

    def fvd(self, name='disk.fvd', size='64M', *options, base=None):
        """A new compact FVD image with a raw base or without; `options` such as 'chunk_size=64k'."""
        over = ['-b', base, '-F', 'raw'] if base else []
        return self.new(name, size, '-o', ','.join(('compact_image=on', *options)), *over)

    # Mounting

    def mount(self, image, *options, point=None, **run_options):
        """Mounts in the background, at a new regular file if no point is given."""
        if point is None:
            point = self.path(Path(image).name + '.mnt')
            point.touch()
        run(IMGFUSE, image, point, *options, **run_options)
        self.assertTrue(is_mounted(point), 'imgfuse returned 0 before the mount was there')
        pids = [pid for pid in daemons_in(self.folder) if '%s %s' % (image, point) in command_line(pid)]
        self.assertEqual(len(pids), 1, 'one daemon for %s, found %s' % (image, pids))
        return Mount(image, point, pids[0])

    def losetup(self, file, *options):
        device = run('losetup', '--find', '--show', *options, file).strip()
        self.addCleanup(attempt, 'losetup', '--detach', device)
        return device

    def detach(self, device):
        run('losetup', '--detach', device)
        wait_until(lambda: attempt('losetup', device).status != 0, what='the detaching of ' + device)

    def trace(self, mount, names, work):
        """What strace writes of these system calls of the daemon during `work`."""
        log, tasks = self.path('strace.log'), '/proc/%d/task' % mount.pid
        with subprocess.Popen(['strace', '-f', '-qq', '-e', 'trace=' + ','.join(names), '-o', log, '-p', str(mount.pid)],
                              stderr=subprocess.PIPE, text=True) as tracer:
            wait_until(lambda: all('TracerPid:\t0' not in open('%s/%s/status' % (tasks, task), encoding='utf-8').read()
                                   for task in os.listdir(tasks)), what='strace to attach')
            work()
            tracer.terminate()
            tracer.wait(20)
        return log.read_text()

    # Claims

    def assert_clean(self, image, format=None):
        """No corruption and no leak, for QEMU, if it knows the format, and for imgfuse."""
        format = format or format_of(image)
        if format != 'fvd':
            outcome = attempt('qemu-img', 'check', '-f', format, image)
            self.assertEqual(outcome.status, 0, str(outcome))
        outcome = attempt(IMGFUSE, 'check', image)
        self.assertEqual(outcome.status, 0, str(outcome))

    def assert_no_corruption(self, image):
        """Leaks may be there, as after a crash."""
        if format_of(image) != 'fvd':
            outcome = attempt('qemu-img', 'check', '-f', format_of(image), image)
            self.assertIn(outcome.status, (0, 3), str(outcome))
        outcome = attempt(IMGFUSE, 'check', image)
        self.assertIn(outcome.status, (0, 3), str(outcome))

