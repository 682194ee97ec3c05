#include "support/image_view.h"

#include <fmt/format.h>

#include "support/fvd_view.h"
#include "support/qcow2_view.h"
#include "support/qed_view.h"

namespace imgfuse::test {

std::string Owner::text() const {
  const char* names[] = {"header",   "refcount table",   "refcount block", "L1 table",         "snapshot table",
                         "L2 table", "bitmap directory", "bitmap table",   "bits of a bitmap", "guest cluster"};
  std::string text = fmt::format("{} {}", names[static_cast<int>(kind)], index);
  if (snapshot) text += fmt::format(" of snapshot {}", snapshot);
  return text;
}

std::shared_ptr<const ImageView> ImageView::parse(const MemImage& image) {
  if (auto qcow2 = Qcow2View::parse(image)) return std::make_shared<Qcow2View>(std::move(*qcow2));
  if (auto qed = QedView::parse(image)) return std::make_shared<QedView>(std::move(*qed));
  if (auto fvd = FvdView::parse(image)) return std::make_shared<FvdView>(std::move(*fvd));
  return nullptr;
}

std::string ImageView::find_corruption() const {
  if (!problems_.empty()) return problems_.front();
  for (auto first = references_.begin(); first != references_.end();) {
    auto next = first;
    while (next != references_.end() && next->cluster == first->cluster) ++next;
    if (const uint64_t stored = count(first->cluster); stored < static_cast<uint64_t>(next - first))
      return fmt::format("cluster {} has {} references ({}) but a count of {}", first->cluster, next - first,
                         first->owner.text(), stored);
    first = next;
  }
  return {};
}

}  // namespace imgfuse::test
