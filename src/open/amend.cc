#include "imgfuse/amend.h"

#include "open/chain.h"

namespace imgfuse {
namespace {

Result<> amend_top(const std::string& path, const AmendOptions& options) {
  const OpenOptions open{.format = options.format, .allowed_directories = options.allowed_directories};
  IMG_LET(const Layer layer, open_top(path, open, true));
  IMG_LET(Chain chain, Chain::below(path, open));
  chain.add_top(layer);
  return layer.format->amend(layer.storage, options,
                             [&](const std::string& name, const std::optional<std::string>& format) {
                               return chain.open_backing(path, name, format);
                             });
}

Result<> change_backing_of(const std::string& path, const std::string& name, const std::optional<std::string>& format) {
  IMG_LET(const Layer layer, open_top(path, {}, true));
  return layer.format->change_backing(*layer.storage, name, format);
}

}  // namespace

Result<> amend_image(const std::string& path, const AmendOptions& options) {
  Result<> amended = amend_top(path, options);
  if (!amended) return fail(amended.error().during("amend {}", path));
  return {};
}

Result<> change_backing(const std::string& path, const std::string& name, const std::optional<std::string>& format) {
  Result<> changed = change_backing_of(path, name, format);
  if (!changed) return fail(changed.error().during("amend {}", path));
  return {};
}

}  // namespace imgfuse
