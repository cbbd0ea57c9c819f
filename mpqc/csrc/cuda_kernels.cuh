// What the generated CUDA kernels call: implicit matrix products over 32-bit words, and the few
// instructions that CUDA C++ has no name for. A word holds 32 one-bit codes of a plane, or four
// codes of eight bits; both tensor-core instructions read the same words in the same order, so
// that one body serves all four forms.
//
// A translation unit that defines MPQC_EMULATED brings the instructions and intrinsics itself:
// tests/cuda runs these very lines on a CPU.
#ifndef MPQC_CUDA_KERNELS
#define MPQC_CUDA_KERNELS

#ifndef MPQC_EMULATED
namespace mpqc {
// c[16 x 8] += a[16 x 256 bits] AND-popcount b[256 bits x 8]; sm_80 and newer.
__device__ __forceinline__ void mma_bits(int (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}
// c[16 x 8] += a[16 x 32 bytes, unsigned] * b[32 bytes x 8, signed]; sm_80 and newer.
__device__ __forceinline__ void mma_bytes(int (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}
// c + sum of four products of unsigned and signed bytes.
__device__ __forceinline__ int dot_bytes(unsigned a, unsigned b, int c) {
  int d;
  asm("dp4a.u32.s32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
}  // namespace mpqc
#endif

namespace mpqc {

// Nothing: a kernel that calls it is compiled with this file.
__device__ __forceinline__ void begin() {}

// The same bit of 32 lanes' codes as a word; all lanes of a warp call it.
__device__ __forceinline__ unsigned vote(int bit) { return __ballot_sync(0xffffffffu, bit); }

struct alignas(16) four { unsigned x, y, z, w; };
struct alignas(8) two { unsigned x, y; };

enum form { BITS = 0, BYTES = 1 };  // what a word holds

// A convolution as a matrix product: rows are output pixels, columns output channels, and the
// reduction runs over the window's taps and the words of a pixel and group.
template <int N_, int H_, int W_, int WORDS_, int GROUP_WORDS_, int OH_, int OW_, int KH_, int KW_,
          int SY_, int SX_, int DY_, int DX_, int TOP_, int LEFT_>
struct window {
  static constexpr int N = N_, H = H_, W = W_;          // image before padding
  static constexpr int WORDS = WORDS_;                  // of a pixel, all groups
  static constexpr int GROUP_WORDS = GROUP_WORDS_;      // of a pixel and group
  static constexpr int OH = OH_, OW = OW_, KH = KH_, KW = KW_, SY = SY_, SX = SX_;
  static constexpr int DY = DY_, DX = DX_, TOP = TOP_, LEFT = LEFT_;
  static constexpr int ROWS = N * OH * OW;
  static constexpr int DEPTH = KH * KW * GROUP_WORDS;
};

// FORM: of a word. A, J: planes of data and weights (of bytes: 1, and 2 where
// weights of nine bits are w0 + 2 w1). NEGATIVE: the last weight plane
// counts negative. ZERO: code of the padding. LAST: valid bits of a pixel's last word. SUMS: also
// sum the codes under the window.
template <int FORM_, int A_, int J_, bool NEGATIVE_, unsigned ZERO_, unsigned LAST_, bool SUMS_>
struct codes {
  static constexpr int FORM = FORM_, A = A_, J = J_;
  static constexpr bool NEGATIVE = NEGATIVE_, SUMS = SUMS_;
  static constexpr unsigned ZERO = ZERO_, LAST = LAST_;
};

// A block makes M x N results with THREADS threads, K words at a time. MMA: by tensor cores, each
// warp a tile of WM x WN; else each thread (M/16) x (N * 16 / THREADS) results.
template <bool MMA_, int M_, int N_, int K_, int THREADS_, int WM_, int WN_>
struct tile {
  static constexpr bool MMA = MMA_;
  static constexpr int M = M_, N = N_, K = K_, THREADS = THREADS_, WM = WM_, WN = WN_;
  static constexpr int STRIDE = K + 4;  // of a row in shared memory: no bank twice, 16-byte rows
};

// Words of chunk `chunk` of the block's data rows, gathered into registers. Each thread takes
// vectors of V adjacent words, which lie in one tap.
template <class W, class C, class T>
struct gather {
  static constexpr int V = W::GROUP_WORDS % 4 == 0 ? 4 : W::GROUP_WORDS % 2 == 0 ? 2 : 1;
  static constexpr int VECTORS = T::M * T::K / V;
  static constexpr int EACH = (VECTORS + T::THREADS - 1) / T::THREADS;
  unsigned held[C::A][EACH][V];

  __device__ __forceinline__ void load(const unsigned* __restrict__ data, int first, int group, int chunk) {
#pragma unroll
    for (int e = 0; e < EACH; e++) {
      const int index = e * T::THREADS + (int)threadIdx.x;
      const int row = first + index / (T::K / V), k = chunk * T::K + index % (T::K / V) * V;
      const int tap = k / W::GROUP_WORDS, word = k % W::GROUP_WORDS;
      const int n = row / (W::OH * W::OW), y = row / W::OW % W::OH, x = row % W::OW;
      const int iy = y * W::SY + tap / W::KW * W::DY - W::TOP;
      const int ix = x * W::SX + tap % W::KW * W::DX - W::LEFT;
      const bool used = index < VECTORS && row < W::ROWS && k < W::DEPTH;
      const bool inside = iy >= 0 && iy < W::H && ix >= 0 && ix < W::W;
      const unsigned* from =
          data + ((n * W::H + iy) * W::W + ix) * W::WORDS + group * W::GROUP_WORDS + word;
#pragma unroll
      for (int i = 0; i < C::A; i++) {
        const unsigned* plane = from + i * (W::N * W::H * W::W * W::WORDS);
        if (used && inside) {
          if (V == 4) {
            const four v = *reinterpret_cast<const four*>(plane);
            held[i][e][0] = v.x, held[i][e][1 % V] = v.y, held[i][e][2 % V] = v.z, held[i][e][3 % V] = v.w;
          } else if (V == 2) {
            const two v = *reinterpret_cast<const two*>(plane);
            held[i][e][0] = v.x, held[i][e][1 % V] = v.y;
          } else {
            held[i][e][0] = *plane;
          }
        } else {
#pragma unroll
          for (int v = 0; v < V; v++) {
            const unsigned whole =
                C::FORM == BYTES ? C::ZERO * 0x01010101u : (C::ZERO >> i & 1u) ? 0xffffffffu : 0u;
            const unsigned mask = C::FORM == BITS && word + v == W::GROUP_WORDS - 1 ? C::LAST : 0xffffffffu;
            held[i][e][v] = used ? whole & mask : 0u;
          }
        }
      }
    }
  }

  __device__ __forceinline__ void store(unsigned* shared) const {
#pragma unroll
    for (int e = 0; e < EACH; e++) {
      const int index = e * T::THREADS + (int)threadIdx.x;
      if (index < VECTORS) {
        unsigned* to = shared + index / (T::K / V) * T::STRIDE + index % (T::K / V) * V;
#pragma unroll
        for (int i = 0; i < C::A; i++)
#pragma unroll
          for (int v = 0; v < V; v++) to[i * T::M * T::STRIDE + v] = held[i][e][v];
      }
    }
  }
};

// The same of the weights, which lie in memory as chunks of [J][N][K] words.
template <class C, class T>
struct stream {
  static constexpr int VECTORS = C::J * T::N * T::K / 4;
  static constexpr int EACH = (VECTORS + T::THREADS - 1) / T::THREADS;
  four held[EACH];

  __device__ __forceinline__ void load(const unsigned* __restrict__ chunk) {
#pragma unroll
    for (int e = 0; e < EACH; e++) {
      const int index = e * T::THREADS + (int)threadIdx.x;
      if (index < VECTORS) held[e] = reinterpret_cast<const four*>(chunk)[index];
    }
  }

  __device__ __forceinline__ void store(unsigned* shared) const {
#pragma unroll
    for (int e = 0; e < EACH; e++) {
      const int index = e * T::THREADS + (int)threadIdx.x;
      if (index < VECTORS) {
        const int row = index / (T::K / 4), k = index % (T::K / 4) * 4;
        *reinterpret_cast<four*>(shared + row * T::STRIDE + k) = held[e];
      }
    }
  }
};

// +-2**(i+j): what the product of planes i and j counts.
template <class C>
__device__ __forceinline__ constexpr int factor(int i, int j) {
  return C::NEGATIVE && j == C::J - 1 ? -(1 << (i + j)) : 1 << (i + j);
}

// Results of a warp in tensor-core registers: lane l holds rows l/4 and l/4 + 8, columns 2*(l%4)
// and the next, of each 16 x 8 tile.
template <class C, class T>
struct warp_sums {
  static constexpr int MI = T::WM / 16, NI = T::WN / 8, ACROSS = T::N / T::WN;
  int sums[MI][NI][4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int m = 0; m < MI; m++)
#pragma unroll
      for (int n = 0; n < NI; n++)
#pragma unroll
        for (int r = 0; r < 4; r++) sums[m][n][r] = 0;
  }

  __device__ __forceinline__ void products(const unsigned* data, const unsigned* weight, int (&to)[MI][NI][4]) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    data += (warp / ACROSS * T::WM + lane / 4) * T::STRIDE + lane % 4;
    weight += (warp % ACROSS * T::WN + lane / 4) * T::STRIDE + lane % 4;
#pragma unroll
    for (int k = 0; k < T::K; k += 8) {
      unsigned a[MI][4], b[NI][2];
#pragma unroll
      for (int m = 0; m < MI; m++) {
        const unsigned* row = data + m * 16 * T::STRIDE + k;
        a[m][0] = row[0], a[m][1] = row[8 * T::STRIDE];
        a[m][2] = row[4], a[m][3] = row[8 * T::STRIDE + 4];
      }
#pragma unroll
      for (int n = 0; n < NI; n++) {
        const unsigned* row = weight + n * 8 * T::STRIDE + k;
        b[n][0] = row[0], b[n][1] = row[4];
      }
#pragma unroll
      for (int m = 0; m < MI; m++)
#pragma unroll
        for (int n = 0; n < NI; n++) {
          if (C::FORM == BITS) mma_bits(to[m][n], a[m], b[n]);
          else mma_bytes(to[m][n], a[m], b[n]);
        }
    }
  }

  __device__ __forceinline__ void add(const unsigned* data, const unsigned* weight) {
    __syncwarp();  // lanes parted where they gathered; the instruction wants all of them together
    if (C::A * C::J == 1 && factor<C>(0, 0) == 1) {
      products(data, weight, sums);
      return;
    }
#pragma unroll
    for (int i = 0; i < C::A; i++)
#pragma unroll
      for (int j = 0; j < C::J; j++) {
        int part[MI][NI][4] = {};
        products(data + i * T::M * T::STRIDE, weight + j * T::N * T::STRIDE, part);
#pragma unroll
        for (int m = 0; m < MI; m++)
#pragma unroll
          for (int n = 0; n < NI; n++)
#pragma unroll
            for (int r = 0; r < 4; r++) sums[m][n][r] += part[m][n][r] * factor<C>(i, j);
      }
  }

  __device__ __forceinline__ void write(int* result) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    result += (warp / ACROSS * T::WM + lane / 4) * T::N + warp % ACROSS * T::WN + lane % 4 * 2;
#pragma unroll
    for (int m = 0; m < MI; m++)
#pragma unroll
      for (int n = 0; n < NI; n++)
#pragma unroll
        for (int r = 0; r < 4; r++)
          result[(m * 16 + r / 2 * 8) * T::N + n * 8 + r % 2] = sums[m][n][r];
  }
};

// Results of a thread on the CUDA cores: rows ty + 16*m', columns tx + X*n'.
template <class C, class T>
struct thread_sums {
  static constexpr int X = T::THREADS / 16, MI = T::M / 16, NI = T::N / X;
  int sums[MI][NI];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int m = 0; m < MI; m++)
#pragma unroll
      for (int n = 0; n < NI; n++) sums[m][n] = 0;
  }

