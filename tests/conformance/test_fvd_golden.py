"""Images of the original FVD driver present what it showed, and stay as they are when they are only read."""
import hashlib
import json
import lzma
import unittest

from harness import IMGFUSE, ROOT, ImageCase, attempt, run, sha256

GOLDEN = ROOT / 'tests/data/fvd'
MANIFEST = {image['name']: image for image in json.loads((GOLDEN / 'manifest.json').read_text())}
BASE_FORMATS = {'nc-base-qcow2': 'qcow2'}


class Golden(ImageCase):
    def unpack(self, image):
        """Its files in one directory; returns the image's path."""
        for file in image['files']:
            path = self.path(file['name'])
            path.write_bytes(lzma.decompress((GOLDEN / (file['name'] + '.xz')).read_bytes()))
            self.assertEqual(sha256(path), file['sha256'])
        return self.path(image['files'][0]['name'])

    def content(self, image, path):
        mount = self.mount(path, '-r', '--backing-format', BASE_FORMATS.get(image['name'], 'raw'))
        digest = sha256(mount.disk)
        mount.unmount()
        return digest

    def files(self, image):
        return {file['name']: sha256(self.path(file['name'])) for file in image['files']}


def add(name, image):
    def presents(self):
        path = self.unpack(image)
        before = self.files(image)

        self.assertEqual(self.content(image, path), image['sha256'])

        self.assertEqual(self.files(image), before, 'reading changed the image')

    def recovers(self):
        path = self.unpack(image)
        repair = attempt(IMGFUSE, 'check', '--repair', 'all', path)
        self.assertEqual(repair.status, 0, str(repair))
        info = json.loads(run(IMGFUSE, 'info', '--json', path))
        self.assertFalse(info['dirty-flag'])
        self.assertEqual(self.content(image, path), image['sha256'])
        header = path.read_bytes()
        if 'sha256_bitmap_after_rw_open' in image:
            offset = int.from_bytes(header[1076:1084], 'little')
            size = int.from_bytes(header[1084:1092], 'little')
            self.assertEqual(hashlib.sha256(header[offset:offset + size]).hexdigest(),
                             image['sha256_bitmap_after_rw_open'])
        if 'sha256_table_after_rw_open' in image:
            offset = int.from_bytes(header[2212:2220], 'little')
            end = int.from_bytes(header[4284:4292], 'little') or int.from_bytes(header[20:28], 'little')
            self.assertEqual(hashlib.sha256(header[offset:end]).hexdigest(), image['sha256_table_after_rw_open'])

    title = name.replace('-', '_')
    setattr(Golden, 'test_%s_presents_its_content' % title, presents)
    setattr(Golden, 'test_%s_is_recovered' % title, recovers)


for name, image in MANIFEST.items():
    add(name, image)


if __name__ == '__main__':
    unittest.main()
