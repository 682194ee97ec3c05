"""Dirty bitmaps and amended images, as QEMU sees them."""
import json
import subprocess
import unittest

from harness import IMGFUSE, ImageCase, KiB, MiB, attempt, imgfuse, imgfuse_json, raw_sha256, run, wait_until

SIZE = 16 * MiB


def qemu_io(image, *commands):
    run('qemu-io', '-f', 'qcow2', *(word for command in commands for word in ('-c', command)), image)


def bitmaps_by_qemu(image):
    data = json.loads(run('qemu-img', 'info', '--output=json', image))['format-specific']['data']
    return data.get('bitmaps', [])


class Bitmaps(ImageCase):
    def image(self, *options):
        image = self.path('disk.qcow2')
        run('qemu-img', 'create', '-q', '-f', 'qcow2', *options, image, SIZE)
        return image

    def assert_clean(self, image):
        outcome = attempt('qemu-img', 'check', image)
        self.assertEqual(outcome.status, 0, str(outcome))
        imgfuse('check', image)

    def dirty_by_qemu(self, image, name):
        """What qemu-nbd exports as the bitmap's dirty parts, merged."""
        socket = self.path('nbd.sock')
        server = subprocess.Popen(['qemu-nbd', '-r', '-f', 'qcow2', '-k', str(socket), '-B', name, str(image)])
        try:
            wait_until(socket.exists, what='the NBD socket')
            options = ('driver=nbd,server.type=unix,server.path=%s,x-dirty-bitmap=qemu:dirty-bitmap:%s' % (socket, name))
            extents = json.loads(run('qemu-img', 'map', '--output=json', '--image-opts', options))
        finally:
            server.terminate()
            server.wait()
            socket.unlink(missing_ok=True)
        dirty = []
        for extent in extents:
            if extent['data']:
                continue  # this is how x-dirty-bitmap says clean
            if dirty and dirty[-1][0] + dirty[-1][1] == extent['start']:
                dirty[-1][1] += extent['length']
            else:
                dirty.append([extent['start'], extent['length']])
        return dirty

    def changed(self, image, name):
        return [[e['start'], e['length']] for e in imgfuse_json('map', '--json', '--changed-since', name, image)]

    def test_qemu_sees_the_bits_that_imgfuse_recorded(self):
        for cluster in (512, 4 * KiB, 64 * KiB, 2 * MiB):
            with self.subTest(cluster):
                image = self.image('-o', 'cluster_size=%d' % cluster)
                imgfuse('bitmap', 'add', image, 'first')
                imgfuse('bitmap', 'add', '-g', '4k', image, 'fine')
                mount = self.mount(image)
                self.write(mount, 1 * MiB + 100, 5000)
                self.write(mount, SIZE - 10, 10)
                mount.unmount()
                self.assert_clean(image)
                self.assertEqual(self.changed(image, 'fine'), [[1 * MiB, 8 * KiB], [SIZE - 4 * KiB, 4 * KiB]])
                for name in ('first', 'fine'):
                    self.assertEqual(self.dirty_by_qemu(image, name), self.changed(image, name))
                image.unlink()

    @staticmethod
    def write(mount, offset, length):
        with open(mount.disk, 'r+b', buffering=0) as file:
            file.seek(offset)
            file.write(b'y' * length)

    def test_qemu_goes_on_recording_in_a_bitmap_of_imgfuse_and_the_reverse(self):
        image = self.image()
        run('qemu-img', 'bitmap', '--add', image, 'theirs')
        imgfuse('bitmap', 'add', image, 'ours')
        qemu_io(image, 'write 1M 64k', 'discard 3M 64k')
        mount = self.mount(image)
        self.write(mount, 5 * MiB, 10)
        mount.unmount()
        self.assert_clean(image)
        self.assertEqual(self.changed(image, 'ours'), self.changed(image, 'theirs'))
        self.assertIn([5 * MiB, 64 * KiB], self.changed(image, 'ours'))
        self.assertIn([1 * MiB, 64 * KiB], self.changed(image, 'ours'))
        run('qemu-img', 'bitmap', '--clear', image, 'ours')
        self.assertEqual(self.changed(image, 'ours'), [])
        imgfuse('bitmap', 'clear', image, 'theirs')
        self.assertEqual(self.dirty_by_qemu(image, 'theirs'), [])

    def test_what_each_program_removes_or_disables_the_other_sees(self):
        image = self.image()
        for name in ('a', 'b', 'c'):
            imgfuse('bitmap', 'add', image, name)
        run('qemu-img', 'bitmap', '--disable', image, 'b')
        run('qemu-img', 'bitmap', '--remove', image, 'c')
        listed = {bitmap['name']: bitmap for bitmap in imgfuse_json('bitmap', 'list', '--json', image)}
        self.assertEqual(sorted(listed), ['a', 'b'])
        self.assertEqual((listed['a']['auto'], listed['b']['auto']), (True, False))
        imgfuse('bitmap', 'remove', image, 'a')
        self.assertEqual(bitmaps_by_qemu(image), [{'flags': [], 'name': 'b', 'granularity': 64 * KiB}])
        imgfuse('bitmap', 'remove', image, 'b')
        self.assertEqual(bitmaps_by_qemu(image), [])
        self.assert_clean(image)

    def test_info_says_what_qemu_img_says(self):
        image = self.image()
        imgfuse('bitmap', 'add', image, 'one')
        imgfuse('bitmap', 'add', '-g', '1M', image, 'two')
        ours = imgfuse_json('info', '--json', image)['format-specific']['data']['bitmaps']
        self.assertEqual(sorted(ours, key=lambda b: b['name']), sorted(bitmaps_by_qemu(image), key=lambda b: b['name']))

    def test_a_killed_writer_leaves_them_in_use_for_everybody(self):
        for writer in ('imgfuse', 'qemu'):
            with self.subTest(writer):
                image = self.image()
                imgfuse('bitmap', 'add', image, 'b')
                if writer == 'imgfuse':
                    mount = self.mount(image)
                    self.write(mount, 0, 10)
                    mount.kill()
                    mount.bury()
                else:
                    attempt('qemu-io', '-f', 'qcow2', '-c', 'write 0 64k', '-c', 'abort', image)
                self.assertEqual(bitmaps_by_qemu(image)[0]['flags'], ['in-use', 'auto'])
                self.assertTrue(imgfuse_json('bitmap', 'list', '--json', image)[0]['in-use'])
                outcome = attempt(IMGFUSE, 'map', '--changed-since', 'b', image)
                self.assertEqual(outcome.status, 1)
                self.assertIn('what changed is not known', outcome.err)
                imgfuse('bitmap', 'remove', image, 'b')
                self.assertEqual(bitmaps_by_qemu(image), [])
                image.unlink()

    def test_errors_are_one_line(self):
        image = self.image()
        for arguments, text in ((('clear', image, 'x'), 'there is no bitmap "x"'),
                                (('remove', image, 'x'), 'there is no bitmap "x"'),
                                (('add', '-g', '100', image, 'x'), 'granularity 100 is not a power of two'),
                                (('add', image, 1024 * 'x'), "a bitmap's name has between 1 and 1023 bytes")):
            outcome = attempt(IMGFUSE, 'bitmap', *arguments)
            self.assertEqual((outcome.status, outcome.err.count('\n')), (1, 1), str(outcome))
            self.assertIn(text, outcome.err)


