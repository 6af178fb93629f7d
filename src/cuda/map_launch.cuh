/* SPDX-License-Identifier: Apache-2.0
 * Which kernel works on the rows of a call. */
#ifndef EMXI_CUDA_MAP_LAUNCH_CUH
#define EMXI_CUDA_MAP_LAUNCH_CUH

#include "map.cuh"

namespace {

template <typename K>
void launch_rows(K kernel, int64_t grid, int blocks, size_t shared, cudaStream_t stream, const emxi_cuda_rows &r) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = (unsigned)blocks;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3((unsigned)grid);
  config.blockDim = dim3(MAP_THREADS);
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = blocks > 1 ? 1 : 0;
  if (shared > 48 << 10) (void)cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared);
  (void)cudaLaunchKernelEx(&config, kernel, r);
}
template <typename T, int PER>
void launch_warps(const emxi_cuda_rows &r, int64_t grid, cudaStream_t stream) {
  if (r.backward)
    launch_rows(map_warps<T, PER, true>, grid, 1, 0, stream, r);
  else
    launch_rows(map_warps<T, PER, false>, grid, 1, 0, stream, r);
}

/* The gradient of a mean has every block count the rows: no more blocks than run at a time. */
template <typename T>
void rows_all(const emxi_cuda_rows &r, cudaStream_t stream) {
  const int64_t most = r.mean ? (int64_t)r.processors * 8 : (int64_t)1 << 27;
  if (r.blocks) {
    const int64_t teams = r.rows < most / r.blocks ? r.rows : most / r.blocks;
    const size_t shared = emxi_cuda_rows_shared(r.resident ? r.slice : 0, sizeof(T));
    if (r.backward)
      launch_rows(map_blocks<T, true>, teams * r.blocks, r.blocks, shared, stream, r);
    else
      launch_rows(map_blocks<T, false>, teams * r.blocks, r.blocks, shared, stream, r);
    return;
  }
  const int64_t blocks = (r.rows + MAP_WARPS - 1) / MAP_WARPS, grid = blocks < most ? blocks : most;
  if (r.n <= 256)
    launch_warps<T, 8>(r, grid, stream);
  else if (r.n <= 512)
    launch_warps<T, 16>(r, grid, stream);
  else if constexpr (sizeof(T) < 8)
    launch_warps<T, 32>(r, grid, stream);
}

} // namespace

#endif
