/* Run a compiled model over raw inputs: runner IN OUT THREADS [heap]. IN holds samples, each of them
 * all inputs in order; OUT receives the outputs likewise. The instance has its memory between pages
 * that cannot be touched, or from the heap, where valgrind watches. */
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "mpqc.h"

#define CHECK(call)                                            \
  do {                                                         \
    int status = (call);                                       \
    if (status != MPQC_OK) {                                   \
      fprintf(stderr, "%s: %s\n", #call, mpqc_message(status)); \
      return 10 + status;                                      \
    }                                                          \
  } while (0)

enum { MOST = 64 };

static void* room(size_t bytes) { return malloc(bytes); }

/* Memory behind which nothing may be touched, nor more than a page before it. */
static void* fenced(size_t bytes) {
  size_t page = 1 << 16, whole = (bytes + page - 1) / page * page;
  char* p = mmap(NULL, whole + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (p == MAP_FAILED || mprotect(p + page, whole, PROT_READ | PROT_WRITE)) exit(5);
  return p + page + whole - bytes;
}

static void* heap(size_t bytes) {
  void* p = NULL;
  if (posix_memalign(&p, MPQC_ALIGNMENT, bytes)) exit(5);
  return p;
}

int main(int argc, char** argv) {
  if (argc < 4) return 2;
  FILE* in = fopen(argv[1], "rb");
  FILE* out = fopen(argv[2], "wb");
  if (in == NULL || out == NULL) return 3;
  void *inputs[MOST], *outputs[MOST];
  size_t input_bytes[MOST], output_bytes[MOST];
  mpqc_tensor tensor;
  mpqc_model* model;
  int threads = atoi(argv[3]);
  size_t scratch = mpqc_scratch_bytes(threads);
  void* memory = argc > 4 ? heap(scratch) : fenced(scratch);
  CHECK(mpqc_create_in(threads, memory, scratch, &model));
  for (int i = 0; i < mpqc_input_count(); i++) {
    CHECK(mpqc_describe_input(i, &tensor));
    inputs[i] = room(input_bytes[i] = tensor.bytes);
  }
  for (int i = 0; i < mpqc_output_count(); i++) {
    CHECK(mpqc_describe_output(i, &tensor));
    outputs[i] = room(output_bytes[i] = tensor.bytes);
  }
  for (;;) {
    for (int i = 0; i < mpqc_input_count(); i++)
      if (fread(inputs[i], 1, input_bytes[i], in) != input_bytes[i]) {
        mpqc_destroy(model);
        return fclose(out) ? 4 : 0;
      }
    CHECK(mpqc_run(model, (const void* const*)inputs, input_bytes, outputs, output_bytes));
    for (int i = 0; i < mpqc_output_count(); i++) fwrite(outputs[i], 1, output_bytes[i], out);
  }
}
