/* Between cuda_runtime.c and the generated model.c of a library for GPUs. */
#ifndef MPQC_CUDA_MODEL_H
#define MPQC_CUDA_MODEL_H

#include "runtime.h"

/* Where a kernel's argument lies on the device. */
struct mpqc_place {
  uint8_t weights; /* else in the arena */
  uint64_t offset;
};

struct mpqc_launch {
  int32_t kernel; /* index into mpqc_kernels */
  uint32_t grid[3], block[3];
  int32_t first, arguments; /* of mpqc_places */
};

extern const char* const mpqc_kernels[] MPQC_HOOK;
extern const int mpqc_kernels_n MPQC_HOOK;
extern const struct mpqc_launch mpqc_launches[] MPQC_HOOK;
extern const struct mpqc_place mpqc_places[] MPQC_HOOK;
extern const int mpqc_step_launches[] MPQC_HOOK; /* first launch of each step, and their number */
extern const int mpqc_capability MPQC_HOOK;      /* 90: compiled for compute capability 9.0 */
extern const char mpqc_device_code[] MPQC_HOOK;  /* fat binary */
#endif
