/* SPDX-License-Identifier: Apache-2.0 */
#include "attn_tiles.cuh"

extern "C" void emxi_cuda_attn_tiles_bf16(const emxi_cuda_attn *a, int keys, unsigned units, void *stream) {
  tile_pass<__nv_bfloat16>(*a, keys, units, (cudaStream_t)stream);
}
