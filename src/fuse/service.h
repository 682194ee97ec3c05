// The service manager that has started the daemon, if one has: sd_notify(3).
#pragma once

#include <string>

namespace imgfuse::fuse {

/// Sends a word such as "READY=1", and a line of text about it, to the socket that $NOTIFY_SOCKET names; does nothing
/// without it. Never blocks.
void tell_service_manager(const std::string& word, std::string status);

}  // namespace imgfuse::fuse
