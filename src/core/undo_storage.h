// UndoStorage: a storage whose changes can be taken back, and the taking back.
#pragma once

#include <cstdint>
#include <map>

#include "core/undo_journal.h"
#include "imgfuse/check.h"
#include "imgfuse/storage.h"

namespace imgfuse {

/// Passes every call on. Before bytes change for the first time, their old values are in the journal, durably. A change
/// fails, and is not made, if they cannot be put there. Bytes that stay what they are are not recorded.
///
/// One thread, as a repair is. Reads the old bytes of all it changes, once.
class UndoStorage final : public Storage {
 public:
  UndoStorage(Storage& inner, UndoJournal& journal) : inner_(inner), journal_(journal) {}

  /// The changes are complete, and durable: from now on they are taken back only as long as nobody has changed the
  /// image since. `modified` is when the host last saw a write to it, 0 where it does not tell.
  Result<> finish(uint64_t modified);

  const StorageInfo& info() const override { return inner_.info(); }
  Result<uint64_t> size() override { return inner_.size(); }
  Result<> read(HostOffset offset, Bytes out) override { return inner_.read(offset, out); }
  using Storage::write;
  Result<> write(HostOffset offset, std::span<const ConstBytes> parts) override;
  Result<> write_zeroes(HostRange range) override;
  Result<> discard(HostRange range) override;
  Result<> allocate(HostRange range) override { return inner_.allocate(range); }
  Result<> flush() override { return inner_.flush(); }
  Result<> resize(uint64_t size) override;
  Result<StorageExtent> extent(HostRange range) override { return inner_.extent(range); }
  Result<uint64_t> allocated() override { return inner_.allocated(); }

 private:
  HostRange inside_image(HostRange range) const;
  Result<> keep_changed(HostOffset offset, ConstBytes new_bytes);
  Result<> keep_data(HostRange range);
  Result<> keep(HostRange range);
  Result<> keep_piece(HostRange range);
  Result<> make_durable();

  Storage& inner_;
  UndoJournal& journal_;
  std::map<uint64_t, uint64_t> kept_;  // begin and end of what the journal has; neighbours are joined
  uint64_t unflushed_ = 0;             // bytes in the journal
};

/// Puts the old bytes back, and cuts off what was appended. Refuses, with nothing changed, if the journal belongs to
/// another image, if somebody else has changed the same places since, or if it was undone already. After a crash it is
/// called again.
Result<UndoReport> undo_changes(Storage& image, UndoJournal& journal, uint64_t modified);

}  // namespace imgfuse
