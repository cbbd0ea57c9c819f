/* Runs compiled models on a board; mpqc compiles it with the board's compiler and sends it along.
 *
 *   measure run LIB THREADS COUNT   inputs of COUNT runs from stdin, outputs to stdout
 *   measure time THREADS REPEAT SECONDS LIB...   times in nanoseconds, as text
 *
 * Input of `run`: the number of reads as uint64; each as three uint64: step, offset, bytes, in the
 * order of the steps; then the inputs. Output of each run: the outputs, then what was read. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <time.h>

#include "mpqc.h"

#define MOST_PASSES 200

#ifdef OLD_GLIBC /* symbols that systems older than the linking one have too */
__asm__(".symver dlopen,dlopen@" OLD_GLIBC);
__asm__(".symver dlsym,dlsym@" OLD_GLIBC);
__asm__(".symver dlerror,dlerror@" OLD_GLIBC);
__asm__(".symver start_of_libc,__libc_start_main@" OLD_GLIBC);
typedef int (*main_fn)(int, char**, char**);
int start_of_libc(main_fn, int, char**, void (*)(void), void (*)(void), void (*)(void), void*);
__attribute__((visibility("hidden"))) int __libc_start_main(
    main_fn entry, int count, char** words, void (*init)(void), void (*fini)(void),
    void (*rtld)(void), void* stack) {
  return start_of_libc(entry, count, words, init, fini, rtld, stack);
}
#endif

struct model {
  int (*abi_version)(void);
  const char* (*message)(int);
  int (*input_count)(void);
  int (*output_count)(void);
  int (*describe_input)(int, mpqc_tensor*);
  int (*describe_output)(int, mpqc_tensor*);
  size_t (*scratch_bytes)(int);
  int (*create_in)(int, void*, size_t, mpqc_model**);
  void (*destroy)(mpqc_model*);
  int (*run)(mpqc_model*, const void* const*, const size_t*, void* const*, const size_t*);
  int (*step_count)(void);
  int (*bind)(mpqc_model*, const void* const*, void* const*);
  int (*step)(mpqc_model*, int);
  int (*read)(mpqc_model*, size_t, void*, size_t);
  mpqc_model* instance;
  int inputs, outputs, steps, passes;
  size_t *input_bytes, *output_bytes;
  void **input, **output;
  int64_t *step_times, *whole_times; /* [passes][steps], [passes] */
};

static void fail(int code, const char* what, const char* why) {
  fprintf(stderr, "measure: %s: %s\n", what, why);
  exit(code);
}

static void* memory(size_t bytes) {
  void* result = aligned_alloc(64, (bytes + 127) / 64 * 64);
  if (!result) fail(4, "memory", "out of memory");
  memset(result, 0, bytes);
  return result;
}

static void check(struct model* m, int status, const char* what) {
  if (status) fail(4, what, m->message(status));
}

