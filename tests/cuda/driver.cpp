// libcuda.so.1 for tests: the part of the driver that the runtime uses, over the host's memory.
//
// A "fat binary" is the text MPQC-EMULATED:PATH; PATH is a library that emulated.h made of the
// generated source. Device memory starts as garbage and ends at a page that cannot be touched.
// What is started on a stream happens when somebody waits for the stream, not before: copies from
// pageable memory wait for the default stream, everything else for the stream of its own.
// MPQC_EMULATED_FAIL=cuMemAlloc_v2:2:1 makes that call fail with code 2 after it went well once.
#include <dlfcn.h>
#include <sys/mman.h>
#include <unistd.h>

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <string>
#include <vector>

using kernel = void (*)(const unsigned*, const unsigned*, void**);
using moment = std::chrono::steady_clock::time_point;
using work = std::vector<std::function<void()>>;

static std::map<uintptr_t, std::pair<char*, size_t>> blocks;
static std::map<std::string, int> calls;
static work* recording;
static work started, copies;  // on the stream, on the default stream
static int contexts;

// Every call of the interface passes here: planned failures, and whether a context is current.
static int planned(const char* name) {
  const char* plan = std::getenv("MPQC_EMULATED_FAIL");
  const int before = calls[name]++;
  if (!plan || std::strncmp(plan, name, std::strlen(name)) || plan[std::strlen(name)] != ':') return 0;
  int code = 0, after = 0;
  std::sscanf(plan + std::strlen(name), ":%d:%d", &code, &after);
  return before >= after ? code : 0;
}
#define ENTER                                             \
  if (int code = planned(__func__)) return code
#define IN_CONTEXT                                        \
  ENTER;                                                  \
  if (!contexts) return 201 /* invalid context */

