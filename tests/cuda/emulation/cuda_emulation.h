// CUDA on the CPU, as much of it as csrc/cuda.cu uses: its kernels run in tests where there is no GPU.
//
// A launch copies its arguments, as a driver does, and waits for synchronize(). Every thread of a block is a fiber;
// blocks run one after another. EMULATION_ORDER says in which order threads and blocks go: 0 as numbered, 1 from the
// end, another number is the seed of a random order. What a launch gets wrong is an exception: sizes, divergent
// barriers, shuffles with lanes that are elsewhere. With EMULATION_OLD_DRIVER the driver is one from before CUDA 12.1,
// which takes 4,096 bytes of arguments. With EMULATION_FAILS_IN=k, k launches go well from when it is set, and the next
// one fails.
// Shared memory is a heap block of its exact size, filled with NaN. With -fsanitize=address an overrun is found. With
// -fsanitize=thread no switch between fibers counts as synchronisation, only barriers and launches do, so that a
// missing barrier, or a conflict between blocks, is a data race whatever the order was.
// What it cannot show: the memory model of a GPU, progress, streams, graphs, occupancy and speed.
#pragma once
#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define EMULATION_ASAN(...) __VA_ARGS__
#else
#define EMULATION_ASAN(...)
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#define EMULATION_TSAN(...) __VA_ARGS__
#define EMULATION_FN __attribute__((no_sanitize_thread, noinline)) inline
#else
#define EMULATION_TSAN(...)
#define EMULATION_FN inline
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#define __global__
#define __device__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

namespace emulation {

// ---- contexts ----

constexpr size_t kStack = 256 * 1024;

#if defined(__x86_64__)
// swapcontext makes two system calls; this is some twenty times as fast.
extern "C" void emulation_switch(void** from, void* to);
__asm__(
    ".weak emulation_switch\n.type emulation_switch,@function\nemulation_switch:\n"
    "push %rbp\npush %rbx\npush %r12\npush %r13\npush %r14\npush %r15\n"
    "mov %rsp,(%rdi)\nmov %rsi,%rsp\n"
    "pop %r15\npop %r14\npop %r13\npop %r12\npop %rbx\npop %rbp\nret\n");

struct Context {
  void* stack_pointer = nullptr;
};
EMULATION_FN void make_context(Context& context, char* stack, size_t bytes, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack + bytes - 64);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  context.stack_pointer = top;
}
EMULATION_FN void switch_context(Context& from, Context& to) {
  emulation_switch(&from.stack_pointer, to.stack_pointer);
}
#else
struct Context {
  ucontext_t context;
};
inline void make_context(Context& context, char* stack, size_t bytes, void (*entry)()) {
  getcontext(&context.context);
  context.context.uc_stack.ss_sp = stack;
  context.context.uc_stack.ss_size = bytes;
  context.context.uc_link = nullptr;
  makecontext(&context.context, entry, 0);
}
inline void switch_context(Context& from, Context& to) { swapcontext(&from.context, &to.context); }
#endif

// ---- threads and blocks ----

struct Index {
  unsigned x;
};

enum class State { kReady, kAtBarrier, kInShuffle, kDone };

struct Thread {
  Context context;
  char* stack = nullptr;
  unsigned index = 0;
  State state = State::kDone;
  int line = 0;  // where it waits
  double given = 0, taken = 0;
  unsigned source = 0;
  void* asan_stack = nullptr;
  void* tsan_fiber = nullptr;
};

struct Shared {
  const void* key = nullptr;
  size_t bytes = 0;
  char* memory = nullptr;
};

struct Block {
  unsigned index = 0, threads = 0;
  const std::function<void()>* body = nullptr;
  Shared shared[8];
  Shared wanted;
  char* barrier = nullptr;  // an address for the thread sanitizer, of this block alone
};

inline std::vector<Thread> pool(1024);
inline Thread* current = nullptr;
inline Block* block = nullptr;
inline Context scheduler;
inline void* scheduler_fiber = nullptr;
inline const void* scheduler_stack = nullptr;
inline size_t scheduler_stack_size = 0;
inline std::exception_ptr error;
inline std::vector<char*> garbage;
inline std::vector<std::pair<void*, char*>> fibers;  // of the thread sanitizer, with their stacks
inline size_t launches = 0, blocks_run = 0;
alignas(8) inline char launch_begin = 0;
alignas(8) inline char launch_end = 0;

[[noreturn]] inline void fail(const std::string& what) { throw std::runtime_error("CUDA emulation: " + what); }

inline std::string place(const Thread& t) {
  return "thread " + std::to_string(t.index) + " in line " + std::to_string(t.line);
}