  static __device__ __forceinline__ int product(unsigned a, unsigned b, int sum, int by) {
    if (C::FORM == BITS) return sum + __popc(a & b) * by;
    return by == 1 ? dot_bytes(a, b, sum) : sum + dot_bytes(a, b, 0) * by;
  }

  __device__ __forceinline__ void add(const unsigned* data, const unsigned* weight) {
    const int tx = threadIdx.x % X, ty = threadIdx.x / X;
#pragma unroll 1  // unrolled, loads of many steps would be held in registers at a time
    for (int k = 0; k < T::K; k += 4)
#pragma unroll 1
      for (int i = 0; i < C::A; i++) {
        four a[MI];
#pragma unroll
        for (int m = 0; m < MI; m++)
          a[m] = *reinterpret_cast<const four*>(data + (i * T::M + ty + 16 * m) * T::STRIDE + k);
#pragma unroll
        for (int j = 0; j < C::J; j++)
#pragma unroll
          for (int n = 0; n < NI; n++) {
            const four b = *reinterpret_cast<const four*>(weight + (j * T::N + tx + X * n) * T::STRIDE + k);
            const int by = factor<C>(i, j);
#pragma unroll
            for (int m = 0; m < MI; m++) {
              int sum = product(a[m].x, b.x, sums[m][n], by);
              sum = product(a[m].y, b.y, sum, by);
              sum = product(a[m].z, b.z, sum, by);
              sums[m][n] = product(a[m].w, b.w, sum, by);
            }
          }
      }
  }

