/* Between runtime.c and the generated model.c. */
#ifndef MPQC_RUNTIME_H
#define MPQC_RUNTIME_H

#include "mpqc.h"

#ifndef MPQC_THREADS
#define MPQC_THREADS 1
#endif
#define MPQC_HOOK __attribute__((visibility("hidden")))
#define MPQC_MOST_TENSORS 256

struct mpqc_bindings {
  uint8_t* arena;
  uint8_t* staging;
  uint8_t* inputs[MPQC_MOST_TENSORS];
  uint8_t* outputs[MPQC_MOST_TENSORS];
  void* results[MPQC_MOST_TENSORS];
};
typedef int (*mpqc_step_fn)(struct mpqc_bindings*);

/* Defined by model.c. */
extern const mpqc_tensor mpqc_inputs[] MPQC_HOOK;
extern const mpqc_tensor mpqc_outputs[] MPQC_HOOK;
extern const int mpqc_inputs_n MPQC_HOOK, mpqc_outputs_n MPQC_HOOK, mpqc_steps_n MPQC_HOOK;
extern const mpqc_step_fn mpqc_steps[] MPQC_HOOK;
extern const size_t mpqc_arena_bytes MPQC_HOOK;
extern const char mpqc_manifest_begin[] MPQC_HOOK, mpqc_manifest_end[] MPQC_HOOK;
extern const uint8_t mpqc_weights[] MPQC_HOOK;
int mpqc_machine_fits(void) MPQC_HOOK;
#endif
