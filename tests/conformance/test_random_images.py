"""Images that QEMU's tools made and changed at random: imgfuse reads them as they do, and what it changes in them at
random they read as a model says, without an error or a leak."""
import functools
import json
import os
import queue
import shutil
import subprocess
import unittest
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from harness import IMGFUSE, ImageCase, attempt, by_scale, run, seed
from random_images import RandomImage, RandomQedImage, make_shared_files

SEED = seed()
IMAGES = int(os.environ.get('IMG_IMAGES') or by_scale(200, 1000, 10000))
BATCH = 100
FORMATS = {'qcow2': (RandomImage, IMAGES), 'qed': (RandomQedImage, max(1, IMAGES // 5))}
EXERCISE = Path(IMGFUSE).resolve().parents[2] / 'tests/conformance/exercise'


class Exercise:
    """The program that changes images, one after the other; it ends with the first failure."""

    def __init__(self):
        self.process = subprocess.Popen([EXERCISE, '--minimal'], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=subprocess.STDOUT, text=True)

    def change(self, image, number, compression):
        self.process.stdin.write('%s %d %s\n' % (image, number, compression))
        self.process.stdin.flush()
        said = ''
        for line in self.process.stdout:  # warnings first; without an answer it has ended
            if line.startswith('ok '):
                return line.split()[1]
            said += line
        raise AssertionError(said)

    def end(self):
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


class RandomImages(ImageCase):
    """One test for each hundred images of a format; they are made at the end of this file."""

    seconds = 3600

    def run_batch(self, format, first, last):
        self.layers = make_shared_files(self.folder, SEED)
        self.idle = queue.SimpleQueue()
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            failures = [failure for failure in pool.map(functools.partial(self.failure_of, format), range(first, last))
                        if failure]
        while not self.idle.empty():
            self.idle.get().end()
        self.assertEqual(len(failures), 0, '\n\n'.join(failures[:3]))

    def failure_of(self, format, number):
        name = 'image%d.%s' % (number, format)
        image = FORMATS[format][0](self.folder, name, number, self.layers)
        try:
            self.try_image(image, number)
        except Exception as failure:  # pylint: disable=broad-except
            return 'Again with IMG_SEED=%d IMG_IMAGES=1:\n  %s\n%s' % (number, '\n  '.join(image.commands), failure)
        finally:
            for file in self.folder.glob(name + '*'):
                file.unlink()
        return None

    def try_image(self, image, number):
        image.create()
        image.work()
        path = image.path
        theirs, original = Path(str(path) + '.theirs'), Path(str(path) + '.original')
        run('qemu-img', 'convert', '-f', image.format, '-O', 'raw', path, theirs)
        shutil.copyfile(path, original)

        exercise = self.idle_exercise()
        snapshot = exercise.change(path, number, image.random.choice(('-', image.compression)) if image.format == 'qcow2' else '-')
        self.idle.put(exercise)

        self.assert_same_bytes(read(path, '.before'), theirs.read_bytes(), 'the disk as QEMU left it')
        self.assert_sound(image.format, path, original)
        run('qemu-img', 'compare', '-q', '-f', 'raw', '-F', image.format, str(path) + '.after', path)
        if snapshot != '-':
            run('qemu-img', 'convert', '-l', 'snapshot.id=' + snapshot, '-f', 'qcow2', '-O', 'raw', path, theirs)
            held, shown = read(path, '.snapshot'), theirs.read_bytes()
            shorter = min(len(held), len(shown))  # QEMU gives the disk's size to its snapshots
            self.assert_same_bytes(held[:shorter], shown[:shorter], 'snapshot ' + snapshot)

    def idle_exercise(self):
        try:
            return self.idle.get_nowait()
        except queue.Empty:
            return Exercise()

    def assert_same_bytes(self, ours, theirs, what):
        self.assertTrue(ours == theirs, 'imgfuse and qemu-img do not read the same: ' + what)

    def assert_sound(self, format, path, original):
        """No damage; where QEMU itself left some, no more of it."""
        left = self.damage(format, path)
        if left != (0, 0):
            before = self.damage(format, original)
            self.assertTrue(left[0] <= before[0] and left[1] <= before[1], '%s\nbefore imgfuse changed it:\n%s' % (
                attempt('qemu-img', 'check', path), attempt('qemu-img', 'check', original)))

    def damage(self, format, path):
        outcome = attempt('qemu-img', 'check', '-f', format, '--output=json', path)
        self.assertIn(outcome.status, (0, 2, 3), outcome)
        found = json.loads(outcome.out)
        return found.get('corruptions', 0), found.get('leaks', 0)


def read(path, suffix):
    return Path(str(path) + suffix).read_bytes()


def add_batch(format, first, last):
    setattr(RandomImages, 'test_%s_images_%05d_to_%05d' % (format, first, last - 1),
            lambda self: self.run_batch(format, SEED + first, SEED + last))


for _format, (_, _images) in FORMATS.items():
    for _first in range(0, _images, BATCH):
        add_batch(_format, _first, min(_first + BATCH, _images))


def setUpModule():
    print('%s, IMG_SEED=%d' % (', '.join('%d random %s images' % (n, name) for name, (_, n) in FORMATS.items()), SEED))


if __name__ == '__main__':
    unittest.main()
