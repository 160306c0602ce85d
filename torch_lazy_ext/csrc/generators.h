// States of random number generators, to be put back.
#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

namespace tle {

// What a run that may come to nothing has drawn is put back. The default generator is everybody's:
// where another thread has seeded it meanwhile, that seed stays, as if it had come after the run.
// Used in one thread; one may live inside of another.
class RandomStates {
 public:
  explicit RandomStates(const std::vector<at::Generator>& generators = {});
  ~RandomStates();
  RandomStates(const RandomStates&) = delete;
  RandomStates& operator=(const RandomStates&) = delete;
  // Remembers the state of one that is not known yet. Returns whether it was not.
  bool keep(const at::Generator& generator);
  void put_back();
  std::vector<at::Tensor> states() const;
  std::vector<at::Generator> generators() const;

 private:
  struct State {
    at::Generator generator;
    at::Tensor state;
    uint64_t seed;
  };
  std::vector<State> kept_;
  std::optional<uint64_t> previous_;
};

// This thread has given a generator another seed, or state, which no other thread asked for.
void note_seed(const at::Generator& generator);

} // namespace tle
