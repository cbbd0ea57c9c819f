/* C interface of a model that mpqc compiled. One library holds one model.
 *
 * Link with the library (or dlopen it); nothing else is needed at run time. An instance serves one
 * caller at a time; make several for several threads, they share the weights. */
#ifndef MPQC_H
#define MPQC_H

#include <stddef.h>
#include <stdint.h>

#ifndef MPQC_TYPES /* what is the same for all models of a program */
#define MPQC_TYPES
#define MPQC_ABI_VERSION 1
#define MPQC_MOST_THREADS 64
#define MPQC_ALIGNMENT 64
#define MPQC_API __attribute__((visibility("default")))

enum mpqc_status {
  MPQC_OK = 0,
  MPQC_INVALID_ARGUMENT = 1, /* null pointer, index or thread count out of range */
  MPQC_OUT_OF_MEMORY = 2,
  MPQC_BUSY = 3, /* the instance is running in another thread */
  MPQC_KERNEL_FAILED = 4,
  MPQC_WRONG_SIZE = 5, /* a buffer has not the size that mpqc_describe_... states */
  MPQC_WRONG_MACHINE = 6, /* this CPU lacks an instruction set that the library uses; or the GPU */
  MPQC_NO_DEVICE = 7,     /* no driver or no GPU; libraries for GPUs only */
  MPQC_DEVICE_FAILED = 8  /* the GPU or its driver failed in the middle; no output was written */
};

typedef struct {
  const char* name;
  const char* dtype; /* numpy's name: "float32", "uint8", ... */
  int32_t rank;
  const int64_t* shape;
  size_t bytes;
} mpqc_tensor;

typedef struct {
  int32_t abi_version;  /* MPQC_ABI_VERSION that the library was built with */
  int32_t most_threads; /* 1 in a library without threads */
  const char* model;    /* file that was compiled, and the hash of its content */
  const char* sha256;
  const char* compiler; /* version of mpqc */
  const char* target;   /* machine that it was compiled for */
} mpqc_about;

typedef struct {
  size_t scratch;         /* bytes of this instance, all in one block */
  size_t arena;           /* of these: values between kernels, inputs and outputs */
  size_t arena_least;     /* largest total of values that live at the same time */
  size_t workspace;       /* of these: working memory of each thread's kernels */
  size_t workspace_peak;  /* most of it that a thread has used so far */
  size_t weights;         /* read-only in the library, for all instances */
  size_t shared;          /* weights made ready for the kernels, once for all instances */
} mpqc_memory;
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef struct mpqc_model mpqc_model;

/* MPQC_ABI_VERSION that the library was built with. */
MPQC_API int mpqc_abi_version(void);
/* What a status means, in words. */
MPQC_API const char* mpqc_message(int status);
/* Which model this is, and of which version. */
MPQC_API int mpqc_describe(mpqc_about* result);
/* The manifest as JSON text: layers, kernels, versions. Not zero-terminated: `bytes` says its length. */
MPQC_API const char* mpqc_manifest(size_t* bytes);

MPQC_API int mpqc_input_count(void);
MPQC_API int mpqc_output_count(void);
/* Describe input or output `index`; returns MPQC_INVALID_ARGUMENT when there is none. */
MPQC_API int mpqc_describe_input(int index, mpqc_tensor* result);
MPQC_API int mpqc_describe_output(int index, mpqc_tensor* result);

/* Bytes of scratch memory that one instance of `threads` threads uses; 0: no such count. */
MPQC_API size_t mpqc_scratch_bytes(int threads);
#ifndef MPQC_NO_HEAP
/* Make an instance that runs on `threads` threads (the caller's included, at most 64). */
MPQC_API int mpqc_create(int threads, mpqc_model** result);
#endif
/* The same in memory of the caller's: `scratch` holds mpqc_scratch_bytes(threads) bytes, aligned to
 * 64, and outlives the instance. */
MPQC_API int mpqc_create_in(int threads, void* scratch, size_t bytes, mpqc_model** result);
MPQC_API void mpqc_destroy(mpqc_model* model);
/* Memory of an instance, and how much of it was needed. */
MPQC_API int mpqc_describe_memory(const mpqc_model* model, mpqc_memory* result);

/* Run once. Buffers are row-major, in the order of the describe calls, of any alignment; `sizes`
 * may be null, else every entry is checked against the model. */
MPQC_API int mpqc_run(mpqc_model* model, const void* const* inputs, const size_t* input_sizes,
                      void* const* outputs, const size_t* output_sizes);

/* For profiles and verification: run single steps. Bind the buffers first; steps go in order. */
MPQC_API int mpqc_step_count(void);
MPQC_API int mpqc_bind(mpqc_model* model, const void* const* inputs, void* const* outputs);
MPQC_API int mpqc_step(mpqc_model* model, int index);
/* Copy `bytes` of the arena from `offset`: intermediate values, where the manifest says. */
MPQC_API int mpqc_read(mpqc_model* model, size_t offset, void* result, size_t bytes);

#ifdef __cplusplus
}
#endif
#endif
