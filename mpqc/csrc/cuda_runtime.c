/* Runtime of a model on an NVIDIA GPU, behind the interface of mpqc.h: one arena in the GPU's
 * memory, the inputs copied in, kernels in order, the outputs copied out; recorded once as a CUDA
 * graph, which starts as a whole. model.c and sizes.h (generated) define what it runs. */
#define _GNU_SOURCE
#include "cuda_model.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cuda_driver.h"

#define MOST_ARGUMENTS 64

struct mpqc_model {
  cu_pointer arena;
  cu_stream stream;
  cu_exec graph; /* NULL: kernels are launched one by one */
  cu_event begin, end;
  uint8_t* staging; /* pinned: inputs, then outputs */
  const void** sources;
  void** results;
  void* owned; /* scratch that mpqc_create allocated */
  double seconds;
  int bound;
  int broken; /* a run failed: the context is lost */
  atomic_int busy;
};
_Static_assert(sizeof(struct mpqc_model) <= MPQC_INSTANCE_BYTES, "instance");

/* What all instances share, from the first to the last. */
static struct {
  pthread_mutex_t lock;
  int users;
  void* library;
  struct cu_driver cu;
  cu_device device;
  cu_context context;
  cu_module module;
  cu_function* functions;
  cu_pointer weights;
} shared = {.lock = PTHREAD_MUTEX_INITIALIZER};
#define cu (shared.cu)

/* ---- messages ---- */

static _Thread_local char detail[640];
static _Thread_local int detailed; /* status that the detail belongs to */

static int fail(int status, const char* format, ...) __attribute__((format(printf, 2, 3)));
static int fail(int status, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(detail, sizeof detail, format, arguments);
  va_end(arguments);
  detailed = status;
  return status;
}

/* A driver's error as a status. */
static int driver_failed(cu_result code, const char* what) {
  const char* text = NULL;
  if (!cu.describe || cu.describe(code, &text) || !text) text = "unknown error";
  switch (code) {
    case CU_OUT_OF_MEMORY:
      return fail(MPQC_OUT_OF_MEMORY,
                  "out of GPU memory (%s): this model takes %zu bytes for values and %zu for weights; "
                  "compile it with a smaller --batch, or free memory on the GPU",
                  what, (size_t)MPQC_ARENA_BYTES, (size_t)(MPQC_WEIGHT_BYTES + MPQC_SHARED_BYTES));
    case CU_NO_DEVICE:
    case CU_INVALID_DEVICE:
      return fail(MPQC_NO_DEVICE,
                  "the CUDA driver finds no GPU (%s: %s): see nvidia-smi and CUDA_VISIBLE_DEVICES",
                  what, text);
    case CU_INVALID_IMAGE:
    case CU_NO_BINARY:
    case CU_INVALID_PTX:
    case CU_UNSUPPORTED_PTX:
    case CU_NO_COMPILER:
      return fail(MPQC_WRONG_MACHINE,
                  "this GPU or its driver cannot run code for sm_%d (%s: %s): compile the model for "
                  "this GPU, or update the driver",
                  mpqc_capability, what, text);
    default:
      return fail(MPQC_DEVICE_FAILED, "the GPU failed (%s: %s, CUDA error %d)", what, text, code);
  }
}

const char* mpqc_message(int status) {
  if (status && status == detailed) return detail;
  switch (status) {
    case MPQC_OK: return "ok";
    case MPQC_INVALID_ARGUMENT: return "invalid argument: null pointer, index or thread count out of range";
    case MPQC_OUT_OF_MEMORY: return "out of memory";
    case MPQC_BUSY: return "the instance is running in another thread; make one instance a thread";
    case MPQC_KERNEL_FAILED: return "a kernel failed";
    case MPQC_WRONG_SIZE: return "a buffer has not the size that the model states";
    case MPQC_WRONG_MACHINE: return "this GPU cannot run the library's code";
    case MPQC_NO_DEVICE: return "no CUDA driver or no GPU";
    case MPQC_DEVICE_FAILED: return "the GPU failed";
    default: return "unknown status";
  }
}

/* ---- what the model is ---- */

int mpqc_abi_version(void) { return MPQC_ABI_VERSION; }

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
  result->most_threads = MPQC_MOST_THREADS;
  return MPQC_OK;
}

/* ---- the device ---- */

