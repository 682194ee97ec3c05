"""fio writes, reads back and verifies checksums, with O_DIRECT and many requests in flight."""
import json
import unittest

from harness import ImageCase, by_scale, raw_sha256, run, sha256


class Verify(ImageCase):
    megabytes = by_scale(32, 64, 512)

    def fio(self, *options):
        report = run('fio', '--direct=1', '--output-format=json', '--randseed=%d' % self.seed, *options, timeout=280,
                     cwd=self.folder)
        jobs = json.loads(report[report.index('{'):])['jobs']
        self.assertEqual([job['error'] for job in jobs], [0] * len(jobs), report)
        return jobs

    def verify(self, image, engine, depth, jobs, *mount_options, sizes=('--bs=4k',)):
        """fio finds 0 bad blocks, and QEMU reads the same bytes afterwards."""
        size = '%dM' % (self.megabytes // jobs)
        mount = self.mount(image, *mount_options)
        reports = self.fio('--name=verify', '--filename=%s' % mount.disk, '--rw=randwrite', '--verify=crc32c',
                           '--do_verify=1', '--fsync=500', '--ioengine=' + engine, '--iodepth=%d' % depth,
                           '--numjobs=%d' % jobs, '--size=' + size, '--offset_increment=' + size, *sizes)
        self.assertEqual(len(reports), jobs)
        for report in reports:
            self.assertGreater(report['read']['total_ios'], 100)
        content = sha256(mount.disk)
        mount.unmount()
        self.assert_clean(image)
        if image.suffix == '.fvd':  # which QEMU cannot read
            content_again = self.mount(image, '-r')
            self.assertEqual(sha256(content_again.disk), content)
            content_again.unmount()
        else:
            self.assertEqual(raw_sha256(image), content)

    def test_0_bad_blocks(self):
        for engine in ('libaio', 'io_uring'):
            for depth, jobs in ((1, 1), (16, 1), (64, 1), (16, 4)):
                with self.subTest(engine=engine, depth=depth, jobs=jobs):
                    image = self.qcow2('%s-%d-%d.qcow2' % (engine, depth, jobs), '%dM' % self.megabytes)
                    self.verify(image, engine, depth, jobs)
                    image.unlink()

    def test_0_bad_blocks_of_a_qed_image(self):
        for depth, jobs in ((1, 1), (64, 1), (16, 4)):
            with self.subTest(depth=depth, jobs=jobs):
                image = self.new('%d-%d.qed' % (depth, jobs), '%dM' % self.megabytes)
                self.verify(image, 'libaio', depth, jobs)
                image.unlink()

    def test_0_bad_blocks_of_mixed_sizes_in_small_clusters(self):
        for name, cluster in (('disk.qcow2', '4k'), ('disk.qed', '16k')):  # with smaller ones QEMU counts phantom leaks
            image = self.new(name, '%dM' % self.megabytes, '-o', 'cluster_size=' + cluster)
            self.verify(image, 'libaio', 16, 1, sizes=('--bsrange=512-32k', '--blockalign=512'))

    def test_0_bad_blocks_with_direct_access_to_the_image(self):
        image = self.qcow2('disk.qcow2', '%dM' % self.megabytes)
        self.verify(image, 'io_uring', 64, 1, '--cache=none')

    def test_0_bad_blocks_over_a_backing_file(self):
        base = self.raw('base.raw', self.megabytes << 20)
        self.fio('--name=fill', '--filename=%s' % base, '--rw=write', '--bs=1M', '--size=%dM' % self.megabytes)
        for name in ('overlay.qcow2', 'overlay.qed'):
            self.verify(self.new(name, None, '-b', 'base.raw', '-F', 'raw'), 'libaio', 16, 4)

    def test_0_bad_blocks_in_fvd_images(self):
        base = self.raw('base.raw', self.megabytes << 20)
        self.fio('--name=fill', '--filename=%s' % base, '--rw=write', '--bs=1M', '--size=%dM' % self.megabytes)
        self.verify(self.fvd('disk.fvd', '%dM' % self.megabytes, 'chunk_size=64k'), 'libaio', 16, 4)
        self.verify(self.fvd('overlay.fvd', None, 'block_size=64k', 'copy_on_read=on', base='base.raw'), 'libaio', 16, 4)

    def test_0_bad_blocks_while_others_write_and_discard(self):
        for name in ('disk.qcow2', 'disk.qed'):
            with self.subTest(name):
                self.write_and_discard(self.new(name, '%dM' % (2 * self.megabytes)))

    def write_and_discard(self, image):
        mount = self.mount(image)
        half = '%dM' % self.megabytes
        elsewhere = ('--bs=64k', '--size=' + half, '--offset=' + half, '--time_based', '--runtime=3')
        self.fio('--filename=%s' % mount.disk,
                 '--name=verify', '--ioengine=libaio', '--iodepth=16', '--rw=randwrite', '--bs=4k', '--size=' + half,
                 '--verify=crc32c', '--do_verify=1',
                 '--name=write', '--ioengine=libaio', '--iodepth=4', '--rw=randwrite', *elsewhere,
                 '--name=discard', '--ioengine=falloc', '--rw=randtrim', *elsewhere)
        content = sha256(mount.disk)
        mount.unmount()
        self.assert_clean(image)
        self.assertEqual(raw_sha256(image), content)


if __name__ == '__main__':
    unittest.main()
