"""The matrix of images that imgfuse and QEMU have to agree on."""
import functools
from dataclasses import dataclass, field
from itertools import product

KiB, MiB = 1 << 10, 1 << 20


@dataclass(frozen=True)
class Spec:
    """One image: how it is made, not what is in it."""
    format: str = 'qcow2'
    table_size: int = 4  # of QED, in clusters
    version: int = 3
    cluster: int = 64 * KiB
    refcount_bits: int = 16
    compression: str = 'none'  # none, zlib, zstd: whether what lies in it at first is compressed
    backing: tuple = field(default=())  # formats, the nearest first
    backing_size: str = 'equal'  # equal, shorter, longer
    snapshots: bool = False
    preallocation: str = 'off'
    lazy_refcounts: bool = False
    odd_size: bool = False  # not a multiple of the cluster size
    extended_l2: bool = False
    data_file: str = 'none'  # none, plain, raw

    @property
    def size(self):
        size = max(4 * MiB, 5 * self.cluster)
        return size + 3 * 512 if self.odd_size else size

    def size_of_backing(self, depth):
        """Layers of unequal size differ from each other too."""
        step = max(MiB, self.cluster) + 1024
        return {'equal': self.size, 'shorter': self.size - depth * step // 2,
                'longer': self.size + depth * step}[self.backing_size]

    @property
    def options(self):
        if self.format == 'qed':
            return 'cluster_size=%d,table_size=%d' % (self.cluster, self.table_size)
        options = ['compat=' + {2: '0.10', 3: '1.1'}[self.version], 'cluster_size=%d' % self.cluster]
        if self.refcount_bits != 16:
            options.append('refcount_bits=%d' % self.refcount_bits)
        if self.compression == 'zstd':
            options.append('compression_type=zstd')
        if self.preallocation != 'off':
            options.append('preallocation=' + self.preallocation)
        if self.lazy_refcounts:
            options.append('lazy_refcounts=on')
        if self.extended_l2:
            options.append('extended_l2=on')
        if self.data_file == 'raw':
            options.append('data_file_raw=on')
        return ','.join(options)

    @property
    def name(self):
        parts = ['v%d' % self.version] if self.format == 'qcow2' else [self.format]
        parts += ['cluster_' + short(self.cluster)]
        parts += ['refcount_%d' % self.refcount_bits] if self.format == 'qcow2' else ['tables_%d' % self.table_size]
        parts += [self.compression] if self.compression != 'none' else []
        parts += ['on_%s_%s' % ('_'.join(self.backing), self.backing_size)] if self.backing else []
        parts += ['snapshots'] if self.snapshots else []
        parts += ['preallocated_' + self.preallocation] if self.preallocation != 'off' else []
        parts += ['lazy'] if self.lazy_refcounts else []
        parts += ['odd_size'] if self.odd_size else []
        parts += ['extended'] if self.extended_l2 else []
        parts += ['data_file_' + self.data_file] if self.data_file != 'none' else []
        return '_'.join(parts)


