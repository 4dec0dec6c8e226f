// Runs CUDA kernels on the CPU: put this directory first on the include path, and g++ compiles a
// .cu file as it is. A CUDA thread is a fiber. See README.md for what that shows and what it can't.
//
//  * Between barriers the threads of a block run in random order (cpucuda_seed), and so do blocks.
//  * __shared__ is thread_local storage, NaN at the start of every block. The blocks of an ordinary
//    launch run one after another; those of a cooperative one each have a thread of the CPU's.
//  * A barrier that only some threads reach aborts, with its line.
//  * With the kernels compiled by -fsanitize=thread and linked to racecheck.cpp, every access is
//    checked against the barriers, whatever the order was.
//  * cpucuda_skip(line) makes the barrier in that line do nothing.
#pragma once
#include <link.h>
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <random>
#include <thread>
#include <tuple>
#include <vector>

// --- the part of the CUDA language and runtime that the kernels use ------------------------------

#define __global__
#define __device__
#define __shared__ thread_local
#define __launch_bounds__(...)

struct uint3 {
  unsigned x, y, z;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline thread_local constinit uint3 threadIdx{}, blockIdx{};
inline thread_local constinit dim3 blockDim{}, gridDim{};

using cudaStream_t = struct CUstream_st*;
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorCooperativeLaunchTooLarge = 82
};
enum cudaLaunchAttributeID { cudaLaunchAttributeCooperative = 2 };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int cooperative;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;  // must be 0
  cudaStream_t stream;      // ignored
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16 };

// --- fibers and barriers ------------------------------------------------------------------------

namespace cpucuda {

#define CPUCUDA_NOSAN __attribute__((no_sanitize("thread")))  // the scheduler is not checked

// Who runs now, for racecheck.cpp: `on` while kernel code runs; how many barriers of the grid, the
// block and the warp it has passed; its stack, which is private.
struct Now {
  uint32_t launch = 0;
  int block = -1, thread = -1;
  uint32_t grid_barriers = 0, block_barriers = 0, warp_barriers = 0;
  bool on = false;
  const char *stack_begin = nullptr, *stack_end = nullptr;
};

struct Block;
// All thread_local state of this file, so that poison() can keep it.
struct PerThread {
  Now now;
  Block* block;
  std::mt19937* rng;
  char *shared_begin, *shared_end;
};
inline thread_local constinit PerThread self{};

inline int multiprocessors = 4;  // each holds one block at a time
inline int skipped_line = 0;
inline uint32_t launches = 0;

[[noreturn]] inline void die(const char* what, int line = 0, int other_line = 0) {
  std::fprintf(stderr, "cpucuda: %s (line %d / %d) in block (%u,%u,%u)\n", what, line, other_line,
               blockIdx.x, blockIdx.y, blockIdx.z);
  std::abort();
}

inline std::mt19937& rng() {  // never freed: poison() would overwrite its owner
  if (!self.rng) self.rng = new std::mt19937(1);
  return *self.rng;
}

// __shared__ lives in this module's thread-local segment. A callback for dl_iterate_phdr.
inline int find_shared(dl_phdr_info* info, size_t, void*) {
  char* const begin = static_cast<char*>(info->dlpi_tls_data);
  char* const own = reinterpret_cast<char*>(&self);
  for (int i = 0; begin && i < info->dlpi_phnum; i++) {
    const auto& segment = info->dlpi_phdr[i];
    if (segment.p_type != PT_TLS || own < begin || own >= begin + segment.p_memsz) continue;
    self.shared_begin = begin;
    self.shared_end = begin + segment.p_memsz;
    return 1;
  }
  return 0;
}

inline void poison() {
  if (!self.shared_begin) dl_iterate_phdr(find_shared, nullptr);
  const PerThread kept = self;
  if (!kept.shared_begin) die("the thread-local segment was not found");
  std::memset(kept.shared_begin, 0xFF, kept.shared_end - kept.shared_begin);
  self = kept;
}

enum class State : char { READY, AT_WARP, AT_BLOCK, AT_GRID, DONE };

struct Fiber {
  ucontext_t context;
  jmp_buf jump;
  bool started;
  uint3 index;
  State state;
  int line;
  unsigned mask;
  Now now;
  int parity;         // a shuffle's slot alternates, so that one meeting of the lanes is enough
  char slots[2][16];
};

struct GridBarrier {
  std::mutex mutex;
  std::condition_variable all_in;
  unsigned blocks, waiting = 0, generation = 0;
  explicit GridBarrier(unsigned blocks) : blocks(blocks) {}
  void wait() {
    std::unique_lock<std::mutex> lock(mutex);
    const unsigned mine = generation;
    if (++waiting == blocks) {
      waiting = 0;
      generation++;
      all_in.notify_all();
    } else {
      all_in.wait(lock, [&] { return generation != mine; });
    }
  }
};

constexpr size_t STACK = 1 << 18;

struct Block {
  std::vector<Fiber> fibers;
  std::vector<int> ready;
  ucontext_t home;
  jmp_buf home_jump;
  Fiber* current = nullptr;
  char* stacks;
  GridBarrier* grid;
  void (*body)(void*);
  void* argument;

