// A race detector for kernels that cuda_runtime.h runs. Compile the kernels with -fsanitize=thread
// and this file without, and link without -fsanitize=thread: the calls that the compiler put at
// each access then arrive here, not in its own runtime, which knows nothing of fibers.
//
// Two accesses to one cell of 2 bytes by different CUDA threads of one launch, one of them a write,
// are a race unless a barrier lies between them: __syncwarp within a warp, __syncthreads within a
// block, grid.sync() between blocks. So is a read of __shared__ memory that the block never wrote.
#include <map>
#include <unordered_map>

#include "cuda_runtime.h"

namespace {

using cpucuda::Now;

struct Access {
  uint32_t launch = 0;
  int block = -1, thread = -1;
  uint32_t grid_barriers = 0, block_barriers = 0, warp_barriers = 0;
  void* pc = nullptr;
};
// The last write and the last read, a read before it by another thread, and one by another block.
struct Cell {
  Access write, read, read_by_other_thread, read_by_other_block;
};

std::mutex mutex;
std::unordered_map<uintptr_t, Cell>* cells;
std::map<std::pair<void*, void*>, long>* reported;
long races = 0;

bool ordered(const Access& old, const Now& now) {
  if (!old.pc || old.launch != now.launch) return true;
  if (old.block != now.block) return old.grid_barriers < now.grid_barriers;
  if (old.thread == now.thread || old.block_barriers < now.block_barriers) return true;
  return old.thread / 32 == now.thread / 32 && old.warp_barriers < now.warp_barriers;
}

void report(const char* what, const void* address, const Access& old, const Now& now, void* pc) {
  races++;
  if ((*reported)[{old.pc, pc}]++) return;
  std::fprintf(stderr, "%s at %p: block %d thread %d (pc %p) and block %d thread %d (pc %p)\n",
               what, address, old.block, old.thread, old.pc, now.block, now.thread, pc);
}

void check(const void* address, unsigned size, bool write, void* pc) {
  Now& now = cpucuda::self.now;
  const char* const c = static_cast<const char*>(address);
  const auto within = [c](const void* object, size_t bytes) {
    return c >= static_cast<const char*>(object) && c < static_cast<const char*>(object) + bytes;
  };
  if (!now.on || (c >= now.stack_begin && c < now.stack_end)) return;
  if (within(&threadIdx, sizeof threadIdx) || within(&blockIdx, sizeof blockIdx) ||
      within(&blockDim, sizeof blockDim) || within(&gridDim, sizeof gridDim) ||
      within(&cpucuda::self, sizeof cpucuda::self))
    return;
  now.on = false;
  const std::lock_guard<std::mutex> lock(mutex);
  if (!cells) {
    cells = new std::unordered_map<uintptr_t, Cell>;
    reported = new std::map<std::pair<void*, void*>, long>;
  }
  const bool shared = c >= cpucuda::self.shared_begin && c < cpucuda::self.shared_end;
  const Access access{now.launch,        now.block,          now.thread, now.grid_barriers,
                      now.block_barriers, now.warp_barriers, pc};
  const uintptr_t first = reinterpret_cast<uintptr_t>(address) >> 1;
  const uintptr_t last = (reinterpret_cast<uintptr_t>(address) + size - 1) >> 1;
  for (uintptr_t key = first; key <= last; key++) {
    Cell& cell = (*cells)[key];
    if (shared && (cell.write.block != now.block || cell.write.launch != now.launch))
      cell = Cell{};  // another block's use of the same storage
    if (shared && !write && !cell.write.pc)
      report("read of unwritten __shared__ memory", address, cell.write, now, pc);
    if (!ordered(cell.write, now))
      report(write ? "two writes" : "a write, then a read", address, cell.write, now, pc);
    if (write) {
      for (const Access* read :
           {&cell.read, &cell.read_by_other_thread, &cell.read_by_other_block}) {
        if (ordered(*read, now)) continue;
        report("a read, then a write", address, *read, now, pc);
        break;
      }
      cell.write = access;
    } else {
      if (cell.read.launch != now.launch) {
        cell.read_by_other_thread = cell.read_by_other_block = Access{};
      } else if (cell.read.block != now.block) {
        cell.read_by_other_block = cell.read;
      } else if (cell.read.thread != now.thread) {
        cell.read_by_other_thread = cell.read;
      }
      cell.read = access;
    }
  }
  now.on = true;
}

}  // namespace

extern "C" {
long cpucuda_races() { return races; }

#define CHECK_AS(name, size, write) \
  void __tsan_##name##size(void* p) { check(p, size, write, __builtin_return_address(0)); }
#define CHECK(size)                       \
  CHECK_AS(read, size, false)             \
  CHECK_AS(write, size, true)             \
  CHECK_AS(unaligned_read, size, false)   \
  CHECK_AS(unaligned_write, size, true)
CHECK(1)
CHECK(2)
CHECK(4)
CHECK(8)
CHECK(16)
void __tsan_read_range(void* p, size_t n) {
  if (n) check(p, n, false, __builtin_return_address(0));
}
void __tsan_write_range(void* p, size_t n) {
  if (n) check(p, n, true, __builtin_return_address(0));
}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
// The kernels have no atomics; those of the standard library in the scheduler are only carried out.
int __tsan_atomic32_fetch_add(volatile int* p, int v, int) {
  return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST);
}
int __tsan_atomic32_load(const volatile int* p, int) {
  return __atomic_load_n(p, __ATOMIC_SEQ_CST);
}
long __tsan_atomic64_fetch_add(volatile long* p, long v, int) {
  return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST);
}
char __tsan_atomic8_load(const volatile char* p, int) {
  return __atomic_load_n(p, __ATOMIC_SEQ_CST);
}
}
