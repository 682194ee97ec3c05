#include "imgfuse/amend.h"

#include "open/chain.h"

namespace imgfuse {
namespace {

Result<> change_backing_of(const std::string& path, const std::string& name, const std::optional<std::string>& format) {
  IMG_LET(const Layer layer, open_top(path, {}, true));
  return layer.format->change_backing(*layer.storage, name, format);
}

}  // namespace

Result<> change_backing(const std::string& path, const std::string& name, const std::optional<std::string>& format) {
  Result<> changed = change_backing_of(path, name, format);
  if (!changed) return fail(changed.error().during("amend {}", path));
  return {};
}

}  // namespace imgfuse