inline char* new_stack(size_t bytes = kStack) {
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) std::abort();
  return static_cast<char*>(p);
}

EMULATION_FN Index thread_index() { return {current->index}; }
EMULATION_FN Index block_index() { return {block->index}; }
EMULATION_FN Index block_size() { return {block->threads}; }

EMULATION_FN void to_scheduler(bool dying = false) {
  Thread* me = current;
  (void)dying;
  EMULATION_ASAN(
      __sanitizer_start_switch_fiber(dying ? nullptr : &me->asan_stack, scheduler_stack, scheduler_stack_size);)
  EMULATION_TSAN(__tsan_switch_to_fiber(scheduler_fiber, 1);)
  switch_context(me->context, scheduler);
  EMULATION_ASAN(__sanitizer_finish_switch_fiber(me->asan_stack, &scheduler_stack, &scheduler_stack_size);)
}

EMULATION_FN void thread_entry() {
  EMULATION_ASAN(__sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_size);)
  EMULATION_TSAN(__tsan_acquire(&launch_begin);)
  try {
    (*block->body)();
  } catch (...) {
    if (!error) error = std::current_exception();
  }
  EMULATION_TSAN(__tsan_release(&launch_end);)
  current->state = State::kDone;
  to_scheduler(true);
}

EMULATION_FN void run_thread(Thread& t) {
  current = &t;
  EMULATION_ASAN(void* fake; __sanitizer_start_switch_fiber(&fake, t.stack, kStack);)
  EMULATION_TSAN(__tsan_switch_to_fiber(t.tsan_fiber, 1);)
  switch_context(scheduler, t.context);
  EMULATION_ASAN(__sanitizer_finish_switch_fiber(fake, nullptr, nullptr);)
}

// ---- what kernels call ----

EMULATION_FN void barrier(int line) {
  current->line = line;
  current->state = State::kAtBarrier;
  EMULATION_TSAN(__tsan_release(block->barrier);)
  to_scheduler();
  EMULATION_TSAN(__tsan_acquire(block->barrier);)
}

EMULATION_FN double shuffle_down(int line, unsigned mask, double x, unsigned delta) {
  if (mask != 0xffffffffu) fail("a shuffle of part of a warp, in line " + std::to_string(line));
  const unsigned lane = current->index % 32;
  current->line = line;
  current->given = x;
  current->source = lane + delta < 32 ? current->index + delta : current->index;
  current->state = State::kInShuffle;
  to_scheduler();
  return current->taken;
}

// One piece of memory a block and a call site. The scheduler allocates it, so that no thread has touched it before.
EMULATION_FN char* shared(const void* key, size_t bytes) {
  for (;;) {
    for (const Shared& s : block->shared)
      if (s.key == key) {
        EMULATION_TSAN(__tsan_acquire(block->barrier + 8);)
        return s.memory;
      }
    block->wanted.key = key;
    block->wanted.bytes = bytes;
    to_scheduler();
  }
}

// ---- the scheduler ----

EMULATION_FN void allocate_wanted() {
  size_t bytes = block->wanted.bytes;
  int k = 0;
  for (; k < 8 && block->shared[k].key; ++k) bytes += block->shared[k].bytes;
  if (k == 8 || bytes > 48 * 1024) fail("more than 8 arrays or 48 KB of shared memory in one block");
  Shared& s = block->shared[k];
  s.key = block->wanted.key;
  s.bytes = block->wanted.bytes;
  s.memory = static_cast<char*>(std::malloc(s.bytes));
  std::memset(s.memory, 0xff, s.bytes);
  garbage.push_back(s.memory);
  block->wanted.key = nullptr;
  EMULATION_TSAN(__tsan_release(block->barrier + 8);)
}

// Ends the shuffles of every warp whose lanes are all there; returns whether there was one.
EMULATION_FN bool release_warps() {
  bool any = false;
  for (unsigned first = 0; first < block->threads; first += 32) {
    Thread* lanes = &pool[first];
    const unsigned n = std::min(32u, block->threads - first);
    unsigned waiting = 0;
    for (unsigned i = 0; i < n; ++i) waiting += lanes[i].state == State::kInShuffle;
    if (waiting == 0) continue;
    for (unsigned i = 0; i < n; ++i)
      if (lanes[i].state == State::kDone) fail("a shuffle with a lane that has ended: " + place(lanes[i]));
    if (n < 32) fail("a shuffle in a warp of fewer than 32 threads");
    if (waiting < n) continue;
    for (unsigned i = 0; i < n; ++i)
      if (lanes[i].line != lanes[0].line) fail("divergent shuffles: " + place(lanes[0]) + " and " + place(lanes[i]));
    for (unsigned i = 0; i < n; ++i) lanes[i].taken = pool[lanes[i].source].given;
    for (unsigned i = 0; i < n; ++i) lanes[i].state = State::kReady;
    any = true;
  }
  return any;
}

