"""What the tests of jobs on mounted disks have in common."""
import json
import subprocess

from harness import MiB, ImageCase, by_scale, imgfuse, raw_sha256, run, sha256, wait_until


def jobs(mount):
    return json.loads(imgfuse('jobs', '--json', mount.point))


def writes(mount):
    """How many have come to the daemon."""
    return json.loads(imgfuse('status', '--json', mount.point))['statistics']['writes']['requests']


def wait_for_state(mount, state):
    wait_until(lambda: jobs(mount)[-1]['state'] == state, 60, 'the state %s of %s' % (state, jobs(mount)))


class LiveCase(ImageCase):
    megabytes = by_scale(32, 64, 512)

    def filled(self, name='source.qcow2', size=None, *options):
        """An image with data in a third of it."""
        size = size or self.megabytes * MiB
        image = self.qcow2(name, str(size), *options)
        commands = []
        for number in range(size // (3 * MiB)):
            commands += ['-c', 'write -P %d %d 1M' % (number % 250 + 1, number * 3 * MiB)]
        run('qemu-io', '-f', 'qcow2', *commands, image)
        return image

    def assert_same_disk(self, image, format, content):
        self.assertEqual(raw_sha256(image, '-f', format), content)

    def change(self, mount, offset, byte):
        with open(mount.disk, 'r+b') as disk:
            disk.seek(offset)
            disk.write(byte * 100000)
        return sha256(mount.disk)

    def start_fio(self, mount):
        """Writes and verifies all of the disk, again and again, until stop_fio(). Has begun when this returns."""
        size = '%dM' % (self.megabytes // 2)
        before = writes(mount)
        fio = subprocess.Popen(
            ['fio', '--name=verify', '--filename=%s' % mount.disk, '--direct=1', '--rw=randwrite', '--verify=crc32c',
             '--do_verify=1', '--verify_fatal=1', '--loops=1000', '--ioengine=libaio', '--iodepth=16', '--numjobs=2',
             '--bs=4k', '--fsync=500', '--size=' + size, '--offset_increment=' + size, '--output-format=json',
             '--randseed=%d' % self.seed], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, cwd=self.folder)
        wait_until(lambda: fio.poll() is not None or writes(mount) >= before + 100, 60, 'the work of fio')
        return fio

    def stop_fio(self, fio, mount):
        """It goes on, what it asked for has been answered, and every block was read back as it was written."""
        before = writes(mount)
        wait_until(lambda: fio.poll() is not None or writes(mount) > before, 60, 'further work of fio')
        self.assertIsNone(fio.poll(), 'fio has ended: a request failed, or a block was wrong')
        fio.terminate()
        out, err = fio.communicate(timeout=60)
        self.assertNotRegex(out + err, 'verify: |err=|error=[^0]')
        return out

    def small_host(self, megabytes, name='small'):
        folder = self.path(name)
        folder.mkdir()
        run('mount', '-t', 'tmpfs', '-o', 'size=%dM' % megabytes, 'none', folder)
        return folder
