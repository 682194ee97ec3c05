#include "fuse/tree.h"

#include <utility>

namespace imgfuse::fuse {

NodeNumber Tree::add_file(NodeNumber directory, std::string name, RawFile& file) {
  const NodeNumber number = nodes_.size() + 1;
  nodes_.push_back({number, directory, std::move(name), &file});
  return number;
}

const Node* Tree::find(NodeNumber number) const {
  return number >= kRootNode && number <= nodes_.size() ? &nodes_[number - 1] : nullptr;
}

const Node* Tree::find(NodeNumber directory, std::string_view name) const {
  for (const Node* child : children(directory))
    if (child->name == name) return child;
  return nullptr;
}

std::vector<const Node*> Tree::children(NodeNumber directory) const {
  std::vector<const Node*> children;
  for (const Node& node : nodes_)
    if (node.parent == directory && node.number != kRootNode) children.push_back(&node);
  return children;
}

struct stat Tree::attributes(const Node& node) const {
  struct stat attributes = {};
  if (node.file != nullptr) {
    attributes = node.file->attributes();
  } else {
    // Who may read the files may list and enter; nobody may add or remove names.
    const mode_t readable = owner_.mode & 0444;
    attributes.st_mode = S_IFDIR | readable | (readable >> 2);
    attributes.st_nlink = 2;
    attributes.st_uid = owner_.uid;
    attributes.st_gid = owner_.gid;
    attributes.st_atim = attributes.st_mtim = attributes.st_ctim = modified_;
  }
  attributes.st_ino = node.number;
  return attributes;
}

}  // namespace imgfuse::fuse
