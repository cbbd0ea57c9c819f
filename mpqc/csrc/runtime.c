/* Runtime of a compiled model: arena, threads, and the three hooks that TVM's kernels call.
 * model.c and sizes.h (generated) define what runtime.h declares. */
#define _GNU_SOURCE
#include "runtime.h"

#include <stdatomic.h>
#include <string.h>

#ifndef MPQC_NO_HEAP
#include <stdlib.h>
#endif
#ifndef MPQC_NO_THREADS
#include <pthread.h>
#include <sched.h>
#define MOST_THREADS MPQC_MOST_THREADS
#else
#define MOST_THREADS 1
#endif

#define SPINS 20000 /* turns that a worker waits awake: a quarter of a millisecond */
#define TURNS_TO_YIELD 32 /* about a microsecond: what sharing a core may cost at each kernel */
#define SHARES 8 /* of a loop, for each thread, at most: whoever is done helps the others */
/* What a worker may take, in one number: launch << 16 | its own tasks << 8 | those taken. */
#define CLAIMS(launch, shares, taken) ((launch) << 16 | (unsigned)(shares) << 8 | (unsigned)(taken))
#define LAUNCH(claims) ((claims) >> 16)
#define OWN(claims) ((int)((claims) >> 8 & 255))
#define TAKEN(claims) ((int)((claims) & 255))

typedef struct {
  void* sync_handle;
  int32_t num_task;
} group_env;
typedef int (*task_fn)(int id, group_env* env, void* data);

/* Memory that kernels allocate from, and free all at once. */
struct pool {
  uint8_t* start;
  size_t size, used;
};

#ifndef MPQC_NO_THREADS
#define OWN_LINE _Alignas(MPQC_ALIGNMENT) /* fetching a line that another core wrote takes 90 ns */
#else
#define OWN_LINE
#endif

struct worker {
#ifndef MPQC_NO_THREADS
  /* what a launch writes, on one line: all that a worker waits for */
  OWN_LINE atomic_uint claims;
  atomic_int asleep;
  task_fn task;
  void* data;
#endif
  OWN_LINE struct mpqc_model* model;
  struct pool pool; /* in parallel loops */
  size_t peak;
#ifndef MPQC_NO_THREADS
  pthread_t thread;
#endif
  int looping;
};

struct mpqc_model {
  uint8_t* arena;
  const void** sources; /* buffers of the caller, while `bound` */
  void** results;
  void* owned; /* scratch that mpqc_create allocated */
  struct worker* workers;
  struct pool pool; /* of the step that runs, outside of parallel loops */
  int threads;
  int bound;
  atomic_int busy;
#ifndef MPQC_NO_THREADS
  unsigned launches;
  int shares; /* of the loops of this step */
  int started;
  OWN_LINE atomic_int done; /* tasks of this launch that have ended */
  atomic_int failed;
  OWN_LINE atomic_int stop;
  pthread_mutex_t lock;
  pthread_cond_t wake;
#endif
};

/* sizes.h promises these to whoever gives the memory */
_Static_assert(sizeof(struct mpqc_model) <= MPQC_INSTANCE_BYTES, "instance");
_Static_assert(sizeof(struct worker) <= MPQC_WORKER_BYTES, "worker");
_Static_assert(SHARES < 256, "task numbers");

/* The worker that runs in this thread. A library without threads still has instances in several,
 * but must not need __tls_get_addr. */
#ifndef MPQC_NO_THREADS
static _Thread_local struct worker* self;
#else
static _Thread_local struct worker* self __attribute__((tls_model("initial-exec")));
#endif

static size_t round_up(size_t bytes) {
  return (bytes + MPQC_ALIGNMENT - 1) & ~((size_t)MPQC_ALIGNMENT - 1);
}

/* ---- hooks of TVM's generated code (weak pointer variables there, these definitions win) ---- */

static void* alloc_workspace(int type, int device, uint64_t bytes, int code, int bits) {
  (void)type, (void)device, (void)code, (void)bits;
  struct worker* w = self;
  if (w == NULL) return NULL;
  struct pool* p = w->looping ? &w->pool : &w->model->pool;
  size_t size = round_up((size_t)bytes);
  if (size > p->size - p->used) return NULL;
  void* result = p->start + p->used;
  p->used += size;
  if (w->looping && p->used > w->peak) w->peak = p->used;
  return result;
}

/* In reverse order. A kernel may also return without: pools are emptied after tasks and steps. */
static int free_workspace(int type, int device, void* pointer) {
  (void)type, (void)device;
  struct worker* w = self;
  if (w == NULL || pointer == NULL) return 0;
  struct pool* p = w->looping ? &w->pool : &w->model->pool;
  p->used = (size_t)((uint8_t*)pointer - p->start);
  return 0;
}