  explicit Block(int threads) : fibers(threads) {
    void* memory = mmap(nullptr, STACK * threads, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) die("no memory for the stacks of the fibers");
    stacks = static_cast<char*>(memory);
  }
  ~Block() { munmap(stacks, STACK * fibers.size()); }
};

#if defined(__SANITIZE_ADDRESS__) || (defined(_FORTIFY_SOURCE) && _FORTIFY_SOURCE > 0)
CPUCUDA_NOSAN inline void to_fiber(Block& b, Fiber& f) { swapcontext(&b.home, &f.context); }
CPUCUDA_NOSAN inline void to_home(Block& b, Fiber& f) { swapcontext(&f.context, &b.home); }
#else  // the same without two system calls a switch
CPUCUDA_NOSAN inline void to_fiber(Block& b, Fiber& f) {
  if (_setjmp(b.home_jump) != 0) return;
  if (f.started) _longjmp(f.jump, 1);
  f.started = true;
  setcontext(&f.context);
}
CPUCUDA_NOSAN inline void to_home(Block& b, Fiber& f) {
  if (_setjmp(f.jump) == 0) _longjmp(b.home_jump, 1);
}
#endif

CPUCUDA_NOSAN inline void entry() {
  Block& b = *self.block;
  self.now.on = true;
  b.body(b.argument);
  self.now.on = false;
  b.current->state = State::DONE;
  to_home(b, *b.current);
}

// A fiber stops until the scheduler says that everybody is there.
CPUCUDA_NOSAN inline void wait(State state, int line) {
  if (line == skipped_line) return;
  Block& b = *self.block;
  Fiber& f = *b.current;
  self.now.on = false;
  f.state = state;
  f.line = line;
  to_home(b, f);
  threadIdx = f.index;
  self.now = f.now;
  self.now.on = true;
}

CPUCUDA_NOSAN inline void run_ready(Block& b) {
  while (!b.ready.empty()) {
    const size_t pick = (uint64_t(rng()()) * b.ready.size()) >> 32;
    std::swap(b.ready[pick], b.ready.back());
    b.current = &b.fibers[b.ready.back()];
    b.ready.pop_back();
    threadIdx = b.current->index;
    self.now = b.current->now;
    to_fiber(b, *b.current);
    self.now.on = false;
  }
}

CPUCUDA_NOSAN inline void run_block(Block& b, int block, uint32_t launch) {
  const int n = b.fibers.size();
  self.block = &b;
  b.ready.resize(n);  // the block before has left it empty
  for (int i = 0; i < n; i++) {
    Fiber& f = b.fibers[i];
    f.started = false;
    f.state = State::READY;
    f.parity = 0;
    f.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y)};
    f.now = Now{launch, block, i, 0, 0, 0, false, b.stacks + i * STACK, b.stacks + (i + 1) * STACK};
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = b.stacks + i * STACK;
    f.context.uc_stack.ss_size = STACK;
    f.context.uc_link = nullptr;
    makecontext(&f.context, entry, 0);
    b.ready[i] = i;
  }
  for (;;) {
    run_ready(b);  // until nobody can go on: a barrier, or the end
    int waiting = 0, line = 0;
    State state = State::DONE;
    for (const Fiber& f : b.fibers) {
      if (f.state == State::DONE) continue;
      if (f.state == State::AT_WARP) die("not all lanes reach a barrier of their warp", f.line);
      if (waiting++ == 0) {
        state = f.state;
        line = f.line;
      } else if (f.state != state || f.line != line) {
        die("threads of one block wait at different barriers", line, f.line);
      }
    }
    if (waiting == 0) break;
    if (waiting < n) die("threads have returned that a barrier waits for", line);
    if (state == State::AT_GRID) b.grid->wait();
    for (int i = 0; i < n; i++) {
      Fiber& f = b.fibers[i];
      f.state = State::READY;
      f.now.block_barriers++;
      if (state == State::AT_GRID) f.now.grid_barriers++;
      b.ready.push_back(i);
    }
  }
  self.now = Now{};
}

