// What can be asked of a disk that is open: the commands of the control socket. A subcommand that opens an image by
// itself runs the same ones on it.
#pragma once

#include <string>

#include "control/protocol.h"
#include "imgfuse/disk.h"
#include "imgfuse/jobs.h"

namespace imgfuse::control {

/// Who shows the disk to others, and may hold some of its content in caches.
class Presenter {
 public:
  virtual ~Presenter() = default;

  /// What `info` tells beyond the disk's own.
  virtual Json describe() const { return Json::object(); }
  /// Brings everything to the disk that has been written by others and waits in a cache.
  virtual Result<> settle() { return {}; }
  /// The disk has become another one: what is cached of it is wrong.
  virtual Result<> replaced() { return {}; }
  /// The size has changed, the content has not.
  virtual Result<> resized() { return {}; }
  /// There are others than before.
  virtual void snapshots_changed() {}
};

/// Runs the commands. Borrows disk and presenter. One thread at a time, but info, statistics and jobs beside it.
class Commands {
 public:
  Commands(Disk& disk, Presenter& presenter) : disk_(disk), presenter_(presenter) {}
  Result<Json> run(const Request& request);

 private:
  using Command = Result<Json> (Commands::*)(Arguments&);
  struct Entry {
    const char* name;
    Command run;
  };
  static const Entry* find(const std::string& name);

  Result<Json> hello(Arguments& arguments);
  Result<Json> info(Arguments& arguments);
  Result<Json> snapshot_list(Arguments& arguments);
  Result<Json> snapshot_create(Arguments& arguments);
  Result<Json> snapshot_apply(Arguments& arguments);
  Result<Json> snapshot_delete(Arguments& arguments);
  Result<Json> bitmap_list(Arguments& arguments);
  Result<Json> bitmap_add(Arguments& arguments);
  Result<Json> bitmap_remove(Arguments& arguments);
  Result<Json> bitmap_clear(Arguments& arguments);
  Result<Json> changed_since(Arguments& arguments);
  Result<Json> resize(Arguments& arguments);
  Result<Json> statistics(Arguments& arguments);
  template <JobKind kind>
  Result<Json> start_job(Arguments& arguments);
  Result<Json> list_jobs(Arguments& arguments);
  Result<Json> set_rate(Arguments& arguments);
  template <Result<> (Jobs::*action)(uint64_t)>
  Result<Json> on_job(Arguments& arguments);

  Result<Snapshots*> snapshots();
  Result<Bitmaps*> bitmaps();
  Result<Jobs*> jobs();
  Result<uint64_t> granularity_of(const std::string& bitmap);

  Disk& disk_;
  Presenter& presenter_;
};

}  // namespace imgfuse::control
