"""Images damaged in many ways: what imgfuse finds, what it repairs, and what it leaves alone."""
import json
import shutil
import tempfile
import unittest
from pathlib import Path

import qed_damage
from damage import KINDS
from harness import IMGFUSE, SCRATCH, ImageCase, attempt, run
from qcow2_bytes import BITMAPS_VALID, Image
from qed_bytes import QedImage

COUNTS = ('corruptions', 'leaks', 'check-errors', 'total-clusters', 'allocated-clusters', 'compressed-clusters',
          'fragmented-clusters', 'image-end-offset')


class Originals:
    """Each image to be damaged, made once."""

    def __init__(self):
        self.folder = Path(tempfile.mkdtemp(prefix='imgfuse-test-', dir=SCRATCH))
        self.images = {}

    def of(self, base):
        if base not in self.images:
            folder = self.folder / base.__name__
            folder.mkdir()
            self.images[base] = base(folder)
        return self.images[base]


def setUpModule():
    global ORIGINALS
    ORIGINALS = Originals()
    print('%d kinds of damage to qcow2, %d to QED, %s' % (len(KINDS), len(qed_damage.KINDS), IMGFUSE))


def tearDownModule():
    shutil.rmtree(ORIGINALS.folder, ignore_errors=True)


def report_of(outcome):
    """Exit status and counts; those that are zero are not in the JSON."""
    found = json.loads(outcome.out) if outcome.out.startswith('{') else {}
    return {'status': outcome.status, **{key: found.get(key, 0) for key in COUNTS}}


class Damaged(ImageCase):
    """Tests for each kind of damage to a format; they are made at the end of this file."""

    format = None
    image_bytes = None

    def damage(self, kind):
        original = ORIGINALS.of(kind.base)
        image = self.path('damaged.' + self.format)
        shutil.copyfile(original, image)
        changed = self.image_bytes(image)
        kind.make(changed)
        changed.save()
        if (original.parent / 'below.raw').exists():
            self.path('below.raw').symlink_to(original.parent / 'below.raw')
        self.backing = self.bytes_of(original.parent / 'below.raw')
        self.data = self.bytes_of(original.with_suffix('.raw'))
        return image

    def bytes_of(self, file):
        return file.read_bytes() if file.exists() else b''

    def check(self, image, *options):
        return attempt(IMGFUSE, 'check', '--json', *options, image)

    def qemu_check(self, image, *options):
        return attempt('qemu-img', 'check', '--output=json', '-f', self.format, *options, image)

    def assert_nothing_lost(self, before, after):
        self.assertEqual(len(before), len(after))
        for index, (old, new) in enumerate(zip(before, after)):
            if old is not None:
                self.assertTrue(old == new, 'piece %d was readable and has changed' % index)

    def assert_found_as_by_qemu(self, image, kind):
        ours, theirs = self.check(image), self.qemu_check(image)
        if kind.qemu is None:
            self.assertEqual(report_of(ours), report_of(theirs), '%s\n%s' % (ours, theirs))
        else:
            self.assertNotEqual(report_of(ours), report_of(theirs), 'QEMU agrees: ' + kind.qemu)
            self.assertEqual(ours.status, 2, str(ours))

    def assert_undone(self, image, undo_file, damaged):
        undo = attempt(IMGFUSE, 'check', '--undo', undo_file, image)
        self.assertEqual(undo.status, 0, str(undo))
        self.assertTrue(image.read_bytes() == damaged, 'the repair was not taken back byte for byte')


class DamagedQcow2(Damaged):
    format, image_bytes = 'qcow2', Image

    def readable(self, image):
        """All pieces of the disk, and of its snapshots' disks; None for those that cannot be read."""
        image = Image(image)
        pieces = image.pieces(self.backing, self.data)
        for index in range(image.field('snapshot_count')):
            pieces += image.snapshot_pieces(index, self.backing)
        return pieces

    def assert_whole_disk_readable(self, image):
        """QEMU reads what we read, byte for byte."""
        raw = self.path('whole.raw')
        run('qemu-img', 'convert', '-f', 'qcow2', '-O', 'raw', image, raw)
        self.assertTrue(raw.read_bytes() == b''.join(Image(image).pieces(self.backing, self.data)))

    def assert_repaired(self, image, kind, repair, before, damaged):
        after = self.readable(image)
        self.assert_nothing_lost(before, after)
        if not kind.mended:
            return self.assertEqual(repair.status, 2, str(repair))
        self.assertEqual(repair.status, 0, str(repair))
        self.assert_clean(image)
        self.assert_bitmaps_are_trusted_only_if_whole(image, damaged)
        # New structures are as large as what the file holds, not as what was claimed.
        room = len(damaged) // 4 + 8 * Image(image).cluster
        self.assertLess(image.stat().st_size, len(damaged) + room)
        if None not in after:
            self.assert_whole_disk_readable(image)

    def assert_bitmaps_are_trusted_only_if_whole(self, image, damaged):
        """A repair changes no bitmap that it leaves valid."""
        repaired = Image(image)
        if not repaired.field('autoclear') & BITMAPS_VALID:
            return
        for part in repaired.bitmap_parts():
            self.assertTrue(repaired.bytes[part] == damaged[part], 'a bitmap has changed')


class DamagedQed(Damaged):
    format, image_bytes = 'qed', QedImage

    def readable(self, image):
        return QedImage(image).pieces(self.backing)

    def assert_repaired(self, image, kind, repair, before, damaged):
        """As QEMU does, byte for byte."""
        self.assert_nothing_lost(before, self.readable(image))
        theirs = self.path('theirs.qed')
        theirs.write_bytes(damaged)
        expected = self.qemu_check(theirs, '-r', 'all')
        self.assertEqual(repair.status, expected.status, '%s\n%s' % (repair, expected))
        self.assertTrue(image.read_bytes() == theirs.read_bytes(), 'QEMU repairs it otherwise')


def make_test(kind):
    def test(self):
        image, undo_file = self.damage(kind), self.path('undo')
        damaged, before = image.read_bytes(), self.readable(image)
        self.assert_found_as_by_qemu(image, kind)

        repair = self.check(image, '--repair', 'all', '--undo-file', undo_file)

        self.assert_repaired(image, kind, repair, before, damaged)
        if image.read_bytes() == damaged:
            self.assertFalse(undo_file.exists(), 'an undo file for nothing')
        else:
            self.assert_undone(image, undo_file, damaged)
    return test


def make_tests(case, kinds):
    for kind in kinds:
        setattr(case, 'test_' + kind.test_name, make_test(kind))


make_tests(DamagedQcow2, KINDS)
make_tests(DamagedQed, qed_damage.KINDS)


if __name__ == '__main__':
    unittest.main()
