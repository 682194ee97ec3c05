#include "support/gate_storage.h"

#include <fmt/format.h>

#include <fstream>
#include <stdexcept>
#include <string>

namespace imgfuse::test {

void Gate::wait_for_arrival() {
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::minutes(4);
  Lock lock(mutex_);
  while (!arrived_) {
    if (std::chrono::steady_clock::now() > deadline) throw std::runtime_error("nobody has come to the gate");
    changed_.wait_until(lock, deadline);
  }
}

void Gate::open() {
  Lock lock(mutex_);
  open_ = true;
  changed_.notify_all();
}

bool Gate::has_arrived() const {
  Lock lock(mutex_);
  return arrived_;
}

void Gate::pass(Call call, HostRange range, Point point) {
  if (point != point_ || !calls_.contains(call) || (wanted_ && !wanted_(range))) return;
  Lock lock(mutex_);
  if (arrived_ || open_) return;
  arrived_ = true;
  changed_.notify_all();
  while (!open_) changed_.wait(lock);
}

std::shared_ptr<Gate> GateStorage::hold(CallSet calls, Point point, std::function<bool(HostRange)> wanted) {
  auto gate = std::make_shared<Gate>(calls, std::move(wanted), point);
  Lock lock(mutex_);
  std::erase_if(gates_, [](const std::weak_ptr<Gate>& old) { return old.expired(); });
  gates_.push_back(gate);
  return {gate.get(), [gate](Gate*) { gate->open(); }};
}

Result<> GateStorage::before(Call call, HostRange range) {
  pass(call, range, Point::before);
  return {};
}

void GateStorage::after(Call call, HostRange range) { pass(call, range, Point::after); }

void GateStorage::pass(Call call, HostRange range, Point point) {
  std::vector<std::shared_ptr<Gate>> gates;
  {
    Lock lock(mutex_);
    for (const std::weak_ptr<Gate>& gate : gates_)
      if (std::shared_ptr<Gate> held = gate.lock()) gates.push_back(std::move(held));
  }
  for (const std::shared_ptr<Gate>& gate : gates) gate->pass(call, range, point);
}

std::optional<uint64_t> sleep_of(pid_t thread) {
  std::ifstream status(fmt::format("/proc/self/task/{}/status", thread));
  bool sleeps = false;
  for (std::string line; std::getline(status, line);) {
    if (line.starts_with("State:")) sleeps = line.starts_with("State:\tS");
    if (sleeps && line.starts_with("voluntary_ctxt_switches:")) return std::stoull(line.substr(line.find('\t')));
  }
  return std::nullopt;
}

}  // namespace imgfuse::test
