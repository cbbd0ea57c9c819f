/* Runtime of a compiled model: arena, threads, and the three hooks that TVM's kernels call.
 * model.c (generated) defines the tables declared in runtime.h. */
#define _GNU_SOURCE
#include "runtime.h"

#include <stdlib.h>
#include <string.h>

#if MPQC_THREADS
#include <pthread.h>
#include <stdatomic.h>
#include <sched.h>
#endif

#define ALIGNMENT ((size_t)64)
#define STACK_BYTES ((size_t)(256 << 10)) /* workspace of one thread; larger requests use malloc */
#define MOST_THREADS 64
#define SPINS 4000 /* turns that a worker waits awake: about the gap between two kernels */

typedef struct {
  void* sync_handle;
  int32_t num_task;
} group_env;
typedef int (*task_fn)(int id, group_env* env, void* data);

struct worker {
  struct mpqc_model* model;
  uint8_t* stack;
  size_t used;
#if MPQC_THREADS
  pthread_t thread;
  int id;
#endif
};

struct mpqc_model {
  struct mpqc_bindings bound;
  void* owned; /* scratch that mpqc_create allocated */
  int threads;
  struct worker* workers;
#if MPQC_THREADS
  atomic_int busy;
  atomic_uint round;   /* counts launches; workers run one task each when it moves */
  atomic_int left;     /* workers that have not finished this launch */
  atomic_int failed;
  atomic_int stop;
  int started;
  task_fn task;
  void* data;
  pthread_mutex_t lock;
  pthread_cond_t wake;
  int sleeping;
#else
  int busy;
#endif
};

#if MPQC_THREADS
static _Thread_local struct worker* self;
#else
static struct worker* self;
#endif

static size_t round_up(size_t bytes) { return (bytes + ALIGNMENT - 1) & ~(ALIGNMENT - 1); }

/* ---- hooks of TVM's generated code (weak pointer variables there, these definitions win) ---- */

static void* alloc_workspace(int type, int device, uint64_t bytes, int code, int bits) {
  (void)type, (void)device, (void)code, (void)bits;
  size_t size = round_up((size_t)bytes);
  struct worker* w = self;
  if (w != NULL && w->used + size <= STACK_BYTES) {
    void* result = w->stack + w->used;
    w->used += size;
    return result;
  }
  void* result = NULL;
  return posix_memalign(&result, ALIGNMENT, size ? size : ALIGNMENT) ? NULL : result;
}

static int free_workspace(int type, int device, void* pointer) {
  (void)type, (void)device;
  struct worker* w = self;
  uint8_t* p = pointer;
  if (w != NULL && p >= w->stack && p < w->stack + STACK_BYTES) {
    w->used = (size_t)(p - w->stack); /* frees come in reverse order */
    return 0;
  }
  free(pointer);
  return 0;
}

#if MPQC_THREADS
static inline void relax(void) {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__) || defined(__arm__)
  __asm__ volatile("yield");
#endif
}

static void* work(void* argument) {
  struct worker* w = argument;
  struct mpqc_model* m = w->model;
  unsigned seen = 0;
  self = w;
  for (;;) {
    int spins = 0;
    while (atomic_load_explicit(&m->round, memory_order_acquire) == seen) {
      if (++spins < SPINS) {
        relax();
        continue;
      }
      pthread_mutex_lock(&m->lock);
      m->sleeping++;
      while (atomic_load(&m->round) == seen) pthread_cond_wait(&m->wake, &m->lock);
      m->sleeping--;
      pthread_mutex_unlock(&m->lock);
    }
    seen++;
    if (atomic_load(&m->stop)) return NULL;
    group_env env = {NULL, m->threads};
    if (m->task(w->id, &env, m->data)) atomic_store(&m->failed, 1);
    w->used = 0;
    atomic_fetch_sub_explicit(&m->left, 1, memory_order_release);
  }
}

static void release(struct mpqc_model* m) {
  atomic_fetch_add_explicit(&m->round, 1, memory_order_seq_cst);
  pthread_mutex_lock(&m->lock);
  if (m->sleeping) pthread_cond_broadcast(&m->wake);
  pthread_mutex_unlock(&m->lock);
}
#endif

static int parallel_launch(task_fn task, void* data, int tasks) {
  struct worker* w = self;
#if MPQC_THREADS
  struct mpqc_model* m = w != NULL ? w->model : NULL;
  if (m != NULL && m->threads > 1 && w == m->workers && (tasks == 0 || tasks == m->threads)) {
    m->task = task;
    m->data = data;
    atomic_store(&m->failed, 0);
    atomic_store(&m->left, m->threads - 1);
    release(m);
    group_env env = {NULL, m->threads};
    int status = task(0, &env, data);
    int spins = 0;
    while (atomic_load_explicit(&m->left, memory_order_acquire)) {
      if (++spins < SPINS) relax();
      else sched_yield();
    }
    return status || atomic_load(&m->failed);
  }
#endif
  (void)w;
  group_env env = {NULL, tasks > 0 ? tasks : 1};
  int status = 0;
  for (int id = 0; id < env.num_task; id++) status |= task(id, &env, data);
  return status;
}

