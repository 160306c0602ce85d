#include "generators.h"

#include <ATen/CPUGeneratorImpl.h>

#include <algorithm>
#include <mutex>
#include <utility>

namespace tle {

namespace {

// The last seed that this thread has given to the default generator.
thread_local std::optional<uint64_t> own_seed;

bool is_default(const at::Generator& generator) {
  return generator == at::detail::getDefaultCPUGenerator();
}

} // namespace

RandomStates::RandomStates(const std::vector<at::Generator>& generators)
    : previous_(std::exchange(own_seed, std::nullopt)) {
  for (const at::Generator& g : generators) {
    keep(g);
  }
}

RandomStates::~RandomStates() {
  if (!own_seed) {
    own_seed = previous_;
  }
}

bool RandomStates::keep(const at::Generator& generator) {
  const bool known = std::any_of(
      kept_.begin(), kept_.end(), [&](const State& s) { return s.generator == generator; });
  if (!known) {
    at::Generator g = generator;
    std::lock_guard<std::mutex> lock(g.mutex());
    kept_.push_back({g, g.get_state(), g.current_seed()});
  }
  return !known;
}

void RandomStates::put_back() {
  for (State& s : kept_) {
    std::lock_guard<std::mutex> lock(s.generator.mutex());
    const uint64_t now = s.generator.current_seed();
    if (!is_default(s.generator) || now == s.seed || now == own_seed) {
      s.generator.set_state(s.state);
    }
  }
}

std::vector<at::Tensor> RandomStates::states() const {
  std::vector<at::Tensor> out;
  for (const State& s : kept_) {
    out.push_back(s.state);
  }
  return out;
}

std::vector<at::Generator> RandomStates::generators() const {
  std::vector<at::Generator> out;
  for (const State& s : kept_) {
    out.push_back(s.generator);
  }
  return out;
}

void note_seed(const at::Generator& generator) {
  if (is_default(generator)) {
    own_seed = generator.current_seed();
  }
}

} // namespace tle
