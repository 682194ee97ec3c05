"""A qcow2 file as bytes: finding its structures, changing them by hand, and reading the guest's disk out of it.

It knows the format by itself, so that what imgfuse and QEMU say of an image can be held against a third opinion.
"""
import zlib

from image_bytes import ImageBytes

COPIED, COMPRESSED, ZERO = 1 << 63, 1 << 62, 1
OFFSETS = 0x00fffffffffffe00
DIRTY, CORRUPT, DATA_FILE, EXTENDED_L2 = 1, 2, 4, 16  # incompatible features
BITMAPS_VALID = 1  # autoclear feature

# Header fields: offset and width.
FIELDS = {
    'version': (4, 4), 'backing_offset': (8, 8), 'backing_length': (16, 4), 'cluster_bits': (20, 4), 'size': (24, 8),
    'l1_entries': (36, 4), 'l1_offset': (40, 8), 'refcount_table': (48, 8), 'refcount_table_clusters': (56, 4),
    'snapshot_count': (60, 4), 'snapshots': (64, 8), 'incompatible': (72, 8), 'autoclear': (88, 8),
    'refcount_order': (96, 4), 'header_length': (100, 4)}
BITMAPS_EXTENSION, DATA_FILE_EXTENSION = 0x23852875, 0x44415441


