// Jobs as the control socket tells of them, and their options as it takes them.
#pragma once

#include "control/protocol.h"
#include "imgfuse/jobs.h"

namespace imgfuse::control {

/// The words of the protocol, which are those of the command line too.
Result<MirrorSync> parse_sync(const std::string& word);
Result<OnError> parse_on_error(const std::string& word);

/// A mirror or a backup: it has a target, not a base.
bool is_copy(JobKind kind);
/// The arguments of the commands `mirror`, `backup`, `stream` and `commit`, but for the kind of job. What is left out
/// has the value that JobOptions has; only a mirror can say how it ends.
Json to_json(const JobOptions& options);
Result<JobOptions> take_job_options(Arguments& arguments, JobKind kind);

Json to_json(const JobStatus& job);
/// What to_json() has made; anything else gives a job without a number.
JobStatus job_from_json(const Json& json);
/// "running", "ready", …
const char* to_word(JobState state);

}  // namespace imgfuse::control
