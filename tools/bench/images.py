"""The images that are measured. Those of lines are functions of (store, side, format) that return the path of the side's
image; the format is the line's, where the side has none of its own. Limit and plain file have raw files of the same
content."""
import os
import random
import shutil
from pathlib import Path

from host import MiB, Failure, drop_pages, run
from sides import Imgfuse

PLACES = 4096  # of 4 KiB with data, in an image that is mostly empty


class Store:
    """A folder of images, which are made once, and another one in memory. Sizes in MiB."""

    def __init__(self, folder, memory, quick):
        self.folder, self.memory = folder, memory
        self.hot = 64 if quick else 512  # random data in the image that is read and overwritten
        self.packed = 48 if quick else 96  # data of programs and libraries, compressed
        self.converted = 96 if quick else 192  # data in an image that is converted
        self.mirrored = 128 if quick else 1024  # in memory; see use_pages()
        self.busy = 128 if quick else 512  # mirrored beside a guest
        self.used = self.hot  # pages that are used before each measurement, which may need as many

    def once(self, name, make):
        """The file, made where it is not there yet. Half a one is never found."""
        path = self.folder / name
        if not path.exists():
            half = self.folder / ('half-' + name)
            make(half)
            drop_pages(half)  # of sizes that depend on who wrote it; see load_pages()
            half.rename(path)
        return path

    def anew(self, name):
        path = self.folder / name
        path.unlink(missing_ok=True)
        return path

    def random_raw(self):
        return self.once('random.raw', lambda path: write_random(path, self.hot))

    def programs_raw(self):
        """Compresses as what a disk has on it."""
        def make(path):
            with open(path, 'wb') as file:
                for program in sorted(Path('/usr').glob('*/**/*')):
                    if file.tell() < self.packed * MiB and program.is_file() and program.stat().st_size >= MiB:
                        file.write(program.read_bytes()[:8 * MiB])
                file.truncate(self.packed * MiB)
        return self.once('programs.raw', make)

    def base(self):
        """A full backing file."""
        return self.once('base.qcow2', lambda path: qemu_img_convert(self.random_raw(), path, 'qcow2'))


def write_random(path, mib):
    with open(path, 'wb') as file:
        for _ in range(mib):
            file.write(os.urandom(MiB))


def qemu_img_convert(source, target, format, *options):
    run('qemu-img', 'convert', '-f', source.suffix[1:], '-O', format, *options, source, target)


def create(path, size, options=()):
    """An empty image; the suffix names the format."""
    path.unlink(missing_ok=True)
    if path.suffix == '.fvd':
        run(Imgfuse.program, 'create', '-f', 'fvd', '-o', 'compact_image=on', path, size)
    else:
        run('qemu-img', 'create', '-q', '-f', path.suffix[1:], *options, path, size)
    return path


def over(below, name, *options):
    """An empty overlay beside the image below it."""
    path = below.with_name(name)
    path.unlink(missing_ok=True)
    run('qemu-img', 'create', '-q', '-f', 'qcow2', *options, '-b', below.name, '-F', 'qcow2', path)
    return path


# --- images that are there already -------------------------------------------------------------------------------

def full(store, side, format):
    """Every cluster is allocated and has random data."""
    if format == 'raw':
        return store.once('full-%s.raw' % side, lambda half: shutil.copyfile(store.random_raw(), half))
    return store.once('full-%s.%s' % (side, format), lambda half: qemu_img_convert(store.random_raw(), half, format))


def raw_data(store, side, format):
    """The same, with the data in a raw file of their own."""
    if format == 'raw':
        return full(store, side, format)
    data = store.folder / ('raw-data-%s.data' % side)

    def make(path):
        qemu_img_convert(store.random_raw(), path, format, '-o', 'data_file=%s,data_file_raw=on' % data)
        drop_pages(data)
    return store.once('raw-data-%s.%s' % (side, format), make)


def packed(compression):
    def make(store, side, format):
        options = ('-c', '-o', 'compression_type=' + compression)
        return store.once('packed-%s-%s.%s' % (side, compression, format),
                          lambda half: qemu_img_convert(store.programs_raw(), half, format, *options))
    return make


def overlay(store, side, format):
    """Empty, over a full backing file."""
    return full(store, side, format) if format == 'raw' else over(store.base(), 'overlay-%s.qcow2' % side)


def spread(size):
    """The virtual disk is large; what is in it lies at even distances, so that every table is in use."""
    def make(store, side, format):
        def write(half):
            run(Imgfuse.program, 'create', '-f', 'qcow2', half, size)
            length = parse_size(size)
            commands = (c for n in range(PLACES) for c in ('-c', 'write -q %d 4k' % (n * (length // PLACES))))
            run('qemu-io', '-t', 'unsafe', '-f', 'qcow2', *commands, half)
        return store.once('spread-%s.qcow2' % size, write)
    return make


def chain(layers):
    """All data is in the lowest layer."""
    def make(store, side, format):
        below = store.base()
        for number in range(1, layers):
            below = over(below, 'chain-%d.qcow2' % number)
        return below
    return make


def parse_size(text):
    return int(text[:-1]) << {'G': 30, 'T': 40}[text[-1]]


# --- images for one measurement ---------------------------------------------------------------------------------------

def empty(store, side, format):
    return create(store.anew('empty.' + format), '4G')


def copy_on_write(store, side, format):
    """An overlay that has nothing yet."""
    return over(store.base(), 'fresh.qcow2')


def subclusters(store, side, format):
    """The same with extended L2 entries and subclusters of 4 KiB: nothing needs to be copied."""
    if format == 'raw':
        return create(store.anew('fresh.raw'), '%dM' % store.hot)
    return over(store.base(), 'fresh.qcow2', '-o', 'cluster_size=128k,extended_l2=on')


# --- what is converted ------------------------------------------------------------------------------------------------

def conversion_source(store, name):
    """One third of the data is random, the rest compresses as text does. "sparse" has a quarter of it, far apart."""
    kind, format = name.split('.')
    if format == 'qcow2':
        return store.once('converted-' + name, lambda half: qemu_img_convert(
            conversion_source(store, kind + '.raw'), half, 'qcow2'))
    if kind not in ('full', 'sparse'):
        raise Failure('no such source: ' + name)

    def make(path):
        chance = random.Random(1)
        words = [chance.randbytes(6) for _ in range(256)]
        text = b''.join(words[n] for n in chance.randbytes(MiB // 6))
        step, distance = (1, MiB) if kind == 'full' else (4, 54 * MiB)
        with open(path, 'wb') as file:
            for number in range(0, store.converted, step):
                file.seek(number * distance)
                file.write(chance.randbytes(MiB) if number // step % 3 == 0 else text)
            file.truncate(store.converted * distance)
    return store.once('converted-' + name, make)


def mirror_source(store):
    """In memory: the host's disk would be what is measured."""
    path = store.memory / 'mirrored.qcow2'
    if not path.exists():
        make_allocated(path, store.mirrored)
    return path


def busy_source(store):
    return store.once('busy.qcow2', lambda half: make_allocated(half, store.busy))


def make_allocated(path, mib):
    """An image in which every cluster is allocated."""
    raw = path.with_suffix('.raw')
    write_random(raw, mib)
    qemu_img_convert(raw, path, 'qcow2')
    raw.unlink()


def mib_of(path):
    """Host space."""
    return path.stat().st_blocks * 512 / MiB
