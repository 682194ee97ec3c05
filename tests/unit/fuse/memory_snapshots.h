// A disk in memory with snapshots.
#pragma once

#include <map>
#include <string>

#include "imgfuse/snapshots.h"
#include "memory_disk.h"

namespace imgfuse::fuse {

class SnapshotMemoryDisk : public MemoryDisk, private Snapshots {
 public:
  using MemoryDisk::MemoryDisk;
  Snapshots* snapshots() override { return this; }

  /// One with these names, as a strange image could have it.
  void add(SnapshotInfo info) {
    Kept kept{std::move(info), content(), 0};
    kept.info.disk_size = kept.content.size();
    const Lock lock(mutex_);
    kept_.push_back(std::move(kept));
  }
  int open_count() const { return open_; }

 private:
  struct Kept {
    SnapshotInfo info;
    std::vector<std::byte> content;
    int open = 0;
  };
  class OpenSnapshot : public MemoryDisk {
   public:
    OpenSnapshot(SnapshotMemoryDisk& owner, const Kept& kept)
        : MemoryDisk(kept.content.size()), owner_(owner), id_(kept.info.id) {
      REQUIRE(write(GuestOffset(0), kept.content));
      ++owner_.open_;
    }
    ~OpenSnapshot() override {
      CHECK(closed());
      --owner_.open_;
      const Lock lock(owner_.mutex_);
      for (Kept& kept : owner_.kept_)
        if (kept.info.id == id_) --kept.open;
    }

   private:
    SnapshotMemoryDisk& owner_;
    const std::string id_;
  };

  Result<Kept*> find(const std::string& id_or_name) REQUIRES(mutex_) {
    for (Kept& kept : kept_)
      if (kept.info.id == id_or_name) return &kept;
    for (Kept& kept : kept_)
      if (kept.info.name == id_or_name) return &kept;
    return fail(ErrorCode::not_found, "there is no snapshot \"{}\"", id_or_name);
  }

  Result<std::vector<SnapshotInfo>> list() const override {
    const Lock lock(mutex_);
    std::vector<SnapshotInfo> list;
    for (const Kept& kept : kept_) list.push_back(kept.info);
    return list;
  }
  Result<SnapshotInfo> create(const std::string& name) override {
    SnapshotInfo info{.id = std::to_string(++last_id_), .name = name, .date_sec = 1'700'000'000};
    add(info);
    info.disk_size = size();
    return info;
  }
  Result<> apply(const std::string& id_or_name) override {
    std::vector<std::byte> then;
    {
      const Lock lock(mutex_);
      IMG_LET(const Kept* const kept, find(id_or_name));
      then = kept->content;
    }
    IMG_TRY(resize(then.size(), {.shrink = true}));
    return write(GuestOffset(0), then);
  }
  Result<> remove(const std::string& id_or_name) override {
    const Lock lock(mutex_);
    IMG_LET(const Kept* const kept, find(id_or_name));
    if (kept->open > 0) return fail(ErrorCode::busy, "snapshot {} is open", kept->info.id);
    kept_.erase(kept_.begin() + (kept - kept_.data()));
    return {};
  }
  Result<std::unique_ptr<Disk>> open(const std::string& id_or_name) override {
    const Lock lock(mutex_);
    IMG_LET(Kept* const kept, find(id_or_name));
    ++kept->open;
    return std::make_unique<OpenSnapshot>(*this, *kept);
  }

  mutable Mutex mutex_;
  std::vector<Kept> kept_ GUARDED_BY(mutex_);
  std::atomic<int> open_ = 0;
  std::atomic<int> last_id_ = 0;
};

}  // namespace imgfuse::fuse
