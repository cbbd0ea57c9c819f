/* Lets a server of TVM's RPC run commands; mpqc compiles it for the board and sends it along.
 *
 *   start(command)       0, or the error's number; one command at a time
 *   wait(milliseconds)   exit status, 128 + signal, or -1 while it is still running
 *   stop()               kills it with all that it started
 *
 * Calls are short, so that a client knows a server that is gone from one that is busy. */
#include <errno.h>
#include <signal.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <tvm/ffi/c_api.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))

static pid_t child;

static int answer(TVMFFIAny* result, int64_t value) {
  result->type_index = kTVMFFIInt;
  result->zero_padding = 0;
  result->v_int64 = value;
  return 0;
}

static const char* text(const TVMFFIAny* value) {
  switch (value->type_index) {
    case kTVMFFIRawStr: return value->v_c_str;
    case kTVMFFISmallStr: return value->v_bytes;
    case kTVMFFIStr: return ((const TVMFFIByteArray*)(value->v_obj + 1))->data;
    default: return NULL;
  }
}

EXPORT int __tvm_ffi_start(void* self, const TVMFFIAny* args, int32_t count, TVMFFIAny* result) {
  (void)self;
  const char* command = count == 1 ? text(&args[0]) : NULL;
  if (!command || child) return answer(result, command ? EBUSY : EINVAL);
  pid_t made = fork();
  if (made < 0) return answer(result, errno);
  if (!made) {
    setpgid(0, 0);
    execl("/bin/sh", "sh", "-c", command, (char*)NULL);
    _exit(127);
  }
  setpgid(made, made);
  child = made;
  return answer(result, 0);
}

EXPORT int __tvm_ffi_wait(void* self, const TVMFFIAny* args, int32_t count, TVMFFIAny* result) {
  (void)self;
  int64_t left = count == 1 && args[0].type_index == kTVMFFIInt ? args[0].v_int64 : 0;
  int status = 0;
  for (;;) {
    pid_t ended = child ? waitpid(child, &status, WNOHANG) : -1;
    if (ended < 0) return answer(result, 127);
    if (ended) break;
    if (left <= 0) return answer(result, -1);
    struct timespec pause = {0, 5000000};
    nanosleep(&pause, NULL);
    left -= 5;
  }
  child = 0;
  return answer(result, WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status));
}

static void stop(void) {
  if (!child) return;
  kill(-child, SIGKILL);
  waitpid(child, NULL, 0);
  child = 0;
}

EXPORT int __tvm_ffi_stop(void* self, const TVMFFIAny* args, int32_t count, TVMFFIAny* result) {
  (void)self, (void)args, (void)count;
  stop();
  return answer(result, 0);
}

/* The session has ended. */
__attribute__((destructor)) static void at_end(void) { stop(); }