class Image(ImageBytes):
    """The bytes of an image. Offsets are host offsets unless they are called guest clusters."""

    fields = FIELDS

    def __init__(self, path):
        super().__init__(path)
        self._l1 = None  # a snapshot's, while that is looked at

    def stored_field(self, name):
        if self.get(4, 4) == 2 and FIELDS[name][0] >= 72:
            return {'refcount_order': 4, 'header_length': 72}.get(name, 0)
        return super().stored_field(name)

    def extension(self, wanted):
        """Where the data of a header extension begins."""
        at = self.field('header_length')
        while self.get(at, 4) != wanted:
            if self.get(at, 4) == 0:
                raise AssertionError('no header extension %08x' % wanted)
            at += 8 + (self.get(at + 4, 4) + 7) // 8 * 8
        return at + 8

    # Geometry

    @property
    def cluster(self):
        return 1 << self.field('cluster_bits')

    @property
    def extended(self):
        return bool(self.field('incompatible') & EXTENDED_L2)

    @property
    def has_data_file(self):
        return bool(self.field('incompatible') & DATA_FILE)

    @property
    def entry_bytes(self):
        return 16 if self.extended else 8

    @property
    def table_entries(self):
        return self.cluster // self.entry_bytes

    # Tables

    def l1_at(self, index=0):
        return (self.field('l1_offset') if self._l1 is None else self._l1) + index * 8

    def l2_table(self, index=0):
        return self.get(self.l1_at(index)) & OFFSETS

    def entry_at(self, guest_cluster):
        table = self.l2_table(guest_cluster // self.table_entries)
        return table + guest_cluster % self.table_entries * self.entry_bytes

    def entry(self, guest_cluster):
        return self.get(self.entry_at(guest_cluster))

    def set_entry(self, guest_cluster, value):
        self.put(self.entry_at(guest_cluster), value)

    def subclusters(self, guest_cluster):
        return self.get(self.entry_at(guest_cluster) + 8)

    def set_subclusters(self, guest_cluster, value):
        self.put(self.entry_at(guest_cluster) + 8, value)

    def host(self, guest_cluster):
        return self.entry(guest_cluster) & OFFSETS

    # Reference counts

    def block_at(self, index=0):
        return self.get(self.field('refcount_table') + index * 8)

    def _count_place(self, host):
        bits = 1 << self.field('refcount_order')
        per_block = self.cluster * 8 // bits
        block = self.block_at(host // self.cluster // per_block)
        return block, host // self.cluster % per_block * bits, bits

    def count(self, host):
        block, position, bits = self._count_place(host)
        if bits >= 8:
            return self.get(block + position // 8, bits // 8)
        return self.get(block + position // 8, 1) >> position % 8 & (1 << bits) - 1

    def set_count(self, host, count):
        block, position, bits = self._count_place(host)
        if bits >= 8:
            return self.put(block + position // 8, count, bits // 8)
        byte = self.get(block + position // 8, 1) & ~((1 << bits) - 1 << position % 8)
        self.put(block + position // 8, byte | count << position % 8, 1)

    # Snapshots and bitmaps

    def snapshot_at(self, index=0):
        at = self.field('snapshots')
        for _ in range(index):
            at += 40 + self.get(at + 36, 4) + self.get(at + 12, 2) + self.get(at + 14, 2) + 7
            at -= at % 8
        return at

    def snapshot_pieces(self, index, backing=b''):
        """What is to be read in a snapshot; nothing if its L1 table cannot be found."""
        l1 = self.get(self.snapshot_at(index))
        if l1 % self.cluster or l1 >= len(self.bytes):
            return []
        self._l1 = l1
        try:
            return self.pieces(backing)
        finally:
            self._l1 = None

    def bitmap_directory(self):
        return self.get(self.extension(BITMAPS_EXTENSION) + 16)

    def bitmap_table(self):
        return self.get(self.bitmap_directory())

    def bitmap_parts(self):
        """Directory, tables and data of all bitmaps, as slices of the file."""
        at = self.bitmap_directory()
        end = at + self.get(self.extension(BITMAPS_EXTENSION) + 8)
        yield slice(at, end)
        while at < end:
            table, entries = self.get(at), self.get(at + 8, 4)
            yield slice(table, table + 8 * entries)
            for index in range(entries):
                data = self.get(table + 8 * index) & OFFSETS
                if data:
                    yield slice(data, data + self.cluster)
            at += (24 + self.get(at + 18, 2) + self.get(at + 20, 4) + 7) // 8 * 8

    # The guest's disk

    def pieces(self, backing=b'', data_file=b''):
        """What the guest reads: bytes for each piece of the disk, None where it cannot be read.

        Reserved bits are ignored, and what lies past the end of the file is zeros, as for QEMU."""
        piece = self.cluster // 32 if self.extended else self.cluster
        return [self._piece(guest, min(piece, self.field('size') - guest), backing, data_file)
                for guest in range(0, self.field('size'), piece)]

    def _piece(self, guest, length, backing, data_file):
        below = backing[guest:guest + length].ljust(length, b'\0')
        index = guest // self.cluster
        table = self.l2_table(index // self.table_entries)
        if table == 0:
            return below
        if table % self.cluster:
            return None
        entry = self.entry(index)
        if entry & COMPRESSED:
            return None if self.has_data_file else self._inflated(entry, guest % self.cluster, length)
        kind = self._subcluster_kind(index, guest) if self.extended else self._cluster_kind(entry)
        if kind != 'data':
            return {'zero': bytes(length), 'none': below, 'bad': None}[kind]
        host = entry & OFFSETS
        if host % self.cluster or self.has_data_file and host != guest // self.cluster * self.cluster:
            return None
        source = data_file if self.has_data_file else self.bytes
        begin = host + guest % self.cluster
        return bytes(source[begin:begin + length]).ljust(length, b'\0')

    def _cluster_kind(self, entry):
        if entry & ZERO:
            return 'bad' if self.field('version') == 2 or (entry & OFFSETS) % self.cluster else 'zero'
        if entry & OFFSETS or self.has_data_file and entry & COPIED:
            return 'data'
        return 'none'

    def _subcluster_kind(self, index, guest):
        entry, states = self.entry(index), self.subclusters(index)
        alloc, zero = states & 0xffffffff, states >> 32
        present = bool(entry & OFFSETS or self.has_data_file and entry & COPIED)
        if alloc & zero or alloc and not present:
            return 'bad'
        bit = 1 << guest % self.cluster // (self.cluster // 32)
        return 'data' if alloc & bit else 'zero' if zero & bit else 'none'

    def _inflated(self, entry, begin, length):
        offset_bits = 70 - self.field('cluster_bits')
        offset = entry & (1 << offset_bits) - 1
        sectors = ((entry & ~(COMPRESSED | COPIED)) >> offset_bits) + 1
        stream = bytes(self.bytes[offset:offset + sectors * 512 - offset % 512])
        try:
            content = zlib.decompressobj(-15).decompress(stream, self.cluster)
        except zlib.error:
            return None
        return content[begin:begin + length] if len(content) == self.cluster else None