static int run_task(struct worker* w, task_fn task, int id, group_env* env, void* data) {
  w->looping = 1;
  int status = task(id, env, data);
  w->looping = 0;
  w->pool.used = 0;
  return status;
}

static inline void relax(void) {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__) || defined(__arm__)
  __asm__ volatile("yield");
#endif
}

#ifndef MPQC_NO_THREADS
/* Whoever is waited for may wait for this very core: on a busy machine threads share one. */
static void wait_turn(int turn) {
  if (turn % TURNS_TO_YIELD) relax();
  else sched_yield();
}

/* Which launch the worker has been given tasks of last. */
static unsigned given(struct worker* w) {
  return LAUNCH(atomic_load_explicit(&w->claims, memory_order_acquire));
}

/* Take the tasks of one worker until none is left; how many that were. Neighbouring tasks touch
 * neighbouring memory, so that everyone begins with those that lie in its own cache since the
 * kernel before. */
static int take_from(struct worker* owner, struct worker* w) {
  struct mpqc_model* m = w->model;
  int count = 0;
  unsigned claims = atomic_load_explicit(&owner->claims, memory_order_acquire);
  while (TAKEN(claims) < OWN(claims)) {
    if (!atomic_compare_exchange_weak(&owner->claims, &claims, claims + 1)) continue;
    /* the launch cannot end before this task: `task` and `data` stay */
    group_env env = {NULL, m->threads * OWN(claims)};
    int id = (int)(owner - m->workers) * OWN(claims) + TAKEN(claims);
    if (run_task(w, w->task, id, &env, w->data)) atomic_store(&m->failed, 1);
    count++;
    claims = atomic_load_explicit(&owner->claims, memory_order_acquire);
  }
  return count;
}

/* Whoever wakes late finds nothing to do, and nobody has waited for it. */
static void take_tasks(struct worker* w) {
  struct mpqc_model* m = w->model;
  int own = (int)(w - m->workers), count = 0;
  for (int i = 0; i < m->threads; i++) count += take_from(&m->workers[(own + i) % m->threads], w);
  if (count) atomic_fetch_add_explicit(&m->done, count, memory_order_release);
}

static void* work(void* argument) {
  struct worker* w = argument;
  struct mpqc_model* m = w->model;
  unsigned seen = 0;
  self = w;
  for (;;) {
    int spins = 0;
    while (given(w) == seen) {
      if (++spins < SPINS) {
        wait_turn(spins);
        continue;
      }
      pthread_mutex_lock(&m->lock);
      atomic_store(&w->asleep, 1);
      atomic_thread_fence(memory_order_seq_cst); /* the launch looks here after it gave tasks */
      while (given(w) == seen) pthread_cond_wait(&m->wake, &m->lock);
      atomic_store(&w->asleep, 0);
      pthread_mutex_unlock(&m->lock);
    }
    seen = given(w);
    if (atomic_load(&m->stop)) return NULL;
    take_tasks(w);
  }
}

/* A new launch, of which every worker has so many tasks of its own. */
static void launch(struct mpqc_model* m, task_fn task, void* data, int shares) {
  unsigned claims = CLAIMS(++m->launches, shares, 0);
  int asleep = 0;
  atomic_store_explicit(&m->done, 0, memory_order_relaxed);
  for (int i = 0; i < m->threads; i++) m->workers[i].task = task, m->workers[i].data = data;
  for (int i = 0; i < m->threads; i++)
    atomic_store_explicit(&m->workers[i].claims, claims, memory_order_release);
  atomic_thread_fence(memory_order_seq_cst);
  for (int i = 1; i < m->threads; i++) asleep |= atomic_load(&m->workers[i].asleep);
  if (!asleep) return;
  pthread_mutex_lock(&m->lock);
  pthread_cond_broadcast(&m->wake);
  pthread_mutex_unlock(&m->lock);
}
#endif

#ifndef MPQC_NO_THREADS
/* Shares of a loop for each thread. TVM gives every task the same number of turns, rounded up, so
 * that the last thread may get few: 32 and 24 of 56 in eight shares, and what the second then takes
 * from the first lies in the wrong cache for the next kernel. Seven shares are 28 and 28. */
static int shares_of(size_t turns, int threads) {
  int best = SHARES, fewest = turns < (size_t)(SHARES * threads) ? 1 : SHARES / 2;
  size_t least = turns;
  for (int shares = SHARES; shares >= fewest && turns; shares--) {
    size_t tasks = (size_t)(threads * shares), most = (turns + tasks - 1) / tasks * (size_t)shares;
    if (most < least) least = most, best = shares;
  }
  return best;
}
#endif

