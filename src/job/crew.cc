#include "job/crew.h"

#include <algorithm>
#include <utility>

namespace imgfuse::job {

Result<> Cutter::look_ahead() {
  IMG_LET(const std::vector<Extent> extents, disk_.map({known_, rest_.end() - known_}));
  if (extents.empty())
    return fail(ErrorCode::io, "{} does not tell what lies at {:#x}", disk_.info().name, known_.bytes());
  ahead_.insert(ahead_.end(), extents.begin(), extents.end());
  known_ = extents.back().range.end();
  return {};
}

Result<std::optional<Piece>> Cutter::next() {
  if (rest_.empty()) return std::nullopt;
  if (ahead_.empty()) IMG_TRY(look_ahead());
  const GuestOffset cut = std::min(cuts_.next(rest_.begin), rest_.end());
  GuestOffset end = cut;
  const Extent& first = ahead_.front();
  if (first.kind != ExtentKind::data && first.range.end() > cut) {
    end = first.range.end();
    if (end != rest_.end()) end = end - (end.bytes() + cuts_.phase) % cuts_.size;
  }
  return take(end - rest_.begin);
}

Result<Piece> Cutter::take(uint64_t length) {
  Piece piece{.range = {rest_.begin, length}};
  rest_ = {piece.range.end(), rest_.length - length};
  while (length > 0) {
    if (ahead_.empty()) IMG_TRY(look_ahead());
    Extent& front = ahead_.front();
    Extent part = front;
    part.range.length = std::min(front.range.length, length);
    piece.extents.push_back(part);
    length -= part.range.length;
    if (part.range.length == front.range.length) {
      ahead_.pop_front();
    } else {
      front.range = {part.range.end(), front.range.length - part.range.length};
    }
  }
  return piece;
}

Crew::Crew(unsigned workers, Work work) : work_(std::move(work)), max_waiting_(2 * std::max(workers, 1u)) {
  for (unsigned i = 0; i < std::clamp(workers, 1u, kMaxWorkers); ++i) threads_.emplace_back([this] { run(); });
}

void Crew::run() {
  Buffer buffer;
  while (const std::optional<Piece> piece = wait_for_piece()) report(*piece, work_(*piece, buffer));
}

std::optional<Piece> Crew::wait_for_piece() {
  Lock lock(mutex_);
  while (waiting_.empty() && !closed_) changed_.wait(lock);
  if (waiting_.empty()) return std::nullopt;
  Piece piece = std::move(waiting_.front());
  waiting_.pop_front();
  changed_.notify_all();
  return piece;
}

void Crew::report(const Piece& piece, Result<> result) {
  Lock lock(mutex_);
  done_ += piece.range.length;
  if (!result) {
    if (!error_) error_ = std::move(result).error();
    waiting_.clear();
  }
  changed_.notify_all();
}

bool Crew::add(Piece piece) {
  Lock lock(mutex_);
  while (waiting_.size() >= max_waiting_ && !error_) changed_.wait(lock);
  if (error_) return false;
  waiting_.push_back(std::move(piece));
  changed_.notify_all();
  return true;
}

Result<> Crew::finish() {
  {
    Lock lock(mutex_);
    closed_ = true;
    changed_.notify_all();
  }
  for (std::thread& thread : threads_) thread.join();
  threads_.clear();
  Lock lock(mutex_);
  return error_ ? Result<>(fail(*error_)) : Result<>{};
}

uint64_t Crew::done() const {
  Lock lock(mutex_);
  return done_;
}

Result<> for_each_piece(Disk& disk, Cuts cuts, unsigned workers, const Progress& progress, const Crew::Work& work) {
  const uint64_t size = disk.size();
  Cutter cutter(disk, {GuestOffset(0), size}, cuts);
  Crew crew(workers, work);
  for (;;) {
    IMG_LET(std::optional<Piece> piece, cutter.next());
    if (!piece || !crew.add(std::move(*piece))) break;
    if (progress) progress(crew.done(), size);
  }
  IMG_TRY(crew.finish());
  if (progress) progress(size, size);
  return {};
}

}  // namespace imgfuse::job