extern "C" {

int cuInit(unsigned) {
  ENTER;
  const char* visible = std::getenv("CUDA_VISIBLE_DEVICES");
  return visible && !*visible ? 100 : 0;
}
int cuDeviceGetCount(int* count) { ENTER; *count = 1; return 0; }
int cuDeviceGet(int* device, int) { ENTER; *device = 0; return 0; }
int cuDeviceGetAttribute(int* value, int attribute, int) {
  ENTER;
  const char* text = std::getenv("MPQC_EMULATED_CAPABILITY");
  const int capability = text ? std::atoi(text) : 90;
  *value = attribute == 75 ? capability / 10 : attribute == 76 ? capability % 10 : 0;
  return 0;
}
int cuDeviceGetName(char* name, int bytes, int) {
  ENTER;
  std::snprintf(name, size_t(bytes), "Emulated GPU");
  return 0;
}
int cuDevicePrimaryCtxRetain(void** context, int) { ENTER; *context = &contexts; return 0; }
int cuDevicePrimaryCtxRelease_v2(int) { ENTER; return 0; }
int cuCtxPushCurrent_v2(void*) { ENTER; contexts++; return 0; }
int cuCtxPopCurrent_v2(void**) { contexts--; return 0; }

int cuModuleLoadData(void** module, const void* image) {
  IN_CONTEXT;
  const std::string text(static_cast<const char*>(image), 14);
  if (text != "MPQC-EMULATED:") return 209;
  *module = dlopen(static_cast<const char*>(image) + 14, RTLD_NOW | RTLD_LOCAL);
  if (!*module) std::fprintf(stderr, "%s\n", dlerror());
  return *module ? 0 : 200;
}
int cuModuleUnload(void* module) { IN_CONTEXT; return dlclose(module) ? 999 : 0; }
int cuModuleGetFunction(void** function, void* module, const char* name) {
  IN_CONTEXT;
  *function = dlsym(module, (std::string(name) + "__call").c_str());
  return *function ? 0 : 500;
}

int cuMemAlloc_v2(uint64_t* pointer, size_t bytes) {
  IN_CONTEXT;
  if (!bytes) return 1;
  const size_t page = size_t(sysconf(_SC_PAGESIZE));
  const size_t whole = (bytes + page - 1) / page * page + page;
  char* start = static_cast<char*>(
      mmap(nullptr, whole, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  if (start == MAP_FAILED) return 2;
  mprotect(start + whole - page, page, PROT_NONE);
  char* first = start + (whole - page - (bytes + 63) / 64 * 64);
  std::memset(first, 0xa5, size_t(start + whole - page - first));
  blocks[uintptr_t(first)] = {start, whole};
  *pointer = uintptr_t(first);
  return 0;
}
int cuMemFree_v2(uint64_t pointer) {
  IN_CONTEXT;
  auto found = blocks.find(uintptr_t(pointer));
  if (found == blocks.end()) return 1;
  munmap(found->second.first, found->second.second);
  blocks.erase(found);
  return 0;
}
int cuMemAllocHost_v2(void** pointer, size_t bytes) {
  IN_CONTEXT;
  *pointer = std::malloc(bytes);
  return *pointer ? 0 : 2;
}
int cuMemFreeHost(void* pointer) { IN_CONTEXT; std::free(pointer); return 0; }

static int later(std::function<void()> task) {
  (recording ? *recording : started).push_back(task);
  return 0;
}
static void go(work& tasks) {
  for (auto& task : tasks) task();
  tasks.clear();
}
int cuMemcpyHtoD_v2(uint64_t to, const void* from, size_t bytes) {
  IN_CONTEXT;
  const char* start = static_cast<const char*>(from);
  std::vector<char> taken(start, start + bytes);
  copies.push_back([=] { std::memcpy(reinterpret_cast<void*>(to), taken.data(), bytes); });
  return 0;
}
int cuMemcpyDtoH_v2(void* to, uint64_t from, size_t bytes) {
  IN_CONTEXT;
  std::memcpy(to, reinterpret_cast<void*>(from), bytes);
  return 0;
}
int cuMemcpyHtoDAsync_v2(uint64_t to, const void* from, size_t bytes, void*) {
  IN_CONTEXT;
  return later([=] { std::memcpy(reinterpret_cast<void*>(to), from, bytes); });
}
int cuMemcpyDtoHAsync_v2(void* to, uint64_t from, size_t bytes, void*) {
  IN_CONTEXT;
  return later([=] { std::memcpy(to, reinterpret_cast<void*>(from), bytes); });
}
int cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                   unsigned bz, unsigned, void*, void** arguments, void** pointers) {
  IN_CONTEXT;
  (void)pointers;
  // how many there are is the kernel's knowledge; the runtime passes at most 64
  static const int most = 64;
  std::vector<uint64_t> values;
  for (int i = 0; i < most && arguments[i]; i++) values.push_back(*static_cast<uint64_t*>(arguments[i]));
  return later([=] {
    std::vector<uint64_t> held = values;
    std::vector<void*> places;
    for (auto& value : held) places.push_back(&value);
    const unsigned grid[] = {gx, gy, gz}, block[] = {bx, by, bz};
    reinterpret_cast<kernel>(function)(grid, block, places.data());
  });
}

int cuStreamCreate(void** stream, unsigned) { IN_CONTEXT; *stream = &recording; return 0; }
int cuStreamDestroy_v2(void*) { IN_CONTEXT; return 0; }
int cuStreamSynchronize(void* stream) {
  if (int code = planned(__func__)) {
    started.clear();  // lost with the device
    return code;
  }
  if (!contexts) return 201;
  go(stream ? started : copies);
  return 0;
}
int cuStreamBeginCapture_v2(void*, int) { IN_CONTEXT; recording = new work; return 0; }
int cuStreamEndCapture(void*, void** graph) {
  ENTER;
  *graph = recording;
  recording = nullptr;
  return 0;
}
int cuGraphInstantiateWithFlags(void** exec, void* graph, uint64_t) {
  IN_CONTEXT;
  *exec = new work(*static_cast<work*>(graph));
  return 0;
}
int cuGraphDestroy(void* graph) { ENTER; delete static_cast<work*>(graph); return 0; }
int cuGraphExecDestroy(void* exec) { ENTER; delete static_cast<work*>(exec); return 0; }
int cuGraphLaunch(void* exec, void*) {
  IN_CONTEXT;
  for (auto& task : *static_cast<work*>(exec)) started.push_back(task);
  return 0;
}

int cuEventCreate(void** event, unsigned) { IN_CONTEXT; *event = new moment; return 0; }
int cuEventDestroy_v2(void* event) { IN_CONTEXT; delete static_cast<moment*>(event); return 0; }
int cuEventRecord(void* event, void*) {
  IN_CONTEXT;
  return later([=] { *static_cast<moment*>(event) = std::chrono::steady_clock::now(); });
}
int cuEventElapsedTime(float* milliseconds, void* begin, void* end) {
  IN_CONTEXT;
  const auto time = *static_cast<moment*>(end) - *static_cast<moment*>(begin);
  *milliseconds = std::chrono::duration<float, std::milli>(time).count();
  return 0;
}
int cuGetErrorString(int code, const char** text) {
  *text = code == 2 ? "out of memory" : code == 100 ? "no CUDA-capable device is detected"
                                                    : "an error of the emulator";
  return 0;
}
}