static void open_model(struct model* m, const char* path, int threads) {
  void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (!library) fail(3, "cannot load the model", dlerror());
#define FIND(name)                                                    \
  if (!(*(void**)&m->name = dlsym(library, "mpqc_" #name)))           \
  fail(3, "not a compiled model, no function", "mpqc_" #name)
  FIND(abi_version); FIND(message); FIND(input_count); FIND(output_count);
  FIND(describe_input); FIND(describe_output); FIND(scratch_bytes); FIND(create_in);
  FIND(destroy); FIND(run); FIND(step_count); FIND(bind); FIND(step); FIND(read);
  if (m->abi_version() != MPQC_ABI_VERSION) fail(3, "the model", "another interface version");
  size_t size = m->scratch_bytes(threads);
  check(m, m->create_in(threads, memory(size ? size : 1), size, &m->instance), "create");
  m->inputs = m->input_count(), m->outputs = m->output_count(), m->steps = m->step_count();
  m->input = memory(sizeof(void*) * (size_t)m->inputs);
  m->output = memory(sizeof(void*) * (size_t)m->outputs);
  m->input_bytes = memory(sizeof(size_t) * (size_t)m->inputs);
  m->output_bytes = memory(sizeof(size_t) * (size_t)m->outputs);
  mpqc_tensor t;
  for (int i = 0; i < m->inputs; i++) {
    check(m, m->describe_input(i, &t), "describe");
    m->input[i] = memory(m->input_bytes[i] = t.bytes);
    /* times do not depend on values, as long as they are numbers */
    uint32_t noise = 1;
    if (!strcmp(t.dtype, "float32"))
      for (size_t k = 0; k < t.bytes / 4; k++, noise = noise * 1664525u + 1013904223u)
        ((float*)m->input[i])[k] = (float)(int32_t)noise / 1073741824.0f;
  }
  for (int i = 0; i < m->outputs; i++) {
    check(m, m->describe_output(i, &t), "describe");
    m->output[i] = memory(m->output_bytes[i] = t.bytes);
  }
}

static void take(void* target, size_t bytes, const char* what) {
  if (bytes && fread(target, 1, bytes, stdin) != bytes) fail(5, what, "too short");
}

static void give(const void* source, size_t bytes) {
  if (bytes && fwrite(source, 1, bytes, stdout) != bytes) fail(5, "output", "cannot be written");
}

static void run(const char* path, int threads, long count) {
  struct model m = {0};
  open_model(&m, path, threads);
  uint64_t reads = 0, total = 0, (*read)[3];
  take(&reads, sizeof reads, "reads");
  read = memory(reads * sizeof *read);
  take(read, reads * sizeof *read, "reads");
  for (uint64_t i = 0; i < reads; i++) total += read[i][2];
  uint8_t* found = memory(total);
  for (; count > 0; count--) {
    for (int i = 0; i < m.inputs; i++) take(m.input[i], m.input_bytes[i], "input");
    if (!reads)
      check(&m, m.run(m.instance, (const void* const*)m.input, m.input_bytes, m.output,
                      m.output_bytes), "run");
    else
      check(&m, m.bind(m.instance, (const void* const*)m.input, m.output), "bind");
    uint8_t* next = found;
    for (uint64_t step = 0, i = 0; reads && step < (uint64_t)m.steps; step++) {
      check(&m, m.step(m.instance, (int)step), "step");
      for (; i < reads && read[i][0] == step; next += read[i++][2])
        check(&m, m.read(m.instance, (size_t)read[i][1], next, (size_t)read[i][2]), "read");
    }
    for (int i = 0; i < m.outputs; i++) give(m.output[i], m.output_bytes[i]);
    give(found, total);
  }
  if (fflush(stdout)) fail(5, "output", "cannot be written");
}

static int64_t now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static void measure(struct model* m) {
  int64_t* steps = m->step_times + (size_t)m->passes * (size_t)m->steps;
  /* the models take turns: this one's data come back into the caches first */
  check(m, m->run(m->instance, (const void* const*)m->input, NULL, m->output, NULL), "run");
  check(m, m->bind(m->instance, (const void* const*)m->input, m->output), "bind");
  for (int i = 0; i < m->steps; i++) {
    int64_t start = now();
    check(m, m->step(m->instance, i), "step");
    steps[i] = now() - start;
  }
  int64_t start = now();
  check(m, m->run(m->instance, (const void* const*)m->input, NULL, m->output, NULL), "run");
  m->whole_times[m->passes++] = now() - start;
}

static void time_models(int threads, int repeat, double seconds, int count, char** paths) {
  /* two clients at once would measure each other */
  int lock = open("/tmp/mpqc-measure.lock", O_RDWR | O_CREAT | O_CLOEXEC, 0666);
  if (lock >= 0) flock(lock, LOCK_EX);
  struct model* models = memory(sizeof *models * (size_t)count);
  int most = repeat > MOST_PASSES ? repeat : MOST_PASSES;
  for (int i = 0; i < count; i++) {
    struct model* m = &models[i];
    open_model(m, paths[i], threads);
    m->step_times = memory(sizeof(int64_t) * (size_t)(most + 1) * (size_t)(m->steps + 1));
    m->whole_times = memory(sizeof(int64_t) * (size_t)(most + 1));
    measure(m); /* warm up */
    m->passes = 0;
  }
  int64_t end = now() + (int64_t)(seconds * 1e9);
  for (int pass = 0; pass < repeat || (pass < most && now() < end); pass++)
    for (int i = 0; i < count; i++) measure(&models[i]);
  for (int i = 0; i < count; i++) {
    struct model* m = &models[i];
    printf("whole");
    for (int p = 0; p < m->passes; p++) printf(" %lld", (long long)m->whole_times[p]);
    for (int s = 0; s < m->steps; s++) {
      printf("\nstep");
      for (int p = 0; p < m->passes; p++)
        printf(" %lld", (long long)m->step_times[(size_t)p * (size_t)m->steps + (size_t)s]);
    }
    printf("\n");
  }
}

int main(int count, char** words) {
  if (count == 5 && !strcmp(words[1], "run"))
    run(words[2], atoi(words[3]), atol(words[4]));
  else if (count >= 6 && !strcmp(words[1], "time"))
    time_models(atoi(words[2]), atoi(words[3]), atof(words[4]), count - 5, words + 5);
  else
    fail(2, "usage", "measure run LIB THREADS COUNT | measure time THREADS REPEAT SECONDS LIB...");
  return 0;
}
