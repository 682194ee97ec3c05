"""QED images to be damaged, and the kinds of damage."""
from damage import Damage, both, cut, made, noise, put, set_entry, set_field, set_l1
from harness import MiB, pattern
from qed_bytes import NEED_CHECK

PAST_THE_END = 1 << 40  # aligned for every cluster size
TOP = (1 << 64) - (64 << 10)

# Guest clusters 0 to 2 are data, 5 is zeros; so are those of a second table, from 4 MiB on in the small image.
CLUSTERS = ['write -P 1 0 12k', 'write -z 20k 4k', 'write -P 2 4M 8k', 'write -z 4116k 4k']


def small(folder):
    return made(folder, 'small', 'cluster_size=4k,table_size=2', CLUSTERS, '12M', format='qed')


def over_raw(folder):
    (folder / 'below.raw').write_bytes(pattern(12 * MiB, 'below'))
    return made(folder, 'over_raw', 'cluster_size=4k,table_size=2', CLUSTERS, '12M', 'below.raw', format='qed')


def large(folder):
    """Tables of a MiB."""
    return made(folder, 'large', 'cluster_size=64k,table_size=16', ['write -P 1 0 192k', 'write -z 320k 64k'], '2M',
                format='qed')


def l1(image):
    return image.l1_at()


def l2(image):
    return image.l2_table()


def entry_on(place):
    return lambda i: i.set_entry(1, place(i))


def l1_entry(index, place):
    return lambda i: i.put(i.l1_at(index), place(i))


def append(length):
    return lambda i: i.bytes.extend(bytes(length(i)))


def shorten(length):
    def make(image):
        del image.bytes[-length:]
    return make


KINDS = []


def kind(bases, name, make, qemu=None):
    KINDS.extend(Damage(base, name, make, qemu) for base in bases)


ALL, BOTH = (small, over_raw, large), (small, over_raw)
kind(ALL, 'entry unaligned', lambda i: i.set_entry(1, i.entry(1) + 512))
kind(BOTH, 'entry 2', set_entry(1, 2))
kind(BOTH, 'entry 4095', set_entry(1, 4095))
kind(ALL, 'entry past the end', set_entry(1, PAST_THE_END))
kind(ALL, 'entry at the end', entry_on(lambda i: i.end))
kind(BOTH, 'entry at the top', set_entry(1, TOP))
kind(BOTH, 'entry 2^63', set_entry(1, 1 << 63))
kind(BOTH, 'entries for nothing', both(set_entry(100, PAST_THE_END), set_entry(101, 77)))
kind(ALL, 'entry twice', entry_on(lambda i: i.entry(0)))
kind(BOTH, 'entry three times', both(entry_on(lambda i: i.entry(0)), lambda i: i.set_entry(9, i.entry(0))))
kind((small,), 'entry of two tables', lambda i: i.set_entry(1024, i.entry(0)))
kind(BOTH, 'entry on the l1 table', entry_on(l1))
kind(BOTH, 'entry on its own table', entry_on(l2))
kind((small,), 'entry on a later table', entry_on(lambda i: i.l2_table(1)))
kind(ALL, 'leak', set_entry(1, 0))
kind(BOTH, 'zeros instead of data', set_entry(1, 1))
kind(ALL, 'l1 entry 1', set_l1(1))
kind(BOTH, 'l1 entry unaligned', lambda i: i.put(i.l1_at(), i.l2_table() + 512))
kind(ALL, 'l1 entry past the end', set_l1(PAST_THE_END))
kind(ALL, 'l1 entry with its end past the end', l1_entry(0, lambda i: i.end - i.cluster))
kind(BOTH, 'l1 entry at the top', set_l1(TOP))
kind(ALL, 'l1 entry on the l1 table', l1_entry(0, l1))
kind((small,), 'l1 entry twice', l1_entry(2, l2))
kind((small,), 'tables that overlap', l1_entry(2, lambda i: i.l2_table() + i.cluster))
kind((small,), 'table on data', l1_entry(2, lambda i: i.entry(0)))
kind(ALL, 'table leaked', set_l1(0))
kind(ALL, 'table of noise', noise(l2))
kind(BOTH, 'l1 table of noise', noise(l1))
# Where damage is left, QEMU takes the mark off all the same, when it closes the image.
kind(ALL, 'needs a check', set_field('features', NEED_CHECK))
kind((small,), 'needs a check and has leaks', both(set_field('features', NEED_CHECK), append(lambda i: i.cluster * 3)))
kind((small,), 'needs a check and an entry is bad', both(set_field('features', NEED_CHECK), set_entry(1, PAST_THE_END)))
kind(ALL, 'torn last cluster', append(lambda i: 700))
kind(ALL, 'longer than what is used', append(lambda i: i.cluster * 5))
kind(ALL, 'last cluster lost', cut(1))
kind(ALL, 'last cluster cut', shorten(1000))
kind(BOTH, 'unknown compatible features', set_field('compatible', 0xf0))
kind(BOTH, 'unknown autoclear features', set_field('autoclear', 0xf0))
