/* SPDX-License-Identifier: Apache-2.0 */
#include "attn_tiles.cuh"

extern "C" void emxi_cuda_attn_tiles_f16(const emxi_cuda_attn *a, int keys, unsigned units, void *stream) {
  tile_pass<__half>(*a, keys, units, (cudaStream_t)stream);
}
