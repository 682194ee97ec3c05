"""An image file as bytes, whose numbers can be looked at and changed."""
from pathlib import Path


class ImageBytes:
    """What formats have in common. They name their byte order, and their header's fields: offset and width."""

    order = 'big'
    fields = {}

    def __init__(self, path):
        self.path = Path(path)
        self.bytes = bytearray(self.path.read_bytes())
        self._fields = {}  # those that were asked for since something was put

    def save(self):
        self.path.write_bytes(self.bytes)

    def get(self, offset, width=8):
        """Past the end: zeros."""
        found = self.bytes[offset:offset + width]
        return int.from_bytes(found if len(found) == width else found.ljust(width, b'\0'), self.order)

    def put(self, offset, value, width=8):
        if len(self.bytes) < offset + width:
            self.bytes.extend(bytes(offset + width - len(self.bytes)))
        self.bytes[offset:offset + width] = value.to_bytes(width, self.order)
        self._fields.clear()

    def field(self, name):
        if name not in self._fields:
            self._fields[name] = self.stored_field(name)
        return self._fields[name]

    def stored_field(self, name):
        return self.get(*self.fields[name])

    def set_field(self, name, value):
        offset, width = self.fields[name]
        self.put(offset, value, width)
