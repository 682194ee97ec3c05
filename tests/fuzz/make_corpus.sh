#!/bin/sh
# Makes the corpus anew. Needs qemu-img, qemu-io, gzip and zstd, and imgfuse in $IMGFUSE.
set -eu
cd "$(dirname "$0")/corpus"
mkdir -p qcow2 qed fvd codec
cd qcow2
create() { shift; qemu-img create -q -f qcow2 "$@"; }
io() { qemu-io -f qcow2 -c "$2" "$1" >/dev/null; }

create plain.qcow2 -o cluster_size=512 plain.qcow2 64k
io plain.qcow2 "write 1k 2k"
create v2.qcow2 -o cluster_size=512,compat=0.10 v2.qcow2 64k
io v2.qcow2 "write 0 1k"
create wide.qcow2 -o cluster_size=512,refcount_bits=64 wide.qcow2 64k
io wide.qcow2 "write 0 5k"
create narrow.qcow2 -o cluster_size=512,refcount_bits=1 narrow.qcow2 64k
io narrow.qcow2 "write 0 1k"
create snapshots.qcow2 -o cluster_size=512 snapshots.qcow2 64k
io snapshots.qcow2 "write 0 1k"
qemu-img snapshot -c one snapshots.qcow2
io snapshots.qcow2 "write 512 1k"
qemu-img snapshot -c two snapshots.qcow2
create bitmap.qcow2 -o cluster_size=512 bitmap.qcow2 64k
qemu-img bitmap --add -g 512 bitmap.qcow2 dirty
io bitmap.qcow2 "write 1k 1k"
create external.qcow2 -o cluster_size=512,data_file=external.raw,data_file_raw=on external.qcow2 64k
io external.qcow2 "write -z 1k 2k"
rm external.raw
seq 1 500 > text
qemu-img convert -f raw -O qcow2 -c -o cluster_size=512 text zlib.qcow2
qemu-img convert -f raw -O qcow2 -c -o cluster_size=512,compression_type=zstd text zstd.qcow2
create names.qcow2 -u -b base.img -F raw -o cluster_size=8192 names.qcow2 64k
create zeroes.qcow2 -o cluster_size=512,lazy_refcounts=on zeroes.qcow2 64k
io zeroes.qcow2 "write -z 0 4k"
io zeroes.qcow2 "write 8k 1k"
io zeroes.qcow2 "write -z 8k 512"

cd ../qed
qemu-img create -q -f qed -o cluster_size=4k,table_size=2 plain.qed 12M
qemu-io -f qed -c "write 1k 2k" -c "write -z 16k 4k" -c "write 4M 4k" plain.qed >/dev/null
qemu-img create -q -f qed -u -b base.img -F raw -o cluster_size=4k,table_size=2 names.qed 64k
qemu-img create -q -f qed -o cluster_size=4k,table_size=2 dirty.qed 64k
qemu-io -f qed -c "write 0 4k" -c abort dirty.qed >/dev/null 2>&1 || true

cd ../fvd
truncate -s 64k base.img
fvd() { "$IMGFUSE" create -f fvd -o "$2,journal_size=$3" ${4-} "$1" 64k; }
fvd plain.fvd compact_image=off -1
fvd chunks.fvd compact_image=on,chunk_size=4k,storage_grow_unit=4k 4k
fvd blocks.fvd compact_image=off,block_size=512 4k "-b base.img -F raw"
fvd both.fvd compact_image=on,chunk_size=8k,block_size=4k,storage_grow_unit=8k 4k "-b base.img -F raw"
truncate -s 24k journal.img
seq 1 2000 >> journal.img
"$IMGFUSE" convert -f raw -O fvd -o compact_image=on,chunk_size=4k,storage_grow_unit=4k,journal_size=4k journal.img filled.fvd
truncate -s 28k filled.fvd  # the file grows by more
# As a crash leaves it: unclean, with a record of each kind in the journal at 16 KiB.
cp both.fvd crashed.fvd
printf '\254\367\346\264\1\0\0\0\1\0\0\0\0\0\0\200\355\270\52\77\4\0\0\0\20\0\0\0\0\0\0\0' |
  dd of=crashed.fvd bs=1 seek=16384 conv=notrunc status=none
printf '\0' | dd of=crashed.fvd bs=1 seek=4300 conv=notrunc status=none
truncate -s +8k crashed.fvd
rm base.img journal.img

cd ../codec
mv ../qcow2/text .
gzip -nc text | tail -c +11 > text.deflate
zstd -qc text > text.zst
head -c 200 text | zstd -qc > two.zst
head -c 312 text | zstd -qc >> two.zst
rm text
