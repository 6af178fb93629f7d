/* SPDX-License-Identifier: Apache-2.0 */
#include "map_launch.cuh"

extern "C" void emxi_cuda_rows_bf16(const emxi_cuda_rows *r, void *stream) { rows_all<__nv_bfloat16>(*r, (cudaStream_t)stream); }