  __device__ __forceinline__ void write(int* result) const {
    const int tx = threadIdx.x % X, ty = threadIdx.x / X;
#pragma unroll
    for (int m = 0; m < MI; m++)
#pragma unroll
      for (int n = 0; n < NI; n++) result[(ty + 16 * m) * T::N + tx + X * n] = sums[m][n];
  }
};

template <bool MMA, class C, class T> struct sums_of { using type = thread_sums<C, T>; };
template <class C, class T> struct sums_of<true, C, T> { using type = warp_sums<C, T>; };

// Sums of codes under the window, row by row: every thread counts some words of one row.
template <class C, class T>
struct code_sums {
  static constexpr int PARTS = T::THREADS / T::M > 0 ? T::THREADS / T::M : 1;
  static constexpr int EACH = T::THREADS / T::M > 0 ? 1 : T::M / T::THREADS;
  int sums[EACH];

  __device__ __forceinline__ void add(const unsigned* data) {
#pragma unroll
    for (int e = 0; e < EACH; e++) {
      const int row = threadIdx.x % T::M + e * T::THREADS, part = threadIdx.x / T::M;
#pragma unroll
      for (int i = 0; i < C::A; i++)
        for (int k = part; k < T::K; k += PARTS)
          sums[e] += __popc(data[(i * T::M + row) * T::STRIDE + k]) << i;
    }
  }
};

