// Jobs as text.
#pragma once

#include "command.h"
#include "control/protocol.h"

namespace imgfuse::tool {

/// What the command `jobs` has returned, as a table; nothing if there are none.
void print_jobs(Io& io, const control::Json& list);

}  // namespace imgfuse::tool