MPQC_HOOK int (*__TVMBackendParallelLaunch)(task_fn, void*, int) = parallel_launch;
MPQC_HOOK void* (*__TVMBackendAllocWorkspace)(int, int, uint64_t, int, int) = alloc_workspace;
MPQC_HOOK int (*__TVMBackendFreeWorkspace)(int, int, void*) = free_workspace;

/* ---- interface ---- */

int mpqc_abi_version(void) { return MPQC_ABI_VERSION; }

const char* mpqc_message(int status) {
  switch (status) {
    case MPQC_OK: return "ok";
    case MPQC_INVALID_ARGUMENT: return "invalid argument: null pointer, index or thread count out of range";
    case MPQC_OUT_OF_MEMORY: return "out of memory";
    case MPQC_BUSY: return "the instance is running in another thread; make one instance a thread";
    case MPQC_KERNEL_FAILED: return "a kernel failed";
    case MPQC_WRONG_SIZE: return "a buffer has not the size that the model states";
    case MPQC_WRONG_MACHINE: return "this CPU lacks instructions that the library was built for";
    default: return "unknown status";
  }
}

const char* mpqc_manifest(size_t* bytes) {
  if (bytes) *bytes = (size_t)(mpqc_manifest_end - mpqc_manifest_begin);
  return mpqc_manifest_begin;
}

int mpqc_input_count(void) { return mpqc_inputs_n; }
int mpqc_output_count(void) { return mpqc_outputs_n; }
int mpqc_step_count(void) { return mpqc_steps_n; }

int mpqc_describe_input(int index, mpqc_tensor* result) {
  if (index < 0 || index >= mpqc_inputs_n || !result) return MPQC_INVALID_ARGUMENT;
  *result = mpqc_inputs[index];
  return MPQC_OK;
}

int mpqc_describe_output(int index, mpqc_tensor* result) {
  if (index < 0 || index >= mpqc_outputs_n || !result) return MPQC_INVALID_ARGUMENT;
  *result = mpqc_outputs[index];
  return MPQC_OK;
}

static size_t staging_bytes(void) {
  size_t total = 0;
  for (int i = 0; i < mpqc_inputs_n; i++) total += round_up(mpqc_inputs[i].bytes + ALIGNMENT);
  for (int i = 0; i < mpqc_outputs_n; i++) total += round_up(mpqc_outputs[i].bytes + ALIGNMENT);
  return total;
}

size_t mpqc_scratch_bytes(int threads) {
  if (threads < 1 || threads > MOST_THREADS) return 0;
  return round_up(sizeof(struct mpqc_model)) + round_up(sizeof(struct worker) * (size_t)threads) +
         round_up(mpqc_arena_bytes) + staging_bytes() + STACK_BYTES * (size_t)threads;
}

int mpqc_create(int threads, mpqc_model** result) {
  if (!result || !mpqc_scratch_bytes(threads)) return MPQC_INVALID_ARGUMENT;
  *result = NULL;
  size_t bytes = mpqc_scratch_bytes(threads);
  void* scratch = NULL;
  if (posix_memalign(&scratch, ALIGNMENT, bytes)) return MPQC_OUT_OF_MEMORY;
  int status = mpqc_create_in(threads, scratch, bytes, result);
  if (status) free(scratch);
  else (*result)->owned = scratch;
  return status;
}

int mpqc_create_in(int threads, void* scratch, size_t bytes, mpqc_model** result) {
  if (!result || !scratch || ((uintptr_t)scratch & (ALIGNMENT - 1)) ||
      threads < 1 || threads > MOST_THREADS)
    return MPQC_INVALID_ARGUMENT;
  *result = NULL;
  if (bytes < mpqc_scratch_bytes(threads)) return MPQC_WRONG_SIZE;
  if (!mpqc_machine_fits()) return MPQC_WRONG_MACHINE;
#if !MPQC_THREADS
  if (threads > 1) return MPQC_INVALID_ARGUMENT;
#endif
  uint8_t* place = scratch;
  struct mpqc_model* m = (struct mpqc_model*)place;
  memset(m, 0, sizeof *m);
  place += round_up(sizeof *m);
  m->workers = (struct worker*)place;
  memset(m->workers, 0, sizeof(struct worker) * (size_t)threads);
  place += round_up(sizeof(struct worker) * (size_t)threads);
  m->bound.arena = place;
  place += round_up(mpqc_arena_bytes);
  m->bound.staging = place;
  place += staging_bytes();
  m->threads = threads;
  for (int i = 0; i < threads; i++) {
    m->workers[i].model = m;
    m->workers[i].stack = place + STACK_BYTES * (size_t)i;
  }
#if MPQC_THREADS
  pthread_mutex_init(&m->lock, NULL);
  pthread_cond_init(&m->wake, NULL);
  for (int i = 1; i < threads; i++) {
    m->workers[i].id = i;
    if (pthread_create(&m->workers[i].thread, NULL, work, &m->workers[i])) {
      mpqc_destroy(m);
      return MPQC_OUT_OF_MEMORY;
    }
    m->started = i;
  }
#endif
  *result = m;
  return MPQC_OK;
}

