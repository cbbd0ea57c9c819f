/* What the runtime uses of the CUDA driver's interface. It is looked up in libcuda.so.1 when the
 * first instance is made: a library for GPUs needs neither CUDA's headers nor its libraries, and
 * loads on machines without them. */
#ifndef MPQC_CUDA_DRIVER_H
#define MPQC_CUDA_DRIVER_H

#include <stddef.h>
#include <stdint.h>

typedef int cu_result;
typedef int cu_device;
typedef uint64_t cu_pointer;
typedef struct cu_context_s* cu_context;
typedef struct cu_module_s* cu_module;
typedef struct cu_function_s* cu_function;
typedef struct cu_stream_s* cu_stream;
typedef struct cu_event_s* cu_event;
typedef struct cu_graph_s* cu_graph;
typedef struct cu_exec_s* cu_exec;

/* cuda.h's numbers */
enum {
  CU_OUT_OF_MEMORY = 2,
  CU_NO_DEVICE = 100,
  CU_INVALID_DEVICE = 101,
  CU_INVALID_IMAGE = 200,
  CU_NO_BINARY = 209,
  CU_INVALID_PTX = 218,
  CU_UNSUPPORTED_PTX = 222,
  CU_NO_COMPILER = 223, /* of PTX */
  CU_CAPABILITY_MAJOR = 75,
  CU_CAPABILITY_MINOR = 76,
  CU_STREAM_NON_BLOCKING = 1,
  CU_CAPTURE_THREAD_LOCAL = 1,
};

/* name in the table, symbol in the library, arguments */
#define CU_FUNCTIONS(F)                                                                           \
  F(init, cuInit, (unsigned flags))                                                               \
  F(count, cuDeviceGetCount, (int* count))                                                        \
  F(device, cuDeviceGet, (cu_device* device, int index))                                          \
  F(attribute, cuDeviceGetAttribute, (int* value, int attribute, cu_device device))               \
  F(name, cuDeviceGetName, (char* name, int bytes, cu_device device))                             \
  F(retain, cuDevicePrimaryCtxRetain, (cu_context * context, cu_device device))                   \
  F(release, cuDevicePrimaryCtxRelease_v2, (cu_device device))                                    \
  F(push, cuCtxPushCurrent_v2, (cu_context context))                                              \
  F(pop, cuCtxPopCurrent_v2, (cu_context * context))                                              \
  F(load, cuModuleLoadData, (cu_module * module, const void* image))                              \
  F(unload, cuModuleUnload, (cu_module module))                                                   \
  F(function, cuModuleGetFunction, (cu_function * function, cu_module module, const char* name))  \
  F(allocate, cuMemAlloc_v2, (cu_pointer * pointer, size_t bytes))                                \
  F(free, cuMemFree_v2, (cu_pointer pointer))                                                     \
  F(allocate_host, cuMemAllocHost_v2, (void** pointer, size_t bytes))                             \
  F(free_host, cuMemFreeHost, (void* pointer))                                                    \
  F(to_device, cuMemcpyHtoD_v2, (cu_pointer to, const void* from, size_t bytes))                  \
  F(to_host, cuMemcpyDtoH_v2, (void* to, cu_pointer from, size_t bytes))                          \
  F(to_device_later, cuMemcpyHtoDAsync_v2,                                                        \
    (cu_pointer to, const void* from, size_t bytes, cu_stream stream))                            \
  F(to_host_later, cuMemcpyDtoHAsync_v2,                                                          \
    (void* to, cu_pointer from, size_t bytes, cu_stream stream))                                  \
  F(make_stream, cuStreamCreate, (cu_stream * stream, unsigned flags))                            \
  F(free_stream, cuStreamDestroy_v2, (cu_stream stream))                                          \
  F(wait, cuStreamSynchronize, (cu_stream stream))                                                \
  F(make_event, cuEventCreate, (cu_event * event, unsigned flags))                                \
  F(free_event, cuEventDestroy_v2, (cu_event event))                                              \
  F(record, cuEventRecord, (cu_event event, cu_stream stream))                                    \
  F(elapsed, cuEventElapsedTime, (float* milliseconds, cu_event begin, cu_event end))             \
  F(launch, cuLaunchKernel,                                                                       \
    (cu_function function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,       \
     unsigned bz, unsigned shared, cu_stream stream, void** arguments, void** extra))             \
  F(begin_capture, cuStreamBeginCapture_v2, (cu_stream stream, int mode))                         \
  F(end_capture, cuStreamEndCapture, (cu_stream stream, cu_graph * graph))                        \
  F(make_exec, cuGraphInstantiateWithFlags, (cu_exec * exec, cu_graph graph, uint64_t flags))     \
  F(free_graph, cuGraphDestroy, (cu_graph graph))                                                 \
  F(free_exec, cuGraphExecDestroy, (cu_exec exec))                                                \
  F(launch_graph, cuGraphLaunch, (cu_exec exec, cu_stream stream))                                \
  F(describe, cuGetErrorString, (cu_result code, const char** text))

struct cu_driver {
#define CU_MEMBER(member, symbol, arguments) cu_result(*member) arguments;
  CU_FUNCTIONS(CU_MEMBER)
#undef CU_MEMBER
};
#endif
