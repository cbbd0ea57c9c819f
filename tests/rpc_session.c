/* A session of a TVM RPC server on a board without Python: rpc_session SOCKET FOLDER */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <tvm/ffi/c_api.h>

static const char* folder;

static TVMFFIByteArray bytes(const char* s) { return (TVMFFIByteArray){s, strlen(s)}; }
static void die(const char* what) { fprintf(stderr, "%s\n", what); exit(1); }

static TVMFFIObjectHandle global(const char* name) {
  TVMFFIByteArray key = bytes(name);
  TVMFFIObjectHandle found = NULL;
  if (TVMFFIFunctionGetGlobal(&key, &found) || !found) die(name);
  return found;
}

static int path_of(const TVMFFIAny* name, TVMFFIAny* result) {
  const char* text = name->type_index == kTVMFFIRawStr ? name->v_c_str
      : name->type_index == kTVMFFISmallStr ? name->v_bytes
      : ((const TVMFFIByteArray*)(name->v_obj + 1))->data;
  char path[4096];
  snprintf(path, sizeof path, "%s/%s", folder, text);
  TVMFFIByteArray whole = bytes(path);
  return TVMFFIStringFromByteArray(&whole, result);
}

static int workpath(void* self, const TVMFFIAny* args, int32_t n, TVMFFIAny* ret) {
  (void)self, (void)n;
  return path_of(args, ret);
}

static int load_module(void* self, const TVMFFIAny* args, int32_t n, TVMFFIAny* ret) {
  (void)self, (void)n;
  TVMFFIAny path = {0};
  if (path_of(args, &path)) return -1;
  return TVMFFIFunctionCall(global("ffi.ModuleLoadFromFile"), &path, 1, ret);
}

static void define(const char* name, TVMFFISafeCallType call) {
  TVMFFIByteArray key = bytes(name);
  TVMFFIObjectHandle made;
  if (TVMFFIFunctionCreate(NULL, call, NULL, &made) || TVMFFIFunctionSetGlobal(&key, made, 1))
    die(name);
}

int main(int count, char** words) {
  if (count != 3) die("usage: rpc_session SOCKET FOLDER");
  folder = words[2];
  define("tvm.rpc.server.workpath", workpath);
  define("tvm.rpc.server.load_module", load_module);
  TVMFFIAny socket = {0}, result = {0};
  socket.type_index = kTVMFFIInt;
  socket.v_int64 = atoi(words[1]);
  if (TVMFFIFunctionCall(global("rpc.ServerLoop"), &socket, 1, &result)) die("session failed");
  return 0;
}
