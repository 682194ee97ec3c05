#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <filesystem>
#include <limits>

#include "base/math.h"
#include "core/undo_storage.h"
#include "imgfuse/check.h"
#include "imgfuse/create.h"
#include "open/chain.h"

namespace imgfuse {
namespace {

constexpr uint64_t kSector = 512;

Result<ImageInfo> layer_info(const Layer& layer) {
  IMG_LET(ImageInfo info, layer.format->info(*layer.storage));
  info.filename = layer.path;
  IMG_LET(info.actual_size, layer.storage->allocated());
  if (info.backing_filename) info.full_backing_filename = resolve_name(layer.path, *info.backing_filename);
  if (info.qcow2 && info.qcow2->data_file) info.full_data_file = resolve_name(layer.path, *info.qcow2->data_file);
  if (info.fvd && info.fvd->data_file) info.full_data_file = resolve_name(layer.path, *info.fvd->data_file);
  return info;
}

Result<std::vector<ImageInfo>> walk_chain(const std::string& path, const OpenOptions& options) {
  IMG_LET(Layer layer, open_top(path, options, false));
  IMG_LET(Chain chain, Chain::below(path, options));
  chain.add_top(layer);
  std::vector<ImageInfo> infos;
  for (;;) {
    IMG_LET(ImageInfo info, layer_info(layer));
    infos.push_back(std::move(info));
    const ImageInfo& top = infos.back();
    if (!top.backing_filename) return infos;
    auto next = chain.open_named(layer.path, *top.backing_filename, top.backing_format, layer.format->probes_backing);
    if (!next) return fail(next.error().during("backing file {}", printable(*top.full_backing_filename)));
    layer = std::move(*next);
  }
}

/// The file an image is to be made in, locked. A file that was not there before is removed again unless kept.
class NewFile {
 public:
  enum class Existing { replaced, refused };
  static Result<NewFile> open(const std::string& path, Existing existing, bool durable);
  /// A file that is open already, for writing.
  static Result<NewFile> adopt(UniqueFd fd, const std::string& path, bool created, bool durable);
  NewFile(NewFile&&) = default;
  NewFile& operator=(NewFile&&) = delete;
  ~NewFile() {
    if (storage_ && created_) unlink(path_.c_str());
  }

  FileStorage& storage() { return *storage_; }
  /// Makes the file and its name durable, if that was asked for.
  Result<> keep();
  /// Removes it, even if it was to be kept.
  void drop() { created_ = true; }

 private:
  NewFile(std::string path, std::shared_ptr<FileStorage> storage, bool created, bool durable)
      : path_(std::move(path)), storage_(std::move(storage)), created_(created), durable_(durable) {}

