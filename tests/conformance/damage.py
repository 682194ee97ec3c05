"""Images to be damaged, and the kinds of damage."""
import re
from dataclasses import dataclass
from typing import Callable, Optional

from harness import MiB, pattern, run
from qcow2_bytes import (BITMAPS_EXTENSION, BITMAPS_VALID, COMPRESSED, COPIED, CORRUPT, DIRTY, OFFSETS, ZERO, Image)

KiB = 1 << 10
PAST_THE_END = 1 << 40  # aligned for every cluster size
ALL_ZERO = 0xffffffff << 32

# --- images -----------------------------------------------------------------------------------------------------------


def made(folder, name, options, commands, size='2M', backing=None, format='qcow2'):
    image = folder / (name + '.' + format)
    below = ['-b', backing, '-F', 'raw'] if backing else []
    run('qemu-img', 'create', '-q', '-f', format, '-o', options, *below, image, size)
    out = run('qemu-io', '-f', format, image, input='\n'.join(commands) + '\nquit\n', cwd=folder)
    assert 'rror' not in out and 'failed' not in out, out
    return image


# Guest clusters 0 to 3 are data, 5 is zero with a host cluster, 6 is zero without.
CLUSTERS = ['write -P 1 0 64k', 'write -P 2 64k 64k', 'write -P 3 128k 64k', 'write -P 4 192k 64k',
            'write -P 5 320k 64k', 'write -z 320k 64k', 'write -z -u 384k 64k']
# Of 16 KiB each, with subclusters of 512 bytes: 0 to 3 whole, 4 with two alloc, 5 with alloc and zero, 7 all zero.
SUBCLUSTERS = ['write -P 1 0 64k', 'write -P 2 65k 1k', 'write -P 3 80k 2k', 'write -z 84k 1k', 'write -z -u 112k 16k']


def standard(folder):
    return made(folder, 'standard', 'cluster_size=64k', CLUSTERS)


def version_2(folder):
    return made(folder, 'version_2', 'compat=0.10,cluster_size=64k', CLUSTERS[:4])


def overlay(folder):
    with open(folder / 'below.raw', 'wb') as below:
        below.write(pattern(2 * MiB, 'below'))
    return made(folder, 'overlay', 'cluster_size=64k', CLUSTERS, '2M', 'below.raw')


def narrow(folder):
    return made(folder, 'narrow', 'cluster_size=4k,refcount_bits=1', CLUSTERS)


def wide(folder):
    return made(folder, 'wide', 'cluster_size=4k,refcount_bits=64', CLUSTERS)


def smallest(folder):
    return made(folder, 'smallest', 'cluster_size=512,refcount_bits=8', CLUSTERS)


def extended(folder):
    return made(folder, 'extended', 'cluster_size=16k,extended_l2=on', SUBCLUSTERS, '1M')


def extended_overlay(folder):
    overlay(folder)
    return made(folder, 'extended_overlay', 'cluster_size=16k,extended_l2=on', SUBCLUSTERS, '1M', 'below.raw')


def data_file(folder):
    return made(folder, 'data_file', 'cluster_size=64k,data_file=%s' % (folder / 'data_file.raw'), CLUSTERS)


def extended_data_file(folder):
    options = 'cluster_size=16k,extended_l2=on,data_file=%s' % (folder / 'extended_data_file.raw')
    return made(folder, 'extended_data_file', options, SUBCLUSTERS, '1M')


def _compressed(folder, name, options):
    source = folder / 'text.raw'
    text = ''.join('%d ' % n for n in range(60000)).encode()
    source.write_bytes((text * 3)[:768 * KiB].ljust(MiB, b'\0'))
    run('qemu-img', 'convert', '-c', '-f', 'raw', '-O', 'qcow2', '-o', options, source, folder / (name + '.qcow2'))
    return folder / (name + '.qcow2')


def compressed(folder):
    return _compressed(folder, 'compressed', 'cluster_size=64k')


def extended_compressed(folder):
    return _compressed(folder, 'extended_compressed', 'cluster_size=16k,extended_l2=on')


def snapshots(folder):
    image = standard(folder).rename(folder / 'snapshots.qcow2')
    run('qemu-img', 'snapshot', '-c', 'one', image)
    run('qemu-img', 'snapshot', '-c', 'two', image)
    run('qemu-io', '-f', 'qcow2', '-c', 'write -P 9 0 64k', image)
    return image


