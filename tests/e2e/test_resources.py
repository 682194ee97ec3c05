"""How much time and memory imgfuse takes."""
import resource
import time
import unittest

from harness import MiB, ImageCase, daemons_in, imgfuse, resident_bytes, run


def children_seconds():
    """Processor time of all that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def process_seconds(pid):
    """Processor time of its threads, of those too that have ended."""
    return time.clock_gettime(~pid << 3 | 2)  # as clock_getcpuclockid(3) makes it


class Opening(ImageCase):
    def test_a_2_tib_image_opens_within_20_ms_of_processor_time_and_16_mib(self):
        """Others that are busy do not change that. What it waits for is bounded loosely."""
        image = self.qcow2('disk.qcow2', '2T', '-o', 'cluster_size=64k')
        point = self.path('point')
        point.touch()
        times, waits, memory = [], [], []
        for _ in range(9):
            before, begin = children_seconds(), time.monotonic()
            imgfuse(image, point)
            waits.append(time.monotonic() - begin)
            [daemon] = daemons_in(self.folder)
            times.append(children_seconds() - before + process_seconds(daemon))
            memory.append(resident_bytes(daemon, 'VmHWM'))
            imgfuse('umount', point)
        print('2 TiB image: mounted in %.1f ms, %.1f ms of processor time (best of 9), %.1f MiB resident' % (
            1000 * min(waits), 1000 * min(times), min(memory) / MiB))
        self.assertLess(min(times), 0.020)
        self.assertLess(min(waits), 0.5)
        self.assertLess(min(memory), 16 * MiB)

    def test_a_10_tib_fvd_image_opens_within_100_ms_and_its_table_and_16_mib(self):
        """Milliseconds of processor time, which others that are busy do not change."""
        image = self.fvd('disk.fvd', '10T')
        table = 10 * MiB * 4  # a chunk is 1 MiB
        point = self.path('point')
        point.touch()
        times, memory = [], []
        for _ in range(5):
            before = children_seconds()
            imgfuse(image, point)
            [daemon] = daemons_in(self.folder)
            times.append(children_seconds() - before + process_seconds(daemon))
            memory.append(resident_bytes(daemon, 'VmHWM'))
            imgfuse('umount', point)
        begin = time.process_time()
        with open(image, 'rb') as file:
            file.seek(8192)
            file.read(table)
        reading = time.process_time() - begin
        print('10 TiB FVD image: mounted in %.1f ms (best of 5), %.1f MiB resident; its table is read in %.1f ms' % (
            1000 * min(times), min(memory) / MiB, 1000 * reading))
        self.assertLess(min(times), 0.100 + reading)
        self.assertLess(min(memory), table + 16 * MiB)


class RandomAccess(ImageCase):
    def random_io(self, mount):
        run('fio', '--name=random', '--filename=%s' % mount.disk, '--rw=randrw', '--rwmixread=70', '--bs=4k',
            '--direct=1', '--ioengine=libaio', '--iodepth=32', '--size=1T', '--io_size=40M', '--randseed=1',
            '--norandommap', timeout=200, cwd=self.folder)

    def check_bound(self, image, cache_size, *options):
        mount = self.mount(image, *options)
        self.random_io(mount)
        peak = resident_bytes(mount.pid, 'VmHWM')
        print('1 TiB image, random I/O, cache of %d MiB: %.1f MiB resident at most' % (cache_size / MiB, peak / MiB))
        self.assertLess(peak, cache_size + 64 * MiB)
        mount.unmount()
        self.assert_clean(image)

    def test_memory_stays_below_the_cache_and_64_mib_over_1_tib(self):
        self.check_bound(self.qcow2('disk.qcow2', '1T'), 32 * MiB)

    def test_memory_follows_the_option(self):
        self.check_bound(self.qcow2('disk.qcow2', '1T'), 4 * MiB, '--metadata-cache', '4M')

    def test_memory_is_bounded_with_large_clusters(self):
        self.check_bound(self.qcow2('disk.qcow2', '1T', '-o', 'cluster_size=2M'), 32 * MiB)


if __name__ == '__main__':
    unittest.main()