EMULATION_FN void run_block(const std::vector<unsigned>& order) {
  for (;;) {
    bool ran = false;
    for (const unsigned i : order) {
      Thread& t = pool[i];
      if (t.state != State::kReady) continue;
      ran = true;
      run_thread(t);
      while (block->wanted.key && !error) {
        allocate_wanted();
        run_thread(t);
      }
      if (error) return;
    }
    if (release_warps() || ran) continue;
    const Thread* waiting = nullptr;
    for (unsigned i = 0; i < block->threads; ++i) {
      Thread& t = pool[i];
      if (t.state == State::kInShuffle) fail("a shuffle that never ends: " + place(t));
      if (t.state != State::kAtBarrier) continue;
      if (waiting && waiting->line != t.line) fail("divergent barriers: " + place(*waiting) + " and " + place(t));
      waiting = &t;
    }
    if (!waiting) return;
    for (unsigned i = 0; i < block->threads; ++i) {
      if (pool[i].state == State::kDone) fail("a barrier that a thread does not reach: " + place(*waiting));
      pool[i].state = State::kReady;
    }
  }
}

EMULATION_FN void start_thread(Thread& t, unsigned index) {
#if defined(__SANITIZE_THREAD__)
  // Blocks that follow each other take other fibers, or the sanitizer would think them ordered.
  const size_t id = blocks_run % 8 * 1024 + index;
  while (fibers.size() <= id) fibers.emplace_back(__tsan_create_fiber(0), new_stack());
  std::tie(t.tsan_fiber, t.stack) = fibers[id];
#else
  if (!t.stack) t.stack = new_stack();
#endif
  // Frames that never returned: the outermost, and all of them in a thread that did not end.
  EMULATION_ASAN(const size_t left = t.state == State::kDone ? 8192 : kStack;
                 __asan_unpoison_memory_region(t.stack + kStack - left, left);)
  t.index = index;
  t.state = State::kReady;
  t.asan_stack = nullptr;
  make_context(t.context, t.stack, kStack, thread_entry);
}

EMULATION_FN void run_grid(unsigned blocks, unsigned threads, const std::function<void()>& body) {
  const char* text = std::getenv("EMULATION_ORDER");
  const int seed = text ? std::atoi(text) : 0;
  std::mt19937 random(seed);
  std::vector<unsigned> thread_order(threads), block_order(blocks);
  for (auto* order : {&thread_order, &block_order}) {
    std::iota(order->begin(), order->end(), 0);
    if (seed == 1) std::reverse(order->begin(), order->end());
    if (seed > 1) std::shuffle(order->begin(), order->end(), random);
  }
  EMULATION_TSAN(scheduler_fiber = __tsan_get_current_fiber(); __tsan_release(&launch_begin);)
  for (const unsigned b : block_order) {
    Block now;
    now.index = b;
    now.threads = threads;
    now.body = &body;
    block = &now;
    ++blocks_run;
    EMULATION_TSAN(garbage.push_back(now.barrier = static_cast<char*>(std::malloc(16)));)
    if (seed > 1) std::shuffle(thread_order.begin(), thread_order.end(), random);
    for (unsigned i = 0; i < threads; ++i) start_thread(pool[i], i);
    try {
      run_block(thread_order);
    } catch (...) {
      if (!error) error = std::current_exception();
    }
    block = nullptr;
    current = nullptr;
    if (error) break;
  }
  EMULATION_TSAN(__tsan_acquire(&launch_end);)
  for (char* p : garbage) std::free(p);
  garbage.clear();
  if (error) std::rethrow_exception(std::exchange(error, nullptr));
}

// ---- launches ----

struct Launch {
  const void* kernel;
  unsigned blocks, threads;
  void* stream;
  std::vector<std::vector<char>> arguments;  // their bytes
  std::function<void(const Launch&)> call;   // the kernel, in one thread
};

inline std::vector<Launch> queued;

template <class P>
std::vector<char> bytes_of_argument(const P& value) {
  static_assert(std::is_trivially_copyable_v<std::remove_cvref_t<P>>, "an argument is copied byte by byte");
  const char* bytes = reinterpret_cast<const char*>(&value);
  return {bytes, bytes + sizeof value};
}

