"""A QED file as bytes: a third opinion beside imgfuse and QEMU, as qcow2_bytes.py is for qcow2."""
from image_bytes import ImageBytes

BACKING, NEED_CHECK, NO_PROBE = 1, 2, 4


class QedImage(ImageBytes):
    """The bytes of an image. Offsets are host offsets unless they are called guest clusters."""

    order = 'little'
    fields = {'cluster': (4, 4), 'table_clusters': (8, 4), 'header_clusters': (12, 4), 'features': (16, 8),
              'compatible': (24, 8), 'autoclear': (32, 8), 'l1_offset': (40, 8), 'size': (48, 8)}

    @property
    def cluster(self):
        return self.field('cluster')

    @property
    def table_bytes(self):
        return self.cluster * self.field('table_clusters')

    @property
    def table_entries(self):
        return self.table_bytes // 8

    @property
    def end(self):
        """A last cluster that is not whole does not exist."""
        return len(self.bytes) // self.cluster * self.cluster

    def l1_at(self, index=0):
        return self.field('l1_offset') + index * 8

    def l2_table(self, index=0):
        return self.get(self.l1_at(index))

    def entry_at(self, guest_cluster):
        return self.l2_table(guest_cluster // self.table_entries) + guest_cluster % self.table_entries * 8

    def entry(self, guest_cluster):
        return self.get(self.entry_at(guest_cluster))

    def set_entry(self, guest_cluster, value):
        self.put(self.entry_at(guest_cluster), value)

    def is_place(self, offset, length):
        return offset % self.cluster == 0 and self.cluster <= offset and offset + length <= self.end

    def pieces(self, backing=b''):
        """What the guest reads: bytes for each cluster of the disk, None where it cannot be read."""
        return [self._piece(guest, min(self.cluster, self.field('size') - guest), backing)
                for guest in range(0, self.field('size'), self.cluster)]

    def _piece(self, guest, length, backing):
        table = self.l2_table(guest // self.cluster // self.table_entries)
        if table and not self.is_place(table, self.table_bytes):
            return None
        entry = self.entry(guest // self.cluster) if table else 0
        if entry == 0:
            return backing[guest:guest + length].ljust(length, b'\0')
        if entry == 1:
            return bytes(length)
        return bytes(self.bytes[entry:entry + length]) if self.is_place(entry, self.cluster) else None