// The lanes of `mask` meet; memory is ordered by __syncwarp, not by a shuffle.
CPUCUDA_NOSAN inline void meet(unsigned mask, int line, bool orders_memory) {
  self.now.on = false;
  Block& b = *self.block;
  const int n = b.fibers.size(), me = b.current - b.fibers.data(), first = me & ~31;
  if (!(mask >> (me & 31) & 1)) die("a barrier of a warp by a lane outside its mask", line);
  b.current->state = State::AT_WARP;
  b.current->mask = mask;
  b.current->line = line;
  const auto each_lane = [&](auto visit) {
    for (int lane = 0; lane < 32 && first + lane < n; lane++) {
      if (mask >> lane & 1) visit(b.fibers[first + lane], first + lane);
    }
  };
  bool all = true;
  uint32_t passed = 0;
  each_lane([&](Fiber& f, int) {
    all = all && f.state == State::AT_WARP && f.mask == mask && f.line == line;
    passed = std::max(passed, f.now.warp_barriers);
  });
  if (!all) return wait(State::AT_WARP, line);
  each_lane([&](Fiber& f, int i) {
    f.state = State::READY;
    f.now.warp_barriers = passed + orders_memory;
    if (&f != b.current) b.ready.push_back(i);
  });
  self.now = b.current->now;
  self.now.on = true;
}

CPUCUDA_NOSAN inline void sync_warp(int line) {
  if (line != skipped_line) meet(0xffffffffu, line, true);
}

// What `value` is in the lane that `source` gives for the calling thread's number in the block.
template <class T, class Source>
CPUCUDA_NOSAN T shuffle(unsigned mask, T value, Source source, int line) {
  static_assert(sizeof(T) <= sizeof(Fiber::slots[0]));
  Block& b = *self.block;
  self.now.on = false;
  Fiber& f = *b.current;
  const int parity = f.parity ^= 1;
  std::memcpy(f.slots[parity], &value, sizeof(T));
  meet(mask, line, false);
  self.now.on = false;
  const size_t other = source(&f - b.fibers.data());
  if (other < b.fibers.size()) std::memcpy(&value, b.fibers[other].slots[parity], sizeof(T));
  self.now.on = true;
  return value;
}

