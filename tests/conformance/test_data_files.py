"""External data files made, written and changed by imgfuse, as QEMU sees them, and the other way round."""
import json
import unittest

from harness import IMGFUSE, ImageCase, KiB, MiB, attempt, imgfuse, imgfuse_json, pattern, raw_sha256, run, sha256
from test_matrix import merged

SIZE = 8 * MiB + 3 * 512  # ends inside a cluster
KINDS = ('off', 'on')


class DataFiles(ImageCase):
    def image(self, raw, name='disk', *options):
        """Made by imgfuse; the name of the data file is absolute, since QEMU looks for a relative one elsewhere."""
        image = self.path(name + '.qcow2')
        imgfuse('create', '-o', 'data_file=%s,data_file_raw=%s' % (self.data(name), raw), *options, image, SIZE)
        return image

    def data(self, name='disk'):
        return self.path(name + '.raw')

    def qemu_io(self, image, *commands):
        out = run('qemu-io', '-f', 'qcow2', *(word for command in commands for word in ('-c', command)), image)
        self.assertNotIn('failed', out)

    def change(self, image):
        """Writes, zeros and holes on a mount."""
        mount = self.mount(image)
        with open(mount.disk, 'r+b') as disk:
            disk.seek(100 * KiB)
            disk.write(pattern(700 * KiB, 'change'))
            disk.seek(SIZE - 1000)
            disk.write(pattern(1000, 'end'))
        run('fallocate', '-p', '-o', 300 * KiB, '-l', 200 * KiB, mount.disk)
        run('fallocate', '-z', '-o', 600 * KiB, '-l', 33 * KiB, mount.disk)
        content = sha256(mount.disk)
        mount.unmount()
        return content

    def assert_sound(self, image, content=None, raw='off', name='disk'):
        """Both checks are clean, both read the same, and so does the raw data file."""
        self.assertEqual(attempt('qemu-img', 'check', image).status, 0)
        imgfuse('check', image)
        content = content or raw_sha256(image)
        self.assertEqual(raw_sha256(image), content)
        mount = self.mount(image, '-r')
        self.assertEqual(sha256(mount.disk), content)
        mount.unmount()
        if raw == 'on':
            self.assertEqual(sha256(self.data(name)), content)

    def test_what_imgfuse_makes_and_changes_qemu_reads_and_changes(self):
        for raw in KINDS:
            for options in ('cluster_size=512', 'extended_l2=on', 'cluster_size=2M', 'preallocation=metadata',
                            'preallocation=full'):
                with self.subTest(options, raw=raw):
                    image = self.image(raw, 'disk', '-o', options)
                    self.assert_sound(image, raw=raw)
                    content = self.change(image)
                    self.assert_sound(image, content, raw)
                    self.assertEqual(self.data().stat().st_size, SIZE)
                    self.qemu_io(image, 'write -P 7 130k 900k', 'write -z 200k 64k', 'write -z -u 2M 128k', 'discard 1M 64k')
                    self.assert_sound(image)
                    self.assert_sound(image, self.change(image))

    def test_info_and_map_say_what_qemu_img_says(self):
        for raw in KINDS:
            with self.subTest(raw=raw):
                image = self.image(raw)
                self.change(image)
                ours = imgfuse_json('info', '--json', image)['format-specific']
                theirs = json.loads(run('qemu-img', 'info', '--output=json', image))['format-specific']
                self.assertEqual(ours, theirs)
                ours = imgfuse_json('map', '--json', image)
                theirs = json.loads(run('qemu-img', 'map', '--output=json', image))
                for extent in theirs:
                    if extent['data']:
                        extent['zero'] = False  # where QEMU looks for holes of the host
                self.assertEqual(merged(ours, theirs), merged(theirs, ours))
                for line in ('data file: %s' % self.data(), 'data file raw: %s' % {'on': 'true', 'off': 'false'}[raw]):
                    self.assertIn(line, run('qemu-img', 'info', image))
                    self.assertIn(line, imgfuse('info', image))
                self.assertEqual({line.split()[3] for line in imgfuse('map', image).splitlines()[1:]}, {str(self.data())})

    def test_resize(self):
        for raw in KINDS:
            for preallocation in ('off', 'full'):
                with self.subTest(preallocation, raw=raw):
                    image = self.image(raw)
                    self.change(image)
                    for size, options in ((SIZE + 5 * MiB + 512, ['--preallocation', preallocation]),
                                          (300 * KiB + 512, ['--shrink']), (2 * MiB, [])):
                        imgfuse('resize', *options, image, size)
                        self.assertEqual(self.data().stat().st_size, size)
                        self.assert_sound(image, raw=raw)
                    with open(self.data(), 'rb') as data:
                        data.seek(300 * KiB + 512)
                        self.assertEqual(data.read().strip(b'\0'), b'')

    def test_convert(self):
        source = self.raw('source.raw', SIZE)
        with open(source, 'r+b') as file:
            file.seek(MiB)
            file.write(pattern(3 * MiB, 'source'))
        for raw in KINDS:
            with self.subTest(raw=raw):
                image = self.path('disk.qcow2')
                self.data().write_bytes(b'old bytes' * 100000)
                imgfuse('convert', '-O', 'qcow2', '-o', 'data_file=%s,data_file_raw=%s' % (self.data(), raw), source, image)
                self.assert_sound(image, sha256(source), raw)
                self.assertLess(self.data().stat().st_blocks * 512, 4 * MiB)
                imgfuse('convert', '-O', 'raw', image, self.path('back.raw'))
                self.assertEqual(sha256(self.path('back.raw')), sha256(source))

    def test_convert_refuses_what_cannot_be_and_leaves_nothing(self):
        source = self.image('off', 'source')
        target, data = self.path('target.qcow2'), self.path('target.raw')
        for options, says in ((['-c', '-o', 'data_file=%s' % data], 'compressed'),
                              (['-o', 'data_file=%s' % self.data('source')], 'read from'),
                              (['-o', 'data_file=%s' % source], 'read from'),
                              (['-o', 'data_file=%s' % target], 'the image itself'),
                              (['-o', 'data_file_raw=on'], 'needs a data_file'),
                              (['-o', 'data_file=%s,compat=0.10' % data], 'version 3')):
            with self.subTest(options):
                content = self.data('source').read_bytes()
                outcome = attempt(IMGFUSE, 'convert', '-O', 'qcow2', *options, source, target)
                self.assertEqual(outcome.status, 1, outcome)
                self.assertIn(says, outcome.err)
                self.assertEqual(len(outcome.err.splitlines()), 1, outcome)
                self.assertFalse(target.exists() or data.exists())
                self.assertEqual(self.data('source').read_bytes(), content)

    def test_measure_counts_the_data_too_as_qemu_img_does(self):
        image = self.image('off')
        self.change(image)
        for options in ('data_file=x.raw', 'data_file=x.raw,data_file_raw=on'):
            for source in ([image], ['--size', '1G']):
                with self.subTest(options, source=source):
                    ours = imgfuse_json('measure', '--json', '-O', 'qcow2', '-o', options, *source)
                    theirs = json.loads(run('qemu-img', 'measure', '--output=json', '-O', 'qcow2', '-o', options, *source))
                    self.assertEqual(ours, theirs)

    def test_commit_out_of_and_into_images_with_data_files(self):
        for raw in KINDS:
            with self.subTest(raw=raw):
                base = self.image(raw, 'base')
                self.qemu_io(base, 'write -P 3 0 4M')
                top = self.path('top.qcow2')
                imgfuse('create', '-b', base, '-F', 'qcow2', '-o', 'data_file=%s' % self.data('top'), top, SIZE + MiB)
                self.change(top)
                content = raw_sha256(top)
                imgfuse('commit', top)
                self.assert_sound(top, content)
                self.assert_sound(base, content, raw, 'base')
                self.assertEqual(self.data('top').stat().st_blocks, 0)

    def test_rebase(self):
        base, other, image = self.raw('base.raw', SIZE), self.raw('other.raw', SIZE), self.path('disk.qcow2')
        self.qemu_io_raw(base, 'write -P 5 0 2M')
        imgfuse('create', '-b', base, '-F', 'raw', '-o', 'data_file=%s' % self.data(), image)
        content = self.change(image)
        imgfuse('rebase', '-b', other, '-F', 'raw', image)
        self.assert_sound(image, content)
        imgfuse('rebase', '-b', '', image)
        self.assert_sound(image, content)
        raw = self.image('on', 'raw')
        before = sha256(raw)
        for options in ([], ['-u']):
            outcome = attempt(IMGFUSE, 'rebase', *options, '-b', other, '-F', 'raw', raw)
            self.assertEqual(outcome.status, 1, outcome)
            self.assertIn('no backing file', outcome.err)
        self.assertEqual(sha256(raw), before)

    def qemu_io_raw(self, file, command):
        run('qemu-io', '-f', 'raw', '-c', command, file)

    def test_amend_ends_what_a_raw_data_file_promises(self):
        image = self.image('on')
        imgfuse('amend', '-o', 'data_file_raw=off', image)
        theirs = json.loads(run('qemu-img', 'info', '--output=json', image))['format-specific']['data']
        self.assertFalse(theirs['data-file-raw'])
        self.assert_sound(image, self.change(image))
        self.assertEqual(attempt(IMGFUSE, 'amend', '-o', 'data_file_raw=on', image).status, 1)
        self.assertEqual(attempt(IMGFUSE, 'amend', '-o', 'compat=0.10', image).status, 1)

    def test_a_clean_mount_keeps_the_raw_bit_and_the_name(self):
        for name in ('disk.raw', './disk.raw', str(self.data())):
            with self.subTest(name):
                image = self.path('disk.qcow2')
                imgfuse('create', '-o', 'data_file=%s,data_file_raw=on' % name, image, SIZE)
                self.change(image)
                imgfuse('bitmap', 'add', image, 'b')
                data = json.loads(run('qemu-img', 'info', '--output=json', image))['format-specific']['data']
                self.assertEqual((data['data-file'], data['data-file-raw']), (name, True))
                self.assertEqual([bitmap['name'] for bitmap in data['bitmaps']], ['b'])

    def test_an_image_that_names_no_data_file_is_given_one(self):
        image = self.image('off')
        content = self.change(image)
        data = image.read_bytes()
        at = data.index(b'DATA')
        image.write_bytes(data[:at] + b'NONE' + data[at + 4:])
        self.assertIn('--data-file', attempt(IMGFUSE, 'map', image).err)
        mount = self.mount(image, '--data-file', self.data())
        self.assertEqual(sha256(mount.disk), content)
        mount.unmount()
        mount = self.mount(image, '-o', 'data_file=%s' % self.data())
        self.assertEqual(sha256(mount.disk), content)
        mount.unmount()


if __name__ == '__main__':
    unittest.main()
