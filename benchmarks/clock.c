/* The core's clock: an addition that waits for the one before takes exactly one cycle. */
#include <stdint.h>
#include <time.h>

enum { ADDITIONS = 16 }; /* of one turn */

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Cycles a second over `turns` * ADDITIONS cycles. */
double clock_hertz(int64_t turns) {
  uint64_t value = 0, one = 1;
  double start = now();
  for (int64_t i = 0; i < turns; ++i) {
#define ADD4 "add %1, %0\n\tadd %1, %0\n\tadd %1, %0\n\tadd %1, %0\n\t"
    __asm__ volatile(ADD4 ADD4 ADD4 ADD4 : "+r"(value) : "r"(one));
  }
  return (double)(turns * ADDITIONS) / (now() - start);
}
