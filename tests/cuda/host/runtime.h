// What csrc/cuda.cu asks of the CUDA runtime, recorded by runtime.cpp, which stands in the runtime's place.
#pragma once
#include <string>
#include <vector>

namespace runtime {

struct Launch {
  std::string kernel;  // mangled, as the object registers it
  unsigned grid[3], block[3];
  size_t shared;
  void* stream;
  std::vector<std::vector<char>> arguments;  // their bytes
};

extern std::vector<Launch> launches;  // those that failed included
extern int failing;                   // the number of the launch that fails; -1 for none
extern int last_error;                // as cudaGetLastError returns it

// A line a kernel: its name, the most threads that a block of it may have, and for each argument alignment and bytes.
void read_kernels(const char* path);

}  // namespace runtime
