#include "fuse/tree.h"

#include <ctime>
#include <utility>

namespace imgfuse::fuse {
namespace {

/// Snapshots are numbered from here on.
constexpr NodeNumber kFirstSnapshot = NodeNumber{1} << 32;

/// To a node that lives as long as the tree: counts nothing.
NodeRef borrow(const Node& node) { return NodeRef(std::shared_ptr<void>(), &node); }

}  // namespace

NodeNumber Tree::add_file(NodeNumber directory, std::string name, RawFile& file) {
  const NodeNumber number = nodes_.size() + 1;
  nodes_.push_back({number, directory, std::move(name), &file});
  return number;
}

void Tree::add_text(NodeNumber directory, std::string name, TextSource text) {
  nodes_.push_back({nodes_.size() + 1, directory, std::move(name), nullptr, nullptr, std::move(text)});
}

void Tree::add_snapshots(NodeNumber directory, std::string name, Disk& disk, const FileOwner& owner) {
  const NodeNumber number = nodes_.size() + 1;
  nodes_.push_back({number, directory, std::move(name), nullptr});
  snapshots_ = std::make_unique<SnapshotFolder>(disk, number, kFirstSnapshot, owner);
}

NodeRef Tree::find(NodeNumber number) const {
  if (number >= kFirstSnapshot) return snapshots_ ? snapshots_->find(number) : nullptr;
  return number >= kRootNode && number <= nodes_.size() ? borrow(nodes_[number - 1]) : nullptr;
}

NodeRef Tree::find(NodeNumber directory, std::string_view name) const {
  if (is_changing(directory)) return snapshots_->find(name);
  for (const NodeRef& child : children(directory))
    if (child->name == name) return child;
  return nullptr;
}

std::vector<NodeRef> Tree::children(NodeNumber directory) const {
  if (is_changing(directory)) return snapshots_->children();
  std::vector<NodeRef> children;
  for (const Node& node : nodes_)
    if (node.parent == directory && node.number != kRootNode) children.push_back(borrow(node));
  return children;
}

struct stat Tree::attributes(const Node& node) const {
  struct stat attributes = {};
  if (node.file != nullptr) {
    attributes = node.file->attributes();
  } else if (node.text) {  // its size is not known before it is opened, as in /proc
    attributes.st_mode = S_IFREG | (owner_.mode & 0444);
    attributes.st_nlink = 1;
    attributes.st_uid = owner_.uid;
    attributes.st_gid = owner_.gid;
    clock_gettime(CLOCK_REALTIME_COARSE, &attributes.st_mtim);
    attributes.st_atim = attributes.st_ctim = attributes.st_mtim;
  } else {
    // Who may read the files may list and enter; nobody may add or remove names.
    const mode_t readable = owner_.mode & 0444;
    attributes.st_mode = S_IFDIR | readable | (readable >> 2);
    attributes.st_nlink = 2;
    for (const Node& child : nodes_)
      if (child.parent == node.number && child.number != kRootNode && child.is_directory()) ++attributes.st_nlink;
    attributes.st_uid = owner_.uid;
    attributes.st_gid = owner_.gid;
    attributes.st_atim = attributes.st_mtim = attributes.st_ctim = modified_;
  }
  attributes.st_ino = node.number;
  return attributes;
}

}  // namespace imgfuse::fuse