void mpqc_destroy(mpqc_model* m) {
  if (!m) return;
#if MPQC_THREADS
  if (m->started) {
    atomic_store(&m->stop, 1);
    release(m);
    for (int i = 1; i <= m->started; i++) pthread_join(m->workers[i].thread, NULL);
  }
  pthread_mutex_destroy(&m->lock);
  pthread_cond_destroy(&m->wake);
#endif
  free(m->owned);
}

static int enter(mpqc_model* m) {
#if MPQC_THREADS
  int idle = 0;
  if (!atomic_compare_exchange_strong(&m->busy, &idle, 1)) return MPQC_BUSY;
#else
  if (m->busy) return MPQC_BUSY;
  m->busy = 1;
#endif
  self = &m->workers[0];
  return MPQC_OK;
}

static int leave(mpqc_model* m, int status) {
  m->workers[0].used = 0;
  self = NULL;
#if MPQC_THREADS
  atomic_store(&m->busy, 0);
#else
  m->busy = 0;
#endif
  return status;
}

/* Kernels want buffers aligned to 64 bytes, and may read a little behind an input. */
static int bind(mpqc_model* m, const void* const* inputs, void* const* outputs) {
  uint8_t* stage = m->bound.staging;
  for (int i = 0; i < mpqc_inputs_n; i++) {
    if (!inputs[i] && mpqc_inputs[i].bytes) return MPQC_INVALID_ARGUMENT;
    memcpy(stage, inputs[i], mpqc_inputs[i].bytes);
    m->bound.inputs[i] = stage;
    stage += round_up(mpqc_inputs[i].bytes + ALIGNMENT);
  }
  for (int i = 0; i < mpqc_outputs_n; i++) {
    if (!outputs[i] && mpqc_outputs[i].bytes) return MPQC_INVALID_ARGUMENT;
    m->bound.results[i] = outputs[i];
    m->bound.outputs[i] = stage;
    stage += round_up(mpqc_outputs[i].bytes + ALIGNMENT);
  }
  return MPQC_OK;
}

static void deliver(mpqc_model* m) {
  for (int i = 0; i < mpqc_outputs_n; i++)
    memcpy(m->bound.results[i], m->bound.outputs[i], mpqc_outputs[i].bytes);
}

static int sizes_fit(const size_t* sizes, const mpqc_tensor* tensors, int n) {
  for (int i = 0; sizes && i < n; i++)
    if (sizes[i] != tensors[i].bytes) return 0;
  return 1;
}

int mpqc_run(mpqc_model* m, const void* const* inputs, const size_t* input_sizes,
             void* const* outputs, const size_t* output_sizes) {
  if (!m || (!inputs && mpqc_inputs_n) || (!outputs && mpqc_outputs_n)) return MPQC_INVALID_ARGUMENT;
  if (!sizes_fit(input_sizes, mpqc_inputs, mpqc_inputs_n) ||
      !sizes_fit(output_sizes, mpqc_outputs, mpqc_outputs_n))
    return MPQC_WRONG_SIZE;
  int status = enter(m);
  if (status) return status;
  status = bind(m, inputs, outputs);
  for (int i = 0; i < mpqc_steps_n && !status; i++)
    if (mpqc_steps[i](&m->bound)) status = MPQC_KERNEL_FAILED;
  if (!status) deliver(m);
  return leave(m, status);
}

int mpqc_bind(mpqc_model* m, const void* const* inputs, void* const* outputs) {
  if (!m || (!inputs && mpqc_inputs_n) || (!outputs && mpqc_outputs_n)) return MPQC_INVALID_ARGUMENT;
  int status = enter(m);
  if (status) return status;
  return leave(m, bind(m, inputs, outputs));
}

int mpqc_step(mpqc_model* m, int index) {
  if (!m || index < 0 || index >= mpqc_steps_n) return MPQC_INVALID_ARGUMENT;
  if (mpqc_outputs_n && !m->bound.results[0]) return MPQC_INVALID_ARGUMENT;
  int status = enter(m);
  if (status) return status;
  if (mpqc_steps[index](&m->bound)) status = MPQC_KERNEL_FAILED;
  if (!status && index == mpqc_steps_n - 1) deliver(m);
  return leave(m, status);
}

int mpqc_read(mpqc_model* m, size_t offset, void* result, size_t bytes) {
  if (!m || !result || offset > mpqc_arena_bytes || bytes > mpqc_arena_bytes - offset)
    return MPQC_INVALID_ARGUMENT;
  memcpy(result, m->bound.arena + offset, bytes);
  return MPQC_OK;
}
