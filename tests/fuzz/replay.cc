// Runs a fuzz target over the files and folders it is given, and over mutations of them that are the same each time.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace {

constexpr int kMutations = 300;  // of each file

std::vector<uint8_t> mutated(std::vector<uint8_t> bytes, std::mt19937& random) {
  for (unsigned changes = 1 + random() % 8; changes > 0 && !bytes.empty(); --changes) {
    const size_t at = random() % bytes.size();
    switch (random() % 5) {
      case 0:
        bytes[at] = static_cast<uint8_t>(random());
        break;
      case 1:
        bytes[at] = static_cast<uint8_t>(bytes[at] ^ 1 << random() % 8);
        break;
      case 2:  // another place's pointer
        for (size_t i = 0, from = random() % bytes.size() / 8 * 8; i < 8 && at / 8 * 8 + i < bytes.size(); ++i)
          bytes[at / 8 * 8 + i] = from + i < bytes.size() ? bytes[from + i] : uint8_t{0xff};
        break;
      case 3:
        bytes.resize(at);
        break;
      case 4:  // the header, where most of the sense is
        bytes[at % std::min<size_t>(bytes.size(), 128)] = static_cast<uint8_t>(random() % 4 ? random() % 32 : 0xff);
        break;
    }
  }
  return bytes;
}

void replay(const std::filesystem::path& path, int& inputs) {
  std::ifstream file(path, std::ios::binary);
  const std::vector<uint8_t> bytes{std::istreambuf_iterator<char>(file), {}};
  LLVMFuzzerTestOneInput(bytes.data(), bytes.size());
  std::mt19937 random(1);
  for (int i = 0; i < kMutations; ++i) {
    const std::vector<uint8_t> other = mutated(bytes, random);
    LLVMFuzzerTestOneInput(other.data(), other.size());
  }
  inputs += 1 + kMutations;
}

}  // namespace

int main(int argc, char** argv) {
  int inputs = 0;
  for (int i = 1; i < argc; ++i) {
    std::vector<std::filesystem::path> paths;
    for (const auto& entry : std::filesystem::directory_iterator(argv[i]))
      if (entry.is_regular_file()) paths.push_back(entry.path());
    std::sort(paths.begin(), paths.end());
    for (const auto& path : paths) replay(path, inputs);
  }
  std::printf("%d inputs\n", inputs);
  return inputs == 0;
}
