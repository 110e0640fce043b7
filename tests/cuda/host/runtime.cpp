// The CUDA runtime without a GPU, as much of it as an object of nvcc's calls to launch kernels: launches are recorded,
// and none runs. What the runtime and the driver refuse is refused here. EMULATION_OLD_DRIVER is the driver's version,
// 0 for one that does not tell it.
#include "runtime.h"

#include <cuda_runtime_api.h>

#include <cstdlib>
#include <fstream>
#include <map>
#include <sstream>
#include <stdexcept>

namespace runtime {

std::vector<Launch> launches;
int failing = -1;
int last_error = cudaSuccess;

namespace {

struct Parameter {
  size_t alignment, bytes;
};
struct Kernel {
  unsigned threads;
  std::vector<Parameter> parameters;

  size_t bytes() const {
    size_t n = 0;
    for (const Parameter& p : parameters) n = (n + p.alignment - 1) / p.alignment * p.alignment + p.bytes;
    return n;
  }
};
std::map<std::string, Kernel> kernels;

// By the address of what the host calls. A function's, for the object registers itself before main().
std::map<const void*, std::string>& names() {
  static std::map<const void*, std::string> all;
  return all;
}

struct Configuration {
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
};
std::vector<Configuration> configurations;

cudaError_t result(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

int driver_version() {
  const char* old = std::getenv("EMULATION_OLD_DRIVER");
  return old ? std::atoi(old) : 13000;
}

cudaError_t launch(const void* function, dim3 grid, dim3 block, void** arguments, size_t shared, cudaStream_t stream) {
  const auto name = names().find(function);
  if (name == names().end()) return cudaErrorInvalidDeviceFunction;
  const Kernel& kernel = kernels.at(name->second);
  Launch launch{name->second, {grid.x, grid.y, grid.z}, {block.x, block.y, block.z}, shared, stream, {}};
  for (size_t i = 0; i < kernel.parameters.size(); ++i) {
    const char* bytes = static_cast<const char*>(arguments[i]);
    launch.arguments.emplace_back(bytes, bytes + kernel.parameters[i].bytes);
  }
  launches.push_back(launch);
  if (static_cast<int>(launches.size()) == failing + 1) return cudaErrorLaunchOutOfResources;
  if (kernel.bytes() > (driver_version() >= 12010 ? 32764 : 4096)) return cudaErrorInvalidValue;
  const unsigned threads = block.x * block.y * block.z;
  if (threads == 0 || threads > kernel.threads) return cudaErrorInvalidValue;
  if (grid.x == 0 || grid.x > 0x7fffffff || grid.y != 1 || grid.z != 1) return cudaErrorInvalidConfiguration;
  return cudaSuccess;
}

}  // namespace

void read_kernels(const char* path) {
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);) {
    std::istringstream words(line);
    std::string name;
    Kernel kernel;
    words >> name >> kernel.threads;
    for (Parameter p; words >> p.alignment >> p.bytes;) kernel.parameters.push_back(p);
    kernels[name] = kernel;
  }
  if (kernels.empty()) throw std::runtime_error(std::string("no kernels in ") + path);
}

}  // namespace runtime

using runtime::result;

extern "C" {

// ---- what nvcc's own code calls ----

void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
  runtime::names()[host] = name;
}
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, CUstream_st* stream) {
  runtime::configurations.push_back({grid, block, shared, stream});
  return cudaSuccess;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  if (runtime::configurations.empty()) return result(cudaErrorMissingConfiguration);
  const runtime::Configuration& last = runtime::configurations.back();
  *grid = last.grid;
  *block = last.block;
  *shared = last.shared;
  *static_cast<cudaStream_t*>(stream) = last.stream;
  runtime::configurations.pop_back();
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  *kernel = static_cast<cudaKernel_t>(const_cast<void*>(function));
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t shared,
                               cudaStream_t stream) {
  return result(runtime::launch(kernel, grid, block, arguments, shared, stream));
}

// ---- what csrc/cuda.cu may call ----

cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** arguments, size_t shared,
                             cudaStream_t stream) {
  return result(runtime::launch(function, grid, block, arguments, shared, stream));
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void** arguments) {
  return result(runtime::launch(function, config->gridDim, config->blockDim, arguments, config->dynamicSmemBytes,
                                config->stream));
}
cudaError_t cudaMemcpyAsync(void*, const void*, size_t, cudaMemcpyKind, cudaStream_t) { return cudaSuccess; }
cudaError_t cudaDriverGetVersion(int* version) {
  *version = runtime::driver_version();
  return result(*version == 0 ? cudaErrorInsufficientDriver : cudaSuccess);
}
cudaError_t cudaGetLastError() {
  const int error = runtime::last_error;
  runtime::last_error = cudaSuccess;
  return static_cast<cudaError_t>(error);
}
const char* cudaGetErrorString(cudaError_t error) {
  static std::string text;
  text = "error " + std::to_string(error);
  return text.c_str();
}

}  // extern "C"