  std::string path_;
  std::shared_ptr<FileStorage> storage_;
  bool created_;
  bool durable_;
};

Result<NewFile> NewFile::open(const std::string& path, Existing existing, bool durable) {
  const int flags = O_RDWR | O_NONBLOCK | O_NOCTTY | O_CLOEXEC;
  UniqueFd fd(::open(path.c_str(), flags | O_CREAT | O_EXCL, 0644));
  const bool created = bool(fd);
  if (!created && errno == EEXIST && existing == Existing::replaced) fd = UniqueFd(::open(path.c_str(), flags));
  if (!fd) return fail(host_error(errno));
  return adopt(std::move(fd), path, created, durable);
}

Result<NewFile> NewFile::adopt(UniqueFd fd, const std::string& path, bool created, bool durable) {
  auto storage = FileStorage::adopt(
      std::move(fd), path,
      {.writable = true, .cache = durable ? CacheMode::writeback : CacheMode::unsafe, .lock = LockRole::writer});
  if (!storage) {
    if (created) unlink(path.c_str());
    return fail(storage.error());
  }
  return NewFile(path, std::move(*storage), created, durable);
}

Result<> NewFile::keep() {
  IMG_TRY(storage_->flush());
  if (!durable_) {
    created_ = false;
    return {};
  }
  const std::filesystem::path directory = std::filesystem::path(path_).parent_path();
  const UniqueFd fd(::open(directory.empty() ? "." : directory.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!fd || (fsync(fd.get()) != 0 && errno != EINVAL)) return fail(host_error(errno, "flush its directory"));
  created_ = false;
  return {};
}

/// When the host last saw a write to a regular file, in nanoseconds. For a device that says nothing: 0.
Result<uint64_t> time_of_change(const FileStorage& storage) {
  struct stat status {};
  if (fstat(storage.fd(), &status) != 0) return fail(host_error(errno));
  if (!S_ISREG(status.st_mode)) return 0;
  return static_cast<uint64_t>(status.st_mtim.tv_sec) * 1000000000 + static_cast<uint64_t>(status.st_mtim.tv_nsec);
}

Result<CheckReport> repair_with_undo(const Layer& layer, Repair repair, const CheckSink& sink,
                                     const std::string& undo_file) {
  auto file = NewFile::open(undo_file, NewFile::Existing::refused, true);
  if (!file) return fail(file.error().during("undo file {}", undo_file));
  IMG_LET(UndoJournal journal, UndoJournal::create(file->storage(), *layer.storage));
  IMG_TRY(file->keep());
  UndoStorage storage(*layer.storage, journal);
  IMG_LET(const CheckReport report, layer.format->check(storage, repair, sink));
  IMG_TRY(storage.flush());
  IMG_LET(const uint64_t size, storage.size());
  if (journal.pieces().empty() && size == journal.image_size()) {
    file->drop();
    return report;
  }
  IMG_LET(const uint64_t changed, time_of_change(*layer.storage));
  IMG_TRY(storage.finish(changed));
  return report;
}

Result<CheckReport> check_layer(const std::string& path, const OpenOptions& options, Repair repair,
                                const CheckSink& sink, const std::optional<std::string>& undo_file) {
  IMG_LET(const Layer layer, open_top(path, options, repair != Repair::none));
  if (undo_file && repair != Repair::none) return repair_with_undo(layer, repair, sink, *undo_file);
  IMG_LET(const CheckReport report, layer.format->check(*layer.storage, repair, sink));
  if (repair != Repair::none) IMG_TRY(layer.storage->flush());
  return report;
}

Result<UndoReport> undo_layer(const std::string& path, OpenOptions options, const std::string& undo_file) {
  options.format = "raw";  // whatever damage is in it
  IMG_LET(const Layer layer, open_top(path, options, true));
  auto file = FileStorage::open(undo_file, {.writable = true, .lock = LockRole::writer});
  if (!file) return fail(file.error().during("undo file {}", undo_file));
  auto journal = UndoJournal::open(**file);
  if (!journal) return fail(journal.error().during("undo file {}", undo_file));
  IMG_LET(const uint64_t changed, time_of_change(*layer.storage));
  return undo_changes(*layer.storage, *journal, changed);
}

/// What is at `path` may be replaced: nothing, or a regular file that is not part of the new image's own chain.
Result<> check_target(const std::string& path, const Chain& chain) {
  struct stat status {};
  if (stat(path.c_str(), &status) != 0) {
    if (errno == ENOENT) return {};
    return fail(host_error(errno));
  }
  if (!S_ISREG(status.st_mode)) return fail(ErrorCode::invalid, "it exists and is not a regular file");
  if (chain.contains({status.st_dev, status.st_ino}))
    return fail(ErrorCode::invalid, "it is its own backing file, or one below that");
  return {};
}

/// The file that a new image's data is to lie in.
Result<NewFile> open_new_data_file(const std::string& image_path, const Chain& chain, FileId image,
                                   const CreateOptions& options) {
  IMG_LET(const PathPolicy policy, PathPolicy::create(image_path, options.allowed_directories));
  const std::string path = resolve_name(image_path, *options.data_file);
  IMG_LET(std::optional<UniqueFd> made, policy.make(*options.data_file, image_path));
  if (made) return NewFile::adopt(std::move(*made), path, true, options.durable);
  IMG_LET(UniqueFd fd, policy.open(*options.data_file, image_path, PathPolicy::Access::write));
  struct stat status {};
  if (fstat(fd.get(), &status) != 0) return fail(host_error(errno));
  if (!S_ISREG(status.st_mode)) return fail(ErrorCode::invalid, "it exists and is not a regular file");
  const FileId file{status.st_dev, status.st_ino};
  if (file == image) return fail(ErrorCode::invalid, "it is the image itself");
  if (chain.contains(file)) return fail(ErrorCode::invalid, "it is the image's backing file, or one below that");
  return NewFile::adopt(std::move(fd), path, false, options.durable);
}

/// The data file of a new image is what a new raw image is.
Result<NewFile> create_data_file(const std::string& image_path, const Chain& chain, FileId image,
                                 const CreateOptions& options) {
  IMG_LET(NewFile file, open_new_data_file(image_path, chain, image, options));
  CreateOptions raw{.format = "raw", .size = options.size, .preallocation = options.preallocation};
  if (raw.preallocation == Preallocation::metadata) raw.preallocation = Preallocation::off;
  IMG_LET(const Format* format, format_by_name(raw.format));
  IMG_TRY(file.storage().resize(0));
  IMG_TRY(format->create(file.storage(), raw, nullptr));
  return file;
}

Result<> create_checked(const std::string& path, CreateOptions options) {
  IMG_LET(const Format* format, format_by_name(options.format));
  if (options.backing_file && !options.backing_format)
    return fail(ErrorCode::invalid, "a backing file needs its format, raw, qcow2, qed or fvd: add --backing-format");
  IMG_LET(Chain chain, Chain::below(path, {.allowed_directories = options.allowed_directories}));

  // The backing chain stays open, and so locked, until the new image stands.
  std::unique_ptr<Disk> backing;
  if (options.backing_file) {
    IMG_LET(backing, chain.open_backing(path, *options.backing_file, options.backing_format));
    if (!options.size) options.size = backing->size();
  }
  if (!options.size)
    return fail(ErrorCode::invalid, "a size is needed, since there is no backing file to take it from");
  if (*options.size > uint64_t{std::numeric_limits<int64_t>::max()} - kSector)
    return fail(ErrorCode::invalid, "size {} is too large", *options.size);
  options.size = round_up(*options.size, kSector);
  IMG_TRY(format->check_create_options(options));
  IMG_TRY(check_target(path, chain));

  IMG_LET(NewFile file, NewFile::open(path, NewFile::Existing::replaced, options.durable));
  std::optional<NewFile> data_file;
  if (options.data_file && options.format == "qcow2") {  // that of an FVD image is the user's, and may hold the disk
    auto made = create_data_file(path, chain, file.storage().id(), options);
    if (!made) return fail(made.error().during("data file {}", printable(resolve_name(path, *options.data_file))));
    data_file.emplace(std::move(*made));
  }
  IMG_TRY(file.storage().resize(0));
  IMG_TRY(format->create(file.storage(), options, backing.get()));
  if (data_file) IMG_TRY(data_file->keep());
  IMG_TRY(file.keep());
  return backing ? backing->close() : Result<>{};
}

template <class T>
Result<T> named(Result<T> result, const char* verb, const std::string& path) {
  if (!result) return fail(result.error().during("{} {}", verb, path));
  return result;
}

Result<ImageInfo> top_info(const std::string& path, const OpenOptions& options) {
  IMG_LET(const Layer layer, open_top(path, options, false));
  return layer_info(layer);
}

}  // namespace

Result<> create_image(const std::string& path, const CreateOptions& options) {
  return named(create_checked(path, options), "create", path);
}

Result<CheckReport> check_image(const std::string& path, const OpenOptions& options, Repair repair,
                                const CheckSink& sink, const std::optional<std::string>& undo_file) {
  return named(check_layer(path, options, repair, sink, undo_file), "check", path);
}

Result<UndoReport> undo_repair(const std::string& path, const OpenOptions& options, const std::string& undo_file) {
  return named(undo_layer(path, options, undo_file), "undo the repair of", path);
}

Result<ImageInfo> image_info(const std::string& path, const OpenOptions& options) {
  return named(top_info(path, options), "open", path);
}

Result<std::vector<ImageInfo>> chain_info(const std::string& path, const OpenOptions& options) {
  return named(walk_chain(path, options), "open", path);
}

}  // namespace imgfuse
