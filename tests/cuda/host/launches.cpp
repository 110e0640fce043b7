// The launches of every operation of the Backend, as the emulation makes them and as the object that nvcc built of the
// same csrc/cuda.cu does. None runs, so tensors are addresses alone: host code that reads one crashes.
//
//   launches FILE same|fail|earlier LENGTH...
//
// with FILE for runtime::read_kernels(), and lists of so many tensors. Prints a line a launch, an allocation or an
// error, its fields separated by tabs: the case, whose it is, what. With "fail" each launch of each case fails in turn;
// with "earlier" there is an error from before the call.
#define cuda_backend emulated_backend
#include "cuda.cu"
#undef cuda_backend

#include <cstdio>
#include <string_view>

#include "runtime.h"

namespace sam {
extern const Backend cuda_backend;
}
using namespace sam;

namespace {

char* const kStream = reinterpret_cast<char*>(0x5eed);

// ---- addresses ----

struct Addresses {
  uintptr_t next;

  void* take(int64_t bytes) {
    void* p = reinterpret_cast<void*>(next);
    next += (bytes + 15) / 16 * 16;
    return p;
  }
};
Addresses tensors{uintptr_t{1} << 44};

template <class T>
T* device(int64_t n) {
  return static_cast<T*>(tensors.take(n * sizeof(T)));
}

// ---- lists ----

struct List {
  Table table;
  std::vector<Ascent> ascent;
};

List make(int length, const std::vector<DType>& dtypes, const std::vector<int64_t>& sizes, int groups) {
  List list;
  for (int r = 0; r < length; ++r) {
    Row row{dtypes[r % dtypes.size()], static_cast<int32_t>(int64_t{r} * groups / length), sizes[r % sizes.size()]};
    row.param = tensors.take(8 * row.numel);
    row.grad = tensors.take(8 * row.numel + 2);
    row.backup = tensors.take(8 * row.numel);
    for (void*& state : row.state) state = tensors.take(8 * row.numel);
    row.step = device<float>(1);
    list.table.push_back(row);
  }
  for (int g = 0; g < groups; ++g) list.ascent.push_back({0.05 + 0.001 * g, 0.01 * g, g % 2 * 1.0});
  return list;
}

// ---- lines ----

std::string hex(std::string_view bytes) {
  std::string out;
  char digits[24];
  if (bytes.size() > 8) {
    std::snprintf(digits, sizeof digits, "%016zx", std::hash<std::string_view>()(bytes));
    return std::to_string(bytes.size()) + " bytes " + digits;
  }
  for (const unsigned char byte : bytes) {
    std::snprintf(digits, sizeof digits, "%02x", byte);
    out += digits;
  }
  return out;
}

void print_launch(const std::string& begin, const runtime::Launch& l) {
  std::printf("%s%s\t%u,%u,%u\t%u,%u,%u\t%zu\t%s", begin.c_str(), l.kernel.c_str(), l.grid[0], l.grid[1], l.grid[2],
              l.block[0], l.block[1], l.block[2], l.shared, l.stream == kStream ? "the stream" : "another stream");
  for (const auto& bytes : l.arguments) std::printf("\t%s", hex({bytes.data(), bytes.size()}).c_str());
  std::printf("\n");
}

// ---- calls ----

using Operation = std::function<void(const Backend&, const Queue&)>;

// Those of the emulation, each with its kernel's address in place of a name, or of the object that nvcc built.
std::vector<runtime::Launch> take_launches(bool emulated) {
  if (!emulated) return std::exchange(runtime::launches, {});
  std::vector<runtime::Launch> out;
  for (const emulation::Launch& l : std::exchange(emulation::queued, {})) {
    char address[24];
    std::snprintf(address, sizeof address, "%p", l.kernel);
    out.push_back({address, {l.blocks, 1, 1}, {l.threads, 1, 1}, 0, l.stream, l.arguments});
  }
  return out;
}

// Returns the number of launches.
size_t call(const std::string& name, const std::string& side, const Operation& operation) {
  const bool emulated = side == "emulated";
  const std::string begin = name + "\t" + side + "\t";
  Addresses addresses{uintptr_t{1} << 45};
  std::vector<std::pair<size_t, size_t>> allocations;  // launches before it, bytes
  const Queue queue{kStream, [&](size_t bytes) {
                      allocations.emplace_back(emulated ? emulation::queued.size() : runtime::launches.size(), bytes);
                      return addresses.take(static_cast<int64_t>(bytes));
                    }};
  std::string error;
  try {
    operation(emulated ? emulated_backend : cuda_backend, queue);
  } catch (const std::exception& e) {
    error = e.what();
  }
  const auto launches = take_launches(emulated);
  auto allocation = allocations.begin();
  for (size_t i = 0; i <= launches.size(); ++i) {
    for (; allocation != allocations.end() && allocation->first == i; ++allocation)
      std::printf("%sallocate %zu\n", begin.c_str(), allocation->second);
    if (i < launches.size()) print_launch(begin, launches[i]);
  }
  if (!error.empty()) std::printf("%sraised %s\n", begin.c_str(), error.c_str());
  return launches.size();
}

void run(const std::string& mode, const std::string& name, const Operation& operation) {
  const int launches = static_cast<int>(call(name, "emulated", operation));
  if (mode == "earlier") runtime::last_error = 1;
  if (mode == "fail")
    for (runtime::failing = 0; runtime::failing < launches; ++runtime::failing) {
      call(name, "fails at " + std::to_string(runtime::failing), operation);
      std::printf("%s\tpending\t%d\n", name.c_str(), runtime::last_error);
    }
  runtime::failing = -1;
  call(name, "nvcc", operation);
}

void run(const std::string& mode, const std::string& name, const List& list) {
  const Table& table = list.table;
  const auto& groups = list.ascent;
  const int64_t n_groups = static_cast<int64_t>(groups.size());
  auto *sq_norms = device<double>(n_groups), *norm = device<double>(1), *total = device<double>(2);
  auto* out = device<double>(3);
  const std::vector<Rate> none(n_groups);
  std::vector<Rate> rates;
  for (int64_t g = 0; g < n_groups; ++g)
    rates.push_back(g % 2 == 0 ? Rate{device<double>(1), 8} : Rate{device<float>(1), 4});
  auto *grad_scale = device<float>(1), *found_inf = device<float>(1);
  run(mode, name + ": grad_sq_norm", [&](const Backend& backend, const Queue& queue) {
    backend.grad_sq_norm(queue, table, groups.data(), n_groups, sq_norms);
  });
  run(mode, name + ": sharpness", [&](const Backend& backend, const Queue& queue) {
    backend.sharpness(queue, sq_norms, groups.data(), n_groups, grad_scale, total, out);
  });
  for (const bool saved : {false, true})
    run(mode, name + (saved ? ": perturb, saved" : ": perturb"),
        [&](const Backend& backend, const Queue& queue) { backend.perturb(queue, table, groups.data(), norm, saved); });
  run(mode, name + ": restore", [&](const Backend& backend, const Queue& queue) { backend.restore(queue, table); });
  Table some = table;  // have a backup
  for (size_t r = 1; r < some.size(); r += 3) some[r].backup = nullptr;
  run(mode, name + ": restore some", [&](const Backend& backend, const Queue& queue) { backend.restore(queue, some); });
  for (int b = 0; b < static_cast<int>(std::tuple_size_v<Bases>); ++b)
    with_base(b, [&]<class Base>(Base) {
      std::vector<double> hyper(n_groups * sizeof(typename Base::Hyper) / sizeof(double));
      for (size_t i = 0; i < hyper.size(); ++i) hyper[i] = 0.001 * static_cast<double>(i + 1);
      const std::string step = name + ": restore_step " + Base::name;
      run(mode, step, [&](const Backend& backend, const Queue& queue) {
        backend.restore_step(queue, table, b, hyper.data(), none.data(), nullptr, nullptr, nullptr);
      });
      run(mode, step + ", scaled", [&](const Backend& backend, const Queue& queue) {
        backend.restore_step(queue, some, b, hyper.data(), rates.data(), grad_scale, found_inf, nullptr);
      });
      const Along along{Base::states - 1, groups.data(), n_groups, sq_norms};
      if (Base::states > 0)
        run(mode, step + ", along", [&](const Backend& backend, const Queue& queue) {
          backend.restore_step(queue, table, b, hyper.data(), rates.data(), grad_scale, found_inf, &along);
        });
    });
}

}  // namespace

int main(int argc, char** argv) {
  using enum DType;
  if (argc < 4) return 2;
  runtime::read_kernels(argv[1]);
  for (int i = 3; i < argc; ++i) {
    const int length = std::atoi(argv[i]);
    run(argv[2], std::to_string(length) + " small", make(length, {kFloat}, {1, 0, 5, 33, 100}, 1));
    run(argv[2], std::to_string(length) + " large, mixed",
        make(length, {kFloat, kBFloat16, kDouble, kHalf}, {100000, 7, 0, 8193, (int64_t{1} << 31) + 9}, length));
  }
}
