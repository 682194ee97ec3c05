"""FVD images as the format's document describes them, read without the program's help."""
import struct
from pathlib import Path

EMPTY, DIRTY = 0xFFFFFFFF, 0x80000000
BITMAP_RECORD, TABLE_RECORD = 0x3F2AB8ED, 0xB4E6F7AC


class Fvd:
    """One image, with its journal applied if it was not shut down cleanly."""

    def __init__(self, path):
        self.path = Path(path)
        self.file = self.path.read_bytes()
        magic, version, self.all_data, self.size, self.metadata_size = self.fields('<IIiqq', 0)
        if (magic, version) != (0x5143F5A9, 1):
            raise ValueError('not FVD version 1')
        self.base_name, self.data_name = self.text(28, 1024), self.text(1108, 1024)
        base_size, bitmap_offset, _, self.block = self.fields('<qqqi', 1068)
        self.base_size = 0 if self.all_data else min(base_size, self.size)
        self.compact, table_offset, self.chunk, self.grow_unit = self.fields('<iqqq', 2208)
        self.journal_offset, self.journal_size, self.clean = self.fields('<qqi', 4284)
        blocks = -(-self.base_size // self.block) if self.base_size else 0
        bitmap = self.file[bitmap_offset:bitmap_offset + -(-blocks // 8)]
        self.in_image = [bool(bitmap[b // 8] >> (b % 8) & 1) for b in range(blocks)]
        chunks = -(-self.size // self.chunk) if self.compact else 0
        self.table = [e if e == EMPTY else e & ~DIRTY for e in self.fields('<%dI' % chunks, table_offset)]
        self.records = 0
        if not self.clean:
            for at in range(self.journal_size // 512):
                self.replay(self.file[self.journal_offset + at * 512:][:512])

    def fields(self, layout, offset):
        return struct.unpack_from(layout, self.file, offset)

    def text(self, offset, room):
        return self.file[offset:offset + room].split(b'\0')[0].decode()

    def replay(self, sector):
        at = 0
        while at + 4 <= 512:
            kind, = struct.unpack_from('<I', sector, at)
            if kind == BITMAP_RECORD:
                count, first = struct.unpack_from('<Iq', sector, at + 4)
                for block in range(first * 512 // self.block, -(-(first + count) * 512 // self.block)):
                    if block < len(self.in_image):
                        self.in_image[block] = True
                self.records += 1
                return
            if kind != TABLE_RECORD:
                return
            first, count = struct.unpack_from('<II', sector, at + 4)
            entries = struct.unpack_from('<%dI' % count, sector, at + 12)
            self.table[first:first + count] = [e & ~DIRTY for e in entries]
            self.records += 1
            at += 12 + count * 4

    def content(self):
        """The whole disk; a base must be raw and lie beside the image."""
        data = (self.path.parent / self.data_name).read_bytes() if self.data_name else self.file
        start = 0 if self.data_name else self.metadata_size // 512 * 512
        base = (self.path.parent / self.base_name).read_bytes() if self.base_size else b''
        disk = bytearray(self.size)

        def put(at, source, where, length):
            piece = source[where:where + length]
            disk[at:at + len(piece)] = piece

        step = self.chunk if self.compact else 1 << 20
        for at in range(0, self.size, step):
            length = min(step, self.size - at)
            if not self.compact:
                put(at, data, start + at, length)
            elif self.table[at // self.chunk] != EMPTY:
                put(at, data, start + self.table[at // self.chunk] * self.chunk, length)
        for number, inside in enumerate(self.in_image):
            if not inside:
                at = number * self.block
                length = min(self.block, self.base_size - at)
                disk[at:at + length] = bytes(length)
                put(at, base, at, length)
        return bytes(disk)

    def problems(self):
        """What must never be: two entries for one chunk, a chunk that the file does not hold as a whole."""
        used = [entry for entry in self.table if entry != EMPTY]
        if len(used) != len(set(used)):
            yield 'two entries claim one chunk'
        if used and not self.data_name and self.metadata_size + (max(used) + 1) * self.chunk > len(self.file):
            yield 'chunk %d is not inside the file' % max(used)
