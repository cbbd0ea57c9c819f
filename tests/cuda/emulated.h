// A GPU on a CPU: what generated CUDA source needs to compile as C++ and to run thread by thread.
//
// Threads of a block are fibers on one thread. Each runs until it waits for others: at
// __syncthreads for the block, at warp-wide instructions for its warp. A wait that never ends - a
// barrier that only some threads reach - ends the process with a message. The tensor-core
// instructions follow the PTX manual's fragment layouts: every lane hands in its registers, and
// each result is summed from what the lanes hold.
#pragma once
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <utility>

#define MPQC_EMULATED
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static

struct dim3_ { int x, y, z; };
static dim3_ threadIdx, blockIdx, blockDim, gridDim;

namespace emulated {

enum { MOST_THREADS = 1024, STACK = 128 * 1024, WARP = 32 };
enum wait { READY, BLOCK, LANES, DONE };

struct fiber {
  ucontext_t context;
  dim3_ index;
  wait state;
  unsigned calls;  // of warp-wide instructions
};
static fiber fibers[MOST_THREADS];
static ucontext_t scheduler;
static int current, threads;
static char* stacks;
static void (*entry)(void*);
static void* argument;
static bool serial;  // the kernel never waits: no fibers
static bool backwards;  // every other block runs its threads from the last: barriers are missed

struct lane_data { unsigned a[4], b[2]; int bit; };
static lane_data slots[MOST_THREADS][2];  // by thread and turn

inline void yield(wait state) {
  if (serial) std::fprintf(stderr, "a kernel without fibers waits\n"), std::abort();
  fibers[current].state = state;
  swapcontext(&fibers[current].context, &scheduler);
}

inline void body() {
  entry(argument);
  fibers[current].state = DONE;
  swapcontext(&fibers[current].context, &scheduler);
}

// Run the threads of a warp until all of them have ended or wait for the block: warps drift apart as
// far as barriers let them, so that a missing one is noticed.
inline void run_warp(int first) {
  for (;;) {
    for (int n = 0; n < WARP; n++) {
      const int t = first + (backwards ? WARP - 1 - n : n);
      if (t >= threads || fibers[t].state != READY) continue;
      current = t;
      threadIdx = fibers[t].index;
      swapcontext(&scheduler, &fibers[t].context);
    }
    bool together = true;
    for (int t = first; t < first + WARP; t++) together &= t < threads && fibers[t].state == LANES;
    if (!together) return;
    for (int t = first; t < first + WARP; t++) fibers[t].state = READY;
  }
}

inline void run_block() {
  threads = blockDim.x * blockDim.y * blockDim.z;
  if (threads > MOST_THREADS) std::fprintf(stderr, "too many threads\n"), std::abort();
  if (!stacks) stacks = static_cast<char*>(std::malloc(size_t(MOST_THREADS) * STACK));
  for (int t = 0; t < threads; t++) {
    fiber& f = fibers[t];
    f.index = {t % blockDim.x, t / blockDim.x % blockDim.y, t / (blockDim.x * blockDim.y)};
    f.state = READY;
    f.calls = 0;
    if (serial) {
      threadIdx = f.index;
      entry(argument);
      continue;
    }
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = stacks + size_t(t) * STACK;
    f.context.uc_stack.ss_size = STACK;
    f.context.uc_link = nullptr;
    makecontext(&f.context, body, 0);
  }
  if (serial) return;
  for (;;) {
    const int warps = (threads + WARP - 1) / WARP;
    for (int n = 0; n < warps; n++) run_warp(WARP * (backwards ? warps - 1 - n : n));
    int done = 0, blocked = 0;
    for (int t = 0; t < threads; t++) {
      done += fibers[t].state == DONE;
      blocked += fibers[t].state == BLOCK;
    }
    if (done == threads) return;
    if (blocked != threads) {
      std::fprintf(stderr, "block %d: a barrier that only some threads reach\n", blockIdx.x);
      std::abort();
    }
    for (int t = 0; t < threads; t++) fibers[t].state = READY;
  }
}

template <class... A, size_t... I>
void call(void (*kernel)(A...), const unsigned* grid, const unsigned* block, void** values, bool waits,
          std::index_sequence<I...>) {
  struct bound { void (*kernel)(A...); void** values; } self = {kernel, values};
  entry = [](void* p) {
    bound* b = static_cast<bound*>(p);
    b->kernel(*static_cast<A*>(b->values[I])...);
  };
  argument = &self;
  serial = !waits;
  gridDim = {int(grid[0]), int(grid[1]), int(grid[2])};
  blockDim = {int(block[0]), int(block[1]), int(block[2])};
  for (int z = 0; z < gridDim.z; z++)
    for (int y = 0; y < gridDim.y; y++)
      for (int x = 0; x < gridDim.x; x++) {
        blockIdx = {x, y, z};
        backwards = x % 2;
        run_block();
      }
}

template <class... A>
void call(void (*kernel)(A...), const unsigned* grid, const unsigned* block, void** values, bool waits) {
  call(kernel, grid, block, values, waits, std::index_sequence_for<A...>());
}

// Hand in this lane's data; when all lanes have, returns those of lane 0.
inline lane_data (*exchange(const lane_data& mine))[2] {
  const int turn = fibers[current].calls++ % 2, me = current;
  slots[me][turn] = mine;
  yield(LANES);
  return &slots[me / WARP * WARP];
}
inline int turn() { return (fibers[current].calls - 1) % 2; }

}  // namespace emulated

