// Torch's threads. From 2.10 on they are reached through a function of libtorch, so that no OpenMP flag is needed and
// any compiler will do. Before, torch's header holds the OpenMP region, and only g++ calls the runtime that torch has.
#pragma once
#include <torch/version.h>

#define SAM_TORCH (TORCH_VERSION_MAJOR * 100 + TORCH_VERSION_MINOR)

#if SAM_TORCH >= 210
#include <torch/csrc/stable/ops.h>
namespace sam {
using torch::stable::get_num_threads;
using torch::stable::parallel_for;
}  // namespace sam
#elif defined(__clang__) || !defined(_OPENMP)
#error "With torch before 2.10, sam_fused can only be built by g++ with -fopenmp: set CC=gcc CXX=g++, or upgrade torch"
#else
#include <ATen/Parallel.h>
namespace sam {
using at::get_num_threads;
using at::parallel_for;
}  // namespace sam
#endif
