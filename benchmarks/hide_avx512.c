/* Answers `cpuid` for a library whose `cpuid` instructions were replaced by `ud2`: what the
 * processor says, less everything beyond AVX2. Linux on x86-64. See ort_avx2.py. */
#define _GNU_SOURCE
#include <cpuid.h>
#include <dlfcn.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <ucontext.h>

enum { LEAF_FEATURES = 7, CPUID_BYTES = 2, STATE_AVX512 = 0xE0 };

/* AVX512 F, DQ, IFMA, PF, ER, CD, BW, VL */
static const uint32_t hidden_ebx = 1u << 16 | 1u << 17 | 1u << 21 | 1u << 26 | 1u << 27 |
                                   1u << 28 | 1u << 30 | 1u << 31;
/* AVX512 VBMI, VBMI2, VNNI, BITALG, VPOPCNTDQ */
static const uint32_t hidden_ecx = 1u << 1 | 1u << 6 | 1u << 11 | 1u << 12 | 1u << 14;
/* AVX512 4VNNIW, 4FMAPS, VP2INTERSECT; AMX-BF16, AVX512-FP16, AMX-TILE, AMX-INT8 */
static const uint32_t hidden_edx = 1u << 2 | 1u << 3 | 1u << 8 | 1u << 22 | 1u << 23 | 1u << 24 |
                                   1u << 25;

static const uintptr_t* places; /* offsets of the replaced instructions in the library */
static size_t place_count;
static struct sigaction previous;
static volatile int answered;

static int replaced(uintptr_t address) {
  Dl_info found;
  if (!dladdr((void*)address, &found)) return 0;
  uintptr_t offset = address - (uintptr_t)found.dli_fbase;
  for (size_t i = 0; i < place_count; ++i)
    if (places[i] == offset) return 1;
  return 0;
}

static void answer(int signal, siginfo_t* info, void* context) {
  (void)signal, (void)info;
  greg_t* r = ((ucontext_t*)context)->uc_mcontext.gregs;
  if (!replaced((uintptr_t)r[REG_RIP])) { /* somebody else's: what would have happened happens */
    sigaction(SIGILL, &previous, NULL);
    return;
  }
  uint32_t leaf = (uint32_t)r[REG_RAX], part = (uint32_t)r[REG_RCX], eax, ebx, ecx, edx;
  __cpuid_count(leaf, part, eax, ebx, ecx, edx);
  if (leaf == LEAF_FEATURES && part == 0) {
    ebx &= ~hidden_ebx, ecx &= ~hidden_ecx, edx &= ~hidden_edx;
  } else if (leaf == LEAF_FEATURES) {
    eax = ebx = ecx = edx = 0; /* AVX-VNNI and later */
  }
  r[REG_RAX] = eax, r[REG_RBX] = ebx, r[REG_RCX] = ecx, r[REG_RDX] = edx;
  r[REG_RIP] += CPUID_BYTES;
  ++answered;
}

/* Answer from now on; `offsets` must stay. Returns 0, or -1 where no handler can be set. */
int hide_avx512(const uintptr_t* offsets, size_t count) {
  struct sigaction action = {.sa_sigaction = answer, .sa_flags = SA_SIGINFO | SA_NODEFER};
  places = offsets, place_count = count;
  return sigaction(SIGILL, &action, &previous);
}

/* How often the library has asked. */
int answers(void) { return answered; }

/* Bring this thread's AVX-512 registers (masks, upper halves, 16 to 31) to their initial state. */
void clear_avx512(void) {
  __asm__ volatile(
      "vzeroall\n"
      "kxorw %%k0, %%k0, %%k0\nkxorw %%k1, %%k1, %%k1\nkxorw %%k2, %%k2, %%k2\n"
      "kxorw %%k3, %%k3, %%k3\nkxorw %%k4, %%k4, %%k4\nkxorw %%k5, %%k5, %%k5\n"
      "kxorw %%k6, %%k6, %%k6\nkxorw %%k7, %%k7, %%k7\n"
      "vpxorq %%zmm16, %%zmm16, %%zmm16\nvpxorq %%zmm17, %%zmm17, %%zmm17\n"
      "vpxorq %%zmm18, %%zmm18, %%zmm18\nvpxorq %%zmm19, %%zmm19, %%zmm19\n"
      "vpxorq %%zmm20, %%zmm20, %%zmm20\nvpxorq %%zmm21, %%zmm21, %%zmm21\n"
      "vpxorq %%zmm22, %%zmm22, %%zmm22\nvpxorq %%zmm23, %%zmm23, %%zmm23\n"
      "vpxorq %%zmm24, %%zmm24, %%zmm24\nvpxorq %%zmm25, %%zmm25, %%zmm25\n"
      "vpxorq %%zmm26, %%zmm26, %%zmm26\nvpxorq %%zmm27, %%zmm27, %%zmm27\n"
      "vpxorq %%zmm28, %%zmm28, %%zmm28\nvpxorq %%zmm29, %%zmm29, %%zmm29\n"
      "vpxorq %%zmm30, %%zmm30, %%zmm30\nvpxorq %%zmm31, %%zmm31, %%zmm31\n" ::
          : "memory");
}

/* XINUSE: bits 5 to 7 are set when the masks, the upper halves or registers 16 to 31 hold data. */
unsigned used_avx512(void) {
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(1));
  return low & STATE_AVX512;
}