#define CUDART_INF_F HUGE_VALF
#define CUDART_NAN_F NAN
#define CUDART_INF HUGE_VAL
#define CUDART_NAN ((double)NAN)

inline void __syncthreads() { emulated::yield(emulated::BLOCK); }
inline void __syncwarp() { emulated::yield(emulated::LANES); }
inline unsigned __ballot_sync(unsigned, int bit) {
  auto lanes = emulated::exchange({{}, {}, bit != 0});
  unsigned result = 0;
  for (int l = 0; l < 32; l++) result |= unsigned(lanes[l][emulated::turn()].bit) << l;
  return result;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int atomicAdd(int* to, int value) { int old = *to; *to += value; return old; }

inline int max(int a, int b) { return a > b ? a : b; }
inline int min(int a, int b) { return a < b ? a : b; }
inline int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }
inline unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }
inline float max(float a, float b) { return fmaxf(a, b); }
inline float min(float a, float b) { return fminf(a, b); }
inline double max(double a, double b) { return fmax(a, b); }
inline double min(double a, double b) { return fmin(a, b); }

namespace mpqc {

// The PTX manual, "Matrix Fragments for mma.m16n8k256" and "mma.m16n8k32": both give a register
// of a to row lane / 4 (+ 8) and 32-bit column lane % 4 (+ 4), of b to column lane / 4.
template <class F>
inline void mma(int (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2], F product) {
  emulated::lane_data mine = {};
  std::memcpy(mine.a, a, sizeof mine.a);
  std::memcpy(mine.b, b, sizeof mine.b);
  auto lanes = emulated::exchange(mine);
  const int turn = emulated::turn(), lane = emulated::current % 32;
  for (int r = 0; r < 4; r++) {
    const int row = lane / 4 + (r >= 2 ? 8 : 0), column = lane % 4 * 2 + r % 2;
    for (int k = 0; k < 8; k++) {
      const unsigned x = lanes[row % 8 * 4 + k % 4][turn].a[(row >= 8 ? 1 : 0) + (k >= 4 ? 2 : 0)];
      const unsigned y = lanes[column * 4 + k % 4][turn].b[k >= 4 ? 1 : 0];
      c[r] += product(x, y);
    }
  }
}
inline int four_products(unsigned a, unsigned b) {
  int sum = 0;
  for (int i = 0; i < 32; i += 8) sum += int(a >> i & 255) * int(int8_t(b >> i & 255));
  return sum;
}
inline void mma_bits(int (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  mma(c, a, b, [](unsigned x, unsigned y) { return __popc(x & y); });
}
inline void mma_bytes(int (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  mma(c, a, b, four_products);
}
inline int dot_bytes(unsigned a, unsigned b, int c) { return c + four_products(a, b); }

}  // namespace mpqc
