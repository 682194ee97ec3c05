// Chains of images in memory, for jobs that exchange one image for another.
#pragma once

#include <algorithm>
#include <atomic>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "core/borrowed_disk.h"
#include "format/registry.h"
#include "imgfuse/jobs.h"
#include "support/must.h"

namespace imgfuse::test {

/// Images by the names that they call each other; the first is the disk's own. Locks nothing.
class TestChain final : public ImageChain {
 public:
  struct Layer {
    std::string name;
    std::string format;
    std::shared_ptr<Storage> storage;
    const Format& driver() const { return *must(format_by_name(format)); }
  };
  explicit TestChain(std::vector<Layer> layers) : layers_(std::move(layers)) {}

  std::atomic<bool> moved = false;   ///< check() fails
  std::function<void()> when_found;  ///< called once, when find() has looked at the image

  const std::vector<Layer>& layers() const { return layers_; }
  std::optional<std::string> backing_of_top() const {
    return must(layers_[0].driver().info(*layers_[0].storage)).backing_filename;
  }
  Result<std::unique_ptr<Disk>> open_top() { return open_layer(layers_[0], false); }

  Result<> check(const std::string& image) override {
    if (moved) return fail(ErrorCode::not_found, "{} is not where it was", image);
    return {};
  }
  Result<BackingLayer> find(const std::string& image, const std::optional<std::string>& base) override {
    if (!backing_of_top()) return fail(ErrorCode::invalid, "{} has no backing file", image);
    if (const auto meanwhile = std::exchange(when_found, nullptr)) meanwhile();
    for (uint32_t i = 1; i < layers_.size(); ++i)
      if (!base || layers_[i].name == *base) return BackingLayer{i, layers_[i].name, layers_[i].format};
    return fail(ErrorCode::not_found, "{} is not in the chain", base.value_or("a backing file"));
  }
  Result<std::unique_ptr<Disk>> open(const std::string&, const std::string&) override { return open_top(); }
  Result<std::unique_ptr<Disk>> open_base(const BackingLayer& base) override {
    return open_layer(layers_[base.depth], false);
  }
  Result<std::unique_ptr<Disk>> open_above(const std::string&, const std::string&, const BackingLayer& base,
                                           Disk& base_disk) override {
    end_ = {base.path, &base_disk};
    auto disk = open_top();
    end_ = {};
    return disk;
  }
  Result<> set_backing(const std::string&, const std::optional<BackingLayer>& base) override {
    if (!backing_of_top()) return {};  // it has left what it had by itself
    return layers_[0].driver().change_backing(*layers_[0].storage, base ? base->path : "",
                                              base ? std::optional(base->format) : std::nullopt);
  }
  Result<> empty(const std::string& image, const std::string&, const BackingLayer& base) override {
    if (base.depth > 1) IMG_TRY(set_backing(image, base));
    end_ = {base.path, nullptr};
    auto disk = open_top();
    end_ = {};
    if (!disk) return fail(disk.error());
    const auto forgotten = (*disk)->forget({GuestOffset(0), (*disk)->size()});
    const auto closed = (*disk)->close();
    return forgotten ? closed : forgotten;
  }

 private:
  struct End {
    std::string name;
    Disk* disk = nullptr;
  };

  Result<std::unique_ptr<Disk>> open_layer(const Layer& layer, bool read_only) {
    const auto backing = [this](const std::string& name, const auto&) { return open_backing(name); };
    return layer.driver().open(layer.storage, {.read_only = read_only,
                                               .metadata_cache = uint64_t{1} << 20,
                                               .open_backing = backing,
                                               .keeps_backing = !end_.name.empty()});
  }
  Result<std::unique_ptr<Disk>> open_backing(const std::string& name) {
    if (name == end_.name && end_.disk == nullptr) return nullptr;
    if (name == end_.name) return std::make_unique<BorrowedDisk>(*end_.disk);
    const auto found = std::find_if(layers_.begin(), layers_.end(), [&](const Layer& l) { return l.name == name; });
    if (found == layers_.end()) return fail(ErrorCode::not_found, "{}: no such file", name);
    return open_layer(*found, true);
  }

  const std::vector<Layer> layers_;
  End end_;
};

}  // namespace imgfuse::test
