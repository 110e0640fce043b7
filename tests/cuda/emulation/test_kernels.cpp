// The emulated kernels against the same functors in long double, over lists of every awkward length and alignment.
// Prints the largest error of each type, in units in the last place; ends with 1 if one is too large.
// SAM_BASES holds the entries of sam_fused/bases.py, see entries() in tests/helpers/entries.py.
#include <cstdio>
#include <map>
#include <memory>
#include <sstream>

#include "../../../csrc/cuda.cu"

using namespace sam;

namespace {

std::mt19937 rng(7);

struct Free {
  void operator()(void* p) const { std::free(p); }
};
std::vector<std::unique_ptr<void, Free>> memory;

// Exactly so many bytes, so that the address sanitizer sees an overrun.
void* allocate(size_t bytes) {
  memory.emplace_back(std::malloc(std::max<size_t>(bytes, 1)));
  return memory.back().get();
}
const Queue queue{nullptr, allocate};

template <class V>
V* device(std::initializer_list<V> values) {
  return std::copy(values.begin(), values.end(), static_cast<V*>(allocate(values.size() * sizeof(V)))) - values.size();
}

// ---- types ----

using Wide = long double;

struct Format {
  const char* name;
  int size, fraction;  // bytes, bits of the fraction
  double worst = 0;
};
Format formats[] = {{"float32", 4, 23}, {"float64", 8, 52}, {"bfloat16", 2, 7}, {"float16", 2, 10}};

Format& format(DType dtype) { return formats[static_cast<int>(dtype)]; }

Wide get(DType dtype, const void* p, int64_t i) {
  Wide x = 0;
  with_dtype(dtype, [&](auto t) { x = load(static_cast<const decltype(t)*>(p)[i]); });
  return x;
}
void put(DType dtype, void* p, int64_t i, double x) {
  with_dtype(dtype, [&](auto t) { store(static_cast<decltype(t)*>(p)[i], static_cast<arithmetic_t<decltype(t)>>(x)); });
}

// ---- bases ----

struct Entry {
  std::string squares;        // for each state, whether it is a mean of squares: 1 or 0
  double error;               // largest, in units in the last place
  std::vector<double> hyper;  // a row
};

const Entry& entry_of(const char* base) {
  static const std::map<std::string, Entry> entries = [] {
    std::map<std::string, Entry> all;
    std::istringstream lines(std::getenv("SAM_BASES"));
    for (std::string line; std::getline(lines, line);) {
      std::istringstream words(line);
      std::string name;
      Entry entry;
      words >> name >> entry.squares >> entry.error;
      for (double x; words >> x;) entry.hyper.push_back(x);
      all[name] = entry;
    }
    return all;
  }();
  return entries.at(base);
}

template <class Base>
typename Base::Hyper hyper_of() {
  const Entry& entry = entry_of(Base::name);
  typename Base::Hyper hyper;
  if (entry.hyper.size() * sizeof(double) != sizeof hyper)
    throw std::runtime_error(std::string(Base::name) + ": hyper");
  std::memcpy(&hyper, entry.hyper.data(), sizeof hyper);
  return hyper;
}

// ---- lists ----

struct List {
  Table table;
  std::vector<Ascent> ascent;
  int shift, apart;
};

// A tensor of random numbers, `shift` elements after an allocation's beginning. Squares are larger than the square of
// every other number, as a mean of squares is than that of the mean.
enum class Kind { kAny, kMean, kSquare };
void* tensor(const Row& row, int shift, Kind kind = Kind::kAny) {
  const int size = format(row.dtype).size;
  char* p = static_cast<char*>(allocate((row.numel + shift) * size)) + shift * size;
  std::normal_distribution<double> normal;
  for (int64_t i = 0; i < row.numel; ++i) {
    const double x = normal(rng);
    put(row.dtype, p, i, kind == Kind::kSquare ? 1 + std::abs(x) : kind == Kind::kMean ? x / 8 : x);
  }
  return p;
}

// Shifts differ between a tensor's lists where `apart`, so that they reach no 16-byte boundary together.
List make(const std::vector<int64_t>& sizes, const std::vector<DType>& dtypes, int groups, int shift, bool apart) {
  List list{{}, {}, shift, apart};
  for (size_t r = 0; r < sizes.size(); ++r) {
    Row row{dtypes[r % dtypes.size()], static_cast<int32_t>(r * groups / sizes.size()), sizes[r]};
    row.param = tensor(row, shift);
    row.grad = tensor(row, shift + apart);
    row.backup = tensor(row, shift + 2 * apart);
    row.step = device({static_cast<float>(r % 3)});
    list.table.push_back(row);
  }
  for (int g = 0; g < groups; ++g) list.ascent.push_back({0.05 + 0.001 * (g % 7), 0.02 * (g % 3), g % 2 * 1.0});
  return list;
}

std::vector<std::vector<Wide>> values(const Table& table, void* const* (*list)(const Row&)) {
  std::vector<std::vector<Wide>> out;
  for (const Row& row : table) {
    out.emplace_back();
    for (int64_t i = 0; *list(row) && i < row.numel; ++i) out.back().push_back(get(row.dtype, *list(row), i));
  }
  return out;
}
auto params(const Table& t) {
  return values(t, [](const Row& r) -> void* const* { return &r.param; });
}
auto backups(const Table& t) {
  return values(t, [](const Row& r) -> void* const* { return &r.backup; });
}

// ---- comparisons ----

bool failed = false;

void expect(bool condition, const char* what, size_t row, int64_t i) {
  if (condition || failed) return;
  failed = true;
  std::printf("%s: row %zu, element %ld\n", what, row, static_cast<long>(i));
}

// Units in the last place are those of `terms`, the sum of the absolute values of what was added up, or of 1. `actual`
// is within one of the correctly rounded number if it is within one and a half of the exact one.
void near(DType dtype, Wide actual, Wide exact, Wide terms, const char* what, size_t row, int64_t i,
          double limit = 1.5) {
  Format& f = format(dtype);
  const int exponent = std::ilogb(std::max({std::abs(exact), terms, Wide(1)})) - f.fraction;
  const double error = static_cast<double>(std::abs(actual - exact) / std::ldexp(Wide(1), exponent));
  f.worst = std::max(f.worst, error);
  expect(error <= limit, what, row, i);
}

// ---- tests ----

// The largest relative error of a squared norm. The squares of 16 bytes are added up in float, a rounding each, and T g
// has two roundings, which are squared. What is added up in double has a hundred roundings, say.
Wide sq_norm_error(const Row& row, bool adaptive) {
  const bool wide = row.dtype == DType::kDouble;
  return std::ldexp(Wide(wide ? 0 : 16 / format(row.dtype).size), -24) +
         std::ldexp(Wide(adaptive ? 4 : 0), wide ? -53 : -24) + std::ldexp(Wide(100), -53);
}

void expect_sq_norms(const double* actual, const Table& table, const std::vector<Ascent>& ascent, const char* what) {
  std::vector<Wide> exact(ascent.size()), error(ascent.size());
  for (const Row& row : table) {
    const Ascent& a = ascent[row.group];
    error[row.group] = std::max(error[row.group], sq_norm_error(row, a.adaptive != 0));
    for (int64_t i = 0; i < row.numel; ++i) {
      const Wide w = get(row.dtype, row.param, i), g = get(row.dtype, row.grad, i);
      const Wide x = a.adaptive != 0 ? Ascend<Wide, true>(a).scaled(w, g) : g;
      exact[row.group] += x * x;
    }
  }
  for (size_t g = 0; g < ascent.size(); ++g) {
    const bool near = std::abs(actual[g] - exact[g]) <= error[g] * exact[g];
    const bool same = std::isnan(exact[g]) ? std::isnan(actual[g]) : actual[g] == exact[g];
    expect(std::isfinite(exact[g]) ? near : same, what, g, 0);
  }
}

// Squares that float does not hold, beside others. Float16 has the smallest and the largest as 0 and infinity.
void extreme_norms(const std::vector<DType>& dtypes) {
  const std::vector<double> lists[] = {
      {1e-30},
      {1e30},
      {1e-30, 1e30},
      {1e-30, 1},
      {1e-20, 1e-10},
      {1e-15},
      {1e-16, 1e-14},
      {1e-44},
      {0, 0, 0, 0, 1e-30},
      {3e38},
      {0},
      {1e19, 1},
      {1e-7, 6e4},
      {1, HUGE_VAL},
      {1e-30, 1, NAN},
      {HUGE_VAL, 0, NAN},
  };
  std::uniform_real_distribution<double> factor(0.5, 1);
  for (const DType dtype : dtypes)
    for (const auto& numbers : lists) {
      memory.clear();
      List list = make({600, 3}, {dtype}, 1, 1, false);
      for (const Row& row : list.table)
        for (int64_t i = 0; i < row.numel; ++i)
          put(dtype, const_cast<void*>(row.grad), i, factor(rng) * numbers[i * 7 % 11 % numbers.size()]);
      auto* sq_norm = device({-1.0});
      cuda_backend.grad_sq_norm(queue, list.table, list.ascent.data(), 1, sq_norm);
      expect_sq_norms(sq_norm, list.table, list.ascent, "norm of extreme numbers");
    }
}

#ifndef HAS_NO_LAUNCHES
// The chunks are the smallest that make kBlocks blocks at most, and the arguments the smallest that hold the rows.
void expect_launches() {
  const std::pair<int64_t, int> chunks[] = {{1, kChunk / 4},
                                            {int64_t{kChunk / 4} * kBlocks, kChunk / 4},
                                            {int64_t{kChunk / 4} * kBlocks + 1, kChunk},
                                            {int64_t{kChunk} * kBlocks, kChunk},
                                            {int64_t{kChunk} * kBlocks + 1, kChunk * 4},
                                            {int64_t{1} << 40, kChunk * 4}};
  for (const auto& [total, chunk] : chunks)
    expect(chunk_of({{DType::kFloat, 0, total - total / 3}, {DType::kHalf, 0, total / 3}}) == chunk, "chunk", 0, total);

  using Sizes = std::vector<std::pair<int, int32_t>>;  // bytes and rows
  using E = UpdateEntry<Adam>;
  constexpr int small = Entries<E, kSmall>::kMax, medium = Entries<E, kMedium>::kMax, large = Entries<E, kLarge>::kMax;
  const auto launches = [](size_t rows) {
    Table table(rows, {DType::kHalf, 0, kChunk / 4 + 1});
    table.resize(rows + 2, {DType::kHalf, 0, 0});
    Sizes sizes;
    for_entries<E>(
        table, [](E&, const Row&, int) { return true; },
        [&]<class T, int kBytes>(T, const Entries<E, kBytes>& entries, int32_t blocks) {
          expect(sizeof(T) == 2 && blocks == entries.n * blocks_of(table[0], chunk_of(table)), "blocks", entries.n,
                 blocks);
          sizes.push_back({kBytes, entries.n});
        });
    return sizes;
  };
  if (!takes_large_arguments()) {
    expect(launches(small + 1) == Sizes{{kSmall, small}, {kSmall, 1}}, "arguments of an old driver", small + 1, 0);
    return;
  }
  expect(launches(0).empty(), "arguments", 0, 0);
  expect(launches(small) == Sizes{{kSmall, small}}, "arguments", small, 0);
  expect(launches(small + 1) == Sizes{{kMedium, small + 1}}, "arguments", small + 1, 0);
  expect(launches(medium) == Sizes{{kMedium, medium}}, "arguments", medium, 0);
  expect(launches(medium + 1) == Sizes{{kLarge, medium + 1}}, "arguments", medium + 1, 0);
  expect(launches(large + 1) == Sizes{{kLarge, large}, {kSmall, 1}}, "arguments", large + 1, 0);
}
#endif

void ascend(const List& list) {
  const Table& table = list.table;
  const int64_t groups = static_cast<int64_t>(list.ascent.size());
  const auto before = params(table);
  auto* sq_norms = static_cast<double*>(allocate(groups * sizeof(double)));
  cuda_backend.grad_sq_norm(queue, table, list.ascent.data(), groups, sq_norms);
  expect_sq_norms(sq_norms, table, list.ascent, "grad_sq_norm");
  Wide sq = 0, weighted = 0;
  for (int64_t g = 0; g < groups; ++g) {
    sq += sq_norms[g];
    weighted += list.ascent[g].rho * sq_norms[g];
  }
  auto* total = device({1.0, 2.0});
  auto* out = static_cast<double*>(allocate(3 * sizeof(double)));
  cuda_backend.sharpness(queue, sq_norms, list.ascent.data(), groups, device({4.0f}), total, out);
  const Wide norm = std::sqrt(sq), value = norm == 0 ? 0 : weighted / norm;
  const Wide wanted[] = {norm / 4, value / 4, norm};
  for (int k = 0; k < 3; ++k) expect(std::abs(out[k] - wanted[k]) <= 1e-12 * norm, "sharpness", 0, k);
  expect(total[0] == 1 + out[1] && total[1] == 3, "total", 0, 0);

  cuda_backend.perturb(queue, table, list.ascent.data(), out + 2, false);
  const auto after = params(table), saved = backups(table);
  for (size_t r = 0; r < table.size(); ++r)
    for (int64_t i = 0; i < table[r].numel; ++i) {
      const Ascent& a = list.ascent[table[r].group];
      const Wide w = before[r][i], g = get(table[r].dtype, table[r].grad, i);
      const Wide x = a.adaptive != 0 ? Ascend<Wide, true>(a, out[2]).perturbed(w, g)
                                     : Ascend<Wide, false>(a, out[2]).perturbed(w, g);
      expect(saved[r][i] == w, "backup", r, i);
      near(table[r].dtype, after[r][i], x, std::abs(w) + std::abs(x - w), "perturb", r, i);
    }
  cuda_backend.restore(queue, table);
  expect(params(table) == before, "restore", 0, 0);

  for (const Row& row : table)
    for (int64_t i = 0; i < row.numel; ++i) put(row.dtype, row.param, i, 0.125);
  cuda_backend.perturb(queue, table, list.ascent.data(), out + 2, true);
  expect(params(table) == after && backups(table) == before, "perturb from what is saved", 0, 0);

  auto* infinite = device({HUGE_VAL});
  cuda_backend.perturb(queue, table, list.ascent.data(), infinite, true);
  expect(params(table) == before && backups(table) == before, "perturb by an infinite norm, from what is saved", 0, 0);
  cuda_backend.perturb(queue, table, list.ascent.data(), infinite, false);
  expect(params(table) == before && backups(table) == before, "perturb by an infinite norm", 0, 0);
}

template <class Base>
void descend(const List& list, int index) {
  Table table = list.table;
  const int groups = static_cast<int>(list.ascent.size());
  for (size_t r = 0; r < table.size(); ++r) {
    if (r % 3 == 1) table[r].backup = nullptr;
    if (!Base::counts_steps) table[r].step = nullptr;
    for (int k = 0; k < Base::states; ++k)
      table[r].state[k] = tensor(table[r], list.shift + k * list.apart,
                                 entry_of(Base::name).squares.at(k) == '1' ? Kind::kSquare : Kind::kMean);
  }
  const double limit = entry_of(Base::name).error;
  const typename Base::Hyper hyper = hyper_of<Base>();
  const std::vector<typename Base::Hyper> rows(groups, hyper);
  auto* wide = static_cast<double*>(allocate(groups * sizeof(double)));
  auto* narrow = static_cast<float*>(allocate(groups * sizeof(float)));
  std::vector<Rate> rates;  // float64, float32 or that of the hyper-parameters
  for (int g = 0; g < groups; ++g) {
    wide[g] = narrow[g] = (g % 5 + 1) / 1024.0f;
    rates.push_back(g % 3 == 0 ? Rate{wide + g, 8} : g % 3 == 1 ? Rate{narrow + g, 4} : Rate{});
  }
  const double scale = 0.5;
  auto* sq_norms = static_cast<double*>(allocate(groups * sizeof(double)));
  const Along along{std::max(Base::states - 1, 0), list.ascent.data(), groups, sq_norms};
  const auto before = params(table), from = backups(table);
  for (const float skip : {1.0f, 0.0f}) {
    std::vector<std::vector<std::vector<Wide>>> states(kMaxStates);
    std::vector<double> counts;
    for (int k = 0; k < Base::states; ++k)
      for (const Row& row : table) {
        states[k].emplace_back();
        for (int64_t i = 0; i < row.numel; ++i) states[k].back().push_back(get(row.dtype, row.state[k], i));
      }
    for (const Row& row : table) counts.push_back(row.step ? *row.step : 0);
    cuda_backend.restore_step(queue, table, index, reinterpret_cast<const double*>(rows.data()), rates.data(),
                              device({static_cast<float>(scale)}), device({skip}), Base::states ? &along : nullptr);
    if (Base::states) expect_sq_norms(sq_norms, along_state(table, along.state), list.ascent, "norm along a state");
    for (size_t r = 0; r < table.size(); ++r) {
      const Row& row = table[r];
      if (row.step) expect(*row.step == counts[r] + (skip == 0), "step", r, 0);
      typename Base::Hyper h = hyper;
      if (row.group % 3 != 2) h.lr = wide[row.group];
      const typename Base::template Update<Wide> update(h, typename Base::Step(h, counts[r] + 1), scale);
      for (int64_t i = 0; i < row.numel; ++i) {
        Wide w = row.backup ? from[r][i] : before[r][i], state[kMaxStates] = {};
        const Wide start = w, g = get(row.dtype, row.grad, i);
        for (int k = 0; k < Base::states; ++k) state[k] = states[k][r][i];
        if (skip != 0) {
          expect(get(row.dtype, row.param, i) == start, "skipped", r, i);
          for (int k = 0; k < Base::states; ++k)
            expect(get(row.dtype, row.state[k], i) == state[k], "skipped state", r, i);
          continue;
        }
        update(w, g, state);
        near(row.dtype, get(row.dtype, row.param, i), w, std::abs(start) + std::abs(w - start), Base::name, r, i,
             limit);
        for (int k = 0; k < Base::states; ++k)
          near(row.dtype, get(row.dtype, row.state[k], i), state[k],
               std::abs(states[k][r][i]) + std::abs(g / Wide(scale)), Base::name, r, i, limit);
      }
    }
  }
}

void run(const std::vector<int64_t>& sizes, const std::vector<DType>& dtypes, int groups, int shift, bool apart) {
  memory.clear();
  const List list = make(sizes, dtypes, groups, shift, apart);
  ascend(list);
  for (int b = 0; b < static_cast<int>(std::tuple_size_v<Bases>); ++b)
    with_base(b, [&]<class Base>(Base) { descend<Base>(list, b); });
}

}  // namespace

