/* SPDX-License-Identifier: Apache-2.0 */
#include "certified.cuh"

extern "C" void emxi_cuda_decode_bf16(const emxi_cuda_decode *d, void *stream) {
  decode_all<__nv_bfloat16>(*d, (cudaStream_t)stream);
}
