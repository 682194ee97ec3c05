// What an L2 entry may say, looked at by itself, and what it says once it is put right.
#pragma once

#include <cstdint>
#include <optional>

#include "format/qcow2/header.h"
#include "format/qcow2/l2_entry.h"
#include "imgfuse/units.h"

namespace imgfuse::qcow2 {

/// Rules for the entries of one image. A value; any thread.
///
/// A repair may not change what can be read. What cannot be read (a cluster that lies past the end of the file, or
/// between two others) becomes zeros, and never what a backing file has there.
class EntryRules {
 public:
  EntryRules(const Header& header, uint64_t file_size) : header_(header), file_size_(file_size) {}

  /// What else is known about an entry.
  struct Known {
    std::optional<GuestOffset> guest;  ///< of its cluster; matters where guest data lies in another file
    bool sole = false;                 ///< nothing else refers to the host cluster that its offset lies in
  };

  /// The entry names a place for plain bytes, as QEMU counts them.
  bool names_host(L2Entry entry) const;
  /// All of the range, but for a part of the last cluster, is in the file.
  bool in_file(HostRange range) const;
  /// Some of the cluster's bytes are read from the host.
  bool reads_host(L2Entry entry) const;
  /// The entry put right; unchanged if it is right by itself, or if nothing can be done.
  L2Entry mended(L2Entry entry, const Known& known) const;

 private:
  L2Entry mended_compressed(L2Entry entry, const Known& known) const;
  L2Entry with_sound_subclusters(L2Entry entry) const;
  L2Entry without_host(L2Entry entry) const;

  const Header& header_;
  uint64_t file_size_;
};

}  // namespace imgfuse::qcow2
