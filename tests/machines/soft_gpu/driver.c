/* A libcuda.so.1 without a GPU: it answers what triton's launcher asks of the driver, checks tensor maps and grids as
 * the real one does, keeps the modules that are loaded, and hands every launch to a callback.
 *
 * A module is PTX text, as the real driver takes it too: launcher.py ends compilation there, so that no ptxas runs. */
#include <cuda.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#undef cuDevicePrimaryCtxRetain
#undef cuLaunchKernelEx

/* ------------------------------------------------------------------ an H200, as far as triton asks */

enum { SHARED_MEMORY_OF_A_BLOCK = 232448, SHARED_MEMORY = 233472, REGISTERS = 65536, MULTIPROCESSORS = 132 };

static int the_context;

CUresult cuGetErrorString(CUresult error, const char **text) {
  static char buffer[64];
  snprintf(buffer, sizeof buffer, "error %d of the stand-in driver", (int)error);
  *text = buffer;
  return CUDA_SUCCESS;
}

CUresult cuInit(unsigned flags) { return CUDA_SUCCESS; }
CUresult cuDeviceGetCount(int *count) { *count = 1; return CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int index) { *device = index; return CUDA_SUCCESS; }

/* Beyond 13.1, triton 3.7 and later would no longer change a bit of the tensor maps that small tensors get. They change
 * it here as they do beside the drivers in use, and the map below leaves them that word. */
CUresult cuDriverGetVersion(int *version) { *version = 13000; return CUDA_SUCCESS; }

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  switch (attribute) {
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = SHARED_MEMORY_OF_A_BLOCK; break;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = SHARED_MEMORY; break;
  case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = REGISTERS; break;
  case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = MULTIPROCESSORS; break;
  case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
  default: *value = 1;
  }
  return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext *context) { *context = (CUcontext)&the_context; return CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice *device) { *device = 0; return CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { *value = 0; return CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) { return cuCtxGetCurrent(context); }
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache cache) { return CUDA_SUCCESS; }
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) { return CUDA_SUCCESS; }
CUresult cuOccupancyMaxActiveClusters(int *n, CUfunction f, const CUlaunchConfig *c) { *n = 1; return CUDA_SUCCESS; }

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr pointer) {
  *(uint64_t *)value = pointer; /* the memory of the process is the memory of the device */
  return CUDA_SUCCESS;
}

/* ------------------------------------------------------------------ modules and launches */

typedef struct { const char *ptx, *name; } module_function;
typedef int (*launch_callback)(const char *ptx, const char *name, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                               unsigned threads, unsigned shared, void **parameters);

static launch_callback on_launch;

void soft_gpu_on_launch(launch_callback callback) { on_launch = callback; }

/* Modules stay for as long as the process does, unloaded or not: launches may still hold their functions. */
CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }

CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  *module = (CUmodule)strdup(image);
  return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  module_function *made = malloc(sizeof *made);
  made->ptx = (const char *)module;
  made->name = strdup(name);
  *function = (CUfunction)made;
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **parameters, void **extra) {
  const module_function *kernel = (const module_function *)function;
  if (config->gridDimX > 0x7fffffffu || config->gridDimY > 65535 || config->gridDimZ > 65535) return CUDA_ERROR_INVALID_VALUE;
  if (config->sharedMemBytes > SHARED_MEMORY_OF_A_BLOCK) return CUDA_ERROR_INVALID_VALUE;
  if (!on_launch) return CUDA_ERROR_NOT_INITIALIZED;
  return on_launch(kernel->ptx, kernel->name, config->gridDimX, config->gridDimY, config->gridDimZ, config->blockDimX,
                   config->sharedMemBytes, parameters) ? CUDA_ERROR_LAUNCH_FAILED : CUDA_SUCCESS;
}

/* ------------------------------------------------------------------ tensor maps */

/* What tma.py reads in place of the hardware's own encoding. triton changes a bit of the second word (see above). */
typedef struct {
  uint64_t magic, free_for_triton, base, dims[5], strides[4];
  uint32_t box[5];
  uint16_t rank;
  uint8_t type, swizzle;
} soft_map;

_Static_assert(sizeof(soft_map) == 120 && sizeof(soft_map) <= sizeof(CUtensorMap), "a map fits into a CUtensorMap");

#define REFUSE(...) do { fprintf(stderr, "tensor map refused: " __VA_ARGS__); fprintf(stderr, "\n"); \
                         return CUDA_ERROR_INVALID_VALUE; } while (0)

CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *base,
                                const cuuint64_t *dims, const cuuint64_t *strides, const cuuint32_t *box,
                                const cuuint32_t *element_strides, CUtensorMapInterleave interleave,
                                CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                                CUtensorMapFloatOOBfill fill) {
  /* U8 U16 U32 S32 U64 S64 F16 F32 F64 BF16 F32FTZ TF32 TF32FTZ */
  static const unsigned element_bytes[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4};
  static const unsigned widest_box[] = {1u << 30, 32, 64, 128}; /* by swizzle */
  if ((uintptr_t)map % 64) REFUSE("it lies at %p, not a multiple of 64", (void *)map);
  if ((unsigned)type >= sizeof element_bytes / sizeof *element_bytes) REFUSE("type %d", (int)type);
  if (rank < 1 || rank > 5) REFUSE("rank %u", rank);
  if ((uintptr_t)base % 16) REFUSE("address %p is no multiple of 16", base);
  if (interleave != CU_TENSOR_MAP_INTERLEAVE_NONE) REFUSE("interleave %d", (int)interleave);
  if (fill != CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) REFUSE("filling with NaN is not modelled");
  if ((unsigned)swizzle > 3) REFUSE("swizzle %d", (int)swizzle);
  for (unsigned i = 0; i < rank; i++) {
    if (dims[i] == 0 || dims[i] > (1ull << 32)) REFUSE("dimension %u is %llu", i, (unsigned long long)dims[i]);
    if (box[i] == 0 || box[i] > 256) REFUSE("box %u is %u", i, box[i]);
    if (element_strides[i] != 1) REFUSE("element stride %u is %u", i, element_strides[i]);
  }
  for (unsigned i = 0; i + 1 < rank; i++)
    if (strides[i] == 0 || strides[i] % 16 || strides[i] >= (1ull << 40))
      REFUSE("stride %u is %llu", i, (unsigned long long)strides[i]);
  unsigned inner = box[0] * element_bytes[type];
  if (inner % 16 || inner > widest_box[swizzle]) REFUSE("%u bytes of inner box with swizzle %d", inner, (int)swizzle);

  soft_map made = {.magic = 0x50F7AB1E, .base = (uint64_t)base, .rank = rank, .type = type, .swizzle = swizzle};
  for (unsigned i = 0; i < rank; i++) {
    made.dims[i] = dims[i];
    made.box[i] = box[i];
    if (i + 1 < rank) made.strides[i] = strides[i];
  }
  memset(map, 0, sizeof *map);
  memcpy(map, &made, sizeof made);
  return CUDA_SUCCESS;
}