class Amend(ImageCase):
    def test_versions_change_and_the_disk_stays(self):
        base = self.path('base.qcow2')
        run('qemu-img', 'create', '-q', '-f', 'qcow2', base, SIZE)
        qemu_io(base, 'write -P 1 0 4M')
        for backing in ([], ['-b', base.name, '-F', 'qcow2']):
            with self.subTest(backing):
                image = self.path('disk.qcow2')
                run('qemu-img', 'create', '-q', '-f', 'qcow2', *backing, image, SIZE)
                qemu_io(image, 'write -P 2 1M 1M', 'write -z 2M 64k', 'write -P 3 3M 128k', 'write -z 3M 64k',
                        'write -z -u 5M 64k')
                before = raw_sha256(image)
                imgfuse('amend', '-o', 'compat=0.10', image)
                self.assertEqual(imgfuse_json('info', '--json', image)['format-specific']['data']['compat'], '0.10')
                run('qemu-img', 'check', image)
                self.assertEqual(raw_sha256(image), before)
                imgfuse('amend', '-o', 'compat=1.1,lazy_refcounts=on', image)
                run('qemu-img', 'check', image)
                data = json.loads(run('qemu-img', 'info', '--output=json', image))['format-specific']['data']
                self.assertEqual((data['compat'], data['lazy-refcounts']), ('1.1', True))
                self.assertEqual(raw_sha256(image), before)
                imgfuse('amend', '-o', 'lazy_refcounts=off', image)
                image.unlink()

    def test_an_old_image_with_snapshots_becomes_a_new_one(self):
        image = self.path('disk.qcow2')
        run('qemu-img', 'create', '-q', '-f', 'qcow2', '-o', 'compat=0.10', image, SIZE)
        qemu_io(image, 'write -P 2 1M 1M')
        run('qemu-img', 'snapshot', '-c', 's', image)
        imgfuse('amend', '-o', 'compat=1.1', image)
        run('qemu-img', 'check', image)
        imgfuse('amend', '-o', 'compat=0.10', image)
        run('qemu-img', 'check', image)
        qemu_io(image, 'read -P 2 1M 1M')

    def test_what_cannot_be_is_refused_with_one_line_and_nothing_is_changed(self):
        def made(*options, commands=()):
            image = self.path('refused.qcow2')
            image.unlink(missing_ok=True)
            run('qemu-img', 'create', '-q', '-f', 'qcow2', *options, image, SIZE)
            for command in commands:
                run(*command, image)
            return image

        cases = (
            (made, ('-o', 'refcount_bits=8'), (), 'compat=0.10', 'a width other than 16 bits'),
            (made, (), (('qemu-io', '-f', 'qcow2', '-c', 'write -z 0 64k'), ('qemu-img', 'snapshot', '-c', 's')),
             'compat=0.10', 'has zero clusters'),
            (made, (), (), 'data_file_raw=on', 'for a new image only'),
            (made, (), (), 'backing_fmt=raw', 'no backing file'),
            (made, ('-o', 'compat=0.10'), (), 'lazy_refcounts=on', 'needs compat 1.1'),
            (made, (), (), 'compat=2', 'compat is "2"'),
        )
        for make, options, commands, change, text in cases:
            with self.subTest(change):
                image = make(*options, commands=commands)
                before = image.read_bytes()
                outcome = attempt(IMGFUSE, 'amend', '-o', change, image)
                self.assertEqual((outcome.status, outcome.err.count('\n')), (1, 1), str(outcome))
                self.assertIn(text, outcome.err)
                self.assertEqual(image.read_bytes(), before)
        for change in ('size=1G', 'cluster_size=4k', 'backing_file=x'):
            self.assertEqual(attempt(IMGFUSE, 'amend', '-o', change, made()).status, 2)


if __name__ == '__main__':
    unittest.main()
