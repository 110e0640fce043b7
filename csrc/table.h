// What a kernel sees of the tensors: plain structs, filled in by rows.cpp after every check. Free of torch.
#pragma once
#include <cstdint>
#include <vector>

#include "functors.h"

namespace sam {

// One parameter and the tensors that go with it, all of one dtype and one dense layout. What an op does not use is
// null; a null backup in an update means that the parameter was not perturbed.
struct Row {
  DType dtype;
  int32_t group;  // row of `ascent` or of the hyper-parameters
  int64_t numel;
  void* param = nullptr;
  const void* grad = nullptr;
  void* backup = nullptr;  // written by perturb, read by the rest
  void* state[kMaxStates] = {};
  float* step = nullptr;
};

// Where the device keeps a group's learning rate; nowhere if it is the one of the group's hyper-parameters.
struct Rate {
  const void* at = nullptr;
  int64_t bytes = 0;  // 8 of a float64, 4 of a float32

  SAM_FN double value_or(double other) const {
    if (!at) return other;
    return bytes == sizeof(double) ? *static_cast<const double*>(at) : *static_cast<const float*>(at);
  }
};

// A run of elements of one row: the unit of work and of the norm's fixed summation order.
struct Chunk {
  int32_t row;
  int32_t size;
  int64_t begin;
};

using Table = std::vector<Row>;

// A row with its state number k in the place of the gradient.
inline Row along_state(Row row, int64_t k) {
  row.grad = row.state[k];
  return row;
}
inline Table along_state(Table table, int64_t k) {
  for (Row& row : table) row = along_state(row, k);
  return table;
}

inline std::vector<Chunk> chunks_of(const Table& table, int64_t chunk_size) {
  std::vector<Chunk> chunks;
  for (size_t r = 0; r < table.size(); ++r)
    for (int64_t begin = 0; begin < table[r].numel; begin += chunk_size) {
      const int64_t left = table[r].numel - begin;
      chunks.push_back({static_cast<int32_t>(r), static_cast<int32_t>(left < chunk_size ? left : chunk_size), begin});
    }
  return chunks;
}

}  // namespace sam
