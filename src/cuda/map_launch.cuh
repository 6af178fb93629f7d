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

/* The gradient of a mean has every block count the rows: no more blocks than run at a time. */
template <typename T, int OP>
void launch_op(const emxi_cuda_rows &r, cudaStream_t stream) {
  const int64_t most = r.mean ? (int64_t)r.processors * 8 : (int64_t)1 << 27;
  if (r.blocks) {
    const int64_t teams = r.rows < most / r.blocks ? r.rows : most / r.blocks;
    launch_rows(map_blocks<T, OP>, teams * r.blocks, r.blocks, emxi_cuda_rows_shared(r.resident ? r.slice : 0, sizeof(T)), stream,
                r);
    return;
  }
  const int64_t blocks = (r.rows + MAP_WARPS - 1) / MAP_WARPS, grid = blocks < most ? blocks : most;
  constexpr int LONGEST = EMXI_CUDA_WARP_ROW / 32 / (sizeof(T) > 4 ? 2 : 1);
  if constexpr (OP != OP_BUDGET && OP != OP_FULL) {
    if (r.n <= 256) return launch_rows(map_warps<T, 8, OP>, grid, 1, 0, stream, r);
    if (r.n <= 512) return launch_rows(map_warps<T, 16, OP>, grid, 1, 0, stream, r);
  }
  launch_rows(map_warps<T, LONGEST, OP>, grid, 1, 0, stream, r);
}

template <typename T>
void rows_all(const emxi_cuda_rows &r, cudaStream_t stream) {
  if (r.backward && (r.kind != EMX_MAP_ENTMAX || r.alphas || r.alpha > 2 || r.d_alpha))
    launch_op<T, OP_FULL>(r, stream);
  else if (r.backward)
    launch_op<T, OP_GRADIENT>(r, stream);
  else if (r.kind == EMX_MAP_BUDGET)
    launch_op<T, OP_BUDGET>(r, stream);
  else if (r.kind != EMX_MAP_ENTMAX || r.alphas || (r.alpha != 1 && r.alpha != 1.5 && r.alpha != 2))
    launch_op<T, OP_ANY>(r, stream);
  else if (r.alpha != 1)
    launch_op<T, OP_CLOSED>(r, stream);
  else
    launch_op<T, OP_SOFTMAX>(r, stream);
}

} // namespace

#endif
