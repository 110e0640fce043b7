// csrc/cpu.cpp in the place of the CUDA backend, for tests/cuda/emulation/test_kernels.cpp; with the instruction set
// SAM_ISA.
#include <cstdlib>
#include <random>

#include "cpu.cpp"

#define HAS_NO_LAUNCHES

namespace sam {

const Backend cuda_backend = cpu_backend;

[[maybe_unused]] const bool chosen = [] {
  const char* name = std::getenv("SAM_ISA");
  if (name && !set_cpu_isa(name)) std::exit(77);
  return true;
}();

}  // namespace sam

namespace emulation {
const size_t launches = 0;
}