template <class... P, class... A>
void enqueue(void (*kernel)(P...), unsigned blocks, unsigned threads, void* stream, const A&... args) {
  ++launches;
  const auto call = [kernel]<size_t... I>(const Launch& launch, std::index_sequence<I...>) {
    kernel(*reinterpret_cast<const std::remove_cvref_t<P>*>(launch.arguments[I].data())...);
  };
  queued.push_back({reinterpret_cast<const void*>(kernel),
                    blocks,
                    threads,
                    stream,
                    {bytes_of_argument<P>(args)...},
                    [call](const Launch& launch) { call(launch, std::index_sequence_for<P...>()); }});
}

inline bool fails_now() {
  static std::string last;
  static int left = -1;
  const char* text = std::getenv("EMULATION_FAILS_IN");
  const std::string now = text ? text : "";
  if (now != last) left = now.empty() ? -1 : std::stoi(now);
  last = now;
  return left >= 0 && left-- == 0;
}

// Runs what is queued, in its order.
inline void synchronize() {
  for (const Launch& launch : std::exchange(queued, {}))
    run_grid(launch.blocks, launch.threads, [&] { launch.call(launch); });
}

// f() on a stack of its own, which nothing can read when f has returned.
inline const std::function<void()>* host_body = nullptr;
inline Context host_context, host_caller;
constexpr size_t kHostStack = 8 * 1024 * 1024;

EMULATION_FN void host_entry() {
  EMULATION_ASAN(__sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_size);)
  try {
    (*host_body)();
  } catch (...) {
    error = std::current_exception();
  }
  EMULATION_ASAN(__sanitizer_start_switch_fiber(nullptr, scheduler_stack, scheduler_stack_size);)
  switch_context(host_context, host_caller);
}

EMULATION_FN void on_own_stack(const std::function<void()>& f) {
  static char* const stack = new_stack(kHostStack);
  if (mprotect(stack, kHostStack, PROT_READ | PROT_WRITE) != 0) std::abort();
  EMULATION_ASAN(__asan_unpoison_memory_region(stack, kHostStack);)
  host_body = &f;
  make_context(host_context, stack, kHostStack, host_entry);
  EMULATION_ASAN(void* fake; __sanitizer_start_switch_fiber(&fake, stack, kHostStack);)
  switch_context(host_caller, host_context);
  EMULATION_ASAN(__sanitizer_finish_switch_fiber(fake, nullptr, nullptr);)
  if (mprotect(stack, kHostStack, PROT_NONE) != 0) std::abort();
  if (error) std::rethrow_exception(std::exchange(error, nullptr));
}

}  // namespace emulation

#define threadIdx (::emulation::thread_index())
#define blockIdx (::emulation::block_index())
#define blockDim (::emulation::block_size())
#define __syncthreads() ::emulation::barrier(__LINE__)
#define __shfl_down_sync(mask, x, delta) ::emulation::shuffle_down(__LINE__, mask, x, delta)

// All threads read the launch's one copy: a copy for each was more than half of the time.
#define SAM_CONSTANT(...) const __VA_ARGS__&
#define SAM_SHARED(T, name, n)                              \
  T* const name = reinterpret_cast<T*>(::emulation::shared( \
      [] {                                                  \
        static const char key = 0;                          \
        return &key;                                        \
      }(),                                                  \
      sizeof(T) * (n)))

namespace sam {
namespace {

bool takes_large_arguments() { return std::getenv("EMULATION_OLD_DRIVER") == nullptr; }

template <int kBytes = kSmall, class... P, class... A>
void launch(const char* /*name*/, void (*kernel)(P...), int64_t blocks, int threads, void* stream, const A&... args) {
  static_assert(bytes_of<P...>() <= kBytes, "more bytes of kernel arguments than a driver takes");
  if (bytes_of<P...>() > (takes_large_arguments() ? 32764 : 4096))
    emulation::fail("an old driver, and a launch with " + std::to_string(bytes_of<P...>()) + " bytes of arguments");
  if (blocks < 1 || blocks > 0x7fffffff) emulation::fail("a launch of " + std::to_string(blocks) + " blocks");
  if (threads < 1 || threads > 1024) emulation::fail("a launch of " + std::to_string(threads) + " threads a block");
  if (emulation::fails_now()) emulation::fail("a kernel launch that fails, as EMULATION_FAILS_IN says");
  emulation::enqueue(kernel, static_cast<unsigned>(blocks), threads, stream, args...);
}

void copy_kernel(void* to, const void* from, size_t bytes) { memcpy(to, from, bytes); }
void copy_on_device(void* to, const void* from, size_t bytes, void* stream) {
  emulation::enqueue(copy_kernel, 1, 1, stream, to, from, bytes);
}

}  // namespace
}  // namespace sam
