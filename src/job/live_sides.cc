// Between which disks a job works, and how one takes another's place.
#include "base/log.h"
#include "job/live_disk.h"
#include "layer/broken_disk.h"

namespace imgfuse::job {

Result<MirrorJob::Sides> LiveDisk::sides_for(JobOptions& options) {
  switch (options.kind) {
    case JobKind::mirror:
    case JobKind::backup:
      return sides_of_copy(options);
    case JobKind::stream:
      return sides_of_stream(options);
    case JobKind::commit:
      return sides_of_commit(options);
  }
  return fail(ErrorCode::invalid, "there is no such job");
}

Result<MirrorJob::Sides> LiveDisk::sides_of_copy(const JobOptions& options) {
  if (options.kind == JobKind::backup) IMG_TRY(hooks_.settle());
  IMG_LET(JobTarget target, open_target_(options.target, options.format));
  if (target.disk->size() < size()) {
    const uint64_t target_size = target.disk->size();
    (void)target.disk->close();
    return fail(ErrorCode::invalid, "{} is too small: it has {} bytes, the disk {}", options.target, target_size,
                size());
  }
  Disk& source = served();
  return MirrorJob::Sides{*this,
                          source,
                          std::move(target.disk),
                          target.has_backing,
                          [this](layer::Standstill& standstill, std::unique_ptr<Disk> disk) {
                            standstill.set_disk(*disk);
                            return Result<std::unique_ptr<Disk>>(adopt(std::move(disk)));
                          },
                          [&source](layer::Standstill& standstill, std::unique_ptr<Disk> disk) {
                            standstill.set_disk(source);
                            return disk;
                          },
                          hooks_};
}

Result<> LiveDisk::check_chain() const {
  if (!chain_) return fail(ErrorCode::unsupported, "nothing is known of the images below this disk");
  if (info().read_only) return fail(ErrorCode::read_only, "{} is open read-only", info().name);
  if (below_) return fail(ErrorCode::busy, "a commit could not be undone: unmount the disk first");
  return chain_->check(info().name);
}

Result<MirrorJob::Sides> LiveDisk::sides_of_stream(JobOptions& options) {
  IMG_TRY(check_chain());
  options.target = info().name;
  IMG_LET(const BackingLayer first, chain_->find(options.target, options.base));
  std::optional<BackingLayer> base;
  if (options.base) base = first;
  if (base && base->depth < 2)
    return fail(ErrorCode::invalid, "{} is the backing file of {}: nothing lies between them", base->path,
                options.target);
  return MirrorJob::Sides{
      *this,
      served(),
      nullptr,
      true,
      [this, base](layer::Standstill& standstill, std::unique_ptr<Disk>) -> Result<std::unique_ptr<Disk>> {
        IMG_TRY(give_base(standstill, base));
        return nullptr;
      },
      [](layer::Standstill&, std::unique_ptr<Disk>) { return std::unique_ptr<Disk>(); },
      hooks_,
      base ? base->depth : 0};
}

Result<MirrorJob::Sides> LiveDisk::sides_of_commit(JobOptions& options) {
  IMG_TRY(check_chain());
  const DiskInfo image = info();
  IMG_LET(const BackingLayer base, chain_->find(image.name, options.base));
  options.target = base.path;
  std::unique_ptr<Disk> base_disk;
  IMG_TRY(serve_above(base, base_disk));
  return MirrorJob::Sides{
      *this,
      served(),
      std::move(base_disk),
      true,
      [this, base](layer::Standstill& standstill, std::unique_ptr<Disk> disk) -> Result<std::unique_ptr<Disk>> {
        IMG_TRY(give_way(standstill, base, disk));
        return nullptr;
      },
      [this](layer::Standstill& standstill, std::unique_ptr<Disk> disk) {
        give_up(standstill, std::move(disk));
        return std::unique_ptr<Disk>();
      },
      hooks_,
      base.depth};
}

/// The base is opened for writing, and the disk above it again: a file is not open for writing here and for reading
/// there, with tables in two caches.
Result<> LiveDisk::serve_above(const BackingLayer& base, std::unique_ptr<Disk>& base_disk) {
  layer::Standstill standstill(*this, layer::Counting::has_ended);
  if (standstill.has_open_snapshots())
    return fail(ErrorCode::busy, "the file of a snapshot is open: close it, and try again");
  const DiskInfo image = served().info();
  IMG_TRY(chain_->check(image.name));
  const auto open = [&]() -> Result<std::unique_ptr<Disk>> {
    IMG_TRY(adopt(nullptr)->close());
    IMG_TRY(chain_->find(image.name, base.path));  // what the guest has filled may have left its base by now
    IMG_LET(base_disk, chain_->open_base(base));
    if (base_disk->size() < image.size) IMG_TRY(base_disk->resize(image.size));
    return chain_->open_above(image.name, image.format, base, *base_disk);
  };
  auto above = open();
  if (!above) {
    if (base_disk) (void)std::exchange(base_disk, nullptr)->close();
    reopen(standstill, image);
    return fail(above.error());
  }
  standstill.set_disk(**above);
  (void)adopt(std::move(*above));
  return {};
}

/// What has been streamed is durable.
Result<> LiveDisk::give_base(layer::Standstill& standstill, const std::optional<BackingLayer>& base) {
  const DiskInfo image = served().info();
  IMG_TRY(chain_->check(image.name));
  Result<> given = adopt(nullptr)->close();
  if (given) given = chain_->set_backing(image.name, base);
  reopen(standstill, image);
  return given;
}

/// What has been committed is durable. From the moment at which the base is written to the image above it would hide
/// what is new, so it is empty before.
Result<> LiveDisk::give_way(layer::Standstill& standstill, const BackingLayer& base, std::unique_ptr<Disk>& base_disk) {
  const DiskInfo image = served().info();
  if (const Result<> there = chain_->check(image.name); !there) {
    give_up(standstill, std::move(base_disk));
    return there;
  }
  Result<> given = adopt(nullptr)->close();
  if (given) given = chain_->empty(image.name, image.format, base);
  if (given) {
    standstill.set_disk(*base_disk);
    (void)adopt(std::move(base_disk));
    return {};
  }
  (void)base_disk->close();
  reopen(standstill, image);
  return given;
}

/// The commit is not to be. What cannot be opened again stays open, with the base below it.
void LiveDisk::give_up(layer::Standstill& standstill, std::unique_ptr<Disk> base_disk) {
  const DiskInfo image = served().info();
  if (const auto there = chain_->check(image.name); !there) {
    log_error("{}", there.error().text());
    standstill.set_disk(served());
    below_ = std::move(base_disk);
    return;
  }
  if (const auto closed = adopt(nullptr)->close(); !closed)
    log_error("close {}: {}", image.name, closed.error().text());
  const std::string base = base_disk->info().name;
  if (const auto closed = base_disk->close(); !closed) log_error("close {}: {}", base, closed.error().text());
  reopen(standstill, image);
}

void LiveDisk::reopen(layer::Standstill& standstill, const DiskInfo& image) {
  auto disk = chain_->open(image.name, image.format);
  if (!disk) {
    log_error("{}", disk.error().text());
    disk = std::make_unique<layer::BrokenDisk>(image, disk.error());
  }
  standstill.set_disk(**disk);
  (void)adopt(std::move(*disk));
}

}  // namespace imgfuse::job