// Of a step with Adam.
size_t launches_for(int tensors) {
  List list = make(std::vector<int64_t>(tensors, 2), {DType::kFloat}, 1, 0, false);
  for (Row& row : list.table)
    for (void*& state : row.state) state = tensor(row, 0, Kind::kSquare);
  const size_t before = emulation::launches;
  auto* doubles = static_cast<double*>(allocate(6 * sizeof(double)));
  cuda_backend.grad_sq_norm(queue, list.table, list.ascent.data(), 1, doubles);
  cuda_backend.sharpness(queue, doubles, list.ascent.data(), 1, nullptr, doubles + 1, doubles + 3);
  cuda_backend.perturb(queue, list.table, list.ascent.data(), doubles + 5, false);
  for (int b = 0; b < static_cast<int>(std::tuple_size_v<Bases>); ++b)
    with_base(b, [&]<class Base>(Base) {
      const auto hyper = hyper_of<Base>();
      const Rate rate;
      if (std::string(Base::name) == "adam")
        cuda_backend.restore_step(queue, list.table, b, reinterpret_cast<const double*>(&hyper), &rate, nullptr,
                                  nullptr, nullptr);
    });
  return emulation::launches - before;
}

// With "quick" only what a thread sanitizer has the time for; with a number, the launches for so many tensors.
int main(int argc, char** argv) {
  using enum DType;
  if (argc > 1 && std::atoi(argv[1]) > 0) {
    for (int i = 1; i < argc; ++i) std::printf("%zu\n", launches_for(std::atoi(argv[i])));
    return 0;
  }
  const int64_t c = kChunk;
  std::vector<int64_t> sizes = {1, 0, 5, c - 1, c, c + 1, 7, 33, 2 * c + 9, 64, 0};
  for (int i = 0; i < 30; ++i) sizes.push_back(i * 3 % 41);
  try {
#ifndef HAS_NO_LAUNCHES
    expect_launches();
#endif
    if (argc > 1) {
      run({2 * c + 9, 1, 0, 5}, {kFloat, kHalf}, 2, 0, false);
      run({c + 1, 17}, {kFloat, kHalf}, 1, 1, true);
      extreme_norms({kFloat, kHalf});
      return failed;
    }
    for (const DType dtype : {kFloat, kDouble, kBFloat16, kHalf}) {
      run(sizes, {dtype}, 2, 0, false);
      run(sizes, {dtype}, 2, 1, false);
      run({3, c + 1, 17}, {dtype}, 1, 0, true);
    }
    run(sizes, {kFloat, kBFloat16, kDouble, kHalf}, 5, 0, false);
    run({0, 0}, {kFloat}, 2, 0, false);
    extreme_norms({kFloat, kDouble, kBFloat16, kHalf});
    run(std::vector<int64_t>(1300, 3), {kFloat}, 1100, 0, false);  // more rows and groups than fit into one launch
  } catch (const std::exception& e) {
    std::printf("%s\n", e.what());
    return 1;
  }
  for (const Format& f : formats) std::printf("%s: largest error %.3f ulp\n", f.name, f.worst);
  return failed;
}
