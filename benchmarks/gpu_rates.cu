// Instruction rates of a GPU: nvcc -O3 -std=c++17 -arch=native gpu_rates.cu -o rates && ./rates
//
// Multiply-accumulates of one multiprocessor a cycle, for the instructions that our kernels are
// made of, each on enough independent sums to hide its latency; the clock while they ran; and the
// memory's bandwidth.
// Prints JSON.
#include <cstdio>

#include "../mpqc/csrc/cuda_kernels.cuh"

constexpr int TURNS = 2048, SUMS = 8, THREADS = 512;

struct bits_mma { static constexpr double macs = 16. * 8 * 256 / 32;
  static __device__ void go(int (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) { mpqc::mma_bits(c, a, b); } };
struct bytes_mma { static constexpr double macs = 16. * 8 * 32 / 32;
  static __device__ void go(int (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) { mpqc::mma_bytes(c, a, b); } };
struct dot { static constexpr double macs = 16;
  static __device__ void go(int (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    for (int i = 0; i < 4; i++) c[i] = mpqc::dot_bytes(a[i], b[i % 2], c[i]); } };
struct popcount { static constexpr double macs = 128;
  static __device__ void go(int (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    for (int i = 0; i < 4; i++) c[i] += __popc(a[i] & (b[i % 2] ^ (unsigned)c[i])); } };

template <class I>
__global__ void __launch_bounds__(THREADS) measure(long long* cycles, int* out, unsigned seed) {
  int c[SUMS][4] = {};
  unsigned a[4], b[2];
  for (int i = 0; i < 4; i++) a[i] = seed * (threadIdx.x + 7 * i + 1);
  for (int i = 0; i < 2; i++) b[i] = seed ^ (threadIdx.x * 31 + i);
  __syncthreads();
  const long long start = clock64();
  for (int t = 0; t < TURNS; t++) {
#pragma unroll
    for (int s = 0; s < SUMS; s++) I::go(c[s], a, b);
  }
  __syncthreads();
  const long long end = clock64();
  int sum = 0;
  for (int s = 0; s < SUMS; s++)
    for (int i = 0; i < 4; i++) sum += c[s][i];
  out[blockIdx.x * THREADS + threadIdx.x] = sum;
  if (threadIdx.x == 0) cycles[blockIdx.x] = end - start;
}

#define CHECK(call)                                                                    \
  if (cudaError_t e = (call)) return std::fprintf(stderr, "%s: %s\n", #call, cudaGetErrorString(e)), 1

double hertz = 0;  // of the fastest run

template <class I>
int report(const char* name, int multiprocessors) {
  cudaEvent_t begin, end;
  CHECK(cudaEventCreate(&begin));
  CHECK(cudaEventCreate(&end));
  long long* cycles;
  int* out;
  CHECK(cudaMallocHost(&cycles, multiprocessors * sizeof *cycles));
  CHECK(cudaMalloc(&out, multiprocessors * THREADS * sizeof *out));
  long long best = 1ll << 62;
  for (int turn = 0; turn < 5; turn++) {
    float milliseconds = 0;
    CHECK(cudaEventRecord(begin));
    measure<I><<<multiprocessors, THREADS>>>(cycles, out, 12345u + turn);
    CHECK(cudaGetLastError());
    CHECK(cudaEventRecord(end));
    CHECK(cudaDeviceSynchronize());
    CHECK(cudaEventElapsedTime(&milliseconds, begin, end));
    long long longest = 0;
    for (int i = 0; i < multiprocessors; i++) {
      best = cycles[i] < best ? cycles[i] : best;
      longest = cycles[i] > longest ? cycles[i] : longest;
    }
    const double clock = double(longest) / (milliseconds * 1e-3);
    hertz = turn && clock > hertz ? clock : hertz;
  }
  std::printf("\"%s\": %.1f, ", name, I::macs * SUMS * THREADS * TURNS / double(best));
  CHECK(cudaFreeHost(cycles));
  CHECK(cudaFree(out));
  return 0;
}

int main() {
  cudaDeviceProp p;
  CHECK(cudaGetDeviceProperties(&p, 0));
  std::printf("{\"gpu\": \"%s\", \"capability\": %d, \"multiprocessors\": %d, ", p.name,
              10 * p.major + p.minor, p.multiProcessorCount);
  if (report<bits_mma>("mma-b1", p.multiProcessorCount) || report<bytes_mma>("mma-s8", p.multiProcessorCount) ||
      report<dot>("dp4a", p.multiProcessorCount) || report<popcount>("and-popcount", p.multiProcessorCount))
    return 1;
  const size_t bytes = size_t(1) << 30;
  char *from, *to;
  cudaEvent_t begin, end;
  float milliseconds, best = 1e9f;
  CHECK(cudaMalloc(&from, bytes));
  CHECK(cudaMalloc(&to, bytes));
  CHECK(cudaEventCreate(&begin));
  CHECK(cudaEventCreate(&end));
  for (int turn = 0; turn < 8; turn++) {
    CHECK(cudaEventRecord(begin));
    CHECK(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice));
    CHECK(cudaEventRecord(end));
    CHECK(cudaEventSynchronize(end));
    CHECK(cudaEventElapsedTime(&milliseconds, begin, end));
    best = milliseconds < best ? milliseconds : best;
  }
  std::printf("\"hertz\": %.5g, \"bytes_a_second\": %.4g}\n", hertz, 2. * double(bytes) / (best * 1e-3));
}
