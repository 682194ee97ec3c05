#include "job_list.h"

#include <fmt/format.h>

#include "control/jobs_json.h"
#include "text.h"

namespace imgfuse::tool {

void print_jobs(Io& io, const control::Json& list) {
  if (list.empty()) return;
  io.out << fmt::format("{:<5}{:<9}{:<12}{:>11}{:>12}{:>13}  {}\n", "JOB", "KIND", "STATE", "COPIED", "REMAINING",
                        "RATE LIMIT", "TARGET");
  for (const control::Json& json : list) {
    const JobStatus job = control::job_from_json(json);
    const std::string rate = job.rate > 0 ? human_size(job.rate) + "/s" : "-";
    io.out << fmt::format("{:<5}{:<9}{:<12}{:>11}{:>12}{:>13}  {}\n", job.id, job.kind, control::to_word(job.state),
                          human_size(job.copied), human_size(job.remaining), rate, printable(job.target));
    if (job.error) io.out << fmt::format("     {}\n", printable(job.error->text()));
  }
}

}  // namespace imgfuse::tool
