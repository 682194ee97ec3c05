#include "open/chain.h"

#include <fcntl.h>
#include <sys/stat.h>

#include <algorithm>
#include <cerrno>

#include "base/unique_fd.h"
#include "core/borrowed_disk.h"
#include "core/disk_storage.h"
#include "layer/copying_disk.h"
#include "open/storage_command.h"
#include "storage/host_file.h"

namespace imgfuse {
namespace {

constexpr uint64_t kSmallestCache = uint64_t{1} << 20;

LockRole lock_role(const OpenOptions& options, bool writable) {
  if (writable) return LockRole::writer;
  return options.force_share ? LockRole::none : LockRole::reader;
}

/// A file that the user named.
Result<UniqueFd> open_given(const std::string& path, PathPolicy::Access access) {
  const int mode = access == PathPolicy::Access::write ? O_RDWR : O_RDONLY;
  UniqueFd fd(::open(path.c_str(), mode | O_NONBLOCK | O_NOCTTY | O_CLOEXEC));
  if (!fd) return fail(host_error(errno));
  return fd;
}

/// The disk with what copies its backing file in the background, if anybody asks for that.
Result<std::unique_ptr<Disk>> copying(std::unique_ptr<Disk> disk, const Layer& top, const OpenOptions& options) {
  const auto info = top.format->info(*top.storage);
  const bool possible = info && info->backing_filename && !disk->info().read_only;
  CopyOptions copy{.everything = options.prefetch.has_value(), .rate = options.prefetch.value_or(0)};
  if (info && info->fvd) {
    copy.settings = info->fvd->copying;
    if (copy.settings.max_outstanding_copy_on_read < 2 * info->fvd->block_size)
      copy.settings.max_outstanding_copy_on_read = info->fvd->block_size;
    copy.everything = copy.everything || copy.settings.start_delay > 0;
  } else {
    copy.settings.throttle_time = 0;
  }
  if (options.prefetch) copy.settings.start_delay = 0;
  if (options.copy_on_read) copy.settings.copy_on_read = true;
  if (!possible || (!copy.everything && !copy.settings.copy_on_read)) return disk;
  return std::make_unique<CopyingDisk>(std::move(disk), std::move(copy));
}

Result<std::unique_ptr<Disk>> open_whole(const std::string& path, const OpenOptions& options) {
  IMG_LET(const Layer top, open_top(path, options, !options.read_only));
  IMG_LET(Chain chain, Chain::below(path, options));
  IMG_TRY(chain.find_end());
  chain.add_top(top);
  IMG_LET(auto disk, chain.open_disk(top, options.read_only));
  if (auto reached = chain.check_end_reached(); !reached) {
    (void)disk->close();
    return fail(reached.error());
  }
  return options.copy_in_background ? copying(std::move(disk), top, options) : std::move(disk);
}

}  // namespace

Result<Layer> open_top(const std::string& path, const OpenOptions& options, bool writable) {
  if (options.force_share && writable)
    return fail(ErrorCode::invalid, "--force-share is for reading only; add --read-only");
  if (options.snapshot && writable) return fail(ErrorCode::invalid, "a snapshot can only be read; add --read-only");
  Layer layer{.path = path, .snapshot = options.snapshot};
  if (options.format) {
    IMG_LET(layer.format, format_by_name(*options.format));
  }
  IMG_LET(
      layer.storage,
      FileStorage::open(path, {.writable = writable, .cache = options.cache, .lock = lock_role(options, writable)}));
  if (!layer.format) {
    IMG_LET(layer.format, probe_format(*layer.storage));
    layer.probed = true;
  }
  return layer;
}

Result<Chain> Chain::below(const std::string& path, const OpenOptions& options) {
  IMG_LET(PathPolicy policy, PathPolicy::create(path, options.allowed_directories));
  return Chain(std::move(policy), options);
}

bool Chain::contains(FileId file) const {
  const auto has = [file](const std::vector<FileId>& files) {
    return std::find(files.begin(), files.end(), file) != files.end();
  };
  return has(files_) || has(data_files_);
}

Result<> Chain::find_end() {
  if (!options_.chain_end) return {};
  const UniqueFd fd(::open(options_.chain_end->c_str(), O_PATH | O_CLOEXEC));
  if (!fd) return fail(host_error(errno, *options_.chain_end));
  IMG_LET(end_, file_id(fd.get()));
  return {};
}

Result<> Chain::check_end_reached() const {
  if (!end_ || end_reached_) return {};
  return fail(ErrorCode::invalid, "{} is not in its backing chain", *options_.chain_end);
}

/// Not probed where it might be raw: the first bytes of a raw backing file are the guest's to choose. Null if the image
/// says that it is something else.
Result<const Format*> Chain::recorded_format(const std::optional<std::string>& format, bool probes) const {
  if (format) return format_by_name(*format);
  if (options_.backing_format) return format_by_name(*options_.backing_format);
  if (probes) return nullptr;
  return fail(
      ErrorCode::invalid,
      "the image that names it does not record its format; give it with --backing-format raw, qcow2, qed or fvd");
}

Result<Layer> Chain::open_named(const std::string& naming_path, const std::string& name,
                                const std::optional<std::string>& format, bool probes) {
  if (files_.size() > kMaxChainDepth)
    return fail(ErrorCode::unsupported, "the chain has more than {} backing files", kMaxChainDepth);
  Layer layer{.path = resolve_name(naming_path, name)};
  IMG_LET(layer.format, recorded_format(format, probes));
  IMG_LET(UniqueFd fd, policy_.open(name, naming_path));

  IMG_LET(const FileId file, file_id(fd.get()));
  if (contains(file))
    return fail(ErrorCode::corrupt, "it is in the chain already: the images name each other in a circle");
  files_.push_back(file);
  IMG_LET(layer.storage,
          FileStorage::adopt(std::move(fd), layer.path, {.cache = options_.cache, .lock = lock_role(options_, false)}));
  if (!layer.format) {
    IMG_LET(layer.format, probe_format(*layer.storage));
    if (layer.format->name == "raw")
      return fail(ErrorCode::denied,
                  "it looks like a raw disk, but the image that names it says that it is not; if it is one, add "
                  "--backing-format raw");
  }
  return layer;
}

Result<bool> Chain::is_end(const std::string& naming_path, const std::string& name) {
  const UniqueFd fd(::open(resolve_name(naming_path, name).c_str(), O_PATH | O_CLOEXEC));
  if (!fd) return false;  // the policy's open tells why
  IMG_LET(const FileId file, file_id(fd.get()));
  end_reached_ = end_reached_ || file == *end_;
  return file == *end_;
}

/// Half as much for each layer down, so that a long chain takes little more than twice the top's.
uint64_t Chain::metadata_cache() const {
  const size_t depth = std::min<size_t>(files_.empty() ? 0 : files_.size() - 1, 63);
  return std::max(options_.metadata_cache >> depth, std::min(kSmallestCache, options_.metadata_cache));
}

/// `path` is whose names are followed; it outlives the opening.
FormatOpenParameters Chain::parameters_for(const std::string& path, const Format& opened, bool read_only) {
  FormatOpenParameters parameters{.read_only = read_only, .metadata_cache = metadata_cache()};
  parameters.open_backing = [this, &path, probes = opened.probes_backing](const std::string& name,
                                                                          const std::optional<std::string>& recorded) {
    return open_backing(path, name, recorded, probes);
  };
  parameters.open_data_file = [this, &path, read_only](const std::optional<std::string>& name) {
    return open_data_file(path, name, read_only);
  };
  parameters.open_data_format = [this, read_only](std::shared_ptr<Storage> file,
                                                  const std::optional<std::string>& format) {
    return open_data_format(std::move(file), format, read_only);
  };
  if (options_.allow_storage_command) parameters.grow_device = run_storage_command;
  parameters.compressed_cache = compressed_cache_;
  return parameters;
}

Result<std::unique_ptr<Disk>> Chain::open_disk(const Layer& layer, bool read_only) {
  FormatOpenParameters parameters = parameters_for(layer.path, *layer.format, read_only);
  parameters.probed = layer.probed;
  parameters.snapshot = layer.snapshot;
  if (!read_only) parameters.compress = options_.compress;
  parameters.keeps_backing = options_.chain_end.has_value();  // who ends it there goes back to what follows
  return layer.format->open(layer.storage, std::move(parameters));
}

/// Never guessed for the same reason as in recorded_format(), but a file that looks raw can be nothing else.
Result<std::shared_ptr<Storage>> Chain::open_data_format(std::shared_ptr<Storage> file,
                                                         const std::optional<std::string>& format, bool read_only) {
  const std::string path = file->info().name;
  const auto open = [&]() -> Result<std::shared_ptr<Storage>> {
    const Format* found = nullptr;
    if (format || options_.data_format) {
      IMG_LET(found, format_by_name(format ? *format : *options_.data_format));
    } else {
      IMG_LET(found, probe_format(*file));
      if (found->name != "raw")
        return fail(ErrorCode::invalid,
                    "it looks like {}, but the image that names it does not record its format; give it with "
                    "-o data_format=",
                    found->name);
    }
    if (found->name == "raw") return file;
    IMG_LET(std::unique_ptr<Disk> disk, found->open(std::move(file), parameters_for(path, *found, read_only)));
    return std::make_shared<DiskStorage>(std::move(disk));
  };
  auto storage = open();
  if (!storage) return fail(locate(storage.error(), "data", path));
  return storage;
}

/// Only the file that is at fault is named, not the two hundred above it.
Error Chain::locate(Error error, const char* what, const std::string& path) {
  if (std::exchange(located_, true)) return error;
  return error.during("{} file {}", what, printable(path));
}

/// Under the same policy as a backing file, and for better reason, since it may be written to.
Result<std::shared_ptr<Storage>> Chain::open_data_file(const std::string& naming_path,
                                                       const std::optional<std::string>& name, bool read_only) {
  const bool given = options_.data_file && files_.size() <= 1;
  if (!given && !name)
    return fail(ErrorCode::invalid, "the image does not name its data file; mount it with --data-file");
  const std::string path = given ? *options_.data_file : resolve_name(naming_path, *name);
  const auto open = [&]() -> Result<std::shared_ptr<FileStorage>> {
    const auto access = read_only ? PathPolicy::Access::read : PathPolicy::Access::write;
    IMG_LET(UniqueFd fd, given ? open_given(path, access) : policy_.open(*name, naming_path, access));
    IMG_LET(const FileId file, file_id(fd.get()));
    if (contains(file))
      return fail(ErrorCode::corrupt, "it is the image itself, or another image of its chain, or the data file of one");
    data_files_.push_back(file);
    const LockRole role = read_only ? LockRole::data_reader : LockRole::data_writer;
    return FileStorage::adopt(
        std::move(fd), path,
        {.writable = !read_only, .cache = options_.cache, .lock = options_.force_share ? LockRole::none : role});
  };
  auto storage = open();
  if (!storage) return fail(locate(storage.error(), "data", path));
  return *storage;
}

Result<std::unique_ptr<Disk>> Chain::open_backing(const std::string& naming_path, const std::string& name,
                                                  const std::optional<std::string>& format, bool probes) {
  const std::string path = resolve_name(naming_path, name);
  if (end_) {
    IMG_LET(const bool reached, is_end(naming_path, name));
    if (reached && options_.below_end != nullptr) return std::make_unique<BorrowedDisk>(*options_.below_end);
    if (reached) return nullptr;
  }
  auto layer = open_named(naming_path, name, format, probes);
  if (!layer) return fail(locate(layer.error(), "backing", path));
  auto disk = open_disk(*layer, true);
  if (!disk) return fail(locate(disk.error(), "backing", path));
  return disk;
}

Result<std::unique_ptr<Disk>> open_disk(const std::string& path, const OpenOptions& options) {
  auto disk = open_whole(path, options);
  if (!disk) return fail(disk.error().during("open {}", path));
  if (options.cache == CacheMode::writethrough || options.cache == CacheMode::directsync) (*disk)->set_write_through();
  return disk;
}

}  // namespace imgfuse
