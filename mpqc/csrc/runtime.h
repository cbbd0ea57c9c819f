/* Between runtime.c and the generated model.c and sizes.h. */
#ifndef MPQC_RUNTIME_H
#define MPQC_RUNTIME_H

/* MPQC_ARENA_BYTES, MPQC_WORKSPACE_BYTES, MPQC_SCRATCH_BYTES(threads); for a library without
 * threads and heap MPQC_NO_THREADS and MPQC_NO_HEAP; names of the interface, where others than
 * mpqc_... were asked for. */
#include "sizes.h"
#include "mpqc.h"

#define MPQC_HOOK __attribute__((visibility("hidden")))

/* A constant whose values need fewer bits than their type has:
 * value[i] = low + scale * (bits `i * bits` to `(i + 1) * bits` of the source, lowest bit first). */
struct mpqc_narrow {
  size_t source, target; /* offsets in the weights and in the shared memory */
  size_t count;
  int32_t low, scale;
  uint8_t bits, bytes; /* of a stored, of a widened value */
};

/* Defined by model.c. */
extern const mpqc_tensor mpqc_inputs[] MPQC_HOOK;
extern const mpqc_tensor mpqc_outputs[] MPQC_HOOK;
extern const size_t mpqc_input_offsets[] MPQC_HOOK, mpqc_output_offsets[] MPQC_HOOK;
/* of each input: what its kernels want of the caller's buffer to read it there; 0: a copy */
extern const size_t mpqc_input_alignments[] MPQC_HOOK;
extern const int mpqc_inputs_n MPQC_HOOK, mpqc_outputs_n MPQC_HOOK, mpqc_steps_n MPQC_HOOK;
/* of each step: offset in the arena, size, size in the loops of the first thread, turns of its
 * longest parallel loop */
extern const size_t mpqc_workspaces[][4] MPQC_HOOK;
extern const struct mpqc_narrow mpqc_narrows[] MPQC_HOOK;
extern const int mpqc_narrows_n MPQC_HOOK;
extern const mpqc_about mpqc_identity MPQC_HOOK;
extern const char mpqc_manifest_begin[] MPQC_HOOK, mpqc_manifest_end[] MPQC_HOOK;
extern const uint8_t mpqc_weights[] MPQC_HOOK;
extern uint8_t mpqc_shared[] MPQC_HOOK;
/* `sources`: the caller's inputs */
int mpqc_call_step(int index, uint8_t* arena, const void* const* sources) MPQC_HOOK;
int mpqc_machine_fits(void) MPQC_HOOK;

/* Where kernels find an input: at the caller's, or copied to its place in the arena. */
static inline void* mpqc_find_input(int index, uint8_t* arena, const void* const* sources) {
  size_t alignment = mpqc_input_alignments[index];
  if (alignment && (uintptr_t)sources[index] % alignment == 0) return (void*)sources[index];
  return arena + mpqc_input_offsets[index];
}
#endif
