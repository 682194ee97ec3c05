// The undo journal: the bytes that a repair overwrites, kept in a file of their own so that they can be put back.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "imgfuse/error.h"
#include "imgfuse/storage.h"
#include "imgfuse/units.h"

namespace imgfuse {

/// A journal file is a header and records, each with checksums, one behind the other:
///
///   header: the image's size and samples of its bytes | name
///   old bytes …            one record for each piece of the image before it changes for the first time
///   finished               the change is complete; what it left
///   undoing, undone        the old bytes are being put back, and all are back
///
/// Pieces do not overlap, so they can be put back in any order, and as often as it takes. What was appended behind the
/// image's end is not recorded: undoing cuts it off. A record that a crash tears is among those after the last flush(),
/// and their pieces have not been changed. One thread.
class UndoJournal {
 public:
  enum class State : uint32_t { open = 0, finished = 2, undoing = 3, undone = 4 };
  static constexpr uint64_t kMaxPiece = uint64_t{1} << 20;
  /// Whoever adds has flushed before more than this is added.
  static constexpr uint64_t kMaxUnflushed = uint64_t{8} << 20;

  struct Piece {
    HostRange range;    ///< in the image
    HostOffset stored;  ///< its old bytes, in the journal
  };

  /// Begins a journal in the empty `file`.
  static Result<UndoJournal> create(Storage& file, Storage& image);
  /// Reads one. Refuses what is not a journal, or is damaged anywhere but at its end.
  static Result<UndoJournal> open(Storage& file);

  /// What a finished change left: nobody has changed the image since as long as it looks like this.
  struct Left {
    uint32_t contents = 0;  ///< checksum of the changed pieces
    uint64_t size = 0;      ///< of the image
    uint64_t modified = 0;  ///< when the host last saw a write, in nanoseconds; 0 where it does not tell
    bool operator==(const Left&) const = default;
  };

  /// At most kMaxPiece bytes that no earlier piece holds. flush() makes it durable.
  Result<> add(HostOffset offset, ConstBytes old_bytes);
  Result<> finish(const Left& left);
  /// Undoing, or undone.
  Result<> mark(State state) { return append_mark(state, {}); }
  Result<> flush() { return file_->flush(); }

  State state() const { return state_; }
  const Left& left() const { return left_; }
  uint64_t image_size() const { return image_size_; }
  const std::string& image_name() const { return image_name_; }
  const std::vector<Piece>& pieces() const { return pieces_; }
  Result<> read_old(const Piece& piece, Bytes out) const { return file_->read(piece.stored, out); }

  /// Whether `image`, with the old bytes put back, would be the image that the journal was begun for.
  Result<> check_belongs_to(Storage& image) const;

 private:
  explicit UndoJournal(Storage& file) : file_(&file) {}
  Result<> read_header();
  Result<bool> read_record(uint64_t file_size);
  Result<bool> read_data(uint32_t kind, HostRange range, HostOffset stored, uint32_t wanted_checksum);
  Result<> append(uint32_t kind, HostOffset offset, ConstBytes data);
  Result<> append_mark(State state, ConstBytes data);
  Result<uint32_t> original_checksum(Storage& image, HostRange range) const;

  Storage* file_;
  uint64_t end_ = 0;  // of the last whole record
  State state_ = State::open;
  Left left_;
  uint64_t image_size_ = 0;
  uint32_t front_ = 0;  // checksums of the image's ends
  uint32_t back_ = 0;
  std::string image_name_;
  std::vector<Piece> pieces_;
};

}  // namespace imgfuse
