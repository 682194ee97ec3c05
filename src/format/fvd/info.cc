#include "format/fvd/fvd.h"
#include "format/fvd/header.h"

namespace imgfuse::fvd {

Result<ImageInfo> info(Storage& storage) {
  IMG_LET(const Header header, read_header(storage));
  ImageInfo image;
  image.format = "fvd";
  image.virtual_size = header.virtual_size;
  image.dirty = !header.clean_shutdown;
  if (header.uses_base()) {
    image.backing_filename = header.base_name;
    if (!header.base_format.empty()) image.backing_format = header.base_format;
  }
  FvdInfo own;
  own.all_data_in_image = header.all_data_in_image;
  own.compact = header.compact;
  own.journal_size = header.journal_sectors() * kSector;
  own.need_zero_init = header.need_zero_init;
  own.copying = header.copying;
  if (header.compact) {
    own.chunk_size = header.chunk_size;
    own.storage_grow_unit = header.storage_grow_unit;
    own.add_storage_command = header.add_storage_command;
  }
  if (header.uses_base()) {
    own.block_size = header.block_size;
    own.base_size = header.base_size;
  }
  if (!header.data_name.empty()) own.data_file = header.data_name;
  if (!header.data_format.empty()) own.data_file_format = header.data_format;
  image.fvd = std::move(own);
  return image;
}

}  // namespace imgfuse::fvd