template <class Body>
CPUCUDA_NOSAN cudaError_t run_grid(dim3 grid, dim3 block, bool cooperative, Body body) {
  const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
  const uint64_t threads = uint64_t(block.x) * block.y * block.z;
  if (!blocks || !threads || threads > 1024 || grid.y > 65535 || grid.z > 65535)
    return cudaErrorInvalidConfiguration;
  if (cooperative && blocks > uint64_t(multiprocessors)) return cudaErrorCooperativeLaunchTooLarge;
  const uint32_t launch = ++launches;
  std::vector<uint32_t> order(blocks);
  for (uint32_t i = 0; i < blocks; i++) order[i] = i;
  std::shuffle(order.begin(), order.end(), rng());
  GridBarrier barrier(blocks);
  const auto run = [&](Block& b, uint32_t i) CPUCUDA_NOSAN {
    poison();
    gridDim = grid;
    blockDim = block;
    blockIdx = {i % grid.x, i / grid.x % grid.y, i / (grid.x * grid.y)};
    b.grid = cooperative ? &barrier : nullptr;
    b.body = [](void* p) { (*static_cast<Body*>(p))(); };
    b.argument = &body;
    run_block(b, i, launch);
  };
  if (cooperative) {
    std::vector<std::thread> running;
    for (uint32_t i : order) {
      running.emplace_back([&, i, seed = rng()()] {
        std::mt19937 own(seed);
        self.rng = &own;
        Block b(threads);
        run(b, i);
      });
    }
    for (auto& thread : running) thread.join();
  } else {
    Block b(threads);
    for (uint32_t i : order) run(b, i);
  }
  return cudaSuccess;
}

}  // namespace cpucuda

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments... arguments) {
  bool cooperative = false;
  for (unsigned i = 0; i < config->numAttrs; i++) {
    const auto& attribute = config->attrs[i];
    if (attribute.id == cudaLaunchAttributeCooperative) cooperative = attribute.val.cooperative;
  }
  if (config->dynamicSmemBytes) return cudaErrorInvalidConfiguration;
  const std::tuple<Parameters...> converted{static_cast<Parameters>(arguments)...};
  return cpucuda::run_grid(config->gridDim, config->blockDim, cooperative,
                           [&] { std::apply(kernel, converted); });
}

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = cpucuda::multiprocessors;
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, size_t) {
  *blocks = 1;
  return cudaSuccess;
}

#define __syncthreads() cpucuda::wait(cpucuda::State::AT_BLOCK, __LINE__)
#define __syncwarp() cpucuda::sync_warp(__LINE__)
#define __shfl_xor_sync(mask, value, lanes) \
  cpucuda::shuffle(mask, value, [&](size_t thread) { return thread ^ (lanes); }, __LINE__)
#define __shfl_sync(mask, value, lane) \
  cpucuda::shuffle(mask, value, [&](size_t thread) { return (thread & ~31) + (lane); }, __LINE__)

template <class T>
T __ldcs(const T* address) {
  return *address;
}
template <class To, class From>
To cpucuda_bits(From value) {
  To result;
  static_assert(sizeof(To) == sizeof(From));
  std::memcpy(&result, &value, sizeof(To));
  return result;
}
inline double __hiloint2double(int high, int low) {
  return cpucuda_bits<double>(uint64_t(uint32_t(high)) << 32 | uint32_t(low));
}
inline long long __double_as_longlong(double value) { return cpucuda_bits<long long>(value); }
inline double __longlong_as_double(long long bits) { return cpucuda_bits<double>(bits); }

// --- for the tests ------------------------------------------------------------------------------

#define CPUCUDA_EXPORT extern "C" __attribute__((used)) inline
CPUCUDA_EXPORT void cpucuda_seed(unsigned seed) { cpucuda::rng().seed(seed); }
CPUCUDA_EXPORT void cpucuda_skip(int line) { cpucuda::skipped_line = line; }
CPUCUDA_EXPORT void cpucuda_multiprocessors(int n) { cpucuda::multiprocessors = n; }
CPUCUDA_EXPORT unsigned cpucuda_launches() { return cpucuda::launches; }