// The block's results into shared memory: int [M][N], behind them [M] sums of codes if SUMS.
// `shared` also holds the two buffers of words that the block works with.
// Blocks: columns fastest, then groups, then rows; COLUMNS of N channels each in a group.
template <class W, class C, class T, int COLUMNS, int GROUPS>
__device__ __forceinline__ void product(int* shared, const unsigned* __restrict__ data,
                                        const unsigned* __restrict__ weight, int block) {
  constexpr int CHUNKS = (W::DEPTH + T::K - 1) / T::K;
  constexpr int DATA = C::A * T::M * T::STRIDE, BUFFER = DATA + C::J * T::N * T::STRIDE;
  unsigned* words = reinterpret_cast<unsigned*>(shared);
  const int group = block / COLUMNS % GROUPS, first = block / (COLUMNS * GROUPS) * T::M;
  weight += (size_t)(block % (COLUMNS * GROUPS)) * (CHUNKS * C::J * T::N * T::K);

  gather<W, C, T> rows;
  stream<C, T> columns;
  typename sums_of<T::MMA, C, T>::type sums;
  code_sums<C, T> counted = {};
  sums.clear();
  rows.load(data, first, group, 0);
  columns.load(weight);
  rows.store(words);
  columns.store(words + DATA);
  __syncthreads();
  for (int chunk = 0; chunk < CHUNKS; chunk++) {
    const unsigned* now = words + chunk % 2 * BUFFER;
    unsigned* next = words + (chunk + 1) % 2 * BUFFER;
    if (chunk + 1 < CHUNKS) {  // in flight while this chunk is multiplied
      rows.load(data, first, group, chunk + 1);
      columns.load(weight + (chunk + 1) * (C::J * T::N * T::K));
    }
    sums.add(now, now + DATA);
    if (C::SUMS) counted.add(now);
    if (chunk + 1 < CHUNKS) {
      rows.store(next);
      columns.store(next + DATA);
    }
    __syncthreads();
  }
  sums.write(shared);
  if (C::SUMS) {
    int* totals = shared + T::M * T::N;
    for (int row = threadIdx.x; row < T::M; row += T::THREADS) totals[row] = 0;
    __syncthreads();
#pragma unroll
    for (int e = 0; e < code_sums<C, T>::EACH; e++)
      atomicAdd(totals + threadIdx.x % T::M + e * T::THREADS, counted.sums[e]);
  }
  __syncthreads();
}

// One result by plain multiplication: few channels a group, or weights beyond eight bits.
// data: uint8 [N][H][W][WORDS], one code a word; weight: [KH][KW][GROUP_WORDS][OUT].
template <class W, int ZERO, int OUT, int GROUP_OUT, class V>
__device__ __forceinline__ void direct(int* result, const unsigned char* __restrict__ data,
                                       const V* __restrict__ weight, int row, int out) {
  const int n = row / (W::OH * W::OW), y = row / W::OW % W::OH, x = row % W::OW;
  const int first = out / GROUP_OUT * W::GROUP_WORDS;
  int sum = 0;
  for (int ky = 0; ky < W::KH; ky++)
    for (int kx = 0; kx < W::KW; kx++) {
      const int iy = y * W::SY + ky * W::DY - W::TOP, ix = x * W::SX + kx * W::DX - W::LEFT;
      const bool inside = iy >= 0 && iy < W::H && ix >= 0 && ix < W::W;
      const unsigned char* from = data + ((n * W::H + iy) * W::W + ix) * W::WORDS + first;
      const V* by = weight + (ky * W::KW + kx) * (W::GROUP_WORDS * OUT) + out;
      for (int c = 0; c < W::GROUP_WORDS; c++)
        sum += (inside ? (int)from[c] : ZERO) * (int)by[c * OUT];
    }
  *result = sum;
}

}  // namespace mpqc
#endif