def short(size):
    return '%dM' % (size // MiB) if size >= MiB else '%dk' % (size // KiB) if size >= KiB else str(size)


def matrix():
    clusters = (512, 4 * KiB, 64 * KiB, 2 * MiB)
    versions = (2, 3)
    specs = []
    specs += [Spec(cluster=512 << n) for n in range(13)]
    specs += [Spec(version=2, cluster=c) for c in clusters]
    specs += [Spec(cluster=c, refcount_bits=b) for c, b in product(clusters, (1, 2, 4, 8, 32, 64))]
    specs += [Spec(version=v, cluster=c, compression='zlib') for v, c in product(versions, clusters)]
    specs += [Spec(cluster=c, compression='zstd') for c in clusters]
    specs += [Spec(cluster=c, refcount_bits=b, compression='zlib') for c, b in product(clusters, (1, 2, 64))]
    specs += [Spec(version=v, cluster=c, backing=(f,), backing_size=s)
              for v, c, f, s in product(versions, clusters, ('raw', 'qcow2'), ('equal', 'shorter', 'longer'))]
    specs += [Spec(cluster=c, backing=b, backing_size=s)
              for c, b, s in product((4 * KiB, 64 * KiB), (('qcow2', 'qcow2', 'raw'), ('qcow2', 'qcow2', 'qcow2')),
                                     ('equal', 'shorter', 'longer'))]
    specs += [Spec(version=v, cluster=c, snapshots=True) for v, c in product(versions, clusters)]
    specs += [Spec(cluster=c, snapshots=True, compression=z) for c, z in product(clusters, ('zlib', 'zstd'))]
    specs += [Spec(cluster=c, snapshots=True, refcount_bits=b) for c, b in product(clusters, (2, 64))]
    specs += [Spec(cluster=c, snapshots=True, backing=('qcow2', 'raw'), compression='zlib', backing_size='shorter')
              for c in clusters]
    specs += [Spec(version=v, cluster=c, preallocation=p)
              for v, c, p in product(versions, clusters, ('metadata', 'falloc', 'full'))]
    lazy = functools.partial(Spec, lazy_refcounts=True)
    specs += [lazy(cluster=c, refcount_bits=b) for c, b in product(clusters, (1, 16, 64))]
    specs += [lazy(cluster=c, snapshots=True, compression=z) for c, z in product(clusters, ('none', 'zlib'))]
    specs += [lazy(cluster=c, backing=(f,), backing_size='shorter') for c, f in product(clusters, ('raw', 'qcow2'))]
    specs += [Spec(version=v, cluster=c, odd_size=True) for v, c in product(versions, clusters)]
    specs += [Spec(cluster=c, odd_size=True, compression='zlib', backing=('raw',)) for c in clusters]
    for c in (16 * KiB, 64 * KiB, 2 * MiB):
        extended = functools.partial(Spec, cluster=c, extended_l2=True)
        specs += [extended(), extended(odd_size=True), extended(snapshots=True), extended(refcount_bits=1)]
        specs += [extended(compression=z, snapshots=s) for z, s in product(('zlib', 'zstd'), (False, True))]
        specs += [extended(backing=(f,), backing_size=s) for f, s in product(('raw', 'qcow2'), ('shorter', 'longer'))]
        specs += [extended(preallocation=p) for p in ('metadata', 'falloc', 'full')]
        specs += [extended(preallocation='metadata', backing=('raw',)), extended(lazy_refcounts=True)]
    for kind in ('plain', 'raw'):
        external = functools.partial(Spec, data_file=kind)
        specs += [external(cluster=c, odd_size=odd) for c, odd in product((512, 64 * KiB), (False, True))]
        specs += [external(cluster=2 * MiB), external(refcount_bits=1), external(preallocation='full'),
                  external(extended_l2=True, odd_size=True)]
    specs += [Spec(data_file='plain', lazy_refcounts=True), Spec(data_file='plain', preallocation='metadata')]
    specs += [Spec(data_file='plain', extended_l2=x, backing=(f,), backing_size=s)
              for x, f, s in ((False, 'raw', 'longer'), (False, 'qcow2', 'shorter'), (True, 'qcow2', 'longer'))]
    return list(dict.fromkeys(specs + list(qed_matrix())))


def opens_in_qemu(cluster, table_size):
    """QEMU computes the largest disk of a QED image modulo 2^64, and does not open tables of one cluster."""
    return table_size > 1 and (cluster * table_size // 8) ** 2 * cluster < 1 << 64


def qed_matrix():
    qed = functools.partial(Spec, format='qed')
    for cluster, table_size in product((4 * KiB << n for n in range(15)), (2, 4, 8, 16)):
        if opens_in_qemu(cluster, table_size):
            yield qed(cluster=cluster, table_size=table_size)
    for cluster in (4 * KiB, 64 * KiB, 2 * MiB):
        yield qed(cluster=cluster, odd_size=True)
        for below, size in product(('raw', 'qcow2', 'qed'), ('equal', 'shorter', 'longer')):
            yield qed(cluster=cluster, backing=(below,), backing_size=size)
    for cluster, chain, size in product((4 * KiB, 64 * KiB), (('qed', 'qed', 'raw'), ('qcow2', 'qed', 'qcow2')),
                                        ('equal', 'shorter', 'longer')):
        yield qed(cluster=cluster, backing=chain, backing_size=size, odd_size=size == 'equal')
    for cluster, size in product((4 * KiB, 64 * KiB), ('equal', 'shorter', 'longer')):
        yield Spec(cluster=cluster, backing=('qed', 'raw'), backing_size=size)