def extended_snapshots(folder):
    image = extended(folder).rename(folder / 'extended_snapshots.qcow2')
    run('qemu-img', 'snapshot', '-c', 'one', image)
    run('qemu-io', '-f', 'qcow2', '-c', 'write -P 9 1k 1k', image)
    return image


def deep_snapshots(folder):
    """200 snapshots of one state, which share its tables; QEMU would take its time."""
    path = made(folder, 'deep_snapshots', 'cluster_size=4k', CLUSTERS[:2], '1M')
    image = Image(path)
    shared, entries = image.l2_table(), image.field('l1_entries')
    clusters = [shared] + [image.host(c) for c in range(32)]
    image.put(image.l1_at(), shared)
    for guest_cluster in range(32):
        image.set_entry(guest_cluster, image.host(guest_cluster))
    for cluster in clusters:
        image.set_count(cluster, 201)
    end = (len(image.bytes) + image.cluster - 1) // image.cluster * image.cluster
    table = b''
    for index in range(200):
        l1_copy = end + index * image.cluster
        image.put(l1_copy, shared)
        image.set_count(l1_copy, 1)
        name = b'%d' % (index + 1)
        table += (l1_copy.to_bytes(8, 'big') + entries.to_bytes(4, 'big') + len(name).to_bytes(2, 'big') * 2 +
                  bytes(20) + (16).to_bytes(4, 'big') + bytes(8) + MiB.to_bytes(8, 'big') + name + name)
        table = table.ljust((len(table) + 7) // 8 * 8, b'\0')
    place = end + 200 * image.cluster
    image.bytes = image.bytes.ljust(place, b'\0') + table
    for offset in range(place, len(image.bytes), image.cluster):
        image.set_count(offset, 1)
    image.set_field('snapshots', place)
    image.set_field('snapshot_count', 200)
    image.save()
    return path


def bitmaps(folder):
    image = standard(folder).rename(folder / 'bitmaps.qcow2')
    run('qemu-img', 'bitmap', '--add', image, 'first')
    run('qemu-img', 'bitmap', '--add', '-g', '4k', image, 'second')
    run('qemu-io', '-f', 'qcow2', '-c', 'write -P 8 1M 64k', image)
    return image


# --- kinds ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Damage:
    """One kind of damage. `make` changes the bytes of an Image."""
    base: Callable
    name: str
    make: Callable
    qemu: Optional[str] = None  # what QEMU's check is known not to see or to count otherwise
    mended: bool = True  # a repair of everything makes the image clean

    @property
    def test_name(self):
        return self.base.__name__ + '_' + re.sub(r'\W+', '_', self.name)


def set_entry(guest_cluster, value):
    return lambda i: i.set_entry(guest_cluster, value)


def flip_entry(guest_cluster, bits):
    return lambda i: i.set_entry(guest_cluster, i.entry(guest_cluster) ^ bits)


def set_subclusters(guest_cluster, value):
    return lambda i: i.set_subclusters(guest_cluster, value)


def flip_subclusters(guest_cluster, bits):
    return lambda i: i.set_subclusters(guest_cluster, i.subclusters(guest_cluster) ^ bits)


def set_count(guest_cluster, count):
    return lambda i: i.set_count(i.host(guest_cluster), count)


def set_count_of(place, count):
    return lambda i: i.set_count(place(i), count)


def flip_l1(bits):
    return lambda i: i.put(i.l1_at(), i.get(i.l1_at()) ^ bits)


def set_l1(value):
    return lambda i: i.put(i.l1_at(), value)


def set_field(name, value):
    return lambda i: i.set_field(name, value)


def set_table_entry(index, value):
    return lambda i: i.put(i.field('refcount_table') + 8 * index, value)


def noise(place):
    def make(image):
        at = place(image)
        image.bytes[at:at + image.cluster] = pattern(image.cluster, 'noise')
    return make


def zeros(place):
    def make(image):
        at = place(image)
        image.bytes[at:at + image.cluster] = bytes(image.cluster)
    return make


def both(*makers):
    def make(image):
        for maker in makers:
            maker(image)
    return make


def same_host(guest_cluster, other):
    return lambda i: i.set_entry(guest_cluster, i.entry(other))


def block(image):
    return image.block_at()


def table(image):
    return image.field('refcount_table')


def l1(image):
    return image.field('l1_offset')


def l2(image):
    return image.l2_table()


def header(_):
    return 0


def snapshot_l1(index):
    return lambda i: i.get(i.snapshot_at(index))


def snapshot_l2(image):
    return image.get(snapshot_l1(0)(image)) & OFFSETS


def put(place, value, width=8):
    return lambda i: i.put(place(i), value, width)


def flip(place, bits, width=8):
    return lambda i: i.put(place(i), i.get(place(i), width) ^ bits, width)


def cut(clusters):
    """The file loses its end."""
    def make(image):
        del image.bytes[-clusters * image.cluster:]
    return make


def counts():
    """For every width of reference counts, and where every cluster's count lies elsewhere in its word."""
    for base in (standard, version_2, narrow, wide, smallest, extended, compressed, snapshots, bitmaps):
        yield Damage(base, 'count zero', lambda i: i.set_count(i.l2_table(), 0))
        yield Damage(base, 'all counts zero', zeros(block))
        yield Damage(base, 'block missing', set_table_entry(0, 0))
        yield Damage(base, 'no refcount table', set_field('refcount_table_clusters', 0))
    for base in (standard, version_2, wide, extended, snapshots, bitmaps):
        yield Damage(base, 'count too high', set_count(1, 7))
        yield Damage(base, 'leak', lambda i: i.set_entry(1, 0))
    yield Damage(narrow, 'data count zero', set_count(1, 0))
    yield Damage(wide, 'huge count', set_count(1, (1 << 64) - 1))


# Where QEMU's check is known to count otherwise.
FOLLOWS_TABLES = 'it reads an L2 table where none can be, and counts what it finds there'
NO_COUNTS = 'it gives up when it cannot read a count, and calls that an error of its own'
REFUSES_BITMAPS = 'it does not open an image with such bitmaps, so it can neither check nor repair it'

KINDS = list(counts())


def kind(base, name, make, **more):
    KINDS.append(Damage(base, name, make, **more))


for _base in (standard, extended):
    kind(_base, 'header count zero', set_count_of(header, 0))
    kind(_base, 'l1 count too high', set_count_of(l1, 3))
    kind(_base, 'copied missing', flip_entry(1, COPIED))
    kind(_base, 'copied missing in l1', flip_l1(COPIED))
    kind(_base, 'two on one host cluster', same_host(2, 1))
    kind(_base, 'two on one host cluster, counted', both(same_host(2, 1), set_count(1, 2)))
    kind(_base, 'reserved bits', flip_entry(1, 6))
    kind(_base, 'high reserved bits', flip_entry(1, 1 << 57))
    kind(_base, 'unaligned', flip_entry(1, 0x200))
    kind(_base, 'past the end', set_entry(2, PAST_THE_END | COPIED))
    kind(_base, 'past the end, not copied', set_entry(2, PAST_THE_END))
    kind(_base, 'l1 reserved bits', flip_l1(1))
    kind(_base, 'l1 unaligned', flip_l1(0x200), qemu=FOLLOWS_TABLES)
    kind(_base, 'l1 past the end', set_l1(PAST_THE_END | COPIED))
    kind(_base, 'l1 with reserved bits only', set_l1(4), qemu=FOLLOWS_TABLES)
    kind(_base, 'points at the refcount block', lambda i: i.set_entry(2, i.block_at() | COPIED))
    kind(_base, 'compressed with copied', lambda i: i.set_entry(2, i.host(2) | COMPRESSED | COPIED))
    kind(_base, 'compressed past the end', set_entry(2, COMPRESSED | 0x10000000))
    kind(_base, 'table entry with reserved bits', flip(table, 1))
    kind(_base, 'table entry unaligned', flip(table, 0x200), qemu=NO_COUNTS)
    kind(_base, 'block past the end', set_table_entry(0, PAST_THE_END))
    kind(_base, 'block twice', lambda i: i.put(table(i) + 8, i.block_at()))
    kind(_base, 'block in data', lambda i: i.put(table(i) + 8, i.host(1)))
    kind(_base, 'block full of noise', noise(block))
    kind(_base, 'refcount table on the l1 table', lambda i: i.set_field('refcount_table', l1(i)), qemu=NO_COUNTS)
    kind(_base, 'refcount table past the end', set_field('refcount_table', PAST_THE_END))
    kind(_base, 'refcount table over the header', set_field('refcount_table', 0))
    kind(_base, 'far refcount blocks', lambda i: [i.put(table(i) + 8 * n, (n << 40) | 1 << 50) for n in range(1, 9)])
    kind(_base, 'dirty with stale counts', both(set_field('incompatible', DIRTY), set_count(1, 0), set_count(2, 5)))
    kind(_base, 'end of the file lost', cut(1))

for _base in (extended, extended_overlay):
    kind(_base, 'alloc and zero', flip_subclusters(1, 1 << 33))
    kind(_base, 'alloc without offset', set_subclusters(10, 3))
    kind(_base, 'alloc and zero without offset', set_subclusters(10, 1 | 1 << 32))
    kind(_base, 'alloc, others zero, without offset', set_subclusters(10, 3 | 1 << 40))
    kind(_base, 'zero cluster unaligned', both(set_subclusters(1, ALL_ZERO), flip_entry(1, 0x200)))
    kind(_base, 'kept cluster unaligned', both(set_subclusters(1, 0), flip_entry(1, 0x200)))
    kind(_base, 'partly written cluster past the end', set_entry(4, PAST_THE_END | COPIED))
kind(extended, 'zero flag', flip_entry(1, ZERO))
kind(extended, 'offset lost', set_entry(1, 0))

kind(standard, 'zero cluster unaligned', flip_entry(5, 0x200))
kind(standard, 'zero cluster past the end', set_entry(5, PAST_THE_END | ZERO))
kind(standard, 'reserved bits without offset', set_entry(10, 4))
kind(standard, 'marked corrupt', set_field('incompatible', CORRUPT))
kind(standard, 'dirty', set_field('incompatible', DIRTY))
kind(version_2, 'past the end', set_entry(2, PAST_THE_END | COPIED))
kind(version_2, 'zero flag', flip_entry(1, ZERO), qemu='it reads such a cluster as corrupt, but its check is silent')
kind(overlay, 'past the end', set_entry(2, PAST_THE_END | COPIED))
kind(overlay, 'unaligned', flip_entry(2, 0x8000))
kind(overlay, 'l1 unaligned', flip_l1(0x200), qemu=FOLLOWS_TABLES)
kind(overlay, 'l1 past the end', set_l1(PAST_THE_END), mended=False)
kind(standard, 'data on the l1 table', lambda i: i.set_entry(2, l1(i) | COPIED), mended=False)

for _base in (compressed, extended_compressed):
    kind(_base, 'descriptor with copied', flip_entry(1, COPIED))
    kind(_base, 'descriptor past the end', set_entry(1, COMPRESSED | 0x10000000))
    kind(_base, 'count of a shared cluster too low', lambda i: i.set_count(i.cluster * 5, 1))
    kind(_base, 'stream full of noise', noise(lambda i: i.cluster * 6))
kind(extended_compressed, 'descriptor with subclusters', set_subclusters(1, 1))
kind(extended_compressed, 'descriptor with subclusters and copied', both(set_subclusters(1, 1), flip_entry(1, COPIED)))

for _base in (data_file, extended_data_file):
    kind(_base, 'copied missing', flip_entry(1, COPIED))
    kind(_base, 'compressed', set_entry(1, COMPRESSED | 0x10000))
    kind(_base, 'unaligned', flip_entry(1, 0x200))
    kind(_base, 'reserved bits', flip_entry(1, 2))
    kind(_base, 'another place', lambda i: i.set_entry(1, i.entry(2)), qemu='its check does not compare the offsets')
    kind(_base, 'place past the end', set_entry(1, PAST_THE_END | COPIED), qemu='its check does not compare the offsets')
    kind(_base, 'table count zero', lambda i: i.set_count(i.l2_table(), 0))
    kind(_base, 'l1 unaligned', flip_l1(0x200), qemu=FOLLOWS_TABLES)
    kind(_base, 'refcount block missing', set_table_entry(0, 0))
kind(extended_data_file, 'alloc and zero', flip_subclusters(1, 1 << 33))
kind(extended_data_file, 'alloc without offset', set_subclusters(10, 1))

for _base in (snapshots, extended_snapshots):
    kind(_base, 'copied on a shared cluster', flip_entry(1, COPIED))
    kind(_base, 'copied on a shared table', lambda i: i.put(l1(i), snapshot_l2(i) | COPIED))
    kind(_base, 'reserved bits in the snapshots l1', flip(snapshot_l1(0), 1))
    kind(_base, 'l1 of a snapshot leads past the end', put(snapshot_l1(0), PAST_THE_END))
    kind(_base, 'l1 entry of a snapshot unaligned', flip(snapshot_l1(0), 0x200), qemu=FOLLOWS_TABLES)
    kind(_base, 'reserved bits in a shared table', flip(snapshot_l2, 2))
    kind(_base, 'entry of a shared table past the end', put(snapshot_l2, PAST_THE_END))
    kind(_base, 'snapshot table count zero', set_count_of(lambda i: i.field('snapshots'), 0))
    kind(_base, 'snapshot l1 count zero', set_count_of(snapshot_l1(0), 0))
    kind(_base, 'l1 of a snapshot unaligned', flip(lambda i: i.snapshot_at(), 0x200), mended=False)
    kind(_base, 'l1 of a snapshot too large', put(lambda i: i.snapshot_at() + 8, 1 << 24, 4), mended=False)
    kind(_base, 'l1 of a snapshot past the end', put(lambda i: i.snapshot_at(), PAST_THE_END), mended=False)

kind(bitmaps, 'directory count zero', set_count_of(lambda i: i.bitmap_directory(), 0))
kind(bitmaps, 'table count zero', set_count_of(lambda i: i.bitmap_table(), 0))
kind(bitmaps, 'not valid', set_field('autoclear', 0))
kind(bitmaps, 'directory unaligned', flip(lambda i: i.extension(BITMAPS_EXTENSION) + 16, 0x200), qemu=REFUSES_BITMAPS)
kind(bitmaps, 'directory past the end', put(lambda i: i.extension(BITMAPS_EXTENSION) + 16, PAST_THE_END), qemu=REFUSES_BITMAPS)
kind(bitmaps, 'directory on the l1 table', lambda i: i.put(i.extension(BITMAPS_EXTENSION) + 16, l1(i)), qemu=REFUSES_BITMAPS)
kind(bitmaps, 'directory too long', put(lambda i: i.extension(BITMAPS_EXTENSION) + 8, 1 << 40), qemu=REFUSES_BITMAPS)
kind(bitmaps, 'more bitmaps than the directory holds', put(lambda i: i.extension(BITMAPS_EXTENSION), 9, 4), qemu=REFUSES_BITMAPS)
kind(bitmaps, 'no bitmaps', put(lambda i: i.extension(BITMAPS_EXTENSION), 0, 4), qemu=REFUSES_BITMAPS)
kind(bitmaps, 'table unaligned', flip(lambda i: i.bitmap_directory(), 0x200), qemu=REFUSES_BITMAPS)
kind(bitmaps, 'table past the end', put(lambda i: i.bitmap_directory(), PAST_THE_END))
kind(bitmaps, 'table too long', put(lambda i: i.bitmap_directory() + 8, 0xffffffff, 4), qemu=REFUSES_BITMAPS)
kind(bitmaps, 'table on the l2 table', lambda i: i.put(i.bitmap_directory(), l2(i)), qemu=REFUSES_BITMAPS)
kind(bitmaps, 'table entry with reserved bits', flip(lambda i: i.bitmap_table(), 4), qemu=REFUSES_BITMAPS)
kind(bitmaps, 'table entry past the end', put(lambda i: i.bitmap_table(), PAST_THE_END))
kind(bitmaps, 'table entry on data', lambda i: i.put(i.bitmap_table(), i.host(1)))

kind(deep_snapshots, 'none', lambda i: None)
kind(deep_snapshots, 'count of the shared table too low', lambda i: i.set_count(i.l2_table(), 200))
kind(deep_snapshots, 'count of shared data too low', set_count(3, 1))
kind(deep_snapshots, 'counts missing', set_table_entry(0, 0))
kind(deep_snapshots, 'copied on the shared table', flip_l1(COPIED))
kind(deep_snapshots, 'reserved bits in the shared table', flip_entry(4, 2))
kind(deep_snapshots, 'shared entry past the end', set_entry(4, PAST_THE_END))
kind(deep_snapshots, 'one l1 for two', lambda i: i.put(i.snapshot_at(7), snapshot_l1(9)(i)), mended=False)

for _base in (standard, extended):
    kind(_base, 'refcount table claims 8 MiB', lambda i: i.set_field('refcount_table_clusters', 8 * MiB // i.cluster))
    kind(_base, 'refcount table of noise', noise(table), qemu=NO_COUNTS)
    kind(_base, 'blocks everywhere', lambda i: [i.put(table(i) + 8 * n, n * i.cluster) for n in range(1, 200)])
