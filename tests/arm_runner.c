/* Run a compiled model over raw inputs: runner IN OUT THREADS. IN holds samples, each of them all
 * inputs in order; OUT receives the outputs likewise. */
#include <stdio.h>
#include <stdlib.h>

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

static void* room(size_t bytes) { return aligned_alloc(64, (bytes + 127) / 64 * 64); }

int main(int argc, char** argv) {
  if (argc != 4) return 2;
  FILE* in = fopen(argv[1], "rb");
  FILE* out = fopen(argv[2], "wb");
  if (in == NULL || out == NULL) return 3;
  void *inputs[MOST], *outputs[MOST];
  size_t input_bytes[MOST], output_bytes[MOST];
  mpqc_tensor tensor;
  mpqc_model* model;
  CHECK(mpqc_create(atoi(argv[3]), &model));
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
