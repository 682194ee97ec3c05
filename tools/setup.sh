# What tools/quickstart, tools/test and tools/bench/run share: the packages that imgfuse needs, and how a build folder
# is made. Sourced, not run.

build_packages=(
  build-essential pkg-config meson ninja-build
  libfuse3-dev fuse3 liburing-dev libfmt-dev libboost-dev libexpected-dev libcli11-dev nlohmann-json3-dev
  libdeflate-dev zlib1g-dev libzstd-dev
)
demo_packages=(e2fsprogs mount util-linux)
bench_packages=(
  python3 fio strace procps e2fsprogs mount util-linux qemu-utils qemu-system-common libnbd-bin
)
test_packages=(
  doctest-dev clang-14 libclang-rt-14-dev clang-format-14 python3 git
  qemu-utils qemu-system-common fio e2fsprogs xfsprogs btrfs-progs mmdebstrap
  mount util-linux strace attr zstd procps man-db
)

as_root() {
  if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi
}

# need_packages SET…: installs what is missing of the sets build, demo, bench and test. Without apt it lists them and
# goes on: the build says what it cannot find.
need_packages() {
  local wanted=() missing=() set package
  for set in "$@"; do
    local -n packages="${set}_packages"
    wanted+=("${packages[@]}")
  done
  if ! command -v apt-get >/dev/null || ! command -v dpkg-query >/dev/null; then
    echo "Packages are installed on Debian and Ubuntu only. Elsewhere, please see to the equivalents of:"
    printf '%s\n' "  ${wanted[*]}" | fold -s -w 100
    return
  fi
  for package in "${wanted[@]}"; do
    dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'install ok installed' || missing+=("$package")
  done
  [ ${#missing[@]} = 0 ] && return
  echo "Installing ${missing[*]}"
  as_root apt-get update -qq
  as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
}

# configure FOLDER OPTION…: makes the build folder, or applies the options to the one that is there.
configure() {
  local folder=$1
  shift
  if [ -f "$folder/build.ninja" ]; then
    meson configure "$folder" "$@" >/dev/null
  else
    meson setup "$folder" "$root" "$@" >/dev/null || { tail -n 20 "$folder/meson-logs/meson-log.txt"; return 1; }
  fi
}

# build_program TARGET…: of the build without tests, in build/.
build_program() {
  echo "Building imgfuse in $root/build"
  [ -f "$root/build/build.ninja" ] || configure "$root/build" -Dtests=false -Dwerror=false
  ninja -C "$root/build" --quiet "$@"
}