static int find_driver(void) {
  if (shared.library) return MPQC_OK;
  const char* path = getenv("MPQC_CUDA_DRIVER"); /* for drivers in unusual places */
  void* library = dlopen(path ? path : "libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (!library)
    return fail(MPQC_NO_DEVICE,
                "no CUDA driver: %s; install NVIDIA's driver (nvidia-smi shows whether it works), or "
                "name the library in MPQC_CUDA_DRIVER",
                dlerror());
#define CU_FIND(member, symbol, arguments)                                                       \
  if (!(*(void**)&cu.member = dlsym(library, #symbol))) {                                        \
    dlclose(library);                                                                            \
    return fail(MPQC_NO_DEVICE, "the CUDA driver is too old: it lacks %s; 11.4 or newer is needed", \
                #symbol);                                                                        \
  }
  CU_FUNCTIONS(CU_FIND)
#undef CU_FIND
  shared.library = library;
  return MPQC_OK;
}

#define TRY(call, what)                                   \
  do {                                                    \
    cu_result code_ = (call);                             \
    if (code_) return driver_failed(code_, what);         \
  } while (0)

static void widen(const struct mpqc_narrow* n, uint8_t* target) {
  const uint8_t* source = mpqc_weights + n->source;
  uint32_t mask = (1u << n->bits) - 1, window = 0;
  unsigned held = 0;
  target += n->target;
  for (size_t i = 0; i < n->count; i++) {
    for (; held < n->bits; held += 8) window |= (uint32_t)*source++ << held;
    int32_t value = n->low + n->scale * (int32_t)(window & mask);
    window >>= n->bits;
    held -= n->bits;
    *target++ = (uint8_t)value;
    if (n->bytes == 2) *target++ = (uint8_t)(value >> 8);
  }
}

/* The driver refuses to allocate nothing. */
static size_t at_least_one(size_t bytes) {
  return bytes ? bytes : 1;
}

/* A copy from pageable memory returns once the driver has taken the bytes, and our streams do not
 * wait for the default one, on which they travel. */
static int arrived(void) {
  TRY(cu.wait(NULL), "copy of the weights");
  return MPQC_OK;
}

static int load_weights(void) {
  TRY(cu.allocate(&shared.weights, at_least_one(MPQC_WEIGHT_BYTES + MPQC_SHARED_BYTES)), "weights");
  if (!MPQC_WEIGHT_BYTES && !MPQC_SHARED_BYTES) return MPQC_OK;
  TRY(cu.to_device(shared.weights, mpqc_weights, MPQC_WEIGHT_BYTES), "copy of the weights");
  if (!MPQC_SHARED_BYTES) return arrived();
  uint8_t* wide = calloc(1, MPQC_SHARED_BYTES);
  if (!wide) return fail(MPQC_OUT_OF_MEMORY, "out of memory for weights");
  for (int i = 0; i < mpqc_narrows_n; i++) widen(&mpqc_narrows[i], wide);
  cu_result code = cu.to_device(shared.weights + MPQC_WEIGHT_BYTES, wide, MPQC_SHARED_BYTES);
  free(wide);
  TRY(code, "copy of the weights");
  return arrived();
}

static int load_code(void) {
  TRY(cu.load(&shared.module, mpqc_device_code), "loading the kernels");
  shared.functions = calloc((size_t)mpqc_kernels_n + 1, sizeof *shared.functions);
  if (!shared.functions) return fail(MPQC_OUT_OF_MEMORY, "out of memory for kernels");
  for (int i = 0; i < mpqc_kernels_n; i++)
    TRY(cu.function(&shared.functions[i], shared.module, mpqc_kernels[i]), mpqc_kernels[i]);
  return load_weights();
}

static int open_device(void) {
  int count = 0, major = 0, minor = 0;
  int status = find_driver();
  if (status) return status;
  TRY(cu.init(0), "cuInit");
  TRY(cu.count(&count), "counting GPUs");
  if (count < 1) return driver_failed(CU_NO_DEVICE, "counting GPUs");
  TRY(cu.device(&shared.device, 0), "first GPU");
  TRY(cu.attribute(&major, CU_CAPABILITY_MAJOR, shared.device), "compute capability");
  TRY(cu.attribute(&minor, CU_CAPABILITY_MINOR, shared.device), "compute capability");
  if (10 * major + minor < mpqc_capability) {
    char name[128] = "";
    cu.name(name, sizeof name, shared.device);
    return fail(MPQC_WRONG_MACHINE,
                "%s is sm_%d%d, this library was compiled for sm_%d, which is newer: compile it with "
                "--target cuda:sm_%d%d",
                name, major, minor, mpqc_capability, major, minor);
  }
  TRY(cu.retain(&shared.context, shared.device), "making a context");
  return MPQC_OK;
}

/* Under the lock, the context pushed. */
static void close_device(void) {
  if (shared.weights) cu.free(shared.weights);
  if (shared.module) cu.unload(shared.module);
  free(shared.functions);
  shared.weights = 0;
  shared.module = NULL;
  shared.functions = NULL;
}

static void leave_context(void) {
  cu_context left;
  cu.pop(&left);
}

/* Count one more user; the first loads code and weights. Leaves the context pushed if it is OK. */
static int acquire(void) {
  pthread_mutex_lock(&shared.lock);
  int status = shared.context ? MPQC_OK : open_device();
  if (!status) {
    cu_result code = cu.push(shared.context);
    if (code) status = driver_failed(code, "context");
    else if (!shared.users && (status = load_code())) {
      close_device();
      leave_context();
    }
  }
  if (!status) shared.users++;
  else if (shared.context && !shared.users) {
    cu.release(shared.device);
    shared.context = NULL;
  }
  pthread_mutex_unlock(&shared.lock);
  return status;
}

/* The context is pushed; pops it. */
static void release(void) {
  pthread_mutex_lock(&shared.lock);
  int last = --shared.users == 0;
  if (last) close_device();
  leave_context();
  if (last) {
    cu.release(shared.device);
    shared.context = NULL;
  }
  pthread_mutex_unlock(&shared.lock);
}

/* ---- running ---- */

static int launch(mpqc_model* m, const struct mpqc_launch* l) {
  cu_pointer values[MOST_ARGUMENTS];
  void* arguments[MOST_ARGUMENTS + 1];
  for (int i = 0; i < l->arguments; i++) {
    const struct mpqc_place* place = &mpqc_places[l->first + i];
    values[i] = (place->weights ? shared.weights : m->arena) + place->offset;
    arguments[i] = &values[i];
  }
  arguments[l->arguments] = NULL;
  TRY(cu.launch(shared.functions[l->kernel], l->grid[0], l->grid[1], l->grid[2], l->block[0],
                l->block[1], l->block[2], 0, m->stream, arguments, NULL),
      mpqc_kernels[l->kernel]);
  return MPQC_OK;
}

/* Queue a step; the first takes the inputs from staging, the last puts the outputs there. */
static int queue_step(mpqc_model* m, int index) {
  size_t at = 0;
  for (int i = 0; i < mpqc_inputs_n; at += (mpqc_inputs[i++].bytes + 63) / 64 * 64)
    if (index == 0 && mpqc_inputs[i].bytes)
      TRY(cu.to_device_later(m->arena + mpqc_input_offsets[i], m->staging + at, mpqc_inputs[i].bytes,
                             m->stream),
          "copy of an input");
  for (int i = mpqc_step_launches[index]; i < mpqc_step_launches[index + 1]; i++) {
    int status = launch(m, &mpqc_launches[i]);
    if (status) return status;
  }
  for (int i = 0; i < mpqc_outputs_n; at += (mpqc_outputs[i++].bytes + 63) / 64 * 64)
    if (index == mpqc_steps_n - 1 && mpqc_outputs[i].bytes)
      TRY(cu.to_host_later(m->staging + at, m->arena + mpqc_output_offsets[i], mpqc_outputs[i].bytes,
                           m->stream),
          "copy of an output");
  return MPQC_OK;
}

static int queue_all(mpqc_model* m) {
  int status = MPQC_OK;
  for (int i = 0; i < mpqc_steps_n && !status; i++) status = queue_step(m, i);
  return status;
}

static size_t staging_bytes(void) {
  size_t bytes = 64;
  for (int i = 0; i < mpqc_inputs_n; i++) bytes += (mpqc_inputs[i].bytes + 63) / 64 * 64;
  for (int i = 0; i < mpqc_outputs_n; i++) bytes += (mpqc_outputs[i].bytes + 63) / 64 * 64;
  return bytes;
}

static int graphs_wanted(void) {
  const char* wanted = getenv("MPQC_CUDA_GRAPH");
  return !(wanted && !strcmp(wanted, "0")) && mpqc_steps_n;
}

/* All steps, or one with an index of 0 and above, so many times. */
static int queue(mpqc_model* m, int index, int times) {
  int status = MPQC_OK;
  for (int i = 0; i < times && !status; i++)
    status = index < 0 ? queue_all(m) : queue_step(m, index);
  return status;
}

/* Record what `queue` would start as a graph: it starts as a whole, which matters where kernels
 * are short. */
static int record(mpqc_model* m, int index, int times, cu_exec* result) {
  cu_graph graph = NULL;
  TRY(cu.begin_capture(m->stream, CU_CAPTURE_THREAD_LOCAL), "recording a graph");
  int status = queue(m, index, times);
  cu_result code = cu.end_capture(m->stream, &graph);
  if (!status && code) status = driver_failed(code, "recording a graph");
  if (!status && (code = cu.make_exec(result, graph, 0)))
    status = driver_failed(code, "making a graph");
  if (graph) cu.free_graph(graph);
  return status;
}

/* Start the graph, or without one what it would hold. */
static int start(mpqc_model* m, cu_exec graph, int index, int times) {
  TRY(cu.record(m->begin, m->stream), "event");
  if (graph) {
    TRY(cu.launch_graph(graph, m->stream), "starting the graph");
  } else {
    int status = queue(m, index, times);
    if (status) return status;
  }
  TRY(cu.record(m->end, m->stream), "event");
  return MPQC_OK;
}

/* Start and wait, also for what was started before something failed: pinned memory stays its own. */
static int finish(mpqc_model* m, cu_exec graph, int index, int times) {
  float milliseconds = 0;
  int status = start(m, graph, index, times);
  cu_result code = cu.wait(m->stream);
  if (status) return status;
  if (code) return driver_failed(code, "running the kernels");
  if (!cu.elapsed(&milliseconds, m->begin, m->end)) m->seconds = milliseconds * 1e-3;
  return MPQC_OK;
}

static int prepare(mpqc_model* m) {
  TRY(cu.make_stream(&m->stream, CU_STREAM_NON_BLOCKING), "stream");
  TRY(cu.make_event(&m->begin, 0), "event");
  TRY(cu.make_event(&m->end, 0), "event");
  TRY(cu.allocate(&m->arena, at_least_one(MPQC_ARENA_BYTES)), "values");
  TRY(cu.allocate_host((void**)&m->staging, staging_bytes()), "pinned memory");
  if (!graphs_wanted()) return MPQC_OK;
  /* Drivers load a kernel when it is first launched, which is better done before anything is
   * recorded: a run over zeros. */
  memset(m->staging, 0, staging_bytes());
  int status = finish(m, NULL, -1, 1);
  return status ? status : record(m, -1, 1, &m->graph);
}

/* In reverse; errors are of no use any more. */
static void dismantle(mpqc_model* m) {
  if (m->graph) cu.free_exec(m->graph);
  if (m->staging) cu.free_host(m->staging);
  if (m->arena) cu.free(m->arena);
  if (m->end) cu.free_event(m->end);
  if (m->begin) cu.free_event(m->begin);
  if (m->stream) cu.free_stream(m->stream);
}

size_t mpqc_scratch_bytes(int threads) {
  return threads < 1 || threads > MPQC_MOST_THREADS ? 0 : MPQC_SCRATCH_BYTES(threads);
}

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

int mpqc_create_in(int threads, void* scratch, size_t bytes, mpqc_model** result) {
  if (!result || !scratch || ((uintptr_t)scratch & (MPQC_ALIGNMENT - 1)) ||
      !mpqc_scratch_bytes(threads))
    return MPQC_INVALID_ARGUMENT;
  *result = NULL;
  if (bytes < mpqc_scratch_bytes(threads)) return MPQC_WRONG_SIZE;
  int status = acquire();
  if (status) return status;
  mpqc_model* m = scratch;
  memset(m, 0, MPQC_INSTANCE_BYTES);
  m->sources = (const void**)((uint8_t*)scratch + MPQC_INSTANCE_BYTES);
  m->results = (void**)(m->sources + mpqc_inputs_n);
  status = prepare(m);
  if (status) {
    dismantle(m);
    release();
    return status;
  }
  leave_context();
  *result = m;
  return MPQC_OK;
}

void mpqc_destroy(mpqc_model* m) {
  if (!m) return;
  if (!cu.push(shared.context)) {
    dismantle(m);
    release();
  }
  free(m->owned);
}

int mpqc_describe_memory(const mpqc_model* m, mpqc_memory* result) {
  if (!m || !result) return MPQC_INVALID_ARGUMENT;
  *result = (mpqc_memory){mpqc_scratch_bytes(1), MPQC_ARENA_BYTES, MPQC_ARENA_LEAST, 0, 0,
                          MPQC_WEIGHT_BYTES, MPQC_SHARED_BYTES};
  return MPQC_OK;
}

static int enter(mpqc_model* m) {
  int idle = 0;
  if (!atomic_compare_exchange_strong(&m->busy, &idle, 1)) return MPQC_BUSY;
  int status = MPQC_OK;
  if (m->broken)
    status = fail(MPQC_DEVICE_FAILED, "the GPU failed in an earlier run: start the process again");
  else {
    cu_result code = cu.push(shared.context);
    if (code) status = driver_failed(code, "context");
  }
  if (status) atomic_store(&m->busy, 0);
  return status;
}

static int leave(mpqc_model* m, int status) {
  if (status == MPQC_DEVICE_FAILED) m->broken = 1;
  leave_context();
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

static void stage_inputs(mpqc_model* m) {
  size_t at = 0;
  for (int i = 0; i < mpqc_inputs_n; at += (mpqc_inputs[i++].bytes + 63) / 64 * 64)
    if (mpqc_inputs[i].bytes) memcpy(m->staging + at, m->sources[i], mpqc_inputs[i].bytes);
}

static void hand_out(mpqc_model* m) {
  size_t at = 0;
  for (int i = 0; i < mpqc_inputs_n; i++) at += (mpqc_inputs[i].bytes + 63) / 64 * 64;
  for (int i = 0; i < mpqc_outputs_n; at += (mpqc_outputs[i++].bytes + 63) / 64 * 64)
    if (mpqc_outputs[i].bytes) memcpy(m->results[i], m->staging + at, mpqc_outputs[i].bytes);
}

/* Run the step, or all with index -1, and wait; the caller's outputs are touched at the very end. */
static int run(mpqc_model* m, int index) {
  if (index <= 0) stage_inputs(m);
  int status = finish(m, index < 0 ? m->graph : NULL, index, 1);
  if (!status && (index < 0 || index == mpqc_steps_n - 1)) hand_out(m);
  return status;
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
  if (!status) status = run(m, -1);
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
  return leave(m, m->bound ? run(m, index) : MPQC_INVALID_ARGUMENT);
}

int mpqc_read(mpqc_model* m, size_t offset, void* result, size_t bytes) {
  if (!m || !result || offset > MPQC_ARENA_BYTES || bytes > MPQC_ARENA_BYTES - offset)
    return MPQC_INVALID_ARGUMENT;
  int status = enter(m);
  if (status) return status;
  cu_result code = cu.to_host(result, m->arena + offset, bytes);
  return leave(m, code ? driver_failed(code, "reading the arena") : MPQC_OK);
}

/* Time that the GPU took for the last run or step, copies included [s]. */
MPQC_API int mpqc_device_seconds(mpqc_model* m, double* result) {
  if (!m || !result) return MPQC_INVALID_ARGUMENT;
  *result = m->seconds;
  return MPQC_OK;
}

static int time_step(mpqc_model* m, int index, int times, double* result) {
  cu_exec graph = NULL;
  int status = graphs_wanted() ? record(m, index, times, &graph) : MPQC_OK;
  if (!status) status = finish(m, graph, index, 1); /* warms up */
  if (!status) status = finish(m, graph, index, times);
  if (graph) cu.free_exec(graph);
  if (!status) *result = m->seconds / times;
  return status;
}

/* Mean time that the GPU takes for a step that runs so many times in a row [s], started together
 * as in a whole run. Values in the arena mean nothing afterwards. */
MPQC_API int mpqc_time_step(mpqc_model* m, int index, int times, double* result) {
  if (!m || !result || index < 0 || index >= mpqc_steps_n || times < 1) return MPQC_INVALID_ARGUMENT;
  int status = enter(m);
  if (status) return status;
  return leave(m, time_step(m, index, times, result));
}
