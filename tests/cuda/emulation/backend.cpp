// The CUDA backend, emulated, in the place of the CPU's.
#include "backend.h"

namespace sam {

const Backend cpu_backend = synchronous;
const char* cpu_isa() { return "emulated"; }
bool set_cpu_isa(const char*) { return false; }

}  // namespace sam