static int parallel_launch(task_fn task, void* data, int tasks) {
  struct worker* w = self;
#ifndef MPQC_NO_THREADS
  struct mpqc_model* m = w != NULL ? w->model : NULL;
  if (m != NULL && m->threads > 1 && w == m->workers && (tasks == 0 || tasks == m->threads)) {
    launch(m, task, data, m->shares);
    take_tasks(w);
    int spins = 0;
    while (atomic_load_explicit(&m->done, memory_order_acquire) < m->threads * m->shares)
      wait_turn(++spins);
    return atomic_exchange(&m->failed, 0);
  }
#endif
  if (w == NULL) return 1;
  group_env env = {NULL, tasks > 0 ? tasks : 1};
  int status = 0;
  for (int id = 0; id < env.num_task; id++) status |= run_task(w, task, id, &env, data);
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
    case MPQC_NO_DEVICE: return "no GPU";
    case MPQC_DEVICE_FAILED: return "the GPU failed";
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

int mpqc_describe(mpqc_about* result) {
  if (!result) return MPQC_INVALID_ARGUMENT;
  *result = mpqc_identity;
  result->most_threads = MOST_THREADS;
  return MPQC_OK;
}

/* ---- weights ---- */

/* 0: nobody has widened the weights, 1: somebody does, 2: they are there for good. */
static atomic_int widened;

static void widen(const struct mpqc_narrow* n) {
  const uint8_t* source = mpqc_weights + n->source;
  uint8_t* target = mpqc_shared + n->target;
  uint32_t mask = (1u << n->bits) - 1, window = 0;
  unsigned held = 0;
  for (size_t i = 0; i < n->count; i++) {
    for (; held < n->bits; held += 8) window |= (uint32_t)*source++ << held;
    int32_t value = n->low + n->scale * (int32_t)(window & mask);
    window >>= n->bits;
    held -= n->bits;
    *target++ = (uint8_t)value;
    if (n->bytes == 2) *target++ = (uint8_t)(value >> 8);
  }
}

static void prepare_weights(void) {
  int untouched = 0;
  if (atomic_compare_exchange_strong(&widened, &untouched, 1)) {
    for (int i = 0; i < mpqc_narrows_n; i++) widen(&mpqc_narrows[i]);
    atomic_store_explicit(&widened, 2, memory_order_release);
  }
  while (atomic_load_explicit(&widened, memory_order_acquire) != 2) relax();
}

/* ---- instances ---- */

size_t mpqc_scratch_bytes(int threads) {
  return threads < 1 || threads > MOST_THREADS ? 0 : MPQC_SCRATCH_BYTES(threads);
}

#ifndef MPQC_NO_HEAP
int mpqc_create(int threads, mpqc_model** result) {
  if (!result || !mpqc_scratch_bytes(threads)) return MPQC_INVALID_ARGUMENT;
  *result = NULL;
  size_t bytes = mpqc_scratch_bytes(threads);
  void* scratch = NULL;
  if (posix_memalign(&scratch, MPQC_ALIGNMENT, bytes)) return MPQC_OUT_OF_MEMORY;
  int status = mpqc_create_in(threads, scratch, bytes, result);
  if (status) free(scratch);
  else (*result)->owned = scratch;
  return status;
}
#endif

int mpqc_create_in(int threads, void* scratch, size_t bytes, mpqc_model** result) {
  if (!result || !scratch || ((uintptr_t)scratch & (MPQC_ALIGNMENT - 1)) ||
      threads < 1 || threads > MOST_THREADS)
    return MPQC_INVALID_ARGUMENT;
  *result = NULL;
  if (bytes < mpqc_scratch_bytes(threads)) return MPQC_WRONG_SIZE;
  if (!mpqc_machine_fits()) return MPQC_WRONG_MACHINE;
  prepare_weights();
  uint8_t* place = scratch;
  struct mpqc_model* m = (struct mpqc_model*)place;
  memset(m, 0, MPQC_INSTANCE_BYTES + MPQC_WORKER_BYTES * (size_t)threads);
  place += MPQC_INSTANCE_BYTES;
  m->workers = (struct worker*)place;
  place += MPQC_WORKER_BYTES * (size_t)threads;
  m->sources = (const void**)place;
  m->results = (void**)(m->sources + mpqc_inputs_n);
  place += round_up(sizeof(void*) * (size_t)(mpqc_inputs_n + mpqc_outputs_n));
  m->threads = threads;
  for (int i = 0; i < threads; i++) {
    m->workers[i].model = m;
    if (i == 0) continue; /* its pool is in the arena, see step */
    m->workers[i].pool.start = place;
    m->workers[i].pool.size = MPQC_WORKSPACE_BYTES;
    place += MPQC_WORKSPACE_BYTES;
  }
  m->arena = place; /* behind the pools: kernels may read a little behind theirs */
#ifndef MPQC_NO_THREADS
  if (pthread_mutex_init(&m->lock, NULL)) return MPQC_OUT_OF_MEMORY;
  if (pthread_cond_init(&m->wake, NULL)) {
    pthread_mutex_destroy(&m->lock);
    return MPQC_OUT_OF_MEMORY;
  }
  for (int i = 1; i < threads; i++) {
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
#ifndef MPQC_NO_THREADS
  if (m->started) {
    atomic_store(&m->stop, 1);
    launch(m, NULL, NULL, 0);
    for (int i = 1; i <= m->started; i++) pthread_join(m->workers[i].thread, NULL);
  }
  pthread_mutex_destroy(&m->lock);
  pthread_cond_destroy(&m->wake);
#endif
#ifndef MPQC_NO_HEAP
  free(m->owned);
#endif
}

int mpqc_describe_memory(const mpqc_model* m, mpqc_memory* result) {
  if (!m || !result) return MPQC_INVALID_ARGUMENT;
  size_t peak = 0;
  for (int i = 0; i < m->threads; i++)
    if (m->workers[i].peak > peak) peak = m->workers[i].peak;
  *result = (mpqc_memory){mpqc_scratch_bytes(m->threads), MPQC_ARENA_BYTES, MPQC_ARENA_LEAST,
                          MPQC_WORKSPACE_BYTES, peak, MPQC_WEIGHT_BYTES, MPQC_SHARED_BYTES};
  return MPQC_OK;
}

/* ---- running ---- */

static int enter(mpqc_model* m) {
  int idle = 0;
  if (!atomic_compare_exchange_strong(&m->busy, &idle, 1)) return MPQC_BUSY;
  self = &m->workers[0];
  return MPQC_OK;
}

static int leave(mpqc_model* m, int status) {
  self = NULL;
  atomic_store(&m->busy, 0);
  return status;
}

static int bind(mpqc_model* m, const void* const* inputs, void* const* outputs) {
  m->bound = 0;
  for (int i = 0; i < mpqc_inputs_n; i++)
    if (!(m->sources[i] = inputs[i]) && mpqc_inputs[i].bytes) return MPQC_INVALID_ARGUMENT;
  for (int i = 0; i < mpqc_outputs_n; i++)
    if (!(m->results[i] = outputs[i]) && mpqc_outputs[i].bytes) return MPQC_INVALID_ARGUMENT;
  m->bound = 1;
  return MPQC_OK;
}

/* Plain loops read inputs where the caller has them; other kernels may read a little behind: for
 * those they are copied to their places in the arena before the first step. Outputs are copied
 * after the last. */
static int step(mpqc_model* m, int index) {
  for (int i = 0; i < mpqc_inputs_n && index == 0; i++) {
    void* place = mpqc_find_input(i, m->arena, m->sources);
    if (place != m->sources[i] && mpqc_inputs[i].bytes)
      memcpy(place, m->sources[i], mpqc_inputs[i].bytes);
  }
  const size_t* space = mpqc_workspaces[index];
  m->pool = (struct pool){m->arena + space[0], space[1], 0};
  m->workers[0].pool = (struct pool){m->arena + space[0] + space[1], space[2], 0};
#ifndef MPQC_NO_THREADS
  m->shares = shares_of(space[3], m->threads);
#endif
  if (mpqc_call_step(index, m->arena, m->sources)) return MPQC_KERNEL_FAILED;
  for (int i = 0; i < mpqc_outputs_n && index == mpqc_steps_n - 1; i++)
    if (mpqc_outputs[i].bytes)
      memcpy(m->results[i], m->arena + mpqc_output_offsets[i], mpqc_outputs[i].bytes);
  return MPQC_OK;
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
  for (int i = 0; i < mpqc_steps_n && !status; i++) status = step(m, i);
  m->bound = 0; /* the caller's buffers may go */
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
  int status = enter(m);
  if (status) return status;
  return leave(m, m->bound ? step(m, index) : MPQC_INVALID_ARGUMENT);
}

int mpqc_read(mpqc_model* m, size_t offset, void* result, size_t bytes) {
  if (!m || !result || offset > MPQC_ARENA_BYTES || bytes > MPQC_ARENA_BYTES - offset)
    return MPQC_INVALID_ARGUMENT;
  int status = enter(m);
  if (status) return status;
  memcpy(result, m->arena + offset, bytes);
  return leave(m, MPQC_OK);
}
