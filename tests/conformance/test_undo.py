"""Undo files of repairs, as a user meets them."""
import json
import os

from harness import IMGFUSE, ImageCase, attempt, run
from qcow2_bytes import Image


class Undo(ImageCase):
    def setUp(self):
        super().setUp()
        self.image = self.qcow2('disk.qcow2', '8M')
        run('qemu-io', '-f', 'qcow2', '-c', 'write -P 1 0 1M', self.image)
        self.undo = self.path('undo')

    def break_it(self):
        changed = Image(self.image)
        changed.put(changed.field('refcount_table'), 0)
        changed.save()
        return self.image.read_bytes()

    def repair(self, *options):
        return attempt(IMGFUSE, 'check', '--repair', 'all', '--undo-file', self.undo, *options, self.image)

    def take_back(self, *options, image=None):
        return attempt(IMGFUSE, 'check', '--undo', self.undo, *options, image or self.image)

    def test_json_names_the_file_and_what_was_put_back(self):
        damaged = self.break_it()

        repair = json.loads(self.repair('--json').out)
        undo = json.loads(self.take_back('--json').out)

        self.assertEqual(repair['undo-file'], str(self.undo))
        self.assertGreater(undo['bytes-restored'], 0)
        self.assertEqual(undo['image-size'], len(damaged))
        self.assertEqual(self.image.read_bytes(), damaged)

    def test_a_repair_of_leaks_can_be_taken_back(self):
        changed = Image(self.image)
        changed.set_count(changed.host(1), 9)
        changed.save()
        damaged = self.image.read_bytes()

        repair = attempt(IMGFUSE, 'check', '--repair', 'leaks', '--undo-file', self.undo, self.image)

        self.assertEqual(repair.status, 0, str(repair))
        self.assertIn('imgfuse check --undo %s %s' % (self.undo, self.image), repair.out)
        self.assertEqual(self.take_back().status, 0)
        self.assertEqual(self.image.read_bytes(), damaged)

    def test_an_existing_file_is_never_overwritten(self):
        damaged = self.break_it()
        self.undo.write_text('something dear')

        outcome = self.repair()

        self.assertEqual(outcome.status, 1, str(outcome))
        self.assertIn(str(self.undo), outcome.err)
        self.assertEqual(self.undo.read_text(), 'something dear')
        self.assertEqual(self.image.read_bytes(), damaged)

    def test_a_sound_image_leaves_no_file(self):
        self.assertEqual(self.repair().status, 0)
        self.assertFalse(self.undo.exists())

    def test_an_image_that_was_used_since_is_left_alone(self):
        self.break_it()
        self.repair()
        run('qemu-io', '-f', 'qcow2', '-c', 'write -P 2 4M 64k', self.image)
        used = self.image.read_bytes()

        outcome = self.take_back()

        self.assertEqual(outcome.status, 1, str(outcome))
        self.assertIn('changed since the repair', outcome.err)
        self.assertEqual(self.image.read_bytes(), used)

    def test_another_image_is_left_alone(self):
        self.break_it()
        self.repair()
        other = self.qcow2('other.qcow2', '16M')
        before = other.read_bytes()

        outcome = self.take_back(image=other)

        self.assertEqual(outcome.status, 1, str(outcome))
        self.assertIn('does not belong to this image', outcome.err)
        self.assertEqual(other.read_bytes(), before)

    def test_it_is_taken_back_once(self):
        self.break_it()
        self.repair()
        self.assertEqual(self.take_back().status, 0)
        outcome = self.take_back()
        self.assertEqual(outcome.status, 1, str(outcome))
        self.assertIn('taken back already', outcome.err)

    def test_an_image_in_use_is_left_alone(self):
        self.break_it()
        self.repair()
        mount = self.mount(self.image, '--read-only')
        outcome = self.take_back()
        self.assertEqual(outcome.status, 1, str(outcome))
        self.assertIn('lock', outcome.err)
        mount.unmount()

    def test_what_is_no_undo_file_is_refused(self):
        for content in (b'', b'x' * 5000, self.image.read_bytes()[:100000]):
            self.undo.write_bytes(content)
            outcome = self.take_back()
            self.assertEqual(outcome.status, 1, str(outcome))
            self.assertIn('not an undo journal', outcome.err)
        os.unlink(self.undo)
        self.assertIn('no such file', self.take_back().err)

    def test_options_that_make_no_sense_together(self):
        for options in (['--undo-file', 'u'], ['--undo', 'u', '--repair', 'all']):
            self.assertEqual(attempt(IMGFUSE, 'check', *options, self.image).status, 2)
